"""``python -m tests.resources.stand_in``: the command line of ``ml`` with stages that do as they are told.

Also a server with the interface of ``python -m ml serve`` and no model: it answers by the manifest
and the file ``behaviour`` of the artifact that it is given.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ml import stages
from ml.__main__ import main
from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.runner import StageContext
from ml.stages import Parameters, Stage


class StandInParameters(Parameters, frozen=True, kw_only=True):
    behaviour: str = "succeed"
    text: str = "hello"


def run(context: StageContext, parameters: StandInParameters) -> dict[str, int]:
    upstream = context.optional_input("upstream")
    text = (upstream / "text").read_text() if upstream else ""
    text += "".join((folder / "text").read_text() for folder in context.partitions("days").values())
    context.progress.say(f"process {os.getpid()} writes {parameters.text}")
    begun_before = (context.checkpoints / "begun").exists()
    (context.checkpoints / "begun").touch()
    match parameters.behaviour:
        case "input error":
            raise InputError("offers.csv row 7: price is 'abc', expected a number")
        case "crash":
            raise RuntimeError("something broke")
        case "be killed once" if not begun_before:
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang once" if not begun_before:
            time.sleep(600)
        case "hang":
            time.sleep(600)
    (context.output / "text").write_text(text + parameters.text)
    return {"characters": len(text + parameters.text), "continued": int(begun_before)}


STAND_INS = {
    name: Stage(
        name=name,
        version="1",
        summary="Writes a text.",
        entry_point="tests.resources.stand_in:run",
        parameters=StandInParameters,
        optional_inputs=("upstream",),
        partitioned_inputs=partitioned,
        heavy=name != "light",
    )
    for name, partitioned in (("light", ()), ("heavy", ()), ("upstream", ()), ("gathering", ("days",)))
}


def serve(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--port", "--workers"):
        parser.add_argument(name)
    options = parser.parse_args(arguments)
    model = Path(options.model)
    behaviour = (model / "behaviour").read_text()
    if behaviour == "broken":
        print("error: the weights are not what the manifest says", file=sys.stderr)
        sys.exit(2)
    version = short_version(read_manifest(model).digest)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, {"status": "ok", "model_version": version, "taxonomy_version": "t1"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if any("title" not in offer for offer in body["offers"]):
                self.answer(400, {"error": "offer 1 has no title"})
            else:
                predictions = [
                    {"offer_id": offer["offer_id"], "category_id": "c1", "model_version": version}
                    for offer in body["offers"]
                ]
                self.answer(200, {"predictions": predictions})

        def answer(self, status: int, content: object) -> None:
            encoded = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

    class Server(ThreadingHTTPServer):
        allow_reuse_port = True
        daemon_threads = False

    def stop(*_: object) -> None:
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    Server(("127.0.0.1", int(options.port)), Handler).serve_forever(poll_interval=0.01)


if __name__ == "__main__":
    stages.STAGES.update(STAND_INS)
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    else:
        sys.exit(main())
