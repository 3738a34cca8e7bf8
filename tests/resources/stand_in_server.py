"""``python -m tests.resources.stand_in_server``: ``serve`` and ``route`` of ``ml``, without a model.

The server answers by the manifest and the file ``behaviour`` of the artifact that it is given. It is started
hundreds of times in a run of the tests and imports next to nothing; the router is the real one.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ml.artifacts import read_manifest, short_version
from ml.serving.variants import OFFERS_HEADER, TARGET_VARIANT_HEADER, names_a_version, variant_of
from resources.atomic_files import write_atomically


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
    if options.end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    server = _Server(("127.0.0.1", options.port), _Handler)
    server.version, server.behaviour = version, behaviour
    # From a thread of its own: it waits for the loop that the signal interrupts.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    state = {  # a ml.serving.server.ServerState
        "pid": os.getpid(),
        "url": f"http://127.0.0.1:{server.server_port}",
        "model": str(options.model),
        "model_version": version,
        "taxonomy_version": "t1",
        "workers": [],
    }
    write_atomically(options.state_file, json.dumps(state).encode())
    server.serve_forever(poll_interval=0.01)
    while select.select([server], [], [], 0)[0]:  # who is connected already is answered
        server.handle_request()
    server.server_close()


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
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    else:
        from ml.__main__ import main

        sys.exit(main())
