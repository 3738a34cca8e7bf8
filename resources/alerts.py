"""The door to people: what somebody should look at, told once.

An alert is raised under an id. Raising it again under the same id does nothing, so that a tick or a
step that is repeated after a crash tells nobody twice.
"""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import dagster as dg
import msgspec
from typing_extensions import override

from ml.errors import InputError
from resources.atomic_files import create_once
from resources.redaction import without_secrets

Severity = Literal["WARN", "ERROR"]

_LONGEST_NAME = 200
"""Characters of an id that make a file name; file systems take 255 bytes, and a suffix is needed."""


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """Something that somebody should look at."""

    id: str
    """Of what is told: equal for equal news, at most 200 characters when quoted for a URL."""
    severity: Severity
    title: str
    """One line."""
    text: str
    """What happened, what it means and what to do next."""
    asset: str | None = None
    """Key of the asset that it is about."""
    link: str | None = None
    """Path of the page in the UI that shows more, e.g. ``/runs/<id>``."""
    raised_at: str = ""
    """ISO time in UTC; filled in when the alert is raised."""


class Alerts(dg.ConfigurableResource[Any], ABC):
    """Where alerts go."""

    @abstractmethod
    def raise_alert(self, alert: Alert) -> bool:
        """Raise ``alert`` unless one with its id was raised before.

        Passwords in its texts are blotted out. Once this returns, the alert survives a crash.

        Returns:
            Whether it is new.
        """

    @abstractmethod
    def alerts(self) -> list[Alert]:
        """All alerts, the oldest first.

        Raises:
            InputError: one cannot be read; the message names it.
        """


class OutboxAlerts(Alerts):
    """One file per alert under ``<home>/outbox``, written once and never changed."""

    home: str

    @override
    def raise_alert(self, alert: Alert) -> bool:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        told = msgspec.structs.replace(
            alert,
            title=without_secrets(alert.title),
            text=without_secrets(alert.text),
            raised_at=alert.raised_at or now,
        )
        file = self._folder / f"{_file_name(alert.id)}.json"
        if file.exists():
            return False
        self._folder.mkdir(parents=True, exist_ok=True)
        return create_once(file, msgspec.json.format(msgspec.json.encode(told)))

    @override
    def alerts(self) -> list[Alert]:
        found = [_read(file) for file in self._folder.glob("*.json") if not file.name.startswith(".")]
        return sorted(found, key=lambda alert: (alert.raised_at, alert.id))

    @property
    def _folder(self) -> Path:
        return Path(self.home).absolute() / "outbox"


def _file_name(alert_id: str) -> str:
    name = quote(alert_id, safe=" @:=+,")
    if not name or len(name) > _LONGEST_NAME:
        raise ValueError(f"an alert's id has 1 to {_LONGEST_NAME} characters when quoted, not {len(name)}")
    # A dot in front would make it a hidden file, which is what unfinished ones are.
    return "%2E" + name[1:] if name.startswith(".") else name


def _read(file: Path) -> Alert:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Alert)
    except msgspec.DecodeError as error:
        raise InputError(f"{file} is not an alert: {error}; delete it") from None
