import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from ml.serving.app import MAX_BODY_BYTES
from ml.serving.predictor import Predictor
from tests import plain_http
from tests.ml.compiled_models import TITLES

OFFERS = [{"offer_id": str(number), "title": title} for number, title in enumerate(TITLES)]


@dataclass
class Server:
    """A real server process."""

    process: subprocess.Popen
    state_file: Path
    url: str
    workers: list[int]
    model_version: str

    def post(self, offers, **options) -> httpx.Response:
        return plain_http.post(f"{self.url}/invocations", json={"offers": offers}, timeout=60, **options)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def serving(model: Path, state_file: Path, *arguments: str, port: int = 0) -> Iterator[Server]:
    command = [sys.executable, "-m", "ml", "serve", "--model", str(model), "--port", str(port)]
    command += ["--state-file", str(state_file), *arguments]
    process = subprocess.Popen(command)
    try:
        state = json.loads(_eventually(lambda: state_file.read_bytes() if state_file.exists() else None))
        yield Server(process, state_file, state["url"], state["workers"], state["model_version"])
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def server(compiled_student, tmp_path_factory) -> Iterator[Server]:
    state_file = tmp_path_factory.mktemp("serving") / "state.json"
    with serving(compiled_student, state_file, "--workers", "1") as started:
        yield started


def test_ping_says_which_model_answers(server, compiled_student):
    predictor = Predictor.load(compiled_student)
    answer = plain_http.get(f"{server.url}/ping")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok",
        "model_version": predictor.model_version,
        "taxonomy_version": predictor.taxonomy_version,
        "pid": server.workers[0],
    }


def test_the_endpoint_answers_exactly_as_the_predictor_does(server, compiled_student):
    expected = Predictor.load(compiled_student).predict([*OFFERS, {"offer_id": "bad"}])
    found = server.post([*OFFERS[::-1], {"offer_id": "bad"}]).json()["predictions"]
    by_id = {prediction["offer_id"]: prediction for prediction in found}
    assert [prediction["offer_id"] for prediction in found] == [o["offer_id"] for o in OFFERS[::-1]] + ["bad"]
    for prediction in expected:
        answer = by_id[prediction.offer_id]
        assert answer["category_id"] == prediction.category_id
        assert answer["confidence"] == prediction.confidence
        assert [a["confidence"] for a in answer["alternatives"]] == [
            a.confidence for a in prediction.alternatives
        ]
    assert by_id["bad"]["problem"] == "title is missing"


def test_json_lines_are_understood(server):
    body = "\n".join(json.dumps(offer) for offer in OFFERS[:3]) + "\n\n"
    headers = {"content-type": "application/jsonlines; charset=utf-8"}
    answer = plain_http.post(f"{server.url}/invocations", content=body, headers=headers)
    assert answer.json() == server.post(OFFERS[:3]).json()


@pytest.mark.parametrize("wanted", ["application/jsonlines", "application/x-ndjson; q=1, */*"])
def test_an_answer_in_json_lines_has_one_for_each_offer_in_order(server, wanted):
    offers = [*OFFERS[:3], {"offer_id": "bad"}]
    answer = server.post(offers, headers={"accept": wanted})
    assert answer.headers["content-type"] == wanted.split(";")[0]
    assert answer.content.endswith(b"}\n")
    lines = [json.loads(line) for line in answer.content.split(b"\n")[:-1]]
    assert lines == server.post(offers, headers={"accept": "*/*"}).json()["predictions"]


def test_an_answer_says_of_how_many_offers_the_model_is_unsure(server, compiled_student):
    offers = [*OFFERS, {"offer_id": "bad"}]
    predictions = Predictor.load(compiled_student).predict(offers)
    unsure = sum(p.category_id is None or p.confidence < 0.5 for p in predictions)
    assert server.post(offers).headers["x-offers"] == f"{len(offers)};{unsure}"
    assert 0 < unsure <= len(offers)


def test_a_request_for_another_variant_is_refused(server):
    for variant, status in ((f"model-{server.model_version}", 200), ("model-other", 400)):
        answer = server.post(OFFERS, headers={"x-amzn-sagemaker-target-variant": variant})
        assert answer.status_code == status
    assert answer.json()["error"].startswith("there is no variant model-other here")


def test_a_server_ends_with_who_started_it_if_it_was_told_to(compiled_student, tmp_path):
    state_file = tmp_path / "state.json"
    command = [sys.executable, "-m", "ml", "serve", "--model", str(compiled_student), "--port", "0"]
    command += ["--workers", "1", "--state-file", str(state_file), "--end-with-stdin"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    _eventually(lambda: state_file.exists() or None)
    process.stdin.close()
    assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("content_type", "body", "said"),
    [
        ("application/json", b"", "expected"),
        ("application/json", b'{"offers": [{"title": "a"', "truncated"),
        ("application/json", b'[{"title": "a"}]', "object"),
        ("application/json", b'{"offers": ["kettle"]}', "$.offers[0]"),
        ("application/json", b'{"offers": [{"title": "\xff"}]}', "expected"),
        ("application/json", b"[" * 100_000, "expected"),
        ("application/jsonlines", b'{"title": "a"}\n{"title"\n', "line 2"),
    ],
)
def test_a_malformed_body_is_400_with_one_line(server, content_type, body, said):
    answer = plain_http.post(
        f"{server.url}/invocations", content=body, headers={"content-type": content_type}
    )
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_a_body_over_the_limit_is_413_and_one_at_the_limit_is_served(server):
    frame = len(b'{"offers":[{"title":""}]}')
    for size, status in ((MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413), (MAX_BODY_BYTES * 2, 413)):
        body = b'{"offers":[{"title":"' + b"a" * (size - frame) + b'"}]}'
        answer = plain_http.post(f"{server.url}/invocations", content=body, timeout=60)
        assert answer.status_code == status


