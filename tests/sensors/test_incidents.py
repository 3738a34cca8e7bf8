"""The sensors find out, keep a history in the UI, and send; what they skip for is a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from offer_assets import policies
from resources.alerting import OutboxAlerts
from resources.alerts import ChannelState, Delivery, News
from resources.artifact_store import FolderArtifactStore
from resources.offer_feed import OfferFeed
from resources.tracking import MlflowTracking
from sensors.incidents import alert_delivery, incidents


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def alerts(tmp_path: Path) -> OutboxAlerts:
    return OutboxAlerts(home=str(tmp_path))


@dg.asset(group_name=policies.FEED, owners=[policies.DATA_TEAM])
def offers() -> None:
    """Offers."""


def tick(
    sensor: dg.SensorDefinition, instance: dg.DagsterInstance, alerts: OutboxAlerts, home: Path
) -> dg.SensorResult:
    resources: dict[str, Any] = {"alerts": alerts}
    if sensor is incidents:
        resources |= {
            "offer_feed": OfferFeed(feed=str(home / "none"), first_day="2024-01-01", home=str(home)),
            "artifact_store": FolderArtifactStore(root=str(home / "artifacts"), feed="f"),
            # Before a version is registered, it is not asked.
            "tracking": MlflowTracking(tracking_uri="http://nowhere.invalid", model_name="m"),
        }
    definitions = dg.Definitions(assets=[offers])
    with dg.build_sensor_context(instance=instance, definitions=definitions, resources=resources) as context:
        result = sensor(context)
    assert isinstance(result, dg.SensorResult)
    return result


def reason(result: dg.SensorResult) -> str:
    assert result.skip_reason is not None
    return result.skip_reason.skip_message or ""


def evaluate(instance: dg.DagsterInstance, *, passed: bool) -> None:
    instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(asset_key=offers.key, check_name="offers_are_there", passed=passed)
    )


def test_what_is_found_is_told_and_observed_once(
    instance: dg.DagsterInstance, alerts: OutboxAlerts, tmp_path: Path
) -> None:
    assert reason(tick(incidents, instance, alerts, tmp_path)) == "0 open incidents, nothing new"
    evaluate(instance, passed=False)
    result = tick(incidents, instance, alerts, tmp_path)
    assert reason(result) == "1 open incident, new: 1 failing"
    (observation,) = result.asset_events
    assert observation.asset_key.to_user_string() == "alerts"
    (incident,) = alerts.incidents()
    assert (incident.group, incident.owners) == (policies.FEED, (policies.DATA_TEAM,))
    result = tick(incidents, instance, alerts, tmp_path)
    assert (reason(result), list(result.asset_events)) == ("1 open incident, nothing new", [])
    evaluate(instance, passed=True)
    assert reason(tick(incidents, instance, alerts, tmp_path)) == "0 open incidents, new: 1 resolved"


def test_sending_says_what_was_sent_and_what_was_not(
    instance: dg.DagsterInstance, alerts: OutboxAlerts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reason(tick(alert_delivery, instance, alerts, tmp_path)) == "nothing to send"
    asked = []

    def deliver(_: OutboxAlerts, seconds: float) -> Delivery:
        asked.append(seconds)
        return Delivery(sent=("slack: offers are late",), failed=("mail: no answer",), waiting=1)

    monkeypatch.setattr(OutboxAlerts, "deliver", deliver)
    assert reason(tick(alert_delivery, instance, alerts, tmp_path)) == (
        "1 message sent: slack: offers are late; not taken, tried again later: mail: no answer; "
        "1 message waiting"
    )
    assert asked[0] < 60


def test_a_channel_that_takes_nothing_is_told_to_the_others_until_it_does(
    instance: dg.DagsterInstance, alerts: OutboxAlerts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = ChannelState(
        channel="slack",
        sent=0,
        waiting=1,
        waiting_since="2026-11-01T10:00:00+00:00",
        set_aside=0,
        last_error="answered 404 Not Found",
    )
    with monkeypatch.context() as patched:
        patched.setattr(OutboxAlerts, "channels", lambda _: [down])
        for told in (1, 0):
            assert len(list(tick(alert_delivery, instance, alerts, tmp_path).asset_events)) == told
        assert [incident.key for incident in alerts.incidents()] == ["channel:slack"]
    tick(alert_delivery, instance, alerts, tmp_path)
    assert alerts.incidents() == []


def test_what_was_told_by_others_counts_as_open(
    instance: dg.DagsterInstance, alerts: OutboxAlerts, tmp_path: Path
) -> None:
    alerts.tell([News(id="1", incident="taxonomy-unreadable", state="failing", title="t")])
    assert reason(tick(incidents, instance, alerts, tmp_path)) == "1 open incident, nothing new"


def test_both_run_from_the_start() -> None:
    for sensor in (incidents, alert_delivery):
        assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
        assert sensor.minimum_interval_seconds == 30
