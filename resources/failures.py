"""How the reader's own mistakes look in the UI: one line, no traceback, no retry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from ml.errors import InputError


class InputFailure(dg.Failure, InputError):
    """An ``InputError`` as Dagster shows it well; still one for who catches those."""

    def __init__(self, line: str) -> None:
        super().__init__(line, allow_retries=False)


@contextmanager
def input_errors_fail_plainly() -> Iterator[None]:
    """Turn an ``InputError`` into a Dagster failure that is not retried. Also a decorator.

    Raises:
        InputFailure: with the error's one line.
    """
    try:
        yield
    except InputFailure:
        raise
    except InputError as error:
        raise InputFailure(str(error)) from None
