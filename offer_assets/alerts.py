"""Alerts at a terminal: what is open, what was, how the channels do, and sending."""

from __future__ import annotations

import datetime
import uuid

from ml.errors import InputError
from offer_assets.wording import COMMAND
from resources.alerts import Alerts, Incident, News
from resources.environment import resources_for
from resources.settings import Settings, variables

_SECONDS = 40.0
_STATES = {"open": "open", "resolved": "resolved", "notice": "noted"}


def incidents_text(settings: Settings, *, all_of_them: bool) -> str:
    """Open incidents, or all with the notices, the oldest first."""
    incidents = _alerts(settings).incidents(all_of_them=all_of_them)
    if not incidents:
        return "nothing was ever told" if all_of_them else "no incident is open (--all shows what was)"
    entries = [_entry(incident, settings.ui_url, with_state=all_of_them) for incident in incidents]
    return "\n".join([*entries, f"({COMMAND} --resolve KEY closes one by hand)"])


def channels_text(settings: Settings) -> str:
    """How every channel is doing."""
    states = _alerts(settings).channels()
    if not states:
        return (
            "there are no channels: OFFER_ASSETS_ALERT_ROUTES names no file with any (alerts.example.toml "
            "shows one), and alerts stay in the outbox"
        )
    return "\n".join(
        f"{state.channel}: {state.sent} sent, {state.waiting} waiting"
        + (f" since {_time(state.waiting_since)}" if state.waiting_since else "")
        + (f", {state.set_aside} of them refused and set aside" if state.set_aside else "")
        + (f"; not taken, tried again: {state.last_error}" if state.last_error else "")
        for state in states
    )


def deliver(settings: Settings) -> bool:
    """Send what is due; True if every channel took it."""
    delivery = _alerts(settings).deliver(_SECONDS)
    lines = [f"sent: {line}" for line in delivery.sent]
    lines += [f"not taken, tried again later: {line}" for line in delivery.failed]
    lines += [f"waiting: {delivery.waiting}"] if delivery.waiting else []
    print("\n".join(lines) or "nothing to send")
    return not delivery.failed


def send_test(settings: Settings, name: str) -> None:
    """Send a message to one channel, past the outbox.

    Raises:
        InputError: there is no such channel, or it does not take the message.
    """
    from resources.alert_routes import read_routes
    from resources.channels import ChannelError, Line, Message

    channels = read_routes(settings.alert_routes, variables(), settings.ui_url).channels
    if name not in channels:
        known = ", ".join(channels) or "none: OFFER_ASSETS_ALERT_ROUTES names no file with any"
        raise InputError(f"--send-test {name}: there is no such channel; there are: {known}")
    now = datetime.datetime.now(datetime.UTC).isoformat()
    line = Line(
        kind="notice",
        incident="test",
        number=1,
        severity="WARN",
        title="Test of Offer Assets: this channel works",
        text="Somebody asked for this message; nothing is wrong.",
        link=settings.ui_url,
        opened_at=now,
        at=now,
    )
    message = Message(
        id=f"test-{uuid.uuid4()}", channel=name, lines=(line,), created_at=now, ui_url=settings.ui_url
    )
    try:
        channels[name].send(message, _SECONDS)
    except ChannelError as error:
        raise InputError(f"{name} did not take the test message: {error}") from None
    print(f"{name} took the test message")


def resolve(settings: Settings, key: str, by: str) -> None:
    """Close an incident that nothing closes by itself, as of a check that was removed.

    Raises:
        InputError: it is not open.
    """
    alerts = _alerts(settings)
    open_keys = [incident.key for incident in alerts.incidents()]
    if key not in open_keys:
        known = ", ".join(open_keys) or "none"
        raise InputError(f"--resolve {key}: no such incident is open; open are: {known}")
    now = datetime.datetime.now(datetime.UTC).isoformat()
    news = News(
        id=f"by-hand:{key}:{now}",
        incident=key,
        state="resolved",
        text=f"Closed by {by or 'hand'}.",
        at=now,
        by_hand=True,
    )
    alerts.tell([news])
    print(f"{key} is resolved")


def _alerts(settings: Settings) -> Alerts:
    alerts: Alerts = resources_for(settings)["alerts"]
    return alerts


def _entry(incident: Incident, ui_url: str, *, with_state: bool) -> str:
    state = f"{_STATES[incident.state]:<8}  " if with_state else ""
    often = f" ({incident.times} times, last at {_time(incident.last_at)})" if incident.times > 1 else ""
    lines = [f"{_time(incident.opened_at)}  {incident.severity:<8}  {state}{incident.title}{often}"]
    lines += [f"    {incident.text}"] if incident.text else []
    run = f"/runs/{incident.run}" if incident.run else None
    pages = dict.fromkeys(filter(None, (incident.link, run)))
    lines += [f"    {ui_url.rstrip('/')}{page}" for page in pages]
    return "\n".join([*lines, f"    {incident.key}"])


def _time(at: str) -> str:
    return f"{at[:19]}Z"
