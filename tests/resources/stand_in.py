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
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec

from ml import stages
from ml.__main__ import main
from ml.artifacts import read_manifest, short_version
from ml.errors import InputError
from ml.runner import StageContext
from ml.serving.server import ServerState
from ml.serving.variants import OFFERS_HEADER, TARGET_VARIANT_HEADER, names_a_version, variant_of
from ml.stages import Parameters, Stage
from resources.atomic_files import write_atomically


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
    for name in ("--model", "--state-file"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--end-with-stdin", action="store_true")
    options, _ = parser.parse_known_args(arguments)
    behaviour = (options.model / "behaviour").read_text()
    if behaviour == "broken":
        print("error: the weights are not what the manifest says", file=sys.stderr)
        sys.exit(2)
    if behaviour == "come up slowly":
        time.sleep(2)
    version = short_version(read_manifest(options.model).digest)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if options.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    server = _Server(("127.0.0.1", options.port), _Handler)
    server.version, server.behaviour = version, behaviour
    state = ServerState(
        pid=os.getpid(),
        url=f"http://127.0.0.1:{server.server_port}",
        model=str(options.model),
        model_version=version,
        taxonomy_version="t1",
        workers=[],
    )
    write_atomically(options.state_file, msgspec.json.encode(state))
    server.serve_forever(poll_interval=0.01)


class _Server(ThreadingHTTPServer):
    allow_reuse_port = True
    daemon_threads = False
    request_queue_size = 64
    version: str
    behaviour: str


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        version = self.server.version
        self.answer(200, {"status": "ok", "model_version": version, "taxonomy_version": "t1"})

    def do_POST(self) -> None:
        offers = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["offers"]
        version, behaviour = self.server.version, self.server.behaviour
        wanted = self.headers.get(TARGET_VARIANT_HEADER, variant_of(version))
        if names_a_version(wanted) and wanted != variant_of(version):
            self.answer(400, {"error": f"there is no variant {wanted} here"})
        elif any("title" not in offer for offer in offers):
            self.answer(400, {"error": "offer 1 has no title"})
        elif behaviour == "fail":
            self.answer(500, {"error": "out of memory"})
        elif behaviour == "die":
            os._exit(1)
        else:
            time.sleep({"slow": 0.3, "hang": 5.0}.get(behaviour, 0.0))
            predictions = [
                {"offer_id": offer["offer_id"], "category_id": "c1", "model_version": version}
                for offer in offers
            ]
            self.answer(200, {"predictions": predictions}, len(offers))

    def answer(self, status: int, content: object, offers: int = 0) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(encoded)))
        if offers:
            unsure = offers if self.server.behaviour == "unsure" else 0
            self.send_header(OFFERS_HEADER, f"{offers};{unsure}")
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    stages.STAGES.update(STAND_INS)
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    else:
        sys.exit(main())
