"""What every endpoint promises, with real server processes; a further one joins by the fixture.

The servers are stand-ins without a model, save in the last test: what is tested is who serves when,
and who takes over.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import msgspec
import pytest

from ml.artifacts import ArtifactRef, reference, write_manifest
from ml.errors import InputError
from resources import local_endpoints, server_process
from resources.endpoints import (
    EndpointError,
    Endpoints,
    EndpointStatus,
    RolledBackError,
    Variant,
    variant_name,
)
from resources.local_endpoints import LocalEndpoints

Model = tuple[Path, ArtifactRef]

OFFERS = [{"offer_id": str(number), "title": "a"} for number in range(20)]


class World(ABC):
    """A place where endpoints are tried; a further implementation joins the suite by one of these."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path

    @abstractmethod
    def endpoints(self, **policy: float) -> Endpoints:
        """The one endpoint of this world; ``policy`` are fields of the resource."""

    def model(self, name: str, behaviour: str = "answer") -> Model:
        """A compiled student without weights; see ``tests/resources/stand_in.py`` for behaviours."""
        folder = self.tmp_path / "compiled_student" / name
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


class LocalWorld(World):
    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        self.port = free_port()

    def endpoints(self, **policy: float) -> LocalEndpoints:
        home, program = str(self.tmp_path / "home"), "tests.resources.stand_in"
        return LocalEndpoints(home=home, port=self.port, workers=1, program=program, **policy)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(params=[LocalWorld])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return request.param(tmp_path)


@pytest.fixture
def endpoints(world: World) -> Iterator[Endpoints]:
    endpoints = world.endpoints()
    yield endpoints
    endpoints.stop()


@pytest.fixture
def model(world: World) -> Callable[..., Model]:
    return world.model


@pytest.fixture
def port(world: LocalWorld) -> int:
    return world.port


@contextmanager
def traffic(endpoints: Endpoints, clients: int = 4) -> Iterator[list[str]]:
    """Clients that ask all the time; yields the versions that answered, and "error" for each failure."""
    is_over, answers = threading.Event(), list[str]()

    def ask() -> None:
        while not is_over.is_set():
            try:
                answers.append(endpoints.invoke(OFFERS)[0]["model_version"])
            except EndpointError:
                answers.append("error")

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask) for _ in range(clients)]
        try:
            yield answers
        finally:
            is_over.set()
    for client in asking:
        client.result()


