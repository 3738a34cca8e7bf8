"""Who hears of what: channels and the routes to them, as a TOML file says it.

The file holds no secret, only the names of the environment variables that do; ``alerts.example.toml``
explains it to people, and a test reads it.
"""

from __future__ import annotations

import difflib
import re
import ssl
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from pydantic import SecretStr

from ml.errors import InputError
from resources.alerts import SEVERITIES, Severity
from resources.channels import Channel
from resources.email_channel import EmailChannel
from resources.pagerduty_channel import PagerDutyChannel
from resources.redaction import forms_of, without_secrets, without_these
from resources.slack_channel import SlackChannel
from resources.transport import MailServer, Security, Way, trusted
from resources.webhook_channel import WebhookChannel

_REMINDER_HOURS: dict[Severity, float] = {"ERROR": 24.0, "CRITICAL": 24.0}
_SECONDS_BETWEEN_MESSAGES = 60.0
_GATHER_SECONDS = 30.0
_LEAST_BLOTTED = 6
"""Shorter values of variables are words or numbers, and would be blotted out of half the texts."""
_ALWAYS_HEARD: tuple[Severity, ...] = ("ERROR", "CRITICAL")
_PORTS: dict[Security, int] = {"starttls": 587, "tls": 465, "none": 25}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_ADDRESS = re.compile(r"[^\s@<>,;:\"()\[\]\\]+@[A-Za-z0-9.-]+")
_NAMED_ADDRESS = re.compile(rf"[^<>@\",;:\\()\[\]]+ <{_ADDRESS.pattern}>")
_HEADER = re.compile(r"[A-Za-z0-9-]+")
_OWN_HEADERS = ("content-type", "content-length", "host", "idempotency-key", "x-signature", "user-agent")

_Table = TypeVar("_Table", bound=msgspec.Struct)


class Route:
    """Incidents that a route is for, and the channels that hear of them."""

    def __init__(
        self,
        channels: Sequence[str],
        severities: Iterable[Severity] = SEVERITIES,
        groups: Iterable[str] = (),
        owners: Iterable[str] = (),
    ) -> None:
        self.channels = tuple(channels)
        self.severities = frozenset(severities)
        self.groups = frozenset(groups)
        self.owners = frozenset(owners)

    def is_for(self, severity: Severity, group: str | None, owners: Sequence[str]) -> bool:
        """Whether all that the route asks for is so; what it does not ask for may be anything."""
        return (
            severity in self.severities
            and (not self.groups or group in self.groups)
            and (not self.owners or not self.owners.isdisjoint(owners))
        )


class Routes:
    """Channels, and which of them hear of an incident."""

    def __init__(
        self,
        channels: Mapping[str, Channel] | None = None,
        routes: Sequence[Route] = (),
        default: Sequence[str] = (),
        reminder_hours: Mapping[Severity, float] = _REMINDER_HOURS,
        seconds_between_messages: float = _SECONDS_BETWEEN_MESSAGES,
        gather_seconds: float = _GATHER_SECONDS,
        ui_url: str = "",
        secrets: Iterable[str] = (),
    ) -> None:
        self.channels: dict[str, Channel] = dict(channels or {})
        self.reminder_hours: dict[Severity, float] = dict(reminder_hours)
        """Hours after which an open incident is told again, by severity; never for those not in it."""
        self.seconds_between_messages = seconds_between_messages
        self.gather_seconds = gather_seconds
        """So long news waits for more of it before it becomes a message, unless some of it is CRITICAL."""
        self.ui_url = ui_url
        self._secrets = forms_of(secrets)
        self._routes = tuple(routes)
        self._default = tuple(default)

    def channels_for(self, severity: Severity, group: str | None, owners: Sequence[str]) -> list[str]:
        """Names of the channels of all matching routes; of the default route where none matches."""
        matching = [route.channels for route in self._routes if route.is_for(severity, group, owners)]
        return list(dict.fromkeys(name for names in (matching or [self._default]) for name in names))

    def without_secrets(self, text: str) -> str:
        """``text`` without what looks like a secret, and without those that the channels use."""
        return without_secrets(without_these(text, self._secrets))


