"""Messages to a server of your own."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from typing import Any

import msgspec
from pydantic import SecretStr
from typing_extensions import override

from resources.channels import (
    TEXT_LENGTHS,
    TITLE_LENGTH,
    HttpChannel,
    Line,
    Message,
    clean,
    counts,
    is_link,
    one_line,
    refusal,
    shortened,
    token,
)
from resources.transport import DIRECTLY, Deadline, Way

_WEBHOOK_SCHEMA = 1
_WEBHOOK_SIZE = 900_000
"""Bytes; nginx takes 1 MiB by default."""


class WebhookChannel(HttpChannel):
    """A POST of JSON to a server of your own, signed.

    The body, UTF-8::

        {"schema_version": 1,                    # rises when a key changes its meaning or goes
         "id": "…",                              # of the message: the same for every try
         "channel": "…", "created_at": "2026-11-21T04:00:00+00:00", "ui_url": "http://localhost:3000",
         "counts": {"CRITICAL": 0, "ERROR": 1, "WARN": 0, "resolved": 0, "notice": 0},
         "lines": [{"kind": "opened",            # or worse, reminder, resolved, notice
                    "incident": "check:drift_report:volume_is_usual", "number": 1,
                    "severity": "ERROR",         # or WARN, CRITICAL
                    "title": "…", "text": "…",   # texts end in … where the body would grow too large
                    "link": "http://…", "run_link": "http://…",   # or empty
                    "opened_at": "…", "at": "…", "times": 1, "page_key": "…"}]}

    Headers: ``Idempotency-Key`` is the id; who keeps the ids that it has seen gets every message once.
    ``X-Signature: t=<unix time>,v1=<hex>`` is the HMAC-SHA256, with the channel's secret, of the time, a
    dot and the body as it came: the scheme of https://docs.stripe.com/webhooks#verify-manually. Compare in
    constant time and refuse old times. Any 2xx means that the message was taken.
    """

    def __init__(
        self,
        name: str,
        url: SecretStr,
        secret: SecretStr,
        headers: dict[str, SecretStr] | None = None,
        way: Way = DIRECTLY,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(name, [url, secret, *(headers or {}).values()], way)
        self._url = url
        self._secret = secret
        self._headers = dict(headers or {})
        self._clock = clock

    @override
    def _hand_over(self, message: Message, deadline: Deadline) -> None:
        body = webhook_body(message)
        headers = {name: value.get_secret_value() for name, value in self._headers.items()}
        headers["Idempotency-Key"] = token(message.id)
        headers["X-Signature"] = signature(body, self._secret.get_secret_value(), int(self._clock()))
        answer = self._post(self._url.get_secret_value(), body, headers, deadline)
        if answer is not None:
            raise refusal(answer)


def webhook_body(message: Message) -> bytes:
    """``message`` as :class:`WebhookChannel` sends it."""
    for text_length in TEXT_LENGTHS:
        body = msgspec.json.encode(
            {
                "schema_version": _WEBHOOK_SCHEMA,
                "id": clean(message.id),
                "channel": message.channel,
                "created_at": message.created_at,
                "ui_url": message.ui_url,
                "counts": counts(message.lines),
                "lines": [_webhook_line(line, text_length) for line in message.lines],
            }
        )
        if len(body) <= _WEBHOOK_SIZE:
            break
    return body


def _webhook_line(line: Line, text_length: int) -> dict[str, Any]:
    said = msgspec.structs.asdict(line)
    return {key: clean(value) if isinstance(value, str) else value for key, value in said.items()} | {
        "title": shortened(one_line(line.title), TITLE_LENGTH),
        "text": shortened(clean(line.text), text_length),
        "link": line.link if is_link(line.link) else "",
        "run_link": line.run_link if is_link(line.run_link) else "",
    }


def signature(body: bytes, secret: str, at: int) -> str:
    """Value of ``X-Signature`` for ``body``, sent at unix time ``at``."""
    digest = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"
