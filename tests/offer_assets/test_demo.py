"""The demo says what happened, as the parts that did it say, and not what should have happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from offer_assets.demo import drift_summary, tell_incidents
from offer_assets.headless import FailedCheck
from resources.alerting import OutboxAlerts
from resources.alerts import News
from resources.artifact_store import FolderArtifactStore
from resources.offer_feed import OfferFeed
from resources.tracking import MlflowTracking
from tests.receivers import HttpReceiver

DAY = "2026-11-05"
FAILED = [
    FailedCheck("drift_report", "prices_are_usual", "WARN", "dearer"),
    FailedCheck("drift_report", "volume_is_usual", "ERROR", "country IT: 0 offers"),
]
ROUTES = """
[channels.hook]
type = "webhook"
url = "{url}"
secret = "${{HOOK_SECRET}}"

[[routes]]
channels = ["hook"]
minimum_severity = "ERROR"
"""


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpReceiver]:
    monkeypatch.setenv("HOOK_SECRET", "a-secret")
    with HttpReceiver() as receiver:
        yield receiver


def alerts_to(folder: Path, receiver: HttpReceiver | None) -> OutboxAlerts:
    """Alerts that go to the receiver, or nowhere."""
    if receiver is None:
        return OutboxAlerts(home=str(folder))
    file = folder / "routes.toml"
    file.write_text(ROUTES.format(url=receiver.url))
    return OutboxAlerts(home=str(folder), routes=str(file))


def said(alerts: OutboxAlerts, *, severity: str = "CRITICAL", number: int = 1) -> str:
    """What is printed of a drifted day, once its incident was told and what is due was sent."""
    news = News(
        id=f"red {number}",
        incident="check:drift_report:volume_is_usual",
        state="failing",
        severity=severity,
        title="Check volume_is_usual of drift_report failed",
        group="operation",
    )
    told = alerts.tell([news])
    return drift_summary(DAY, FAILED, "report.html", alerts, told, alerts.deliver(5))


def test_errors_come_before_warnings_and_what_is_open_is_listed(tmp_path):
    text = said(alerts_to(tmp_path, None))
    assert text.index("ERROR  volume_is_usual: country IT") < text.index("WARN   prices_are_usual: dearer")
    assert "CRITICAL  Check volume_is_usual of drift_report failed (since " in text


def test_without_channels_it_is_kept(tmp_path):
    text = said(alerts_to(tmp_path, None))
    assert "kept in the outbox (OFFER_ASSETS_ALERT_ROUTES sends them)" in text
    assert "sent" not in text.replace("sends", "")


def test_what_a_channel_took_is_sent(tmp_path, receiver):
    text = said(alerts_to(tmp_path, receiver))
    assert "sent to hook: opened: Check volume_is_usual of drift_report failed" in text
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("mode", ["broken", "refusing"])
def test_what_a_channel_did_not_take_is_not_called_sent(tmp_path, receiver, mode):
    receiver.mode = mode
    text = said(alerts_to(tmp_path, receiver))
    assert "not taken, tried again later: hook: " in text
    assert "sent to" not in text
    assert "waiting" not in text


def test_what_no_route_is_for_is_not_called_sent(tmp_path, receiver):
    text = said(alerts_to(tmp_path, receiver), severity="WARN")
    assert "nothing was sent: no route is for it" in text
    assert receiver.requests == []


def test_what_is_still_gathered_for_one_message_is_waiting(tmp_path, receiver):
    file = alerts_to(tmp_path, receiver).routes
    Path(file).write_text(f"gather_seconds = 600\n{Path(file).read_text()}")
    text = said(OutboxAlerts(home=str(tmp_path), routes=file), severity="ERROR")
    assert "1 message waiting: `python -m offer_assets alerts --deliver` sends what is due" in text
    assert receiver.requests == []


def test_what_was_told_before_is_nothing_new(tmp_path, receiver):
    alerts = alerts_to(tmp_path, receiver)
    assert "sent to hook" in said(alerts)
    assert "nothing new: people were told when it began" in said(alerts, number=2)


def test_it_collects_and_sends_as_the_sensors_do(tmp_path, receiver):
    @dg.asset
    def offers() -> None:
        raise RuntimeError("the disk is full")

    definitions = dg.Definitions(assets=[offers], jobs=[dg.define_asset_job("ingest", [offers])])
    resources = {
        "alerts": alerts_to(tmp_path, receiver),
        "offer_feed": OfferFeed(feed=str(tmp_path / "*.csv"), first_day=DAY, home=str(tmp_path)),
        "artifact_store": FolderArtifactStore(root=str(tmp_path / "artifacts"), feed="feed"),
        "tracking": MlflowTracking(tracking_uri="", model_name=""),
    }
    with dg.DagsterInstance.ephemeral() as instance:
        job = definitions.resolve_job_def("ingest")
        job.execute_in_process(instance=instance, raise_on_error=False)
        told, delivery = tell_incidents(instance, definitions, resources)
        observed = instance.fetch_observations(dg.AssetKey("alerts"), limit=10).records
    assert len(told) == len(observed) == 1
    assert len(delivery.sent) + delivery.waiting == 1