def read_routes(path: str | None, environ: Mapping[str, str], ui_url: str = "") -> Routes:
    """Routes of the TOML file ``path``.

    Args:
        path: None or empty: there are no channels, and what happens is kept in the outbox alone.
        environ: Environment variables that hold the secrets.
        ui_url: Address of the UI, for links in messages.

    Raises:
        InputError: one line that names the file and the key or variable, and never a secret.
    """
    if not path:
        return Routes(ui_url=ui_url)
    secrets: list[str] = []
    try:
        text = _text(Path(path).expanduser())
        values = [environ.get(variable, "").strip() for variable in _REFERENCE.findall(text)]
        secrets = [value for value in values if len(value) >= _LEAST_BLOTTED]
        return _routes_of(_parsed(text), environ, ui_url, secrets)
    except InputError as error:
        problem = without_secrets(without_these(str(error), forms_of(secrets)))
    # Raised out here, so that no secret hangs on it as its context.
    raise InputError(f"{path}: {problem}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("there is no such file; alerts.example.toml is one to start from") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text") from None


def _parsed(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"is not TOML: {error}") from None


class _RouteTable(msgspec.Struct, forbid_unknown_fields=True):
    channels: Annotated[list[str], msgspec.Meta(min_length=1)]
    severity: list[Severity] | None = None
    minimum_severity: Severity | None = None
    groups: list[str] = []
    owners: list[str] = []
    default: bool = False

    def route(self, place: str) -> Route:
        if self.severity is not None and self.minimum_severity is not None:
            raise InputError(f"{place} has both severity and minimum_severity; keep one")
        if self.default and (self.severity or self.minimum_severity or self.groups or self.owners):
            raise InputError(
                f"{place} is the default, for what no other route is for: it takes nothing but channels"
            )
        severities = SEVERITIES if self.severity is None else self.severity
        if self.minimum_severity is not None:
            severities = SEVERITIES[SEVERITIES.index(self.minimum_severity) :]
        return Route(self.channels, severities, self.groups, self.owners)


class _ReminderTable(msgspec.Struct, forbid_unknown_fields=True):
    WARN: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    ERROR: Annotated[float, msgspec.Meta(ge=0)] = _REMINDER_HOURS["ERROR"]
    CRITICAL: Annotated[float, msgspec.Meta(ge=0)] = _REMINDER_HOURS["CRITICAL"]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    channels: dict[str, dict[str, Any]] = {}
    routes: list[dict[str, Any]] = []
    reminders: dict[str, Any] = {}
    seconds_between_messages: Annotated[float, msgspec.Meta(ge=0)] = _SECONDS_BETWEEN_MESSAGES
    gather_seconds: Annotated[float, msgspec.Meta(ge=0)] = _GATHER_SECONDS


def _routes_of(
    file: dict[str, Any], environ: Mapping[str, str], ui_url: str, secrets: Sequence[str]
) -> Routes:
    read = _table(file, _File, "the file", environ)
    channels = {name: _channel(name, table, environ) for name, table in read.channels.items()}
    if channels and not read.routes:
        raise InputError("has channels but no [[routes]]: nobody would hear of anything; add one")
    routes: list[Route] = []
    defaults: list[Route] = []
    for number, table in enumerate(read.routes, 1):
        place = f"route {number}"
        found = _table(table, _RouteTable, place, environ)
        for name in found.channels:
            if name not in channels:
                raise InputError(
                    f"{place} names the channel {name!r}, {_not_among(name, channels, 'channels')}"
                )
        (defaults if found.default else routes).append(found.route(place))
    if len(defaults) > 1:
        raise InputError("has two default routes; keep one")
    hours = msgspec.structs.asdict(_table(read.reminders, _ReminderTable, "[reminders]", environ))
    result = Routes(
        channels,
        routes,
        default=defaults[0].channels if defaults else (),
        reminder_hours={severity: hours[severity] for severity in SEVERITIES if hours[severity]},
        seconds_between_messages=read.seconds_between_messages,
        gather_seconds=read.gather_seconds,
        ui_url=ui_url,
        secrets=secrets,
    )
    for severity in _ALWAYS_HEARD if channels else ():
        # Failed runs of several groups, sensors and sources have no group or owner.
        if not result.channels_for(severity, None, ()):
            raise InputError(
                f"has no route for {severity} without group and owner, of which nobody would hear; add "
                "[[routes]] with default = true and channels"
            )
    return result