def eventually(look: Callable[[], Any], seconds: float = 30.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
    return found


def variants_of(model: Callable[..., Model], **weights: float) -> list[Variant]:
    made = {name: model(name) for name in weights}
    return [Variant(folder=folder, ref=ref, weight=weights[name]) for name, (folder, ref) in made.items()]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def servers_of(endpoints: LocalEndpoints) -> set[int]:
    """Servers and routers of this endpoint, without those behind a router."""
    processes = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return {pid for pid in processes if is_alive(pid) and endpoints.home in command_of(pid)}


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


def test_versions_share_the_requests_by_weight(endpoints, model):
    variants = variants_of(model, first=3, second=1)
    status = endpoints.split(variants)
    first, second = (variant.ref.version for variant in variants)
    assert status.model_version == first
    assert [(v.name, v.weight) for v in status.variants] == [
        (variant_name(variants[0].ref), 0.75),
        (variant_name(variants[1].ref), 0.25),
    ]
    answered = Counter(endpoints.invoke(OFFERS[:2])[0]["model_version"] for _ in range(100))
    assert answered[first] + answered[second] == 100
    assert 10 <= answered[second] <= 40
    seen = {observation.variant.name: observation for observation in endpoints.observations()}
    assert sum(observation.requests for observation in seen.values()) == 100
    assert seen[variant_name(variants[1].ref)].requests == answered[second]
    assert {observation.errors for observation in seen.values()} == {0}


def test_a_request_may_name_its_variant(endpoints, model):
    variants = variants_of(model, first=99, second=1)
    endpoints.split(variants)
    for variant in variants:
        name = variant_name(variant.ref)
        answers = [endpoints.invoke(OFFERS[:1], name)[0]["model_version"] for _ in range(5)]
        assert set(answers) == {variant.ref.version}
    with pytest.raises(dg.Failure, match="no variant model-unknown here"):
        endpoints.invoke(OFFERS[:1], "model-unknown")


def test_a_version_that_serves_alone_answers_to_its_name_only(endpoints, model):
    folder, ref = model("first")
    endpoints.deploy(folder, ref)
    assert endpoints.invoke(OFFERS[:1], variant_name(ref))[0]["model_version"] == ref.version
    with pytest.raises(dg.Failure, match="no variant model-unknown here"):
        endpoints.invoke(OFFERS[:1], "model-unknown")


def test_a_deployment_ends_a_split(endpoints, model):
    variants = variants_of(model, first=1, second=1)
    endpoints.split(variants)
    status = endpoints.deploy(variants[1].folder, variants[1].ref)
    assert [(v.model_version, v.weight) for v in status.variants] == [(variants[1].ref.version, 1.0)]
    assert {endpoints.invoke(OFFERS[:1])[0]["model_version"] for _ in range(20)} == {variants[1].ref.version}


@pytest.mark.parametrize("weights", [{}, {"first": 0.0, "second": 1.0}, {"first": -1.0}, {"first": math.nan}])
def test_a_split_without_shares_is_refused(endpoints, model, weights):
    with pytest.raises(InputError, match="expected"):
        endpoints.split(variants_of(model, **weights))


def test_a_split_whose_second_version_does_not_come_up_leaves_the_first_serving(endpoints, model):
    folder, ref = model("first")
    before = endpoints.deploy(folder, ref)
    broken_folder, broken = model("second", "broken")
    with pytest.raises(EndpointError, match="the weights are not what the manifest says"):
        endpoints.split(
            [
                Variant(folder=folder, ref=ref, weight=1),
                Variant(folder=broken_folder, ref=broken, weight=1),
            ]
        )
    assert endpoints.status() == before


def test_a_shadow_sees_the_requests_and_answers_none(endpoints, model):
    folder, ref = model("first")
    endpoints.deploy(folder, ref)
    shadow_folder, shadow = model("second", "fail")
    status = endpoints.shadow(shadow_folder, shadow, percent=100)
    assert status.model_version == ref.version
    assert [(v.model_version, v.weight, v.is_shadow) for v in status.variants] == [
        (ref.version, 1.0, False),
        (shadow.version, 1.0, True),
    ]
    assert {endpoints.invoke(OFFERS)[0]["model_version"] for _ in range(20)} == {ref.version}
    seen = eventually(lambda: [o for o in endpoints.observations() if o.variant.is_shadow and o.errors == 20])
    assert seen[0].requests == 20
    with pytest.raises(dg.Failure, match="no variant"):
        endpoints.invoke(OFFERS[:1], variant_name(shadow))
    after = endpoints.end_shadow()
    assert [v.model_version for v in after.variants] == [ref.version]
    assert endpoints.end_shadow() == after


def test_a_shadow_needs_one_other_version_that_serves(endpoints, model):
    folder, ref = model("first")
    other_folder, other = model("second")
    with pytest.raises(InputError, match="nothing serves"):
        endpoints.shadow(folder, ref, percent=10)
    endpoints.deploy(folder, ref)
    with pytest.raises(InputError, match="serves already"):
        endpoints.shadow(folder, ref, percent=10)
    with pytest.raises(InputError, match="percent 0"):
        endpoints.shadow(other_folder, other, percent=0)
    endpoints.split(
        [Variant(folder=folder, ref=ref, weight=1), Variant(folder=other_folder, ref=other, weight=1)]
    )
    with pytest.raises(InputError, match="end the split"):
        endpoints.shadow(*model("third"), percent=10)


def test_a_good_version_is_tried_out_and_then_gets_all_requests(world, endpoints, model):
    endpoints.deploy(*model("first"))
    trying = world.endpoints(canary_seconds=1.0, canary_percent=50)
    folder, ref = model("second")
    with traffic(endpoints) as answers:
        status = trying.deploy(folder, ref)
    assert [v.model_version for v in status.variants] == [ref.version]
    assert "error" not in answers
    assert endpoints.invoke(OFFERS)[0]["model_version"] == ref.version


@pytest.mark.parametrize(
    ("behaviour", "policy", "alarm"),
    [
        ("fail", {}, "server error, more than OFFER_ASSETS_ALARM_ERROR_PERCENT=1$"),
        ("slow", {"alarm_p99_milliseconds": 200}, "more than OFFER_ASSETS_ALARM_P99_MILLISECONDS=200$"),
        ("hang", {"alarm_p99_milliseconds": 500}, "more than OFFER_ASSETS_ALARM_P99_MILLISECONDS=500$"),
        ("unsure", {}, "more than OFFER_ASSETS_ALARM_LOW_CONFIDENCE_PERCENT=60$"),
    ],
)
def test_a_bad_version_is_rolled_back_by_its_alarm(world, endpoints, model, behaviour, policy, alarm):
    old_folder, old = model("first")
    endpoints.deploy(old_folder, old)
    trying = world.endpoints(canary_seconds=60.0, canary_percent=50, **policy)
    with traffic(endpoints, clients=12), pytest.raises(RolledBackError) as failure:
        trying.deploy(*model("second", behaviour))
    line = str(failure.value)
    assert re.search(alarm.replace("$", r"\. Model version"), line)
    assert line.endswith(f"Model version {old.version} has all requests again")
    assert not failure.value.allow_retries
    assert [v.model_version for v in endpoints.status().variants] == [old.version]
    assert {endpoints.invoke(OFFERS)[0]["model_version"] for _ in range(10)} == {old.version}


def test_a_version_that_no_request_reached_is_taken_and_that_is_said(world, endpoints, model, caplog):
    endpoints.deploy(*model("first"))
    folder, ref = model("second")
    with caplog.at_level(logging.INFO):
        status = world.endpoints(canary_seconds=0.1).deploy(folder, ref)
    assert status.model_version == ref.version
    assert "no request came its way, so nothing was seen of it" in caplog.text


def test_a_deployment_at_once_is_not_watched(world, endpoints, model):
    endpoints.deploy(*model("first"))
    folder, ref = model("second", "fail")
    status = world.endpoints(canary_seconds=600.0).deploy(folder, ref, at_once=True)
    assert [v.model_version for v in status.variants] == [ref.version]


def test_a_version_that_does_not_come_up_is_not_tried_out(world, endpoints, model):
    old = endpoints.deploy(*model("first"))
    with pytest.raises(EndpointError, match="the weights are not what the manifest says"):
        world.endpoints(canary_seconds=600.0).deploy(*model("second", "broken"))
    assert endpoints.status() == old


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
        other_port = free_port()
        moved = LocalEndpoints(home=endpoints.home, port=other_port, workers=1, program=endpoints.program)
        assert moved.deploy(folder, ref).url.endswith(f":{other_port}")
        assert not is_alive(process_of(old))

    def test_a_server_that_never_answers_is_ended(self, endpoints, model, monkeypatch):
        monkeypatch.setattr(server_process, "_SECONDS_TO_ANSWER", 0.0)
        with pytest.raises(EndpointError, match="did not answer within 0 s"):
            endpoints.deploy(*model("first"))
        assert endpoints.status() is None

    def test_a_server_that_dies_while_it_is_tried_out_is_rolled_back(self, world, endpoints, model):
        old_folder, old = model("first")
        endpoints.deploy(old_folder, old)
        with traffic(endpoints) as answers, pytest.raises(RolledBackError, match="its server ended"):
            world.endpoints(canary_seconds=60.0, canary_percent=10).deploy(*model("second", "die"))
        assert answers.count("error") <= 4  # those that were with it when it died; the rest went elsewhere
        assert [v.model_version for v in endpoints.status().variants] == [old.version]

    def test_a_killed_router_is_noticed_and_leaves_no_servers(self, endpoints, model, world):
        variants = variants_of(model, first=1, second=1)
        status = endpoints.split(variants)
        servers = children_of(process_of(status))
        assert len(servers) == 2
        os.kill(process_of(status), signal.SIGKILL)
        eventually(lambda: not any(is_alive(server) for server in servers))
        assert endpoints.status() is None
        assert endpoints.observations() == []
        assert endpoints.split(variants).variants == status.variants

    def test_a_killed_server_of_a_split_costs_no_request_and_is_shown(self, endpoints, model):
        variants = variants_of(model, first=3, second=1)
        status = endpoints.split(variants)
        second = eventually(
            lambda: [pid for pid in children_of(process_of(status)) if "second" in command_of(pid)]
        )[0]
        os.kill(second, signal.SIGKILL)
        eventually(lambda: not is_alive(second))
        answered = {endpoints.invoke(OFFERS[:1])[0]["model_version"] for _ in range(40)}
        assert answered == {variants[0].ref.version}
        assert endpoints.status().details["down"] == variant_name(variants[1].ref)
        assert "down" not in endpoints.split(variants).details

    def test_a_dead_shadow_costs_the_answers_nothing(self, endpoints, model):
        folder, ref = model("first")
        endpoints.deploy(folder, ref)
        status = endpoints.shadow(*model("second"), percent=100)
        shadow = eventually(
            lambda: [pid for pid in children_of(process_of(status)) if "second" in command_of(pid)]
        )[0]
        os.kill(shadow, signal.SIGKILL)
        eventually(lambda: not is_alive(shadow))
        assert {endpoints.invoke(OFFERS)[0]["model_version"] for _ in range(20)} == {ref.version}

    def test_a_shadow_that_hangs_costs_the_answers_nothing(self, endpoints, model):
        folder, ref = model("first")
        endpoints.deploy(folder, ref)
        endpoints.shadow(*model("second", "hang"), percent=100)
        started_at = time.monotonic()
        for _ in range(100):
            endpoints.invoke(OFFERS[:1])
        assert time.monotonic() - started_at < 100  # as long as the shadow takes, four at a time
        assert "copies_missed" in endpoints.status().details

    @pytest.mark.parametrize("moment", ["while it is tried out", "while it comes up"])
    def test_a_killed_deployer_leaves_all_requests_with_the_old_version(
        self, world, endpoints, model, monkeypatch, moment
    ):
        old_folder, old = model("first")
        endpoints.deploy(old_folder, old)
        folder, new = model("second", "answer" if moment == "while it is tried out" else "come up slowly")
        monkeypatch.setattr(local_endpoints, "_SECONDS_OF_A_SHARE", 1.0)
        trying = world.endpoints(canary_seconds=600.0, canary_percent=50)
        deployer = multiprocessing.get_context("fork").Process(target=trying.deploy, args=(folder, new))
        deployer.start()
        current = Path(endpoints.home) / "endpoint"
        if moment == "while it is tried out":
            eventually(lambda: [o for o in endpoints.observations() if o.variant.weight == 0.5])
        else:
            eventually((current / "changing.json").exists)
        deployer.kill()
        deployer.join()
        eventually(
            lambda: {v.model_version: v.weight for v in endpoints.status().variants}.get(old.version) == 1.0
        )
        assert {endpoints.invoke(OFFERS[:1])[0]["model_version"] for _ in range(20)} == {old.version}
        again = endpoints.deploy(old_folder, old)
        assert [v.model_version for v in again.variants] == [old.version]
        assert servers_of(endpoints) == {process_of(again)}

    def test_only_the_owner_can_steer_the_router(self, endpoints, model):
        endpoints.split(variants_of(model, first=1, second=1))
        control = next((Path(endpoints.home) / "endpoint").glob("router-*.sock"))
        assert stat.S_IMODE(control.stat().st_mode) == 0o600


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
