"""What a router is told and tells: its plan, its state, and how its owner asks it.

The router itself is :mod:`ml.serving.router`. It is asked by one JSON line over a socket that only its owner
may open, and answers with one.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ml.serving.variants import variant_of

_SECONDS_TO_TELL = 5.0


class RouterGoneError(Exception):
    """No router answers at the socket."""


class RoutedVariant(msgspec.Struct, frozen=True, kw_only=True):
    """One model behind a router."""

    model: str
    """Folder of the compiled student."""
    model_version: str
    weight: float
    """Share of the requests, in [0, 1]; of a shadow: the share of which it sees a copy."""
    is_shadow: bool = False

    @property
    def name(self) -> str:
        """See :func:`ml.serving.variants.variant_of`."""
        return variant_of(self.model_version)


class RoutePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a router starts with, and returns to when nobody tells it otherwise."""

    variants: list[RoutedVariant]


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """How are you? And where weights are given: share the requests like this for a while."""

    weights: dict[str, float] = {}
    """By the name of the variant; those that are not named get nothing."""
    seconds: float = 0.0
    """Then the weights of the plan hold again, unless they were told again: who told may be gone."""


class VariantState(msgspec.Struct, frozen=True, kw_only=True):
    """One model behind a router, and what was seen of it since the router started."""

    name: str
    model_version: str
    taxonomy_version: str
    weight: float
    """Right now."""
    is_shadow: bool
    is_up: bool
    """Whether its server lives."""
    requests: int
    errors: int
    p99_milliseconds: float | None
    offers: int
    low_confidence: int
    dropped: int
    """Copies that a shadow did not see, because it could not keep up."""


class RouterState(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of a router."""

    variants: list[VariantState] = []
    """In the order of the plan."""
    error: str = ""
    """Why the question was not understood."""


def ask(control: Path, weights: Mapping[str, float] | None = None, seconds: float = 0.0) -> RouterState:
    """Ask a router how it is; with ``weights``, have it share requests like this for ``seconds``.

    Args:
        control: Its socket.
        weights: By the name of the variant.
        seconds: How long they hold.

    Raises:
        RouterGoneError: it does not answer.
        ValueError: it did not understand the question.
    """
    question = Question(weights=dict(weights or {}), seconds=seconds)
    try:
        with socket.socket(socket.AF_UNIX) as connection, short_name(control) as name:
            connection.settimeout(_SECONDS_TO_TELL)
            connection.connect(name)
            connection.sendall(msgspec.json.encode(question) + b"\n")
            with connection.makefile("rb") as answer:
                state = msgspec.json.decode(answer.readline(), type=RouterState)
    except (OSError, msgspec.DecodeError) as error:
        raise RouterGoneError(f"no router answers at {control}: {error}") from None
    if state.error:
        raise ValueError(f"the router at {control} did not understand: {state.error}")
    return state


def listening_socket(control: Path) -> socket.socket:
    """A socket in the file system that only this user can open."""
    listener = socket.socket(socket.AF_UNIX)
    control.unlink(missing_ok=True)
    with short_name(control) as name:
        listener.bind(name)
    control.chmod(0o600)
    listener.listen()  # only now can anybody connect
    return listener


@contextmanager
def short_name(path: Path) -> Iterator[str]:
    """A name of ``path`` that fits into the 107 bytes that the system allows for a socket's."""
    if not sys.platform.startswith("linux"):
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
