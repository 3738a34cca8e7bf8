"""MLflow on a server, and as SageMaker runs it: found by its ARN, requests signed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dagster as dg
import httpx
import pytest

from resources.tracking import MlflowTracking
from tests.registry import registry_in
from tests.release_world import free_port
from tests.tracking_contract import passed, promotion, read_again

SERVER = "arn:aws:sagemaker:eu-central-1:123456789012:mlflow-tracking-server/offer-assets"
APP = "arn:aws:sagemaker:eu-central-1:123456789012:mlflow-app/app-1"


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow keeps its server in the process and in the environment."""
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, str]]]:
    """Headers of the requests to a server without models, where SageMaker's would be."""
    seen: list[dict[str, str]] = []

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SAGEMAKER_MLFLOW_CUSTOM_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield seen
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("uri", "header", "service"),
    [
        (SERVER, "x-mlflow-sm-tracking-server-arn", "sagemaker-mlflow"),
        (APP, "x-sm-mlflow-app-arn", "sagemaker"),
    ],
)
def test_requests_to_mlflow_in_sagemaker_name_the_server_and_are_signed(
    as_before, asked, monkeypatch, uri, header, service
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    assert MlflowTracking(tracking_uri=uri, model_name="m").production() is None
    (headers,) = asked
    assert headers[header] == uri
    assert f"/eu-central-1/{service}/aws4_request" in headers["authorization"]


def test_without_credentials_mlflow_in_sagemaker_is_one_line(as_before, asked, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(dg.Failure, match=r"^MLflow at arn:.* Unable to locate credentials$") as failure:
        MlflowTracking(tracking_uri=SERVER, model_name="m").production()
    assert "\n" not in str(failure.value)
    assert asked == []


def test_a_real_server_keeps_versions_decisions_and_promotions(
    as_before, tmp_path: Path, tmp_path_factory, capfd
):
    with_tables = registry_in(tmp_path, tmp_path_factory)
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--backend-store-uri", with_tables.tracking_uri]
    command += ["--default-artifact-root", str(tmp_path / "artifacts")]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", tmp_path / "server.log")
        tracking = MlflowTracking(tracking_uri=f"http://127.0.0.1:{port}", model_name="offer-categories")
        version = passed(tracking, "5", "pending")
        decided = tracking.decide(version, "approved", "anna", "looks good")
        promoted = tracking.promote(decided, promotion(decided))
        assert promoted.in_production
        assert read_again(tracking, version) == promoted == tracking.production()
        # The same tables say the same without the server.
        assert with_tables.versions() == [promoted]
        assert "WARNING" not in capfd.readouterr().err
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


def _wait_for(url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"the server did not come up: {log.read_text(errors='replace')[-2000:]}")
