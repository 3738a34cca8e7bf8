"""What one feed's state is filed under: two feeds in one home must never be trained on together."""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath

from resources.redaction import without_secrets
from resources.settings import Settings

_DEMO = "demo"
_READABLE_CHARACTERS = 40


def feed_name(settings: Settings) -> str:
    """Name of the configured feed, made of its place alone: the same whatever it holds.

    Artifacts are shared by all feeds of a home, for they are named by what they are made of. Which of
    them belong to a feed (its days, its evaluation set, its models) is kept under this name.
    """
    if settings.is_demo:
        return _DEMO
    place = without_secrets(settings.offer_feed)
    readable = re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(place).name).strip("-")[:_READABLE_CHARACTERS]
    return f"{readable or 'feed'}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
