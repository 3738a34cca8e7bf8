"""Messages in Slack."""

from __future__ import annotations

import html
import re
from typing import Any

import msgspec
from pydantic import SecretStr
from typing_extensions import override

from resources.channels import (
    COMMAND,
    SENDER,
    TITLE_LENGTH,
    HttpChannel,
    Line,
    Message,
    headline,
    is_link,
    kind_of,
    links,
    one_line,
    refusal,
    state,
    subject,
    worst_first,
)
from resources.transport import DIRECTLY, Deadline, Way

_SLACK_TEXT = 40_000
"""Characters of one message: https://docs.slack.dev/reference/methods/chat.postMessage#truncating."""
_SLACK_SECTION = 3_000
"""Characters of one block: https://docs.slack.dev/reference/block-kit/blocks/section-block."""
_SLACK_TITLE = 200
_SLACK_DETAILS = ((600, True), (150, True), (0, True), (0, False))
"""Characters of a line's text, and whether it has links; the first that lets all lines in is taken."""
_SLACK_SHORT_TITLES = (120, 80, 60, 40)
_SLACK_SIGNS = {
    "CRITICAL": ":rotating_light:",
    "ERROR": ":red_circle:",
    "WARN": ":large_yellow_circle:",
    "resolved": ":large_green_circle:",
    "notice": ":information_source:",
}
_SLACK_REASON = re.compile(r"[a-z_]{3,60}")
"""Slack's own reasons, e.g. ``no_service``; anything else that it answers is not repeated."""


class SlackChannel(HttpChannel):
    """A Slack incoming webhook (https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks).

    Slack knows no idempotency key: a message whose answer got lost is posted twice.
    """

    def __init__(self, name: str, url: SecretStr, way: Way = DIRECTLY) -> None:
        super().__init__(name, [url], way)
        self._url = url

    @override
    def _hand_over(self, message: Message, deadline: Deadline) -> None:
        body = msgspec.json.encode(slack_body(message))
        answer = self._post(self._url.get_secret_value(), body, {}, deadline)
        if answer is not None:
            reason = answer.body.decode("ascii", "replace").strip()
            raise refusal(answer, reason if _SLACK_REASON.fullmatch(reason) else "")


def slack_body(message: Message) -> dict[str, Any]:
    """``message`` as one Slack message, whatever the number of its lines: the more, the less of each."""
    first = f"*{SENDER}: {headline(message.lines)}*"
    shown, note = _slack_lines(message, _SLACK_TEXT - _units(first) - 2)
    sections = [first]
    for line in (*shown, *([note] if note else [])):
        if _units(sections[-1]) + 1 + _units(line) <= _SLACK_SECTION:
            sections[-1] += f"\n{line}"
        else:
            sections.append(line)
    return {
        "text": f"{SENDER}: {_slack_text(subject(message.lines), TITLE_LENGTH)}",
        "blocks": [{"type": "section", "text": {"type": "mrkdwn", "text": text}} for text in sections],
        "unfurl_links": False,
    }


def _slack_lines(message: Message, limit: int) -> tuple[list[str], str]:
    """Lines that together have at most ``limit`` characters, and the note that says what is not in them."""
    lines = worst_first(message.lines)
    where = f"`{COMMAND}`" + (f" and {_slack_link(message.ui_url, 'the UI')}" if message.ui_url else "")
    styles = [(_SLACK_TITLE, *detail) for detail in _SLACK_DETAILS]
    styles += [(title, 0, False) for title in _SLACK_SHORT_TITLES]
    for number, style in enumerate(styles):
        shown = [_slack_line(line, *style) for line in lines]
        note = f"Shortened; all of it: {where}" if number else ""
        if sum(_units(line) + 1 for line in shown) + _units(note) <= limit:
            return shown, note
    fitting = 0
    limit -= _units(where) + 60
    while fitting < len(shown) and (limit := limit - _units(shown[fitting]) - 1) >= 0:
        fitting += 1
    return shown[:fitting], f"… and {len(shown) - fitting} more lines, left out here; all of them: {where}"


def _slack_line(line: Line, title_length: int, text_length: int, linked: bool) -> str:
    title = _slack_text(one_line(line.title), title_length)
    found = links(line) if linked else {}
    if "in the UI" in found:
        title = _slack_link(line.link, title)
    said = f"{_SLACK_SIGNS[kind_of(line)]} *{state(line)}* {title}"
    if "run" in found:
        said += f" ({_slack_link(line.run_link, 'run')})"
    text = _slack_text(one_line(line.text), text_length)
    return f"{said}\n>{text}" if text_length and text else said


def _slack_text(text: str, limit: int) -> str:
    """``text`` escaped as Slack wants it (&, < and >), at most ``limit`` characters of it."""
    whole = html.escape(text, quote=False)
    if _units(whole) <= limit:
        return whole
    room = limit - 1
    kept = ""
    for character in text[:limit]:
        escaped = html.escape(character, quote=False)
        room -= _units(escaped)
        if room < 0:
            break
        kept += escaped
    return f"{kept}…"


def _slack_link(address: str, escaped: str) -> str:
    if not is_link(address) or "|" in address:
        return escaped
    return f"<{html.escape(address, quote=False)}|{escaped or 'link'}>"


def _units(text: str) -> int:
    """Length of ``text`` in UTF-16: the longest that anybody counts."""
    return len(text.encode("utf-16-le")) // 2
