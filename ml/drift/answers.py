"""What monitoring says of a day: one answer per question, in words and numbers.

Only the form; how an answer is found is :mod:`ml.drift.series` (statistics), what is measured is
:mod:`ml.drift.measures`.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import pyarrow as pa

Level = Literal["OK", "WARN", "ERROR", "UNKNOWN"]
"""UNKNOWN: there is too little to tell, which is not the same as OK."""

Kind = Literal["share", "count", "number"]
"""A share of offers, a number of offers, or the mean of a number over offers."""

_SERIES_COLUMNS: dict[str, pa.DataType] = {
    "day": pa.string(),  # ISO date
    "question": pa.string(),
    "measure": pa.string(),  # in words, e.g. "title length"
    "group": pa.string(),  # "" for all offers, or e.g. "country DE"
    "segment": pa.string(),  # value or range whose share it is; "" for counts of all and for numbers
    "kind": pa.string(),  # of :data:`Kind`
    "value": pa.float64(),  # share 0..1, count, or mean
    "offers": pa.float64(),  # behind a share or mean; of a count, the count
    "deviation": pa.float64(),  # of a mean: standard deviation of one offer's number; else null
}
SERIES_SCHEMA = pa.schema(_SERIES_COLUMNS)
"""One row per series and day. A series is told by question, measure, group and segment."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is asked of every day; also the name of its asset check."""

    name: str
    """A proposition, e.g. ``volume_is_usual``."""
    title: str
    """In words, e.g. "offers per country and shop"."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One series that is not what the reference lets expect."""

    question: str
    measure: str
    group: str
    segment: str
    level: Level
    value: float
    usual: float
    usual_low: float
    usual_high: float
    """Range that the series leaves by chance once in as many days as the level allows."""
    effect: float
    """How far it moved, in the measure that the limits of the question are given in."""
    p_value: float
    """Corrected for all series of the question."""
    days: int
    """1, or the length of the window over which it was found."""
    sentence: str
    """What moved, by how much and for which segment."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one question."""

    question: str
    title: str
    level: Level
    sentence: str
    series: int
    """How many series were tested."""
    findings: list[Finding]
    """The strongest first, at most 20; :attr:`found` counts all."""
    found: int
    picture: str = ""
    """File name of its plot in the artifact; empty for none."""


class DistanceOfColumn(msgspec.Struct, frozen=True, kw_only=True):
    """Evidently's distance (PSI) of one column between the day and the reference."""

    column: str
    distance: float
    usual_high: float
    """What the days of the reference stay below among themselves."""


class DayReport(msgspec.Struct, frozen=True, kw_only=True):
    """Content of ``drift.json``."""

    day: str
    offers: int
    """Clean offers of the day."""
    offers_looked_at: int
    """Those of the sample that titles, prices and predictions were measured on."""
    reference_days: int
    reference_offers: int
    weekdays_allowed_for: bool
    """Whether the reference is long enough to know its weekdays."""
    sentence: str
    answers: list[Answer]
    columns: list[DistanceOfColumn]


LEVELS: dict[Level, int] = {"OK": 0, "UNKNOWN": 1, "WARN": 2, "ERROR": 3}
"""As numbers, for the metrics of the artifact (``level_<question>``)."""
