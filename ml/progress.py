"""How a stage tells people where it is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0

Listener = Callable[[str], None]


class Progress:
    """Reports of one stage; ``listener`` gets the same lines (the UI's log, for instance)."""

    def __init__(self, stage: str, listener: Listener | None = None) -> None:
        self._stage = stage
        self._listener = listener
        self._is_terminal = sys.stderr.isatty()

    def say(self, message: str) -> None:
        """One line, at once."""
        tqdm.write(f"{self._stage}: {message}", file=sys.stderr)
        if self._listener is not None:
            self._listener(message)

    def figures(self, point: Mapping[str, int | float]) -> None:
        """A point of a learning curve, as soon as it is known; who watches a training may end it."""

    @contextmanager
    def bar(self, what: str, total: int | None, unit: str, done: int = 0) -> Iterator[Bar]:
        """A counter over ``total`` units (None: unknown), of which ``done`` were done before."""
        bar = Bar(self, what, total, unit, done, draws=self._is_terminal)
        try:
            yield bar
        finally:
            bar.close()


class Silence(Progress):
    """Tells nobody: another process that does the same work speaks for it."""

    def __init__(self, stage: str) -> None:
        super().__init__(stage)
        self._is_terminal = False

    def say(self, message: str) -> None:
        """Nothing."""


class Bar:
    """One counter of a :class:`Progress`."""

    def __init__(
        self, progress: Progress, what: str, total: int | None, unit: str, done: int, *, draws: bool
    ) -> None:
        self._progress = progress
        self._what = what
        self._unit = unit
        self._started_at = self._last_line_at = time.monotonic()
        self._done_before = done
        self._tqdm = tqdm(
            total=total, initial=done, unit=unit, desc=what, file=sys.stderr, leave=False, disable=not draws
        )
        self._total = total
        self._done = done

    def update(self, units: int, **figures: Any) -> None:
        """Count ``units`` more; ``figures`` are shown beside (``loss=1.2``)."""
        self._done += units
        self._tqdm.update(units)
        if figures:
            self._tqdm.set_postfix(figures, refresh=False)
        now = time.monotonic()
        if now - self._last_line_at >= _SECONDS_BETWEEN_LINES:
            self._last_line_at = now
            self._line(now, figures)

    def close(self) -> None:
        """Take the bar off the terminal."""
        self._tqdm.close()

    def _line(self, now: float, figures: dict[str, Any]) -> None:
        rate = (self._done - self._done_before) / max(now - self._started_at, 1e-9)
        text = f"{self._what} {self._done:,}"
        if self._total:
            left = (self._total - self._done) / rate if rate else float("inf")
            text += f" of {self._total:,} {self._unit} ({self._done / self._total:.0%}), {left:,.0f} s left"
        else:
            text += f" {self._unit}"
        text += f", {rate:,.0f}/s"
        for name, value in figures.items():
            text += f", {name} {value:.4g}" if isinstance(value, float) else f", {name} {value}"
        self._progress.say(text)