class _SlackTable(msgspec.Struct, forbid_unknown_fields=True):
    url: SecretStr
    ca_file: str | None = None
    proxy: SecretStr | None = None

    def channel(self, name: str, place: str) -> Channel:
        _check_url(self.url.get_secret_value(), f"{place}.url", encrypted=True)
        return SlackChannel(name, self.url, _way(self.ca_file, self.proxy, place))


class _EmailTable(msgspec.Struct, forbid_unknown_fields=True, rename={"sender": "from", "recipients": "to"}):
    host: str
    sender: str
    recipients: Annotated[list[str], msgspec.Meta(min_length=1)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    tls: Security = "starttls"
    user: str | None = None
    password: SecretStr | None = None
    ca_file: str | None = None

    def channel(self, name: str, place: str) -> Channel:
        if not re.fullmatch(r"[A-Za-z0-9.:_-]+", self.host):
            raise InputError(f"{place}.host must be the name of a mail server such as smtp.example.com")
        if not (_is_address(self.sender) or _NAMED_ADDRESS.fullmatch(self.sender)):
            raise InputError(
                f"{place}.from={self.sender!r} must be an address such as Alerts <alerts@example.com>"
            )
        for recipient in self.recipients:
            if not _is_address(recipient):
                raise InputError(f"{place}.to: {recipient!r} must be an address such as you@example.com")
        self._check_login(place)
        server = MailServer(self.host, self.port or _PORTS[self.tls], self.tls, _ca_file(self.ca_file, place))
        return EmailChannel(name, server, self.sender, self.recipients, self.user, self.password)

    def _check_login(self, place: str) -> None:
        if (self.user is None) != (self.password is None):
            raise InputError(f"{place} has only one of user and password; set both or neither")
        if self.password is None:
            return
        if self.tls == "none" and self.host not in _LOOPBACK:
            raise InputError(
                f'{place} would send its password unencrypted (tls = "none"); use starttls or tls'
            )
        if not (self.password.get_secret_value().isascii() and (self.user or "").isascii()):
            raise InputError(f"{place}: user and password must be ASCII: SMTP's logins know nothing else")


class _WebhookTable(msgspec.Struct, forbid_unknown_fields=True):
    url: SecretStr
    secret: SecretStr
    headers: dict[str, SecretStr] = {}
    ca_file: str | None = None
    proxy: SecretStr | None = None

    def channel(self, name: str, place: str) -> Channel:
        _check_url(self.url.get_secret_value(), f"{place}.url", encrypted=False)
        for header, value in self.headers.items():
            if not _HEADER.fullmatch(header) or header.lower() in _OWN_HEADERS:
                raise InputError(f"{place}.headers: {header!r} is no header that can be set")
            if not re.fullmatch(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?", value.get_secret_value()):
                raise InputError(f"{place}.headers.{header} must be one line of printable ASCII")
        return WebhookChannel(
            name, self.url, self.secret, self.headers, _way(self.ca_file, self.proxy, place)
        )


class _PagerDutyTable(msgspec.Struct, forbid_unknown_fields=True):
    routing_key: SecretStr
    url: str = "https://events.pagerduty.com/v2/enqueue"
    source: Annotated[str, msgspec.Meta(min_length=1, max_length=100)] = "offer-assets"
    ca_file: str | None = None
    proxy: SecretStr | None = None

    def channel(self, name: str, place: str) -> Channel:
        _check_url(self.url, f"{place}.url", encrypted=True)
        return PagerDutyChannel(
            name, self.url, self.routing_key, self.source, _way(self.ca_file, self.proxy, place)
        )


_KINDS: dict[str, type[_SlackTable | _EmailTable | _WebhookTable | _PagerDutyTable]] = {
    "slack": _SlackTable,
    "email": _EmailTable,
    "webhook": _WebhookTable,
    "pagerduty": _PagerDutyTable,
}


_MAY_BE_PLAIN = ((_WebhookTable, "url"), *((kind, "proxy") for kind in _KINDS.values()))
"""Addresses that may hold a secret, and then must be references."""


def _channel(name: str, table: dict[str, Any], environ: Mapping[str, str]) -> Channel:
    place = f"channels.{name}"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name):
        raise InputError(f"{place}: a channel's name has letters, digits, - and _, at most 60")
    kind = table.get("type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"{place}.type must be one of {', '.join(_KINDS)}")
    keys = {key: value for key, value in table.items() if key != "type"}
    return _table(keys, _KINDS[kind], place, environ).channel(name, place)


def _table(given: dict[str, Any], kind: type[_Table], place: str, environ: Mapping[str, str]) -> _Table:
    """``given`` as ``kind``, with the secrets that it refers to."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for key in given:
        if key not in fields:
            raise InputError(f"{place} has the key {key!r}, {_not_among(key, fields, 'keys')}")
    for key, field in fields.items():
        if field.required and key not in given:
            raise InputError(f"{place} lacks the key {key}")
    filled = {
        key: _filled(
            value, fields[key].type, f"{place}.{key}", environ, may_be_plain=(kind, key) in _MAY_BE_PLAIN
        )
        for key, value in given.items()
    }
    try:
        return msgspec.convert(filled, kind)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at `$")
        key = where.rstrip("`").removeprefix(".")
    raise InputError(f"{place}: {key or 'it'} is wrong: {problem}")


def _filled(value: Any, kind: Any, place: str, environ: Mapping[str, str], *, may_be_plain: bool) -> Any:
    """``value`` with what it refers to; where ``kind`` is a secret, it must be a reference."""
    if kind in (SecretStr, SecretStr | None):
        return _secret(value, place, environ, may_be_plain=may_be_plain)
    if kind == dict[str, SecretStr] and isinstance(value, dict):
        return {key: _secret(each, f"{place}.{key}", environ) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, str, place, environ, may_be_plain=True) for each in value]
    if isinstance(value, str):
        return _REFERENCE.sub(lambda reference: _variable(reference[1], place, environ), value)
    return value


def _variable(name: str, place: str, environ: Mapping[str, str]) -> str:
    if not environ.get(name):
        raise InputError(f"{place} is to come from the environment variable {name}, which is not set")
    return environ[name].strip()


def _secret(value: Any, place: str, environ: Mapping[str, str], *, may_be_plain: bool = False) -> SecretStr:
    reference = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if reference is not None:
        return SecretStr(_variable(reference[1], place, environ))
    if may_be_plain and isinstance(value, str) and "$" not in value and without_secrets(value) == value:
        return SecretStr(value)
    key = re.sub(r"\W", "_", place.removeprefix("channels.")).upper()
    raise InputError(
        f'{place} is a secret and does not belong in a file: write {place.rpartition(".")[2]} = "${{{key}}}" '
        f"and set the environment variable {key} (any name will do)"
    )


def _not_among(name: str, known: Iterable[str], what: str) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    if not nearest:
        return f"but there are no {what}"
    return f"which is none of its {what}; did you mean {nearest[0]}? ({', '.join(known)})"


def _check_url(url: str, place: str, *, encrypted: bool) -> None:
    """Refuse what is no address to send to, without repeating it: it may be a secret."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or parts.scheme not in ("http", "https") or not re.fullmatch(r"[\x21-\x7e]+", url):
        raise InputError(f"{place} must be a whole address such as https://hooks.example.com/path")
    if parts.username is not None or parts.password is not None:
        raise InputError(f"{place} must have no user and password in it; a header can carry them")
    if encrypted and parts.scheme != "https" and host not in _LOOPBACK:
        raise InputError(f"{place} must begin with https://: what is sent there holds a secret")


def _way(ca_file: str | None, proxy: SecretStr | None, place: str) -> Way:
    if proxy is not None:
        try:
            parts = urlsplit(proxy.get_secret_value())
            right = parts.scheme == "http" and bool(parts.hostname) and parts.port is not None
        except ValueError:
            right = False
        if not right:
            raise InputError(f"{place}.proxy must be an address such as http://proxy.example.com:3128")
    return Way(_ca_file(ca_file, place), proxy)


def _is_address(text: str) -> bool:
    return text.isascii() and _ADDRESS.fullmatch(text) is not None


def _ca_file(path: str | None, place: str) -> str | None:
    if path is None:
        return None
    absolute = str(Path(path).expanduser().absolute())
    try:
        trusted(absolute)
    except (OSError, ssl.SSLError):
        raise InputError(f"{place}.ca_file={path} is not a readable file of PEM certificates") from None
    return absolute
