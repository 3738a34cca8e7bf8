"""Pages to who is on call."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from pydantic import SecretStr
from typing_extensions import override

from resources.alerts import Severity
from resources.channels import (
    COMMAND,
    SENDER,
    TAKEN,
    TEXT_LENGTHS,
    TITLE_LENGTH,
    HttpChannel,
    Line,
    Message,
    clean,
    links,
    one_line,
    refusal,
    shortened,
    state,
    subject,
    worst_first,
)
from resources.transport import DIRECTLY, Answer, Deadline, TransportError, Way

_PAGE_SUMMARY = 1_024
_PAGE_SIZE = 500_000
"""Bytes; PagerDuty takes 512 KB: https://developer.pagerduty.com/docs/events-api-v2-overview."""
_PAGE_LINES = 200
_DEDUP_KEY = 255
_PAGE_SEVERITY: dict[Severity, str] = {"CRITICAL": "critical", "ERROR": "error", "WARN": "warning"}


class PagerDutyChannel(HttpChannel):
    """PagerDuty's Events API v2, or a service that speaks it.

    One event per page: incidents with one page key are one alert to who is on call, resolved when the last
    of them is. An incident that opens and is resolved within one message pages nobody. Notices page too,
    and whoever is on call closes them. The dedup key makes it safe to send an event again.
    https://developer.pagerduty.com/docs/send-alert-event
    """

    def __init__(self, name: str, url: str, routing_key: SecretStr, source: str, way: Way = DIRECTLY) -> None:
        super().__init__(name, [routing_key], way)
        self._url = url
        self._routing_key = routing_key
        self._source = source

    @override
    def _hand_over(self, message: Message, deadline: Deadline) -> None:
        taken = TAKEN.of(message)
        refused: TransportError | None = None
        for event in page_events(message, self._source):
            if event["dedup_key"] in taken:
                continue
            deadline.left()
            body = {"routing_key": self._routing_key.get_secret_value(), **event}
            answer = self._post(self._url, msgspec.json.encode(body), {}, deadline)
            if answer is None:
                taken.add(event["dedup_key"])
                continue
            refused = refused or refusal(answer, _reasons_of(answer))
            if not answer.is_permanent:
                break
        if refused is not None:
            raise refused


def _reasons_of(answer: Answer) -> str:
    try:
        said = msgspec.json.decode(answer.body, type=dict[str, Any])
    except msgspec.DecodeError:
        return ""
    errors = said.get("errors")
    return "; ".join(str(each) for each in errors) if isinstance(errors, list) else ""


def page_events(message: Message, source: str) -> list[dict[str, Any]]:
    """Events that tell ``message``, the worst first, without the routing key."""
    pages: dict[str, list[Line]] = {}
    for line in message.lines:
        pages.setdefault(line.page_key or line.incident, []).append(line)
    events = [_page_event(message, source, page, lines) for page, lines in pages.items()]
    order = {"critical": 0, "error": 1, "warning": 2}
    found = [event for event in events if event is not None]
    return sorted(found, key=lambda event: order.get(event.get("payload", {}).get("severity"), 3))


def _page_event(message: Message, source: str, page: str, lines: list[Line]) -> dict[str, Any] | None:
    """What to tell of one page; nothing where it stays open and only lost some of its incidents."""
    dedup_key = _dedup_key(f"{source}:{clean(page)}")
    resolved_at = {line.incident: place for place, line in enumerate(lines) if line.kind == "resolved"}
    failing = [line for place, line in enumerate(lines) if place > resolved_at.get(line.incident, -1)]
    if not failing:
        is_open = page in message.open_page_keys
        return None if is_open else {"event_action": "resolve", "dedup_key": dedup_key}
    payload: dict[str, Any] = {
        "summary": shortened(subject(failing), _PAGE_SUMMARY),
        "source": source,
        "severity": _PAGE_SEVERITY[worst_first(failing)[0].severity],
        "custom_details": _page_details(failing),
    }
    event: dict[str, Any] = {"event_action": "trigger", "dedup_key": dedup_key, "payload": payload}
    event["client"] = SENDER
    if message.ui_url:
        event["client_url"] = message.ui_url
    if len(failing) == 1 and (found := links(failing[0])):
        event["links"] = [{"href": address, "text": name} for name, address in found.items()]
    return event


def _page_details(lines: list[Line]) -> dict[str, Any]:
    ordered = worst_first(lines)
    for text_length, shown in [*((each, len(ordered)) for each in TEXT_LENGTHS), (0, _PAGE_LINES)]:
        details: dict[str, Any] = {
            "lines": [_page_line(line, text_length) for line in ordered[:shown]],
            "all_incidents": COMMAND,
        }
        if shown < len(ordered):
            details["lines_left_out"] = len(ordered) - shown
        if len(msgspec.json.encode(details)) <= _PAGE_SIZE:
            break
    return details


def _page_line(line: Line, text_length: int) -> str:
    said = f"{state(line)}: {shortened(one_line(line.title), TITLE_LENGTH)}"
    text = shortened(one_line(line.text), text_length)
    return " | ".join(each for each in (said, text, *links(line).values()) if each)


def _dedup_key(page: str) -> str:
    if len(page) <= _DEDUP_KEY:
        return page
    return page[:180] + hashlib.sha256(page.encode()).hexdigest()
