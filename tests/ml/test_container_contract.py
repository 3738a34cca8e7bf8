"""SageMaker's contract for containers that serve, driven over HTTP: the image's own command and packages."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from ml.serving.predictor import Predictor
from tests import plain_http
from tests.container import IMAGES, command_of, environment_of, health_check_of, run
from tests.ml.compiled_models import TITLES

SERVING = IMAGES / "serving.Dockerfile"
OFFERS = [{"offer_id": str(number), "title": title} for number, title in enumerate(TITLES)]
HEAD = (
    b"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)


@dataclass
class Container:
    """One that runs, as SageMaker sees it: a port, and signals."""

    process: subprocess.Popen
    port: int
    environment: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def invoke(self, offers, client=plain_http) -> httpx.Response:
        return client.post(f"{self.url}/invocations", json={"offers": offers}, timeout=60)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def is_pinged(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return plain_http.get(f"{self.url}/ping", timeout=2).status_code == 200
        return False


@contextmanager
def running(model: Path, folder: Path, **variables: str) -> Iterator[Container]:
    """``docker run IMAGE serve`` with a model in ``/opt/ml/model``, until it answers ``/ping``."""
    base = folder / "opt-ml"
    shutil.copytree(model, base / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"SAGEMAKER_BIND_TO_PORT": str(port), "SAGEMAKER_MODEL_SERVER_WORKERS": "1", **variables}
    environment = environment_of("serving", folder / "image", base, **settings)
    process = subprocess.Popen(command_of(SERVING, "serve"), env=environment, cwd="/")
    container = Container(process, port, environment)
    try:
        eventually(container.is_pinged)
        yield container
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def container(compiled_student, tmp_path_factory) -> Iterator[Container]:
    with running(compiled_student, tmp_path_factory.mktemp("container")) as started:
        yield started


@pytest.fixture(scope="module")
def impatient(compiled_student, tmp_path_factory) -> Iterator[Container]:
    """It gives a request three seconds to arrive."""
    folder = tmp_path_factory.mktemp("impatient")
    with running(compiled_student, folder, SAGEMAKER_MODEL_SERVER_TIMEOUT="3") as started:
        yield started


def test_the_image_serves_with_the_packages_it_installs_and_no_others(container, compiled_student):
    expected = [prediction.category_id for prediction in Predictor.load(compiled_student).predict(OFFERS)]
    answer = container.invoke(OFFERS)
    assert answer.status_code == 200
    assert [each["category_id"] for each in answer.json()["predictions"]] == expected
    absent = run([*command_of(SERVING)[:1], "-c", "import torch"], container.environment)
    assert "not in the image" in absent.stderr


def test_it_has_the_workers_that_it_is_told_on_every_address_of_the_container(container):
    pid = container.process.pid
    assert len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) == 1
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {row[1] for row in rows if row[3] == "0A"}
    assert f"00000000:{container.port:04X}" in listening


def test_the_health_check_of_the_image_tells_whether_it_answers(container):
    assert run(health_check_of(SERVING), container.environment).returncode == 0
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = {**container.environment, "SAGEMAKER_BIND_TO_PORT": str(unused.getsockname()[1])}
        assert run(health_check_of(SERVING), nobody).returncode != 0


def test_many_clients_at_once_get_each_their_own_answer(container):
    alone = {offer["offer_id"]: container.invoke([offer]).json()["predictions"][0] for offer in OFFERS}
    with ThreadPoolExecutor(8) as pool, plain_http.Client() as client:
        answers = list(pool.map(lambda n: container.invoke(OFFERS[n : n + 5], client), range(40)))
    for start, answer in enumerate(answers):
        assert answer.status_code == 200
        for offer, prediction in zip(OFFERS[start : start + 5], answer.json()["predictions"], strict=True):
            assert prediction["category_id"] == alone[offer["offer_id"]]["category_id"]


def test_what_sagemaker_puts_around_a_request_changes_nothing(container):
    headers = {
        "accept": "application/json",
        "x-amzn-sagemaker-custom-attributes": "c000b4f9-df62-4c85-a0bf-7c525f9104a4",
        "content-type": "application/jsonlines",
    }

    def in_pieces():  # without a content-length, as a transform job sends it
        for offer in OFFERS[:3]:
            yield json.dumps(offer).encode() + b"\n"

    answer = plain_http.post(f"{container.url}/invocations", content=in_pieces(), headers=headers, timeout=60)
    assert answer.json() == container.invoke(OFFERS[:3]).json()


def test_slow_clients_keep_nobody_out_and_are_sent_away(impatient):
    slow = [impatient.connect() for _ in range(80)]  # more than the 32 that may wait for an answer
    for number, connection in enumerate(slow):
        connection.sendall(b"POST /invocations HTTP/1.1\r\nhost" if number % 2 else HEAD % 100 + b"{")
    for _ in range(5):
        assert impatient.invoke(OFFERS[:2]).status_code == 200
        assert impatient.is_pinged()
    for number, connection in enumerate(slow):
        connection.settimeout(10)
        answer = connection.recv(1000)
        assert answer == b"" if number % 2 else answer.startswith(b"HTTP/1.1 408")
        connection.close()
    assert impatient.invoke(OFFERS[:2]).status_code == 200


def test_a_connection_that_is_used_again_has_the_same_time_for_its_next_request(impatient):
    body = json.dumps({"offers": OFFERS[:1]})
    client = HTTPConnection("127.0.0.1", impatient.port, timeout=30)
    with contextlib.closing(client):
        for _ in range(2):
            client.request("POST", "/invocations", body, {"content-type": "application/json"})
            answer = client.getresponse()
            assert answer.status == 200
            answer.read()
        client.sock.sendall(b"POST /invoc")
        assert client.sock.recv(1000) == b""


def test_a_slow_client_does_not_hold_up_the_end(compiled_student, tmp_path):
    with (
        running(compiled_student, tmp_path, SAGEMAKER_MODEL_SERVER_TIMEOUT="3") as container,
        container.connect() as stalled,
        container.connect() as headless,
    ):
        stalled.sendall(HEAD % 100 + b"{")
        headless.sendall(b"POST /invocations HTTP/1.1\r\nho")
        assert container.is_pinged()
        container.process.send_signal(signal.SIGTERM)
        assert container.process.wait(30) == 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "is not an artifact"),
        (lambda model: (model / "manifest.json").unlink(), "is not an artifact"),
        (lambda model: (model / "manifest.json").write_text("{"), "manifest.json"),
        (lambda model: next(model.glob("*.onnx")).write_bytes(b"damaged"), "differs from"),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer.json"),
    ],
    ids=["no model", "no manifest", "half a manifest", "a damaged file", "a missing file"],
)
def test_without_a_sound_model_the_container_ends_with_2_and_one_line(
    compiled_student,
    tmp_path,
    damage,
    said,
):
    base = tmp_path / "opt-ml"
    shutil.copytree(compiled_student, base / "model")
    damage(base / "model")
    environment = environment_of(
        "serving", tmp_path / "image", base, SAGEMAKER_BIND_TO_PORT="0", SAGEMAKER_MODEL_SERVER_WORKERS="1"
    )
    ended = run(command_of(SERVING, "serve"), environment)
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in ended.stderr


def test_it_leaves_its_folders_as_it_found_them(container, compiled_student):
    container.invoke(OFFERS)
    base = Path(container.environment["SAGEMAKER_BASE_DIR"])
    found = {str(path.relative_to(base / "model")) for path in base.rglob("*") if path.is_file()}
    files = (path for path in compiled_student.rglob("*") if path.is_file())
    assert found == {str(path.relative_to(compiled_student)) for path in files}


def eventually(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
