"""The router: who gets which request, what it passes on, how it is steered and how it ends.

The servers behind it are those of ``tests.resources.stand_in_server``, which answer without a model.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml import __main__ as command_line
from ml.artifacts import read_manifest, short_version, write_manifest
from ml.serving.app import MAX_BODY_BYTES
from ml.serving.routing import RoutedVariant, RoutePlan, RouterGoneError, ask
from ml.serving.seen import Seen
from ml.serving.shares import BLOCK, Shares
from ml.serving.variants import INVOKED_VARIANT_HEADER, OFFERS_HEADER, TARGET_VARIANT_HEADER
from tests import plain_http

PROGRAM = "tests.resources.stand_in_server"
OFFERS = {"offers": [{"offer_id": "1", "title": "a"}]}

weights = st.lists(st.integers(0, 100), min_size=1, max_size=6).filter(any)


@settings(max_examples=30)  # up to 500 choices each
@given(weights, st.integers(1, 5), st.randoms(use_true_random=False))
def test_in_every_block_each_variant_gets_its_share(weights, blocks, generator):
    shares = Shares(weights, generator)
    for _ in range(blocks):
        counts = Counter(shares.next() for _ in range(BLOCK))
        for index, weight in enumerate(weights):
            assert abs(counts[index] - BLOCK * weight / sum(weights)) < 2
            assert weight or not counts[index]


def test_whole_percents_are_kept_exactly_and_in_no_fixed_order():
    shares = Shares([90, 10], random.Random(3))
    blocks = [[shares.next() for _ in range(BLOCK)] for _ in range(3)]
    assert [block.count(1) for block in blocks] == [10, 10, 10]
    assert blocks[0] != blocks[1]


@given(st.lists(st.floats(0.0001, 100), min_size=1, max_size=300))
def test_the_slowest_hundredth_is_known_to_five_percent(seconds):
    now = [0.0]
    seen = Seen(lambda: now[0])
    for duration in seconds:
        request = seen.begin()
        now[0] += duration
        seen.end(request, 200)
    expected = 1000 * sorted(seconds)[int(0.99 * (len(seconds) - 1))]
    assert seen.p99_milliseconds() == pytest.approx(expected, rel=0.05)


def test_what_hangs_counts_with_its_time_so_far():
    now = [0.0]
    seen = Seen(lambda: now[0])
    assert seen.p99_milliseconds() is None
    for _ in range(5):
        seen.begin()
    now[0] = 7.0
    assert seen.p99_milliseconds() == pytest.approx(7000, rel=0.05)


def test_server_errors_and_offers_are_counted_whatever_the_header_says():
    seen = Seen()
    for status, header in ((200, "20;5"), (200, ""), (200, "many;few"), (400, "1;1"), (500, ""), (None, "")):
        seen.end(seen.begin(), status, {OFFERS_HEADER: header})
    assert (seen.requests, seen.errors, seen.offers, seen.low_confidence) == (6, 2, 21, 6)


class Router:
    """A router process with stand-in servers."""

    def __init__(self, folder: Path, shares: dict[str, float], **behaviours: str) -> None:
        self.control = folder / "control.sock"
        self.versions: dict[str, str] = {}
        variants = [
            self._variant(folder / name, share, behaviours.get(name, "answer"))
            for name, share in shares.items()
        ]
        plan, state_file = folder / "plan.json", folder / "state.json"
        plan.write_bytes(msgspec.json.encode(RoutePlan(variants=variants)))
        command = [sys.executable, "-m", PROGRAM, "route", "--plan", str(plan), "--port", "0"]
        command += ["--control", str(self.control), "--state-file", str(state_file)]
        command += ["--program", PROGRAM, "--workers", "1", "--timeout", "20"]
        self.process = subprocess.Popen(command)
        eventually(state_file.exists)
        state = json.loads(state_file.read_bytes())
        self.url, self.servers = state["url"], state["workers"]

    def _variant(self, folder: Path, share: float, behaviour: str) -> RoutedVariant:
        folder.mkdir()
        (folder / "behaviour").write_text(behaviour)
        (folder / "name").write_text(folder.name)
        write_manifest(
            folder,
            kind="compiled_student",
            key=folder.name,
            inputs={},
            code_version="1",
            code_revision=None,
            parameters={},
            metrics={},
            seconds=0.1,
        )
        self.versions[folder.name] = short_version(read_manifest(folder).digest)
        return RoutedVariant(model=str(folder), model_version=self.versions[folder.name], weight=share)

    def post(self, content: bytes = json.dumps(OFFERS).encode(), **headers: str) -> httpx.Response:
        return plain_http.post(f"{self.url}/invocations", content=content, headers=headers, timeout=60)

    def answered_by(self, requests: int) -> Counter[str]:
        names = {version: name for name, version in self.versions.items()}
        with plain_http.Client() as client:
            answers = [client.post(f"{self.url}/invocations", json=OFFERS).json() for _ in range(requests)]
        return Counter(names[answer["predictions"][0]["model_version"]] for answer in answers)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    router = Router(tmp_path_factory.mktemp("router"), {"first": 0.75, "second": 0.25})
    yield router
    router.process.terminate()
    assert router.process.wait(30) == 0


def eventually(look: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def test_a_router_shares_requests_exactly_and_says_who_answered(router):
    assert router.answered_by(BLOCK) == {"first": 75, "second": 25}
    answer = router.post()
    (prediction,) = answer.json()["predictions"]
    assert answer.headers[INVOKED_VARIANT_HEADER] == f"model-{prediction['model_version']}"
    assert answer.headers[OFFERS_HEADER] == "1;0"
    ping = plain_http.get(f"{router.url}/ping").json()
    assert (ping["status"], ping["model_version"]) == ("ok", router.versions["first"])


def test_refusals_of_a_server_are_passed_on_and_are_no_errors_of_it(router):
    answer = router.post(b'{"offers": [{"offer_id": "1"}]}')
    assert (answer.status_code, answer.json()) == (400, {"error": "offer 1 has no title"})
    answer = router.post(**{TARGET_VARIANT_HEADER: "model-unknown"})
    assert answer.status_code == 400
    assert "there is no variant model-unknown here" in answer.json()["error"]
    assert [variant.errors for variant in ask(router.control).variants] == [0, 0]


def test_a_body_over_the_limit_is_413_before_any_server_sees_it(router):
    before = sum(variant.requests for variant in ask(router.control).variants)
    frame = len(b'{"offers":[{"offer_id":"1","title":""}]}')
    body = b'{"offers":[{"offer_id":"1","title":"%s"}]}' % (b"a" * (MAX_BODY_BYTES - frame))
    assert router.post(body).status_code == 200
    assert router.post(body + b" ").status_code == 413
    assert sum(variant.requests for variant in ask(router.control).variants) == before + 1


def test_weights_that_are_told_hold_for_their_time_only(router):
    name = f"model-{router.versions['second']}"
    state = ask(router.control, {name: 1.0}, seconds=3.0)
    assert [variant.weight for variant in state.variants] == [0.0, 1.0]
    assert router.answered_by(5) == {"second": 5}
    eventually(lambda: [v.weight for v in ask(router.control).variants] == [0.75, 0.25])
    for nonsense in ({"model-unknown": 1.0}, {name: 0.0}, {name: -1.0}):
        with pytest.raises(ValueError, match="did not understand"):
            ask(router.control, nonsense, seconds=1.0)


def test_a_router_that_ends_answers_what_it_has_begun_and_takes_its_servers_along(tmp_path):
    router = Router(tmp_path, {"first": 1.0, "second": 0.0}, first="slow")
    with ThreadPoolExecutor(4) as pool:
        under_way = [pool.submit(router.post) for _ in range(4)]
        eventually(lambda: ask(router.control).variants[0].requests == 4)
        router.process.send_signal(signal.SIGTERM)
        assert [request.result().status_code for request in under_way] == [200] * 4
    assert router.process.wait(30) == 0
    assert not [pid for pid in router.servers if Path(f"/proc/{pid}").exists()]
    with pytest.raises(RouterGoneError):
        ask(router.control)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (None, "no such file"),
        (b"[]", "Expected `object`"),
        (b'{"variants": []}', "no variant has a share of the requests"),
    ],
)
def test_a_plan_that_is_none_is_one_line(tmp_path, capsys, plan, said):
    if plan is not None:
        (tmp_path / "plan.json").write_bytes(plan)
    arguments = ["route", "--plan", str(tmp_path / "plan.json"), "--port", "0"]
    arguments += ["--control", str(tmp_path / "c.sock"), "--state-file", str(tmp_path / "state.json")]
    assert command_line.main(arguments) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
