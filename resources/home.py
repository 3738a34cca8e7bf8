"""A home belongs to one feed: artifacts of two feeds in one place would be trained on together."""

from __future__ import annotations

from pathlib import Path

import msgspec

from resources.atomic_files import create_once
from resources.redaction import without_secrets
from resources.settings import Settings, SettingsError


class HomeClaim(msgspec.Struct, frozen=True):
    """Content of ``feed.json``: whose home it is."""

    feed: str


def claim_home(settings: Settings) -> None:
    """Write down at first use which feed this home is for; nothing happens if it is that feed's already.

    Raises:
        SettingsError: it is another feed's home, or cannot be used as one; one line that names it.
    """
    wanted = feed_identity(settings)
    file = settings.home / "feed.json"
    try:
        owner = _owner(file)
        if owner is None:
            settings.home.mkdir(parents=True, exist_ok=True)
            # Where another process was first in this moment, its claim holds.
            if create_once(file, msgspec.json.format(msgspec.json.encode(HomeClaim(wanted)))):
                return
            owner = _owner(file)
    except OSError as error:
        raise SettingsError(
            f"OFFER_ASSETS_HOME={settings.home} cannot be used: {error}; choose a folder that can be written"
        ) from None
    if owner != wanted:
        raise SettingsError(
            f"{settings.home} holds artifacts of feed {owner}; set OFFER_ASSETS_HOME to another folder for "
            f"feed {wanted} (or delete it)"
        )


def feed_identity(settings: Settings) -> str:
    """What tells one feed from another: its place, or what the demo feed is made by; never its content."""
    if settings.is_demo:
        return f"demo seed={settings.demo_seed} offers_per_day={settings.demo_offers_per_day}"
    return without_secrets(settings.offer_feed)


def _owner(file: Path) -> str | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=HomeClaim).feed
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise SettingsError(
            f"{file} cannot be read: {error}; delete it if the artifacts beside it are of this feed"
        ) from None
