import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import pytest

from ml.__main__ import main
from ml.artifacts import read_manifest
from ml.errors import InputError
from ml.evaluation.gate import GateLimits, compiled_matches_uncompiled
from ml.serving import device_measurement
from ml.serving.device_report import read_report
from ml.serving.load import measure_latency
from tests.device_reports import device_report
from tests.ml.compiled_models import TITLES, seal

BRIEFLY = ["--seconds", "0.3", "--workers", "1", "--request-sizes", "1", "5"]


def arguments(model, root, output, *more):
    return [
        *("--model", str(model), "--student", str(root / "student")),
        *("--evaluation-set", str(root / "evaluation"), "--output", str(output), *BRIEFLY, *more),
    ]


def test_one_call_measures_a_model(compiled_root, traced_student, tmp_path, capsys, monkeypatch):
    # Of buckets, as one for neuron; the stage serving_measurement measures one for cpu in the same way.
    monkeypatch.setenv("SM_CURRENT_INSTANCE_TYPE", "ml.test.large")
    output = tmp_path / "report.json"
    assert main(["device-report", *arguments(traced_student, compiled_root, output, "--rate", "100")]) == 0

    report = read_report(output.read_bytes(), str(output))
    assert (report.model_digest, report.target) == (read_manifest(traced_student).digest, "torchscript")
    assert (report.instance_type, report.workers, report.neuron_cores) == ("ml.test.large", 1, 0)
    assert report.parity.offers == len(TITLES)
    assert report.parity.same_category > 0.95
    assert compiled_matches_uncompiled(report.gate_metrics, GateLimits()).passed
    assert [each.workers for each in report.throughput] == [1]
    assert report.offers_per_second > 0
    assert [(each.request_offers, each.asked_offers_per_second) for each in report.latency] == [
        (1, 0.0),
        (5, 0.0),
        (32, 100.0),
    ]
    for latency in report.latency:
        assert latency.requests > latency.failed == 0
        assert 0 < latency.p50_milliseconds <= latency.p99_milliseconds
    assert report.peak_memory_bytes > 10_000_000
    assert report.versions.keys() == {"torch"}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    said = capsys.readouterr().err
    assert "throughput of 1 worker for 0.3 s" in said
    assert "same category on" in said


def test_a_host_that_cannot_run_the_model_says_so_before_anything_is_measured(
    compiled_root, neuron_student, tmp_path, capsys
):
    output = tmp_path / "report.json"
    assert main(["device-report", *arguments(neuron_student, compiled_root, output)]) == 2
    assert "this is not a Neuron host" in capsys.readouterr().err
    assert not output.exists()


def test_artifacts_that_do_not_belong_together_are_refused(compiled_student, compiled_root, tmp_path):
    other = tmp_path / "student"
    other.mkdir()
    (other / "weights").write_text("others")
    seal(other, "student_checkpoint")
    given = arguments(compiled_student, compiled_root, tmp_path / "report.json")
    with pytest.raises(InputError, match="was not made of --student"):
        device_measurement.main([*given, "--student", str(other)])
    with pytest.raises(InputError, match="is a student_checkpoint, expected a evaluation_set"):
        device_measurement.main([*given, "--evaluation-set", str(compiled_root / "student")])


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--output", "/nowhere/report.json"], "expected a file in a folder that exists"),
        (["--seconds", "0"], "--seconds 0.0: expected more than 0"),
        (["--workers", "-1"], "--workers -1: expected more than 0"),
        (["--request-sizes", "0"], "expected at least 1 offer"),
    ],
)
def test_a_wrong_option_is_one_line(option, said, compiled_student, compiled_root, tmp_path):
    with pytest.raises(InputError, match=said):
        device_measurement.main(
            [*arguments(compiled_student, compiled_root, tmp_path / "report.json"), *option]
        )


def test_no_two_offers_are_of_the_same_text():
    offers = device_measurement._distinct_offers(["tent", "sofa"])
    titles = [next(offers)["title"] for _ in range(100)]
    assert len(set(titles)) == 100


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"parity": "fine"}, "is no device report"),
        ({"model_digest": None}, "is no device report"),
    ],
)
def test_a_report_that_cannot_be_read_is_named(change, said):
    content = json.dumps(msgspec.to_builtins(device_report()) | change).encode()
    with pytest.raises(InputError, match=f"reports/one.json {said}"):
        read_report(content, "reports/one.json")


def test_a_report_is_read_as_it_was_written():
    report = device_report()
    assert read_report(msgspec.json.encode(report), "one.json") == report


def test_requests_come_at_even_intervals_whatever_the_answers_are():
    with_trouble = _Endpoint(failing_every=5)
    latency = measure_latency(with_trouble.url, lambda: b"{}", request_offers=10, rate=400, seconds=0.5)
    assert (latency.requests, latency.failed) == (20, 4)
    assert with_trouble.requests == 20
    assert latency.asked_offers_per_second == 400
    with_trouble.close()


def test_an_endpoint_that_is_gone_fails_every_request():
    gone = _Endpoint()
    gone.close()
    latency = measure_latency(gone.url, lambda: b"{}", request_offers=10, rate=100, seconds=0.3)
    assert latency.requests == latency.failed >= 1  # on a busy machine fewer or more fall into the time
    assert (latency.p50_milliseconds, latency.offers_per_second) == (0.0, 0.0)


class _Endpoint:
    """Answers; every so many requests with 503."""

    def __init__(self, failing_every: int = 0) -> None:
        self.requests = 0
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler) -> None:
                handler.rfile.read(int(handler.headers["content-length"]))
                with lock:
                    self.requests += 1
                    fails = failing_every and self.requests % failing_every == 0
                handler.send_response(503 if fails else 200)
                handler.send_header("content-length", "2")
                handler.end_headers()
                handler.wfile.write(b"{}")

            def log_message(handler, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
