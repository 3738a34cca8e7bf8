"""How news is worded: one line of an error, sentences in a row, times."""

from __future__ import annotations

import datetime
from typing import Any

import dagster as dg

from resources.redaction import without_secrets

COMMAND = "python -m offer_assets alerts"
"""What people type to see and close incidents."""

_LONGEST_LINE = 500


def failure_line(failure: Any) -> str:
    """The line of a failed step that is meant for people: its own, or that of its innermost error."""
    described = failure.user_failure_data
    if described is not None and described.description:
        return _first_line(described.description)
    return error_line(failure.error)


def error_line(error: Any) -> str:
    """The first line of the innermost error, without secrets; a trace is in the log."""
    while error is not None and error.cause is not None:
        error = error.cause
    return _first_line(error.message) if error is not None else "no error was reported"


def _first_line(text: str) -> str:
    line = without_secrets(text.strip().split("\n", maxsplit=1)[0])
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 1] + "…"


def exception_line(error: Exception) -> str:
    """The first line of an exception, without secrets."""
    text = error.description if isinstance(error, dg.Failure) and error.description else str(error)
    return _first_line(text) or type(error).__name__


def sentences(*texts: str) -> str:
    """The texts in a row, each with an end."""
    ended = [
        text if text.rstrip().endswith((".", "!", "?", ")")) else f"{text.rstrip()}."
        for text in texts
        if text
    ]
    return " ".join(ended)


def capital(text: str) -> str:
    """With a capital letter."""
    return text[:1].upper() + text[1:]


def iso(at: float) -> str:
    """Unix time as ISO time (UTC)."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat()


def unix(at: str) -> float:
    """ISO time as Unix time; without a zone it is UTC."""
    time = datetime.datetime.fromisoformat(at)
    return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()
