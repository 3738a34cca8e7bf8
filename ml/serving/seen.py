"""What a router saw of one variant: requests, server errors, latency, offers. In constant memory."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping

from ml.serving.variants import OFFERS_HEADER

_GROWTH = 1.05
"""Latencies are counted in buckets, each so much wider than the one before: a quantile is within 2.5 %,
whatever the scale, and nothing is forgotten, as the slowest hundredth would be by a sample of them."""

_LEAST_MILLISECONDS = 0.01
_QUANTILE = 0.99
_SERVER_ERROR = 500


class Seen:
    """Counts since the variant got its share."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.requests = 0
        """Begun, answered or not."""
        self.errors = 0
        """Ended in a server error, or in nothing."""
        self.offers = 0
        self.low_confidence = 0
        self._clock = clock
        self._latencies: Counter[int] = Counter()
        self._under_way: dict[int, float] = {}

    def begin(self) -> int:
        """A request goes out; returns its number for :meth:`end`."""
        self.requests += 1
        self._under_way[self.requests] = self._clock()
        return self.requests

    def end(self, request: int, status: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        """It was answered with ``status``, or (None) it never will be."""
        self._latencies[_bucket(self._clock() - self._under_way.pop(request))] += 1
        self.errors += status is None or status >= _SERVER_ERROR
        offers, _, low_confidence = (headers or {}).get(OFFERS_HEADER, "").partition(";")
        if offers.isdecimal() and low_confidence.isdecimal():
            self.offers += int(offers)
            self.low_confidence += int(low_confidence)

    def p99_milliseconds(self) -> float | None:
        """A hundredth of the requests took longer; None before the first.

        What is still under way counts with its time so far: a variant that hangs would look idle. Of fewer
        than a hundred requests it is the second slowest, so that one alone raises no alarm.
        """
        now = self._clock()
        counts = self._latencies + Counter(_bucket(now - began) for began in self._under_way.values())
        rank = math.floor(_QUANTILE * (counts.total() - 1))
        for bucket in sorted(counts):
            rank -= counts[bucket]
            if rank < 0:
                return float(_GROWTH ** (bucket - 0.5))
        return None


def _bucket(seconds: float) -> int:
    return math.ceil(math.log(max(seconds * 1000, _LEAST_MILLISECONDS), _GROWTH))
