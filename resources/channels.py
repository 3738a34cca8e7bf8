"""How messages reach people: what a message is, what every channel does, and the words that they share.

Each channel, in a module of its own, says the same lines in its own way and within its own limits. Who
hears of what is decided by :mod:`resources.alert_routes`; when, and what is tried again, by the outbox.
What is told here comes from shops, logs and exceptions: none of it is trusted, all of it is escaped.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import msgspec
from pydantic import SecretStr

from resources.alerts import SEVERITIES, Severity
from resources.redaction import forms_of, without_secrets, without_these
from resources.transport import Answer, Deadline, TransportError, Way, post, within

SENDER = "Offer Assets"
COMMAND = "python -m offer_assets alerts"
"""Shows every incident in full."""
TITLE_LENGTH = 300
_MAX_LINK = 500
_REASON_LENGTH = 300

TEXT_LENGTHS = (10_000, 3_000, 1_000, 300, 100, 0)
"""Characters of a line's text; the first that keeps within the size is taken."""

_MESSAGES_REMEMBERED = 1_000

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
_LINK = re.compile(r"https?://[^\s<>\"'`|\\\x00-\x20\x7f-\x9f]+")
_TOKEN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")

LineKind = Literal["opened", "worse", "reminder", "resolved", "notice"]


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What a message tells about one incident."""

    kind: LineKind
    incident: str
    """Key of the incident, e.g. ``check:drift_report:volume_is_usual``."""
    number: int
    """1 for the first time that the incident opened, 2 for the second."""
    severity: Severity
    title: str
    text: str = ""
    link: str = ""
    """Absolute address of the page that shows more; empty if there is none."""
    run_link: str = ""
    """Absolute address of the run in which it was found; empty if there is none."""
    opened_at: str
    """ISO time (UTC)."""
    at: str
    """ISO time (UTC) of what is told."""
    times: int = 1
    """How often it was found so far."""
    page_key: str = ""
    """Incidents with the same one are one page to who is on call; empty: it is a page of its own."""


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What a channel is told at once."""

    id: str
    """Idempotency key: the same however often the message is tried."""
    channel: str
    lines: tuple[Line, ...]
    created_at: str
    """ISO time (UTC)."""
    open_page_keys: tuple[str, ...] = ()
    """Page keys that still have an open incident once these lines are told: they are not resolved."""
    ui_url: str = ""
    """Address of the UI; empty if it is not known."""


class ChannelError(Exception):
    """A channel did not take a message. The text is one line and holds no secret."""

    def __init__(self, line: str, *, permanent: bool = False, retry_after: float | None = None) -> None:
        super().__init__(line)
        self.permanent = permanent
        """Whether trying the same again is pointless until somebody mends something."""
        self.retry_after = retry_after
        """Seconds for which the channel asked to be left alone; None if it did not say."""


class Channel(ABC):
    """One place where people read messages."""

    def __init__(self, name: str, secrets: Sequence[SecretStr] = ()) -> None:
        self.name = name
        self._secrets = tuple(secrets)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def send(self, message: Message, seconds: float) -> None:
        """Hand ``message`` over; once this returns, the channel has taken it.

        Args:
            message: Has at least one line.
            seconds: After about so long at the latest it returns or raises.

        Raises:
            ChannelError: the channel did not take it, or not all of it; sending it again is safe.
        """
        failure: ChannelError | None = None
        try:
            within(seconds, lambda deadline: self._hand_over(message, deadline))
        except TransportError as error:
            failure = ChannelError(
                self._without_secrets(str(error)), permanent=error.permanent, retry_after=error.retry_after
            )
        # Raised out here, so that nothing hangs on it as its context.
        if failure is not None:
            raise failure

    @abstractmethod
    def _hand_over(self, message: Message, deadline: Deadline) -> None:
        """Hand ``message`` over before ``deadline``, or raise whatever is in the way."""

    def _without_secrets(self, text: str) -> str:
        text = without_these(text, forms_of(secret.get_secret_value() for secret in self._secrets))
        return shortened(one_line(without_secrets(text)), _REASON_LENGTH)


class HttpChannel(Channel):
    """A channel that is POSTed to."""

    def __init__(self, name: str, secrets: Sequence[SecretStr], way: Way) -> None:
        super().__init__(name, [*secrets, way.proxy] if way.proxy else secrets)
        self._way = way

    def _post(self, url: str, body: bytes, headers: dict[str, str], deadline: Deadline) -> Answer | None:
        """POST JSON; None if it was taken."""
        headers = {"Content-Type": "application/json", "User-Agent": "offer-assets", **headers}
        return post(url, body, headers, deadline, self._way)


