"""What only the endpoint on this machine has: its port, its processes, and what happens when they die.

The servers are stand-ins without a model, save in the last test.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import dagster as dg
import msgspec
import pytest

from ml.artifacts import reference
from ml.errors import InputError
from resources import local_endpoints, server_process
from resources.endpoints import (
    EndpointError,
    Endpoints,
    EndpointStatus,
    RolledBackError,
    variant_name,
)
from resources.local_endpoints import LocalEndpoints
from tests import plain_http
from tests.resources.endpoint_world import (
    OFFERS,
    LocalWorld,
    Model,
    World,
    children_of,
    command_of,
    eventually,
    free_port,
    is_alive,
    process_of,
    servers_of,
    traffic,
    variants_of,
)


@pytest.fixture
def world(tmp_path: Path) -> LocalWorld:
    return LocalWorld(tmp_path)


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


def test_a_new_version_takes_over_and_the_old_one_ends(endpoints, model):
    old = endpoints.deploy(*model("first"))
    folder, ref = model("second")
    new = endpoints.deploy(folder, ref)
    assert process_of(new) != process_of(old)
    assert not is_alive(process_of(old))
    assert {plain_http.get(f"{new.url}/ping").json()["model_version"] for _ in range(20)} == {ref.version}


def test_an_endpoint_that_died_is_started_again(endpoints, model):
    folder, ref = model("first")
    dead = endpoints.deploy(folder, ref)
    os.kill(process_of(dead), signal.SIGKILL)
    while is_alive(process_of(dead)):
        time.sleep(0.01)
    assert endpoints.status() is None
    assert process_of(endpoints.deploy(folder, ref)) != process_of(dead)


def test_workers_that_outlive_their_killed_server_are_waited_for(endpoints, model, port):
    folder, ref = model("first")
    dead = endpoints.deploy(folder, ref)
    with socket.socket() as worker:
        worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        worker.bind(("127.0.0.1", port))
        worker.listen()
        os.kill(process_of(dead), signal.SIGKILL)
        eventually(lambda: not is_alive(process_of(dead)))
        with ThreadPoolExecutor(1) as pool:
            deploying = pool.submit(endpoints.deploy, folder, ref)
            with pytest.raises(TimeoutError):
                deploying.result(0.5)
            worker.close()
            assert process_of(deploying.result()) != process_of(dead)


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


def test_a_stopped_endpoint_leaves_no_process(endpoints, model):
    status = endpoints.deploy(*model("first"))
    assert status.url == f"http://127.0.0.1:{endpoints.port}"
    assert endpoints.stop()
    assert not is_alive(process_of(status))


def test_how_a_server_ended_that_did_not_come_up_is_told(endpoints, model):
    with pytest.raises(EndpointError, match="ended with status 2"):
        endpoints.deploy(*model("first", "broken"))


def test_a_port_that_somebody_else_uses_names_the_setting(endpoints, model, port):
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        with pytest.raises(dg.Failure, match=f"OFFER_ASSETS_ENDPOINT_PORT={port} cannot be used"):
            endpoints.deploy(*model("first"))


def test_a_stranger_that_shares_its_port_is_not_joined(endpoints, model, port):
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        stranger.bind(("127.0.0.1", port))
        stranger.listen()
        with pytest.raises(dg.Failure, match="OFFER_ASSETS_ENDPOINT_PORT"):
            endpoints.deploy(*model("first"))


def test_current_names_the_folder_of_the_serving_model(endpoints, model, tmp_path):
    folder, ref = model("first")
    endpoints.deploy(folder, ref)
    current = msgspec.json.decode((tmp_path / "home" / "endpoint" / "current.json").read_bytes())
    assert (current["model"], current["model_version"]) == (str(folder), ref.version)


def test_a_process_that_got_the_id_of_a_dead_server_is_left_alone(endpoints, model, tmp_path):
    """``current.json`` names this very test process, as if it had got the id of the server."""
    endpoints.deploy(*model("first"))
    current = tmp_path / "home" / "endpoint" / "current.json"
    written = current.read_bytes()
    endpoints.stop()
    current.write_bytes(msgspec.json.encode({**msgspec.json.decode(written), "pid": os.getpid()}))
    assert endpoints.status() is None
    assert not endpoints.stop()


def test_the_server_outlives_a_signal_to_its_starters_group(endpoints, model):
    assert os.getpgid(process_of(endpoints.deploy(*model("first")))) != os.getpgid(0)


def test_another_port_in_the_settings_moves_the_endpoint(endpoints, model):
    folder, ref = model("first")
    old = endpoints.deploy(folder, ref)
    other_port = free_port()
    moved = LocalEndpoints(home=endpoints.home, port=other_port, workers=1, program=endpoints.program)
    assert moved.deploy(folder, ref).url.endswith(f":{other_port}")
    assert not is_alive(process_of(old))


def test_a_server_that_never_answers_is_ended(endpoints, model, monkeypatch):
    monkeypatch.setattr(server_process, "_SECONDS_TO_ANSWER", 0.0)
    with pytest.raises(EndpointError, match="did not answer within 0 s"):
        endpoints.deploy(*model("first"))
    assert endpoints.status() is None


def test_a_server_that_dies_while_it_is_tried_out_is_rolled_back(world, endpoints, model):
    old_folder, old = model("first")
    endpoints.deploy(old_folder, old)
    with traffic(endpoints) as answers, pytest.raises(RolledBackError, match="its server ended"):
        world.endpoints(canary_seconds=60.0, canary_percent=10).deploy(*model("second", "die"))
    assert answers.count("error") <= 4  # those that were with it when it died; the rest went elsewhere
    assert [v.model_version for v in endpoints.status().variants] == [old.version]


def test_a_killed_router_is_noticed_and_leaves_no_servers(endpoints, model, world):
    variants = variants_of(model, first=1, second=1)
    status = endpoints.split(variants)
    servers = children_of(process_of(status))
    assert len(servers) == 2
    os.kill(process_of(status), signal.SIGKILL)
    eventually(lambda: not any(is_alive(server) for server in servers))
    assert endpoints.status() is None
    assert endpoints.observations() == []
    assert endpoints.split(variants).variants == status.variants


def test_a_killed_server_of_a_split_costs_no_request_and_is_shown(endpoints, model):
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


def test_a_dead_shadow_costs_the_answers_nothing(endpoints, model):
    folder, ref = model("first")
    endpoints.deploy(folder, ref)
    status = endpoints.shadow(*model("second"), percent=100)
    shadow = eventually(
        lambda: [pid for pid in children_of(process_of(status)) if "second" in command_of(pid)]
    )[0]
    os.kill(shadow, signal.SIGKILL)
    eventually(lambda: not is_alive(shadow))
    assert {endpoints.invoke(OFFERS)[0]["model_version"] for _ in range(20)} == {ref.version}


def test_a_shadow_that_hangs_costs_the_answers_nothing(endpoints, model):
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
    world, endpoints, model, monkeypatch, moment
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


@pytest.mark.parametrize("moment", ["_watch", "end"])
def test_a_canceled_roll_out_leaves_one_server(world, endpoints, model, monkeypatch, moment):
    """Canceled while it watches, or when the new version has the port and the router is to end."""
    old_folder, old = model("first")
    endpoints.deploy(old_folder, old)
    folder, new = model("second")
    trying = world.endpoints(canary_seconds=0.1)
    with monkeypatch.context() as patched:
        if moment == "_watch":
            patched.setattr(LocalEndpoints, "_watch", canceled)
        else:
            end, ends = server_process.ServerProcess.end, count()

            def end_but_not_the_second(process: server_process.ServerProcess) -> None:
                canceled() if next(ends) == 1 else end(process)

            patched.setattr(server_process.ServerProcess, "end", end_but_not_the_second)
        with pytest.raises(KeyboardInterrupt):
            trying.deploy(folder, new)
    serving = endpoints.status()
    assert serving.model_version == (old if moment == "_watch" else new).version
    assert servers_of(endpoints) == {process_of(serving)}


def canceled(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_killed_router_ends_a_roll_out_with_the_version_before(world, endpoints, model):
    old_folder, old = model("first")
    endpoints.deploy(old_folder, old)
    folder, new = model("second")
    with ThreadPoolExecutor(1) as pool:
        deploying = pool.submit(world.endpoints(canary_seconds=600.0).deploy, folder, new)
        eventually(lambda: [o for o in endpoints.observations() if o.variant.weight == 0.1])
        os.kill(process_of(endpoints.status()), signal.SIGKILL)
        with pytest.raises(EndpointError, match="the router ended while model version"):
            deploying.result()
    assert [v.model_version for v in endpoints.status().variants] == [old.version]


def test_only_the_owner_can_steer_the_router(endpoints, model):
    endpoints.split(variants_of(model, first=1, second=1))
    control = next((Path(endpoints.home) / "endpoint").glob("router-*.sock"))
    assert stat.S_IMODE(control.stat().st_mode) == 0o600


def test_no_request_is_lost_while_one_real_model_takes_over_from_another(
    tmp_path, compiled_student, other_compiled_student
):
    """From the old one to the router, and from it to the new one."""
    endpoints = LocalEndpoints(
        home=str(tmp_path / "home"),
        port=free_port(),
        workers=1,
        canary_seconds=1.0,
        alarm_low_confidence_percent=100,
    )
    offers = [{"offer_id": str(number), "shop_id": "s", "title": f"Offer {number}"} for number in range(8)]
    is_over = threading.Event()
    answers: list[list[dict]] = []

    def ask() -> None:
        while not is_over.is_set():
            answers.append(endpoints.invoke(offers))
            is_over.wait(0.01)

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
