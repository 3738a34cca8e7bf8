"""Starting a job from outside, on a real web server of Dagster."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from offer_assets import launch as launching
from offer_assets.__main__ import main

INSTANCE = """
run_coordinator: {module: dagster._core.run_coordinator, class: DefaultRunCoordinator}
telemetry: {enabled: false}
"""


@pytest.fixture(scope="module")
def deployment(tmp_path_factory) -> Iterator[str]:
    """Address of a UI, below a path as behind a proxy."""
    home = tmp_path_factory.mktemp("dagster")
    (home / "dagster.yaml").write_text(INSTANCE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    location = Path(__file__).with_name("launch_location.py")
    command = [sys.executable, "-m", "dagster_webserver", "--python-file", str(location)]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--path-prefix", "/dagster", "--log-level", "warning"],
        env={**os.environ, "DAGSTER_HOME": str(home)},
        cwd=home,
        stdout=subprocess.DEVNULL,  # every event of every run
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}/dagster"
    try:
        _until_it_answers(f"{url}/server_info")
        yield url
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(launching, "_SECONDS_BETWEEN_LOOKS", 0.2)


def test_a_job_is_started_for_a_partition_watched_and_its_success_told(deployment, capsys):
    assert main(["launch", "make_part", "--partition", "cpu", "--url", deployment]) == 0
    link, outcome = capsys.readouterr().out.splitlines()
    assert link.startswith(f"make_part: {deployment}/runs/")
    assert outcome == "make_part: SUCCESS"


def test_the_failure_of_a_run_is_that_of_the_command(deployment, capsys):
    assert main(["launch", "make_nothing", "--url", f"{deployment}/"]) == 1
    assert capsys.readouterr().out.endswith("make_nothing: FAILURE\n")


def test_an_unknown_job_is_one_line(deployment, capsys):
    assert main(["launch", "make_everything", "--url", deployment]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {deployment} did not start make_everything: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("url", ["dagster.example.com", "ftp://127.0.0.1"])
def test_what_is_no_address_of_a_page_is_named(url, capsys):
    assert main(["launch", "make_part", "--url", url]) == 2
    assert f"--url {url}: expected" in capsys.readouterr().err


def test_a_deployment_that_is_not_there_is_one_line(capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert main(["launch", "make_part", "--url", url]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_page_that_asks_for_a_password_is_one_line(capsys):
    class LoginPage(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Who are you?</html>")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), LoginPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert main(["launch", "make_part", "--url", f"http://127.0.0.1:{server.server_port}"]) == 2
        server.shutdown()
    assert len(capsys.readouterr().err.splitlines()) == 1


def _until_it_answers(url: str) -> None:
    deadline = time.monotonic() + 90
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        assert time.monotonic() < deadline, "the web server did not come up"
        time.sleep(0.1)