def refusal(answer: Answer, reason: str = "") -> TransportError:
    """What to raise after ``answer``; ``reason`` is what may be repeated of its words."""
    line = f"answered {answer.status_line}" + (f": {reason}" if reason else "")
    if 300 <= answer.status < 400:
        line += "; redirects are not followed: set the address that it leads to"
    return TransportError(line, permanent=answer.is_permanent, retry_after=answer.retry_after)


class Taken:
    """Which parts of messages were taken already, so that another try goes on where the last one ended.

    Only in memory: after a restart the parts are sent again, with the same keys.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: OrderedDict[tuple[str, str], set[str]] = OrderedDict()

    def of(self, message: Message) -> set[str]:
        """Names of the parts of ``message``; who sends it adds to them."""
        with self._lock:
            parts = self._parts.setdefault((message.channel, message.id), set())
            while len(self._parts) > _MESSAGES_REMEMBERED:
                self._parts.popitem(last=False)
            return parts


TAKEN = Taken()


def counts(lines: Sequence[Line]) -> dict[str, int]:
    """Lines that are failing by severity, the worst first, then those resolved and the notices."""
    found = dict.fromkeys([*reversed(SEVERITIES), "resolved", "notice"], 0)
    for line in lines:
        found[kind_of(line)] += 1
    return found


def kind_of(line: Line) -> str:
    """As what a line counts: its severity while it is failing."""
    return line.kind if line.kind in ("resolved", "notice") else line.severity


def headline(lines: Sequence[Line]) -> str:
    """How much of what there is in ``lines``, e.g. ``2 ERROR, 1 resolved``."""
    return ", ".join(f"{number} {kind}" for kind, number in counts(lines).items() if number)


def subject(lines: Sequence[Line]) -> str:
    """The headline of ``lines``, and the title of the worst."""
    worst = shortened(one_line(worst_first(lines)[0].title), TITLE_LENGTH)
    return f"{headline(lines)}: {worst}" + (" …" if len(lines) > 1 else "")


def worst_first(lines: Sequence[Line]) -> list[Line]:
    """Failing lines by severity, then resolved ones, then notices; among equals as they are."""
    kinds = [*reversed(SEVERITIES), "resolved", "notice"]
    return sorted(lines, key=lambda line: kinds.index(kind_of(line)))


def state(line: Line) -> str:
    """How the incident stands, in words."""
    since = _minute(line.opened_at)
    match line.kind:
        case "worse":
            return f"{line.severity}, worse than before"
        case "reminder":
            return f"{line.severity} since {since}, found {line.times} times"
        case "resolved":
            return f"resolved, was {line.severity} since {since}"
        case "notice":
            return f"notice, {line.severity}"
        case _:
            return line.severity if line.number == 1 else f"{line.severity} again"


def _minute(moment: str) -> str:
    at = time_of(moment)
    return f"{at:%Y-%m-%d %H:%M} UTC" if at else "an unknown time"


def time_of(moment: str) -> datetime.datetime | None:
    """ISO time ``moment`` in UTC; None if it is none."""
    try:
        at = datetime.datetime.fromisoformat(moment)
    except ValueError:
        return None
    return at.replace(tzinfo=datetime.UTC) if at.tzinfo is None else at.astimezone(datetime.UTC)


def clean(text: str) -> str:
    """``text`` with plain line ends, and without what neither UTF-8 nor a terminal takes."""
    return _UNPRINTABLE.sub("\ufffd", "\n".join(text.splitlines()))


def one_line(text: str) -> str:
    """``text`` as one line, with single spaces."""
    return _UNPRINTABLE.sub("\ufffd", " ".join(text.split()))


def shortened(text: str, length: int) -> str:
    """At most ``length`` characters of ``text``; what was cut ends in …."""
    return text if len(text) <= length else text[: max(0, length - 1)] + "…" * bool(length)


def is_link(address: str) -> bool:
    """Whether ``address`` may stand as a link in a message: http(s), and nothing that ends a link early."""
    return len(address) <= _MAX_LINK and _LINK.fullmatch(address) is not None and address.isascii()


def links(line: Line) -> dict[str, str]:
    """Addresses that may stand in a message, by what is there: the page that shows more, and the run."""
    found = {"in the UI": line.link, "run": "" if line.run_link == line.link else line.run_link}
    return {name: address for name, address in found.items() if is_link(address)}


def token(identity: str) -> str:
    """``identity`` where it may stand in a header as it is, else a digest of it."""
    return identity if _TOKEN.fullmatch(identity) else hashlib.sha256(clean(identity).encode()).hexdigest()
