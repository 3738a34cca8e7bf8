"""Keeping passwords out of what people see: messages, logs, files."""

from __future__ import annotations

import re

_USER_INFO = re.compile(
    r"(?<=://)(?:"
    r"[^\s/?#@:]*:(?!\d+[/?#])\S*"  # user:password, whatever the password holds; a port is none
    r"|[^\s/?#]*"
    r")@"
)
_QUERY_SECRET = re.compile(
    r"([?&](?:[\w-]*(?:password|passwd|token|secret|signature|(?:api|access)[_-]?key(?:[_-]?id)?|credential)"
    r"|pwd|sig|key|code|auth)=)[^&\s]+",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """``text`` with ``***`` for user and password of every URI in it, and for secrets in its query."""
    return _QUERY_SECRET.sub(r"\1***", _USER_INFO.sub("***@", text))