def test_unknown_paths_and_methods_are_refused(server):
    assert plain_http.get(f"{server.url}/nothing").status_code == 404
    assert plain_http.get(f"{server.url}/invocations").status_code == 405
    assert plain_http.post(f"{server.url}/ping").status_code == 405


def test_ping_is_answered_while_a_large_request_is_computed(server):
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(server.post, _slow_offers("ping", 2000))
        _eventually(request.running)
        answered = 0
        while not request.done():
            assert plain_http.get(f"{server.url}/ping", timeout=2).status_code == 200
            answered += 1
        assert request.result().status_code == 200
    assert answered > 3


def test_requests_beyond_the_queue_get_503_and_the_others_their_answer(compiled_student, tmp_path):
    with serving(compiled_student, tmp_path / "state.json", "--workers", "1", "--queue", "2") as server:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(server.post, [_slow_offers(f"queue {n}", 1500) for n in range(6)]))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses[:2] == [200, 200]
        assert statuses[-1] == 503
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert "try again" in refused.json()["error"]
        assert refused.headers["retry-after"] == "1"
        assert server.post(OFFERS[:1]).status_code == 200


def test_sigterm_finishes_what_is_under_way_and_tells_what_was_answered(compiled_student, tmp_path, capfd):
    with serving(compiled_student, tmp_path / "state.json", "--workers", "1") as server:
        with ThreadPoolExecutor(3) as pool:
            requests = [pool.submit(server.post, _slow_offers(f"drain {n}", 700)) for n in range(3)]
            _eventually(lambda: _connections(server) >= 3)
            assert server.stop() == 0
            assert [request.result().status_code for request in requests] == [200] * 3
        with pytest.raises(httpx.ConnectError):
            plain_http.get(f"{server.url}/ping")
        assert not server.state_file.exists()
    (line,) = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert 0 <= line.pop("seconds") <= 30
    assert line.pop("low_confidence") <= 3 * 700
    assert line == {"event": "answers", "model_version": server.model_version, "offers": 3 * 700}


def test_a_killed_worker_is_replaced_and_all_end_with_a_killed_supervisor(compiled_student, tmp_path):
    with serving(compiled_student, tmp_path / "state.json", "--workers", "2") as server:
        os.kill(server.workers[0], signal.SIGKILL)
        seen = set()

        def both_are_new_or_left():
            # What the killed worker had in its queue is reset, whoever asked.
            with suppress(httpx.TransportError):
                seen.add(plain_http.get(f"{server.url}/ping").json()["pid"])
            return len(seen - {server.workers[0]}) == 2

        _eventually(both_are_new_or_left)
        assert not _is_alive(server.workers[0])
        assert server.post(OFFERS[:1]).status_code == 200
        server.process.kill()
        server.process.wait()
        _eventually(lambda: not any(_is_alive(worker) for worker in seen))


def test_a_new_version_takes_over_the_port_without_a_failed_request(
    compiled_student, other_compiled_student, tmp_path
):
    failures, versions = [], []
    is_over = threading.Event()

    def ask(url, client):
        while not is_over.is_set():
            try:
                answer = client.post(f"{url}/invocations", json={"offers": OFFERS[:2]}, timeout=30)
                answer.raise_for_status()
                versions.append(answer.json()["predictions"][0]["model_version"])
            except Exception as error:
                failures.append(repr(error))

    with serving(compiled_student, tmp_path / "old.json", "--workers", "1") as old:
        port = int(old.url.rpartition(":")[2])
        with ThreadPoolExecutor(2) as pool, plain_http.Client() as kept_open:
            pool.submit(ask, old.url, kept_open)
            pool.submit(ask, old.url, plain_http)  # a connection per request
            _eventually(lambda: len(versions) > 10)
            with serving(other_compiled_student, tmp_path / "new.json", "--workers", "1", port=port) as new:
                assert old.stop() == 0
                seen = len(versions)
                _eventually(lambda: len(versions) > seen + 20)
                is_over.set()
                assert new.url == old.url
                assert set(versions[seen:]) == {new.model_version}
                assert set(versions) == {old.model_version, new.model_version}
    assert failures == []


def test_a_port_that_another_program_uses_ends_with_2_and_one_line(compiled_student):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _refused(
            ["--model", str(compiled_student), "--port", str(port)], f"port {port} (Address already in use)"
        )


def test_a_setting_that_is_no_number_is_named(compiled_student, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_MODEL_SERVER_WORKERS", "many")
    _refused(["--model", str(compiled_student)], "SAGEMAKER_MODEL_SERVER_WORKERS=many")


def _refused(arguments, said):
    ended = subprocess.run(
        [sys.executable, "-m", "ml", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in ended.stderr


def _slow_offers(prefix, count):
    """Offers that no earlier request had, so that none is answered from memory."""
    return [{"offer_id": str(n), "title": f"{prefix} {n} {TITLES[n % len(TITLES)]}"} for n in range(count)]


def _connections(server):
    """Established connections to the server's port, as its side sees them."""
    port = int(server.url.rpartition(":")[2])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[1].split(":")[1], 16) == port and row[3] == "01" for row in rows)


def _is_alive(pid):
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def _eventually(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return result
