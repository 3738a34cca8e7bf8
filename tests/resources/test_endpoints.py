"""What every endpoint promises; a further one joins by a world of its own in the fixture.

The servers are stand-ins without a model: what is tested is who serves when, and who takes over.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from ml.errors import InputError
from resources.endpoints import (
    EndpointError,
    Endpoints,
    RolledBackError,
    Variant,
    variant_name,
)
from tests.resources.endpoint_world import (
    OFFERS,
    LocalWorld,
    Model,
    World,
    eventually,
    traffic,
    variants_of,
)


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


def test_nothing_serves_before_the_first_deployment(endpoints):
    assert endpoints.status() is None
    with pytest.raises(EndpointError, match="does not answer"):
        endpoints.invoke([{"offer_id": "1", "title": "a"}])


def test_a_deployed_model_answers_and_says_what_it_is(endpoints, model):
    folder, ref = model("first")
    status = endpoints.deploy(folder, ref)
    assert (status.model_version, status.taxonomy_version) == (ref.version, "t1")
    assert [(v.name, v.weight) for v in status.variants] == [(variant_name(ref), 1.0)]
    assert endpoints.status() == status
    predictions = endpoints.invoke([{"offer_id": "2", "title": "b"}, {"offer_id": "1", "title": "a"}])
    assert [prediction["offer_id"] for prediction in predictions] == ["2", "1"]


def test_the_same_version_again_goes_on_as_it_is(endpoints, model):
    folder, ref = model("first")
    assert endpoints.deploy(folder, ref) == endpoints.deploy(folder, ref)


def test_a_new_version_takes_over_from_the_old_one(endpoints, model):
    endpoints.deploy(*model("first"))
    folder, ref = model("second")
    assert endpoints.deploy(folder, ref).model_version == ref.version
    assert {endpoints.invoke(OFFERS[:1])[0]["model_version"] for _ in range(10)} == {ref.version}


def test_a_version_that_does_not_come_up_leaves_the_old_one_serving(endpoints, model):
    old = endpoints.deploy(*model("first"))
    with pytest.raises(EndpointError, match="the weights are not what the manifest says"):
        endpoints.deploy(*model("second", "broken"))
    assert endpoints.status() == old
    assert endpoints.invoke([{"offer_id": "1", "title": "a"}])[0]["model_version"] == old.model_version


def test_refused_offers_are_an_input_error_in_the_endpoints_words(endpoints, model):
    endpoints.deploy(*model("first"))
    with pytest.raises(dg.Failure, match="offer 1 has no title") as failure:
        endpoints.invoke([{"offer_id": "1"}])
    assert not failure.value.allow_retries


def test_a_stopped_endpoint_is_gone_and_stopping_again_is_nothing(endpoints, model):
    endpoints.deploy(*model("first"))
    assert endpoints.stop()
    assert endpoints.status() is None
    assert not endpoints.stop()


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
