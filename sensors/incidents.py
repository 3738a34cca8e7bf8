"""Something went wrong, or is over: find out, and tell people."""

import dagster as dg

from offer_assets.failed_ticks import Declared
from offer_assets.incidents import (
    COLLECTOR,
    DELIVERY,
    collect,
    look_after_channels,
    look_after_collector,
    observations,
)
from resources.alerts import Alerts, Delivery, News
from resources.artifact_store import ArtifactStore
from resources.offer_feed import OfferFeed
from resources.tracking import Tracking

_SECONDS_TO_COLLECT = 15.0
_SECONDS_TO_SEND = 40.0
"""An evaluation of a sensor is ended after 60 s."""


@dg.sensor(
    name=COLLECTOR,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Finds out what goes wrong and what is over: checks that failed or raised, failed runs, "
    "sensors and schedules, versions of the model that were refused or wait. Checks of old days do not "
    f"alert. The asset alerts has the history; {DELIVERY} sends.",
)
def incidents(
    context: dg.SensorEvaluationContext,
    alerts: Alerts,
    offer_feed: OfferFeed,
    artifact_store: ArtifactStore,
    tracking: Tracking,
) -> dg.SensorResult:
    """Read every source on; how far is kept with what was found, and not in the cursor."""
    repository = context.repository_def
    told = collect(
        context.instance,
        alerts,
        graph=repository.asset_graph if repository is not None else None,
        offer_feed=offer_feed,
        artifact_store=artifact_store,
        tracking=tracking,
        declared=_declared(context),
        seconds=_SECONDS_TO_COLLECT,
    )
    _log(context, told)
    return dg.SensorResult(skip_reason=_found(told, len(alerts.incidents())), asset_events=observations(told))


@dg.sensor(
    name=DELIVERY,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Sends what people have to be told to the channels that the routes name "
    "(OFFER_ASSETS_ALERT_ROUTES), and sends it again while a channel does not take it. Also tells if a "
    f"channel takes nothing for an hour, and if the sensor {COLLECTOR} fails.",
)
def alert_delivery(context: dg.SensorEvaluationContext, alerts: Alerts) -> dg.SensorResult:
    """One round of sending; whatever is interrupted is taken up by the next."""
    told = look_after_collector(context.instance, alerts)
    delivery = alerts.deliver(_SECONDS_TO_SEND)
    told += look_after_channels(alerts)
    _log(context, told)
    for line in delivery.failed:
        context.log.warning(f"not taken, tried again later: {line}")
    return dg.SensorResult(skip_reason=_sent(delivery), asset_events=observations(told))


def _declared(context: dg.SensorEvaluationContext) -> Declared | None:
    repository, location = context.repository_def, context.code_location_origin
    if repository is None or location is None:
        return None
    instigators = [*repository.sensor_defs, *repository.schedule_defs]
    return Declared(location.location_name, frozenset(instigator.name for instigator in instigators))


def _log(context: dg.SensorEvaluationContext, told: list[News]) -> None:
    for news in told:
        tell = context.log.info if news.state == "resolved" else context.log.warning
        tell(f"{news.state}: {news.title or news.incident}: {news.text}")


def _found(told: list[News], still_open: int) -> str:
    counted = [
        f"{count} {name}"
        for name, state in (("failing", "failing"), ("resolved", "resolved"), ("noted", "notice"))
        if (count := sum(news.state == state for news in told))
    ]
    return (
        f"{_count(still_open, 'open incident')}, {'new: ' + ', '.join(counted) if counted else 'nothing new'}"
    )


def _sent(delivery: Delivery) -> str:
    parts = []
    if delivery.sent:
        parts.append(f"{_count(len(delivery.sent), 'message')} sent: {'; '.join(delivery.sent[:5])}")
    if delivery.failed:
        parts.append(f"not taken, tried again later: {'; '.join(delivery.failed[:5])}")
    if delivery.waiting:
        parts.append(f"{_count(delivery.waiting, 'message')} waiting")
    return "; ".join(parts) or "nothing to send"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
