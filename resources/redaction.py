"""Keeping passwords out of what people see: messages, logs, files."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from urllib.parse import SplitResult, quote, urlsplit

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
_SLACK_HOOK = re.compile(r"(?<=//hooks\.slack\.com/)[^\s\"'<>)]+")
_NAMED_SECRET = re.compile(
    # Of a query the pattern above has taken care, and there a value ends at "&".
    r"(?<![?&\w.-])([\w.-]{0,100}(?:password|passwd|pwd|token|secret|credential|authorization"
    r"|(?:api|access|private|routing)[_-]?key(?:[_-]?id)?)"
    r"\\?[\"']?[ \t]*[=:][ \t]*)"
    r"(?![\"']?\$\{)"  # a reference says where the secret is, and is none
    r"(?:\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|(?:(?:Bearer|Basic|Token)[ \t]+)?\S+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\bBearer[ \t]+)[\w.~+/=-]{8,}", re.IGNORECASE)
_LEAST_SECRET_PART = 6
"""Shorter parts of a secret address are words like ``v2``: blotting those out would blot out the error."""


def without_secrets(text: str) -> str:
    """``text`` with ``***`` for what looks like a secret.

    That is user and password of every URI in it, secrets in the query of one, the path of a webhook of
    Slack, what follows a name like ``password=`` or ``"api_key":``, and bearer tokens.
    """
    text = _QUERY_SECRET.sub(r"\1***", _USER_INFO.sub("***@", text))
    return _BEARER.sub(r"\1***", _NAMED_SECRET.sub(r"\1***", _SLACK_HOOK.sub("***", text)))


def without_these(text: str, forms: Iterable[str]) -> str:
    """``text`` with ``***`` for each of ``forms``, as :func:`forms_of` gives them."""
    for form in forms:
        text = text.replace(form, "***")
    return text


def forms_of(secrets: Iterable[str]) -> list[str]:
    """``secrets`` with their encodings and, of addresses, their parts; the longest first."""
    forms: set[str] = set()
    for secret in secrets:
        parts = _address(secret)
        pieces = [secret, *(re.split(r"[/?&=;]", f"{parts.path}?{parts.query}") if parts else [])]
        pieces += [piece for piece in (parts.username, parts.password) if piece] if parts else []
        plain = {piece for piece in pieces if len(piece) >= _LEAST_SECRET_PART} | {secret}
        for piece in plain:
            encoded = base64.b64encode(piece.encode()).decode().rstrip("=")
            forms |= {piece, quote(piece), quote(piece, safe=""), encoded}
    return sorted(forms, key=len, reverse=True)


def _address(text: str) -> SplitResult | None:
    try:
        return urlsplit(text) if "://" in text else None
    except ValueError:
        return None
