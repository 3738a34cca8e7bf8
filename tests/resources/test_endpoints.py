"""What every endpoint promises, with real server processes; a further one joins by the fixture.

The servers are stand-ins without a model, save in the last test: what is tested is who serves when,
and who takes over.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import httpx
import msgspec
import pytest

from ml.artifacts import ArtifactRef, reference, write_manifest
from ml.errors import InputError
from resources import server_process
from resources.endpoints import EndpointError, Endpoints, EndpointStatus
from resources.local_endpoints import LocalEndpoints

Model = Callable[..., tuple[Path, ArtifactRef]]


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(params=[LocalEndpoints])
def endpoints(request: pytest.FixtureRequest, tmp_path: Path, port: int) -> Iterator[Endpoints]:
    endpoints = request.param(
        home=str(tmp_path / "home"), port=port, workers=1, program="tests.resources.stand_in"
    )
    yield endpoints
    endpoints.stop()


@pytest.fixture
def model(tmp_path: Path) -> Model:
    def model(name: str, behaviour: str = "answer") -> tuple[Path, ArtifactRef]:
        folder = tmp_path / "compiled_student" / name
        folder.mkdir(parents=True)
        (folder / "name").write_text(name)
        (folder / "behaviour").write_text(behaviour)
        write_manifest(
            folder,
            kind="compiled_student",
            key=name,
            inputs={},
            code_version="1",
            code_revision=None,
            parameters={},
            metrics={},
            seconds=0.1,
        )
        return folder, reference(folder)

    return model


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def process_of(status: EndpointStatus) -> int:
    return int(status.details["pid"])


def test_nothing_serves_before_the_first_deployment(endpoints):
    assert endpoints.status() is None
    with pytest.raises(EndpointError, match="does not answer"):
        endpoints.invoke([{"offer_id": "1", "title": "a"}])


def test_a_deployed_model_answers_and_says_what_it_is(endpoints, model, port):
    folder, ref = model("first")
    status = endpoints.deploy(folder, ref)
    assert (status.model_version, status.taxonomy_version) == (ref.version, "t1")
    assert status.url == f"http://127.0.0.1:{port}"
    assert endpoints.status() == status
    predictions = endpoints.invoke([{"offer_id": "2", "title": "b"}, {"offer_id": "1", "title": "a"}])
    assert [prediction["offer_id"] for prediction in predictions] == ["2", "1"]


def test_a_port_of_a_stranger_is_told_before_anything_is_deployed(endpoints, port):
    endpoints.check_available()
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        with pytest.raises(InputError, match=f"^OFFER_ASSETS_ENDPOINT_PORT={port} cannot be used"):
            endpoints.check_available()


def test_the_port_is_available_to_the_version_after_the_one_that_serves(endpoints, model):
    endpoints.deploy(*model("first"))
    endpoints.check_available()


def test_the_same_version_again_goes_on_as_it_is(endpoints, model):
    folder, ref = model("first")
    assert endpoints.deploy(folder, ref) == endpoints.deploy(folder, ref)


def test_a_new_version_takes_over_and_the_old_one_ends(endpoints, model):
    old = endpoints.deploy(*model("first"))
    folder, ref = model("second")
    new = endpoints.deploy(folder, ref)
    assert process_of(new) != process_of(old)
    assert not is_alive(process_of(old))
    assert {httpx.get(f"{new.url}/ping").json()["model_version"] for _ in range(20)} == {ref.version}


def test_a_version_that_does_not_come_up_leaves_the_old_one_serving(endpoints, model):
    old = endpoints.deploy(*model("first"))
    with pytest.raises(EndpointError, match="the weights are not what the manifest says") as failure:
        endpoints.deploy(*model("second", "broken"))
    assert "ended with status 2" in str(failure.value)
    assert endpoints.status() == old
    assert endpoints.invoke([{"offer_id": "1", "title": "a"}])[0]["model_version"] == old.model_version


def test_refused_offers_are_an_input_error_in_the_endpoints_words(endpoints, model):
    endpoints.deploy(*model("first"))
    with pytest.raises(dg.Failure, match="offer 1 has no title") as failure:
        endpoints.invoke([{"offer_id": "1"}])
    assert not failure.value.allow_retries


def test_a_stopped_endpoint_is_gone_and_stopping_again_is_nothing(endpoints, model):
    status = endpoints.deploy(*model("first"))
    assert endpoints.stop()
    assert not is_alive(process_of(status))
    assert endpoints.status() is None
    assert not endpoints.stop()


def test_an_endpoint_that_died_is_started_again(endpoints, model):
    folder, ref = model("first")
    dead = endpoints.deploy(folder, ref)
    os.kill(process_of(dead), signal.SIGKILL)
    while is_alive(process_of(dead)):
        time.sleep(0.01)
    assert endpoints.status() is None
    assert process_of(endpoints.deploy(folder, ref)) != process_of(dead)


def test_two_deployments_at_once_leave_one_server(endpoints, model):
    folder, ref = model("first")
    results: list[EndpointStatus] = []
    threads = [
        threading.Thread(target=lambda: results.append(endpoints.deploy(folder, ref))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({process_of(status) for status in results}) == 1


def test_one_at_a_time_changes_what_serves(endpoints):
    order: list[str] = []

    def release() -> None:
        with endpoints.releasing():
            order.append("second")

    with endpoints.releasing():
        other = threading.Thread(target=release)
        other.start()
        other.join(0.3)
        order.append("first")
    other.join()
    assert order == ["first", "second"]


class TestLocal:
    """What only the local endpoint has."""

    def test_a_port_that_somebody_else_uses_names_the_setting(self, endpoints, model, port):
        with socket.socket() as stranger:
            stranger.bind(("127.0.0.1", port))
            stranger.listen()
            with pytest.raises(dg.Failure, match=f"OFFER_ASSETS_ENDPOINT_PORT={port} cannot be used"):
                endpoints.deploy(*model("first"))

    def test_a_stranger_that_shares_its_port_is_not_joined(self, endpoints, model, port):
        with socket.socket() as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            stranger.bind(("127.0.0.1", port))
            stranger.listen()
            with pytest.raises(dg.Failure, match="OFFER_ASSETS_ENDPOINT_PORT"):
                endpoints.deploy(*model("first"))

    def test_current_names_the_folder_of_the_serving_model(self, endpoints, model, tmp_path):
        folder, ref = model("first")
        endpoints.deploy(folder, ref)
        current = msgspec.json.decode((tmp_path / "home" / "endpoint" / "current.json").read_bytes())
        assert (current["model"], current["model_version"]) == (str(folder), ref.version)

    def test_a_process_that_got_the_id_of_a_dead_server_is_left_alone(self, endpoints, model, tmp_path):
        """``current.json`` names this very test process, as if it had got the id of the server."""
        endpoints.deploy(*model("first"))
        current = tmp_path / "home" / "endpoint" / "current.json"
        written = current.read_bytes()
        endpoints.stop()
        current.write_bytes(msgspec.json.encode({**msgspec.json.decode(written), "pid": os.getpid()}))
        assert endpoints.status() is None
        assert not endpoints.stop()

    def test_the_server_outlives_a_signal_to_its_starters_group(self, endpoints, model):
        assert os.getpgid(process_of(endpoints.deploy(*model("first")))) != os.getpgid(0)

    def test_another_port_in_the_settings_moves_the_endpoint(self, endpoints, model):
        folder, ref = model("first")
        old = endpoints.deploy(folder, ref)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            other_port = probe.getsockname()[1]
        moved = LocalEndpoints(home=endpoints.home, port=other_port, workers=1, program=endpoints.program)
        assert moved.deploy(folder, ref).url.endswith(f":{other_port}")
        assert not is_alive(process_of(old))

    def test_a_server_that_never_answers_is_ended(self, endpoints, model, monkeypatch):
        monkeypatch.setattr(server_process, "_SECONDS_TO_ANSWER", 0.0)
        with pytest.raises(EndpointError, match="did not answer within 0 s"):
            endpoints.deploy(*model("first"))
        assert endpoints.status() is None


def test_no_request_is_lost_while_one_real_model_takes_over_from_another(
    tmp_path, port, compiled_student, other_compiled_student
):
    endpoints = LocalEndpoints(home=str(tmp_path / "home"), port=port, workers=1)
    offers = [{"offer_id": str(number), "shop_id": "s", "title": f"Offer {number}"} for number in range(8)]
    is_over = threading.Event()
    answers: list[list[dict]] = []

    def ask() -> None:
        while not is_over.is_set():
            answers.append(endpoints.invoke(offers))

    try:
        old = endpoints.deploy(compiled_student, reference(compiled_student))
        with ThreadPoolExecutor(max_workers=2) as pool:
            clients = [pool.submit(ask) for _ in range(2)]
            try:
                new = endpoints.deploy(other_compiled_student, reference(other_compiled_student))
            finally:
                is_over.set()
        for client in clients:
            client.result()
        last = endpoints.invoke(offers)
    finally:
        endpoints.stop()
    assert all([prediction["offer_id"] for prediction in answer] == list("01234567") for answer in answers)
    assert {answer[0]["model_version"] for answer in answers} >= {old.model_version}
    assert {prediction["model_version"] for prediction in last} == {new.model_version}
    assert not is_alive(process_of(old))
