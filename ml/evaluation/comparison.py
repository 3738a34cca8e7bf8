"""What a comparison of two models on a part of the offers says; evaluation writes it, the gate reads it."""

from __future__ import annotations

from typing import Literal

import msgspec

Group = Literal["overall", "country", "top_level", "change"]
"""By what offers are told apart: nothing, their country, the root above their category, or whether the
taxonomy changed at their category since the version in production."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Weighted F1 of the student minus that of the version in production, on the offers of one segment."""

    group: Group
    segment: str
    offers: int
    difference: float
    low: float
    """Lower end of the 95 % interval; those of all segments hold at once."""
    high: float

    @property
    def title(self) -> str:
        """The segment in words: ``country AT``, ``top level Garden``, ``new categories``."""
        words = {
            "overall": self.segment,
            "country": f"country {self.segment}",
            "top_level": f"top level {self.segment}",
            "change": f"{self.segment} categories",
        }
        return words[self.group]
