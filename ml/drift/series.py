"""Whether a day's series are what the days of the reference let expect.

One series is one number per day: a share of offers, a count of offers, or the mean of a number. Days differ
for two reasons. Offers are drawn (known from their number), and days differ (shops send more or less; only
the reference can tell). A test that knows of the first alone finds "drift" every day, because with thousands
of offers everything is significant; and a reference of some days tells little of the second for a single
series, but much for all series of a measure together. Hence, per series:

0. **Bad days**: an outage that the reference holds is not to make the next one usual, so a day that is far
   from what the series is on the others counts as one at the edge of it (:func:`_without_bad_days`).
1. **Expectation**: weighted mean of the reference days. Where the reference has every weekday at least twice,
   the expectation is the weekday's, pulled towards the mean as far as weekdays explain no more than chance
   would (positive-part James-Stein; Efron & Morris 1973).
2. **Residual** of each day on a scale on which its standard deviation is one if days differ as they do in the
   measure as a whole: the variance-stabilising transform of an overdispersed binomial (shares), of a negative
   binomial (counts; Anscombe 1948), or a plain difference (numbers).
3. **Moderated variance**: the series' own mean square of residuals, pulled towards that of the measure's
   other series (Smyth 2004, limma; of dispersions Lund et al. 2012, edgeR's quasi-likelihood). How strongly
   is estimated from how alike the series are, and bounded by how many independent ones there are.
   What is supposed of days in general (:data:`ml.drift.questions.BETWEEN_DAYS`) counts as some days of
   reference, so that a reference of one day gives wide, finite ranges.
4. **Tests**: t of the day, and of the mean of the last week, whose days are taken as correlated. Of small
   counts, also the exact test of two rates (Przyborowski & Wilenski 1940): the greater p-value holds, because
   no transform makes three offers normal.
5. **Levels**: Holm's correction (1979) over all series and both windows of a question, at a chance of false
   alarms that the questions share equally; and an effect that is large enough to matter, in a
   direction that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from itertools import pairwise
from typing import Any, cast, get_args

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy import special, stats

from ml.drift.answers import LEVELS, SERIES_SCHEMA, Finding, Kind, Level
from ml.drift.questions import (
    COMPLETENESS,
    LIMITS,
    MEASURED_ON_SOME,
    NAMES,
    PRICE_OVER_USUAL,
    QUESTIONS,
    SHOP_MIX,
    SPANS,
    TAXONOMY_IN_FORCE,
    UNITS,
    LeastEffect,
    Limits,
)

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

EXPECTATION_SCHEMA = pa.schema(
    dict[str, pa.DataType](
        day=pa.string(),
        question=pa.string(),
        measure=pa.string(),
        group=pa.string(),
        segment=pa.string(),
        kind=pa.string(),
        value=pa.float64(),  # null where the day has no such series
        expected=pa.float64(),
        low=pa.float64(),
        high=pa.float64(),
    )
)
"""One row per series and day, for plots. A value outside of ``low`` and ``high`` is a WARN, if the effect is
large enough."""

_KINDS: tuple[Kind, ...] = get_args(Kind)
_KEY = ("question", "measure", "group", "segment", "kind")
_WEEKDAYS = 7
_LEAST_COUNT = 5.0
"""Expected offers below which a series tells nothing of how much days differ."""
_OWN_DAYS = 4.0
"""Days of reference that the measure counts as for a series, at least: one measure's series are alike."""
_MOST_DECIMALS = 6
"""Of a figure in a sentence."""
_NARROWER_FIRST = 1.25
"""How much more a finding of one country or shop counts in the order of findings. What moved in one country
alone moves all offers by as much times its part, and the country is what a person has to be told."""
_ANSCOMBE = 3 / 8
"""Added to counts before they are transformed (Anscombe 1948)."""


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What is found of one question."""

    question: str
    level: Level
    """UNKNOWN where no series could be tested."""
    series: int
    """How many series were tested."""
    findings: list[Finding]
    """All of them, the strongest first."""


def judge(
    day: str,
    today: pa.Table,
    reference: pa.Table,
    earlier: Sequence[pa.Table] = (),
    limits: Limits = LIMITS,
) -> dict[str, Judgement]:
    """Hold the series of a day against those of the reference.

    Args:
        day: ISO date of the day.
        today: Its series (``SERIES_SCHEMA``).
        reference: Series of the days of the reference, made by the same frame.
        earlier: Series of days before this one, made by the same frame. Those of the six days before count
            towards the mean of the last week; others are left out.
        limits: When a day is not usual.

    Returns:
        For every question of :data:`ml.drift.questions.QUESTIONS`, by name, in their order. A series that
        either side does not have is a share of zero, or a count of zero, where that side has other segments
        of the same measure and group; otherwise it is not tested, and is a finding where the reference has
        it on every day and today's offers of the group are enough (:func:`_vanished`).
    """
    judgements = {}
    grid = _Grid.of(day, today, reference, earlier, limits)
    of_group = _offers_of_groups(grid)
    for question in QUESTIONS:
        part = grid.of_question(question.name)
        if question.name == TAXONOMY_IN_FORCE:
            judgements[question.name] = _taxonomy_in_force(part, limits)
        else:
            vanished = _vanished(question.name, part, of_group, limits)
            judgements[question.name] = _judgement(question.name, part, vanished, limits)
    return judgements


def expectations(
    question: str,
    day: str,
    today: pa.Table,
    reference: pa.Table,
    earlier: Sequence[pa.Table] = (),
    limits: Limits = LIMITS,
) -> pa.Table:
    """Value, expectation and usual range of each series of a question on every day that is given.

    Args:
        question: Name of the question.
        day: ISO date of the day.
        today: Its series.
        reference: Series of the days of the reference.
        earlier: Series of days before this one.
        limits: When a day is not usual.

    Returns:
        ``EXPECTATION_SCHEMA``; reference days first, then earlier ones, then the day. The range of a day of
        the reference is that of a further day like it.
    """
    grid = _Grid.of(day, today, reference, earlier, limits).of_question(question)
    if not len(grid) or question == TAXONOMY_IN_FORCE:
        return EXPECTATION_SCHEMA.empty_table()
    usual = _Usual.of(grid, limits)
    tested = _is_tested(grid, usual, limits)
    low, high = usual.ranges(_warning_chances(grid, tested, limits), np.arange(len(grid)))
    rows, columns = len(grid), len(grid.days)
    table: dict[str, Any] = {"day": np.tile(np.array(grid.days, dtype=object), rows)}
    for place, name in enumerate(_KEY):
        table[name] = np.repeat(np.array([key[place] for key in grid.keys], dtype=object), columns)
    for name, numbers in (("value", grid.value), ("expected", usual.expected), ("low", low), ("high", high)):
        table[name] = pa.array(numbers.ravel(), from_pandas=True)
    return pa.table(table, schema=EXPECTATION_SCHEMA)


def weekdays_are_known(days: Iterable[str]) -> bool:
    """Whether these days hold every weekday at least twice."""
    counts = np.bincount([date.fromisoformat(day).weekday() for day in set(days)], minlength=_WEEKDAYS)
    return bool(counts.min() >= 2)


# Series side by side


class _Grid(msgspec.Struct, kw_only=True):
    """Series as rows, days as columns: those of the reference, earlier ones, and today as the last."""

    keys: list[tuple[str, str, str, str, Kind]]
    days: list[str]
    references: int
    """How many of the columns are the reference's."""
    value: Floats
    """NaN where a day does not have the series."""
    offers: Floats
    unit: Floats
    """Of numbers, the standard deviation of one offer's number in the reference; 1 where it has none."""
    is_drawn: Bools
    """False for numbers without a deviation: what drawing offers explains of them is not known."""

    @classmethod
    def of(
        cls, day: str, today: pa.Table, reference: pa.Table, earlier: Sequence[pa.Table], limits: Limits
    ) -> _Grid:
        """All series of all days, with the zeros that go without saying filled in."""
        before = {str(table["day"][0]): table for table in earlier if table.num_rows}
        within = [on for on in sorted(before) if 0 < _days_between(on, day) < limits.window_days]
        reference_days = sorted({str(on) for on in reference["day"].to_pylist()})
        days = [*reference_days, *within, day]
        place_of_reference = pc.index_in(reference["day"], pa.array(reference_days, pa.string())).to_numpy()
        tables = [reference, *(before[on] for on in within), today]
        columns = [place_of_reference.astype(np.int64)]
        for place, table in enumerate(tables[1:], start=len(reference_days)):
            columns.append(np.full(table.num_rows, place, dtype=np.int64))
        everything = pa.concat_tables([table.select(SERIES_SCHEMA.names) for table in tables])
        keys, rows = _series(everything)
        column = np.concatenate(columns)

        def spread(name: str) -> Floats:
            numbers = np.full((len(keys), len(days)), np.nan)
            numbers[rows, column] = everything[name].to_numpy()
            return numbers

        offers, deviation = np.nan_to_num(spread("offers")), spread("deviation")
        unit = _pooled(deviation[:, : len(reference_days)], offers[:, : len(reference_days)])
        is_drawn = unit > 0
        grid = cls(
            keys=keys,
            days=days,
            references=len(reference_days),
            value=spread("value"),
            offers=offers,
            unit=np.where(is_drawn, unit, 1.0),
            is_drawn=is_drawn,
        )
        grid._fill_what_has_no_offers()
        return grid

    def __len__(self) -> int:
        return len(self.keys)

    def of_question(self, question: str) -> _Grid:
        """The series of one question."""
        return self.at(np.flatnonzero(np.array([key[0] == question for key in self.keys], dtype=bool)))

    def at(self, rows: Ints) -> _Grid:
        """The series of these rows."""
        return _Grid(
            keys=[self.keys[row] for row in rows],
            days=self.days,
            references=self.references,
            value=self.value[rows],
            offers=self.offers[rows],
            unit=self.unit[rows],
            is_drawn=self.is_drawn[rows],
        )

    def of_kind(self, kind: Kind) -> Bools:
        """Which series are of that kind."""
        return np.array([key[4] == kind for key in self.keys], dtype=bool)

    @property
    def in_reference(self) -> Floats:
        """Values of the reference's days."""
        return self.value[:, : self.references]

    def _fill_what_has_no_offers(self) -> None:
        """Write down as zero what a day has no offers of.

        Who counts offers by country has no row for a country that sends none. Where a day has other
        segments of the same measure and group, it has offers that are not of this one.
        """
        families = _numbered([key[:3] if key[4] == "share" else key[:1] for key in self.keys])
        for kind in ("share", "count"):
            of_kind = np.flatnonzero(self.of_kind(kind))
            known = np.where(np.isnan(self.value[of_kind]), -1.0, self.offers[of_kind])
            most = np.full((int(families.max(initial=-1)) + 1, len(self.days)), -1.0)
            np.maximum.at(most, families[of_kind], known)
            of_family = most[families[of_kind]]
            fill = np.isnan(self.value[of_kind]) & (of_family >= 0)
            self.value[of_kind] = np.where(fill, 0.0, self.value[of_kind])
            if kind == "share":
                self.offers[of_kind] = np.where(fill, of_family, self.offers[of_kind])


def _series(table: pa.Table) -> tuple[list[tuple[str, str, str, str, Kind]], Ints]:
    """The series of a table in order, and of each row the place of its series."""
    code = np.zeros(table.num_rows, dtype=np.int64)
    names, sizes = [], []
    for column in _KEY:
        encoded = table[column].combine_chunks().dictionary_encode()
        words = cast(list[str], encoded.dictionary.to_pylist())
        order = np.argsort(np.array(words, dtype=object))
        rank = np.empty(len(words), dtype=np.int64)
        rank[order] = np.arange(len(words))
        code = code * max(len(words), 1) + rank[encoded.indices.to_numpy()]
        names.append([words[place] for place in order])
        sizes.append(max(len(words), 1))
    codes, rows = np.unique(code, return_inverse=True)
    parts = np.unravel_index(codes, sizes)
    keys = [
        cast(
            tuple[str, str, str, str, Kind],
            tuple(words[place] for words, place in zip(names, places, strict=True)),
        )
        for places in zip(*parts, strict=True)
    ]
    return keys, rows


def _pooled(deviation: Floats, offers: Floats) -> Floats:
    """Standard deviation of one offer's number over all days; 0 where no day tells."""
    known = np.isfinite(deviation)
    weight = np.where(known, np.maximum(offers, 1.0), 0.0)
    squares = (np.nan_to_num(deviation) ** 2 * weight).sum(axis=1)
    pooled: Floats = np.sqrt(squares / np.maximum(weight.sum(axis=1), 1.0))
    return pooled


def _numbered(names: Sequence[Any]) -> Ints:
    """Equal names get equal numbers."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def _days_between(earlier: str, later: str) -> int:
    return (date.fromisoformat(later) - date.fromisoformat(earlier)).days


# What is usual


class _Usual(msgspec.Struct, kw_only=True):
    """What the reference lets expect of each series of a question, on each day of the grid."""

    grid: _Grid
    """Without the reference's bad days."""
    expected: Floats
    between: Floats
    """Variance between days that the residuals are scaled with; of a measure, on its natural scale."""
    residual: Floats
    variance: Floats
    """Of the residuals of a series, moderated."""
    freedom: Floats
    """Degrees of freedom of the variance."""
    by_days: Floats
    """Part of a residual's variance that is differences between days, and so remembered by the next."""
    uncertainty: Floats
    """Variance of the expectation, over that of a residual."""
    autocorrelation: float

    @classmethod
    def of(cls, grid: _Grid, limits: Limits) -> _Usual:
        """Fit the reference's days; see the module's docstring."""
        references = grid.references
        supposed = _per_kind(grid, limits, "supposed") ** 2
        grid = _without_bad_days(grid, supposed, limits)
        least = _per_kind(grid, limits, "least") ** 2
        days = np.isfinite(grid.in_reference).sum(axis=1)
        expected, weekdays = _expected(grid, supposed)
        freedom = np.maximum(days - 1.0 - (_WEEKDAYS - 1) * weekdays, 0.0)
        drawing = _drawing(grid, expected)
        # In all offers the ups and downs of countries and shops cancel out; their series tell nothing of it.
        measures = _numbered([(key[1], key[4], _is_of_all_offers(key)) for key in grid.keys])

        between = np.empty(len(grid))
        relative = ((grid.value - expected) / _slope(grid, expected))[:, :references]
        for rows in _groups(measures):
            between[rows] = _between_days(
                relative[rows], drawing[rows, :references], freedom[rows], supposed[rows], limits
            )
        between = np.maximum(between, least)
        residual = _stabilised(grid, grid.value, between) - _stabilised(grid, expected, between)

        variance, prior = np.ones(len(grid)), np.full(len(grid), limits.short_reference_days)
        if references >= _WEEKDAYS:
            informative = (freedom >= 3) & _has_offers(grid, expected)
            for rows in _groups(measures):
                variance[rows], prior[rows] = _moderation(
                    residual[rows, :references], freedom[rows], informative[rows]
                )
        own = np.nansum(residual[:, :references] ** 2, axis=1)
        variance = (prior * variance + own) / (prior + freedom)
        # No luck makes a day's offers less random than drawing them is, nor days more alike than the least.
        usually = _usual_drawing(drawing[:, :references])
        variance = np.maximum(variance, (usually + least) / (usually + between))
        by_days = between[:, None] / (drawing + between[:, None])
        autocorrelation = _autocorrelation(grid, residual[:, :references], limits)
        remembered = 1 + between / (usually + between) * (_of_a_mean(references, autocorrelation) - 1)
        told = np.where(np.isfinite(grid.in_reference), by_days[:, :references], 0.0).sum(axis=1)
        # Days of one weekday are a week apart and remember nothing of each other.
        of_mean = (remembered + (_WEEKDAYS - 1) * weekdays) / np.maximum(told, 1e-300)
        return cls(
            grid=grid,
            expected=expected,
            between=between,
            residual=residual,
            variance=variance,
            freedom=prior + freedom,
            by_days=by_days,
            uncertainty=by_days * of_mean[:, None],
            autocorrelation=autocorrelation,
        )

    def ranges(self, chances: Floats, rows: Ints) -> tuple[Floats, Floats]:
        """Where each day's value of these series lies, but for its chance on both sides together."""
        grid, expected, between = self.grid.at(rows), self.expected[rows], self.between[rows]
        spread = np.sqrt(self.variance[rows, None] * (1 + self.uncertainty[rows]))
        width = stats.t.isf(chances[rows] / 2, self.freedom[rows])[:, None] * spread
        centre = _stabilised(grid, expected, between)
        spans = np.array([SPANS.get(key[1], (-np.inf, np.inf)) for key in grid.keys]).reshape(-1, 2)
        spans[~grid.of_kind("number")] = -np.inf, np.inf
        low = np.maximum(_restored(grid, centre - width, between), spans[:, :1])
        high = np.minimum(_restored(grid, centre + width, between), spans[:, 1:])
        return np.minimum(low, expected), np.maximum(high, expected)


def _is_of_all_offers(key: tuple[str, str, str, str, Kind]) -> bool:
    """Whether a series is the count of all offers, or of all shops."""
    return key[4] == "count" and not key[2] and not key[3]


def _per_kind(grid: _Grid, limits: Limits, name: str) -> Floats:
    has_week = grid.references >= _WEEKDAYS
    found = [
        limits.differences(key[4], of_all_offers=has_week and _is_of_all_offers(key)) for key in grid.keys
    ]
    return np.array([getattr(between, name) for between in found], dtype=np.float64)


def _groups(numbers: Ints) -> list[Ints]:
    """The places of each number."""
    return [np.flatnonzero(numbers == number) for number in range(int(numbers.max(initial=-1)) + 1)]


def _without_bad_days(grid: _Grid, supposed: Floats, limits: Limits) -> _Grid:
    """The series, with bad days of the reference drawn in to the edge of what the other days are.

    A day is bad for a series if it is far from the median of all days and from that of the others of its
    weekday. What happens on many days, or again and again, is no accident but how the series is: a shop that
    sends now and then. Before the weekdays are known a week-end looks like an outage; nothing is drawn in.
    """
    reference = grid.days[: grid.references]
    if not weekdays_are_known(reference) or not len(grid):
        return grid
    stable = _stabilised(grid, grid.value, supposed)[:, : grid.references]
    # A share of no offers has no place on the scale.
    stable[~np.isfinite(stable) | ~np.isfinite(grid.in_reference)] = np.nan
    rows = np.flatnonzero(np.isfinite(stable).any(axis=1))
    stable = stable[rows]
    centre = np.nanmedian(stable, axis=1, keepdims=True)
    scale = np.maximum(1.4826 * np.nanmedian(np.abs(stable - centre), axis=1, keepdims=True), 1.0)
    bad = np.abs(stable - centre) > limits.bad_day_deviations * scale
    weekday = np.array([date.fromisoformat(day).weekday() for day in reference])
    for column in np.flatnonzero(bad.any(axis=0)):
        others = np.flatnonzero((weekday == weekday[column]) & (np.arange(len(weekday)) != column))
        known = bad[:, column] & np.isfinite(stable[:, others]).any(axis=1)
        of_weekday = np.nanmedian(stable[known][:, others], axis=1)
        far = np.abs(stable[known, column] - of_weekday) > limits.bad_day_deviations * scale[known, 0]
        bad[known, column] = far
    times = bad[:, 0] + (bad[:, 1:] & ~bad[:, :-1]).sum(axis=1)
    days = np.isfinite(stable).sum(axis=1)
    bad[(times > limits.bad_times) | (bad.sum(axis=1) > limits.bad_days_share * days)] = False
    edge = limits.bad_day_edge * scale
    drawn_in = np.full((len(rows), len(grid.days)), np.nan)
    drawn_in[:, : grid.references] = np.clip(stable, centre - edge, centre + edge)
    restored = _restored(grid.at(rows), drawn_in, supposed[rows])[:, : grid.references]
    value = grid.value.copy()
    value[rows, : grid.references] = np.where(bad, restored, value[rows, : grid.references])
    return msgspec.structs.replace(grid, value=value)


def _expected(grid: _Grid, supposed: Floats) -> tuple[Floats, Floats]:
    """Expected value of each series and day, and how far weekdays are trusted (0 to 1) in it."""
    mean = _mean(grid, supposed)[:, None]
    expected = np.repeat(mean, len(grid.days), axis=1)
    reference = grid.days[: grid.references]
    if not weekdays_are_known(reference):
        return expected, np.zeros(len(grid))
    weekday = np.array([date.fromisoformat(day).weekday() for day in grid.days])
    is_weekday = np.eye(_WEEKDAYS)[weekday]
    known = np.isfinite(grid.in_reference).astype(np.float64)
    times = known @ is_weekday[: grid.references]
    deviation = np.nan_to_num(grid.in_reference - mean)
    deviation -= known * (
        deviation.sum(axis=1, keepdims=True) / np.maximum(known.sum(axis=1, keepdims=True), 1)
    )
    of_weekday = deviation @ is_weekday[: grid.references] / np.maximum(times, 1)
    rest = (deviation - known * of_weekday[:, weekday[: grid.references]]) ** 2
    freedom = np.maximum(known.sum(axis=1) - _WEEKDAYS, 1)
    within, across = rest.sum(axis=1) / freedom, (times * of_weekday**2).sum(axis=1) / (_WEEKDAYS - 1)
    shrinkage = (_WEEKDAYS - 3) / (_WEEKDAYS - 1) * freedom / (freedom + 2)
    trust = np.clip(1 - shrinkage * within / np.maximum(across, 1e-300), 0, 1)
    trust[(times.min(axis=1) < 2) | (across <= 0)] = 0.0
    shifted = expected + trust[:, None] * of_weekday[:, weekday]
    shares, numbers = grid.of_kind("share")[:, None], grid.of_kind("number")[:, None]
    # A weekday holds a tenth of the usual at least, so that logarithms stay finite.
    bounded = np.clip(shifted, 0.1 * expected, np.where(shares, 1 - 0.1 * (1 - expected), np.inf))
    return np.where(numbers, shifted, bounded), trust


def _mean(grid: _Grid, supposed: Floats) -> Floats:
    """Mean of the reference's days, each weighted by how much it tells.

    A share or count of zero is taken for half an offer in all of the reference: more may come.
    """
    value, offers = grid.in_reference, grid.offers[:, : grid.references]
    total = np.where(np.isfinite(value), offers, 0.0).sum(axis=1)
    plain = np.nansum(value * offers, axis=1) / np.maximum(total, 1.0)
    days = np.isfinite(value).sum(axis=1)
    plain = np.where(grid.of_kind("count"), np.nansum(value, axis=1) / np.maximum(days, 1), plain)
    plain = _inside(grid, plain, total, days)
    drawing = _drawing(grid, np.repeat(plain[:, None], len(grid.days), axis=1))[:, : grid.references]
    weight = np.where(np.isfinite(value), 1 / (drawing + supposed[:, None]), 0.0)
    weighted = np.nansum(value * weight, axis=1) / np.maximum(weight.sum(axis=1), 1e-300)
    return _inside(grid, weighted, total, days)


def _inside(grid: _Grid, mean: Floats, offers: Floats, days: Ints) -> Floats:
    half = 0.5 / np.where(grid.of_kind("share"), offers + 1, np.maximum(days, 1))
    limited = np.maximum(mean, half)
    limited = np.where(grid.of_kind("share"), np.minimum(limited, 1 - half), limited)
    return np.where(grid.of_kind("number"), mean, limited)


def _slope(grid: _Grid, expected: Floats) -> Floats:
    """What one unit of the natural scale is worth in values: log odds, logarithm, or deviations."""
    slope = np.repeat(grid.unit[:, None], expected.shape[1], axis=1)
    shares, counts = grid.of_kind("share"), grid.of_kind("count")
    slope[shares] = expected[shares] * (1 - expected[shares])
    slope[counts] = expected[counts]
    return slope


def _drawing(grid: _Grid, expected: Floats) -> Floats:
    """Variance, on the natural scale, that drawing offers explains."""
    shares, counts = grid.of_kind("share"), grid.of_kind("count")
    with np.errstate(divide="ignore"):
        drawing = np.where(grid.is_drawn[:, None], 1 / grid.offers, 0.0)
        drawing[shares] = 1 / (grid.offers[shares] * expected[shares] * (1 - expected[shares]))
        drawing[counts] = 1 / expected[counts]
    return drawing


def _usual_drawing(drawing: Floats) -> Floats:
    """Median over the days that have offers; 0 where none has, of what is not tested."""
    known = np.where(np.isfinite(drawing), drawing, np.nan)
    known[np.isnan(known).all(axis=1)] = 0.0
    usual: Floats = np.nanmedian(known, axis=1)
    return usual


def _has_offers(grid: _Grid, expected: Floats) -> Bools:
    """Which series have, on a day of the reference, offers enough to tell how much days differ."""
    drawing = _drawing(grid, expected)[:, : grid.references]
    usual = np.median(drawing, axis=1)
    return np.asarray(usual <= 1 / _LEAST_COUNT, dtype=bool)


def _between_days(
    relative: Floats, drawing: Floats, freedom: Floats, supposed: Floats, limits: Limits
) -> Floats:
    """Variance between days of a measure: what its series show, and what is supposed, by their days."""
    known = np.isfinite(relative) & np.isfinite(drawing)
    times = np.maximum(known.sum(axis=1), 1)
    explained = np.where(known, drawing, 0.0).sum(axis=1) / times
    excess = np.where(known, relative, 0.0)
    shown = (excess**2).sum(axis=1) / np.maximum(freedom, 1.0) - explained
    # The less drawing hides, the more a series tells.
    telling = freedom * (supposed / (supposed + explained)) ** 2
    days = min(telling.sum(), 3 * freedom.max(initial=0.0))
    mean = max(float((telling * shown).sum() / max(telling.sum(), 1e-12)), 0.0)
    mixed = (limits.supposed_days * supposed + days * mean) / (limits.supposed_days + days)
    between: Floats = np.maximum(mixed, supposed) if relative.shape[1] < _WEEKDAYS else mixed
    return between


def _moderation(residual: Floats, freedom: Floats, informative: Bools) -> tuple[float, float]:
    """Variance that a measure's series have in common, and the degrees of freedom it counts as.

    Smyth (2004), section 6.2: the logarithms of the series' variances scatter more than chance alone lets
    them, by what series differ. Series that move together are not as many witnesses as there are series.
    """
    if informative.sum() < 3:
        return 1.0, _OWN_DAYS
    residual, freedom = np.nan_to_num(residual[informative]), freedom[informative]
    variance = np.maximum((residual**2).sum(axis=1) / freedom, 1e-3)
    logs = np.log(variance) - special.digamma(freedom / 2) + np.log(freedom / 2)
    scatter = float(np.var(logs, ddof=1) - special.polygamma(1, freedom / 2).mean())
    witnesses = float(
        np.clip(residual.var(axis=1).mean() / max(residual.mean(axis=0).var(), 1e-12), 1, len(logs))
    )
    most = _OWN_DAYS + (witnesses - 1) * float(freedom.mean())
    prior = min(2 * _inverse_trigamma(scatter), most) if scatter > 0 else most
    prior = max(prior, 2.0)
    common = float(np.exp(logs.mean() + special.digamma(prior / 2) - np.log(prior / 2)))
    return common, prior


def _inverse_trigamma(value: float) -> float:
    """Newton's iteration of Smyth (2004), appendix."""
    found = 0.5 + 1 / value
    for _ in range(50):
        trigamma = float(special.polygamma(1, found))
        step = trigamma * (1 - trigamma / value) / float(special.polygamma(2, found))
        found += step
        if -step / found < 1e-8:
            break
    return found


def _autocorrelation(grid: _Grid, residual: Floats, limits: Limits) -> float:
    """Correlation of neighbouring days of the reference, at least what is always allowed for."""
    days = [date.fromisoformat(day) for day in grid.days[: grid.references]]
    if len(days) < 2 * _WEEKDAYS:
        return limits.autocorrelation
    follows = np.array([after - before == timedelta(days=1) for before, after in pairwise(days)])
    known = np.nan_to_num(residual)
    products = (known[:, :-1] * known[:, 1:])[:, follows].sum() / max(follows.sum(), 1)
    found = products / max((known**2).sum() / len(days), 1e-12) + 1 / len(days)
    return float(np.clip(found, limits.autocorrelation, 0.9))


def _of_a_mean(days: int, autocorrelation: float) -> float:
    """How many times the variance of a mean of so many days is what it is of unrelated ones."""
    apart = np.arange(1, days)
    return float(1 + 2 * ((1 - apart / max(days, 1)) * autocorrelation**apart).sum())


# Scales on which days that differ as supposed have a variance of one


def _stabilised(grid: _Grid, value: Floats, between: Floats) -> Floats:
    """Values on a scale on which their variance is one.

    A share's variance is q(1-q)/n + b q²(1-q)²: integrating its inverse root gives an elliptic integral,
    which is the arc sine of Anscombe for b = 0 and log odds over √b for many offers. A count's is
    m + b m², which gives asinh.
    """
    stable = np.empty_like(value)
    shares, counts, numbers = (grid.of_kind(kind) for kind in _KINDS)
    root, modulus, offers = _elliptic(grid, shares, between)
    centred = 2 * (value[shares] * offers + _ANSCOMBE) / (offers + 2 * _ANSCOMBE) - 1
    stable[shares] = root * special.ellipkinc(np.arcsin(np.clip(centred, -1, 1)), modulus)
    b = between[counts][:, None]
    stable[counts] = 2 / np.sqrt(b) * np.arcsinh(np.sqrt(b * (value[counts] + _ANSCOMBE)))
    stable[numbers] = value[numbers] / _spread_of_numbers(grid, numbers, between)
    return stable


def _restored(grid: _Grid, stable: Floats, between: Floats) -> Floats:
    """The values that :func:`_stabilised` makes these of."""
    value = np.empty_like(stable)
    shares, counts, numbers = (grid.of_kind(kind) for kind in _KINDS)
    root, modulus, offers = _elliptic(grid, shares, between)
    quarter = special.ellipk(modulus)
    centred = special.ellipj(np.clip(stable[shares] / np.maximum(root, 1e-300), -quarter, quarter), modulus)[
        0
    ]
    plain = (centred + 1) / 2 * (offers + 2 * _ANSCOMBE) - _ANSCOMBE
    value[shares] = np.clip(plain / np.maximum(offers, 1e-300), 0, 1)
    b = between[counts][:, None]
    angle = np.maximum(stable[counts] * np.sqrt(b) / 2, 0)
    value[counts] = np.maximum(np.sinh(np.minimum(angle, 300)) ** 2 / b - _ANSCOMBE, 0)
    value[numbers] = stable[numbers] * _spread_of_numbers(grid, numbers, between)
    return value


def _elliptic(grid: _Grid, shares: Bools, between: Floats) -> tuple[Floats, Floats, Floats]:
    offers = grid.offers[shares]
    ratio = offers * between[shares][:, None] / 4
    return np.sqrt(offers / (1 + ratio)), ratio / (1 + ratio), offers


def _spread_of_numbers(grid: _Grid, numbers: Bools, between: Floats) -> Floats:
    drawn = np.where(grid.is_drawn[numbers][:, None], 1 / np.maximum(grid.offers[numbers], 1.0), 0.0)
    return grid.unit[numbers][:, None] * np.sqrt(drawn + between[numbers][:, None])


# Tests


class _Window(msgspec.Struct, kw_only=True):
    """What a question's series show over some days that end today."""

    columns: list[int]
    p_value: Floats
    """Of each series; NaN where it was not tested."""
    value: Floats
    expected: Floats
    width: Floats
    """Of the range of the window's mean, over that of one day."""


def _judgement(question: str, grid: _Grid, vanished: Sequence[Finding], limits: Limits) -> Judgement:
    if not len(grid):
        return Judgement(question=question, level="UNKNOWN", series=0, findings=[])
    usual = _Usual.of(grid, limits)
    tested = _is_tested(grid, usual, limits)
    windows = [_window(usual, tested, [len(grid.days) - 1], limits)]
    if len(week := list(range(grid.references, len(grid.days)))) >= limits.least_window_days:
        windows.append(_window(usual, tested, week, limits))
    found = _findings(usual, windows, _warning_chances(grid, tested, limits), limits)
    # What is no longer measured may hide anything.
    findings = sorted([*vanished, *found], key=lambda finding: -LEVELS[finding.level])
    level: Level = findings[0].level if findings else "OK" if tested.any() else "UNKNOWN"
    return Judgement(
        question=question, level=level, series=int(tested.sum()) + len(vanished), findings=findings
    )


def _offers_of_groups(grid: _Grid) -> dict[str, Floats]:
    """Offers of each group that were looked at on each day, by whichever share or mean is of most of them."""
    most: dict[str, Floats] = {}
    offers = np.where(np.isfinite(grid.value), grid.offers, 0.0)
    for place, (question, _, group, _, kind) in enumerate(grid.keys):
        # Missing values and shops are counted over all offers, not over those that are looked at.
        if kind != "count" and question not in (COMPLETENESS, SHOP_MIX):
            most[group] = np.maximum(most.get(group, 0.0), offers[place])
    return most


def _vanished(question: str, grid: _Grid, of_group: dict[str, Floats], limits: Limits) -> list[Finding]:
    """What the reference measures on every day, and today on none of enough offers; no test is needed.

    Of a question that has no series at all today it was not asked: the day is not over, or there is no model.
    """
    known = np.isfinite(grid.value)
    if question in MEASURED_ON_SOME or not known[:, -1].any():
        return []
    usually = (known & (grid.offers >= limits.least_segment_offers))[:, : grid.references].all(axis=1)
    findings = {}
    for row in np.flatnonzero(usually & ~known[:, -1] & ~grid.of_kind("count")):
        _, measure, group, _, _ = grid.keys[row]
        offers = of_group.get(group)
        if offers is None or offers[-1] < limits.least_offers or (measure, group) in findings:
            continue
        of_all = max(float(of_day[-1]) for of_day in of_group.values())
        shares = grid.offers[row, : grid.references] / np.maximum(offers[: grid.references], 1.0)
        usual, low, high = (float(bound(np.minimum(shares, 1.0))) for bound in (np.median, np.min, np.max))
        effect = usual * float(offers[-1]) / of_all
        _, least, most = _in_words("", "share", 0.0, low, high)
        name = ", ".join(part for part in (NAMES.get(measure, measure), group) if part)
        findings[measure, group] = Finding(
            question=question,
            measure=f"offers with {measure}",
            group=group,
            segment="can be measured",
            level="ERROR" if effect >= limits.vanished_for_error else "WARN",
            value=0.0,
            usual=usual,
            usual_low=low,
            usual_high=high,
            effect=-effect,
            p_value=0.0,
            days=1,
            sentence=f"{name}: cannot be measured any more on any of {offers[-1]:,.0f} offers, usually on "
            f"{least if least == most else f'{least}–{most}'} % of them",
        )
    return sorted(findings.values(), key=_strongest_first)


def _is_tested(grid: _Grid, usual: _Usual, limits: Limits) -> Bools:
    """Which series today and the reference have offers enough for."""
    counts = grid.of_kind("count")
    offers = np.where(np.isfinite(grid.value), grid.offers, 0.0)
    of_reference = offers[:, : grid.references].sum(axis=1)
    enough = (offers[:, -1] >= limits.least_segment_offers) & (of_reference >= limits.least_offers)
    if offers[~counts, -1].max(initial=0.0) < limits.least_offers:
        enough[:] = False
    known = np.isfinite(grid.value[:, -1]) & np.isfinite(grid.in_reference).any(axis=1)
    return np.asarray(known & (enough | counts), dtype=bool)


def _share_of(chance: float) -> float:
    """What each question has of a chance of false alarms; the deterministic one needs none."""
    return chance / (len(QUESTIONS) - 1)


def _warning_chances(grid: _Grid, tested: Bools, limits: Limits) -> Floats:
    """Chance at which each series leaves its range; each is tested on two windows."""
    chances = np.empty(len(grid))
    families = _families(grid)
    for rows in families:
        chances[rows] = 1 / len(families) / max(2 * int(tested[rows].sum()), 1)
    return _share_of(limits.false_warnings_per_day) * chances


def _families(grid: _Grid) -> list[Ints]:
    """Series that share a chance of false alarms; each family has an equal part of its question's.

    The counts of all offers and of all shops are one for themselves: everything else is a part of them, and
    they are not to pay for the number of shops.
    """
    of_all = np.array([_is_of_all_offers(key) for key in grid.keys], dtype=bool)
    return [rows for rows in (np.flatnonzero(of_all), np.flatnonzero(~of_all)) if len(rows)]


def _window(usual: _Usual, tested: Bools, columns: list[int], limits: Limits) -> _Window:
    """The mean of these days against its expectation.

    A week that was unusual until yesterday is yesterday's news: today has to lie on the same side, at least
    half as far out.
    """
    grid, counts = usual.grid, usual.grid.of_kind("count")[:, None]
    offers = np.where(np.isfinite(grid.value), grid.offers, 0.0)[:, columns]
    known = np.isfinite(grid.value[:, columns]) & ((offers >= limits.least_segment_offers) | counts)
    days = known.sum(axis=1)
    tested = tested & (days >= min(limits.least_window_days, len(columns)))
    weight = np.where(counts, 1.0, offers) * known
    weight /= np.maximum(weight.sum(axis=1, keepdims=True), 1e-300)
    value = (np.where(known, grid.value[:, columns], 0.0) * weight).sum(axis=1)
    expected = (usual.expected[:, columns] * weight).sum(axis=1)

    mean = np.where(known, usual.residual[:, columns], 0.0).sum(axis=1) / np.maximum(days, 1)
    remembered = 1 + usual.by_days[:, -1] * (_of_a_mean(len(columns), usual.autocorrelation) - 1)
    uncertainty = usual.uncertainty[:, columns].mean(axis=1)
    spread = remembered / np.maximum(days, 1) + uncertainty
    p_value = 2 * stats.t.sf(np.abs(mean) / np.sqrt(usual.variance * spread), usual.freedom)
    p_value = np.maximum(p_value, _of_two_rates(usual, columns))
    change, change_today = value - expected, grid.value[:, -1] - usual.expected[:, -1]
    goes_on = (change * change_today > 0) & (2 * np.abs(change_today) >= np.abs(change))
    return _Window(
        columns=columns,
        p_value=np.where(tested, np.where(goes_on, p_value, 1.0), np.nan),
        value=value,
        expected=expected,
        width=np.sqrt(spread / (1 + uncertainty)),
    )


def _of_two_rates(usual: _Usual, columns: Sequence[int]) -> Floats:
    """p-value of as many offers as on these days, given those of the reference; 0 for numbers.

    If only drawing offers made the difference, the offers of both sides together would fall on these days
    by their part of what is expected of both. The rarer side of a share is the one that is counted.
    """
    grid, references = usual.grid, slice(0, usual.grid.references)
    shares, counts = grid.of_kind("share"), grid.of_kind("count")
    size = np.where(shares[:, None], grid.offers, 1.0)
    rare = np.where(shares & (usual.expected.mean(axis=1) > 0.5), -1.0, 1.0)[:, None]
    found = np.nan_to_num(np.where(rare < 0, 1 - grid.value, grid.value) * size)
    awaited = np.where(
        np.isfinite(grid.value), np.where(rare < 0, 1 - usual.expected, usual.expected) * size, 0.0
    )
    here, there = np.round(found[:, columns].sum(axis=1)), np.round(found[:, references].sum(axis=1))
    part = awaited[:, columns].sum(axis=1), awaited[:, references].sum(axis=1)
    odds = np.clip(part[0] / np.maximum(part[0] + part[1], 1e-300), 0, 1)
    at_least = np.where(here > 0, special.betainc(np.maximum(here, 1), there + 1, odds), 1.0)
    at_most = np.where(there > 0, special.betaincc(here + 1, np.maximum(there, 1), odds), 1.0)
    p_value = np.minimum(2 * np.where(here >= part[0], at_least, at_most), 1.0)
    return np.where(shares | counts, p_value, 0.0)


def _corrected(grid: _Grid, p_values: Floats) -> Floats:
    """p-values corrected for the number of families, and in each of them of series and windows."""
    corrected = np.empty_like(p_values)
    families = _families(grid)
    for rows in families:
        corrected[:, rows] = np.minimum(len(families) * _holm(p_values[:, rows]), 1.0)
    return corrected


def _holm(p_values: Floats) -> Floats:
    """p-values corrected for their number (Holm 1979); what was not tested stays NaN and is not counted."""
    flat = p_values.ravel()
    order = np.argsort(flat, kind="stable")  # NaN last
    count = int(np.isfinite(flat).sum())
    corrected = np.full(flat.shape, np.nan)
    steps = np.maximum.accumulate(flat[order[:count]] * np.arange(count, 0, -1))
    corrected[order[:count]] = np.minimum(steps, 1.0)
    return corrected.reshape(p_values.shape)


# Findings


def _findings(usual: _Usual, windows: Sequence[_Window], chances: Floats, limits: Limits) -> list[Finding]:
    """At most one of each series: the day's or the week's, whichever is stronger.

    First what a person would name first: of the worst level, what concerns most of all offers.
    """
    corrected = _corrected(usual.grid, np.stack([window.p_value for window in windows]))
    unlikely = corrected < _share_of(limits.false_warnings_per_day)
    rows = np.flatnonzero(unlikely.any(axis=0))
    if not len(rows):
        return []
    low, high = usual.ranges(chances, rows)
    findings: list[Finding] = []
    places: dict[tuple[str, str, str], int] = {}
    for place, row in enumerate(rows.tolist()):
        found = [
            finding
            for window, p_values in zip(windows, corrected, strict=True)
            if p_values[row] < _share_of(limits.false_warnings_per_day)
            and (
                finding := _finding(usual, window, row, float(p_values[row]), low[place], high[place], limits)
            )
        ]
        findings.extend(sorted(found, key=_strongest_first)[:1])
        places.update((_series_of(finding), row) for finding in found)
    parts = _parts_of_offers(usual.grid)
    return sorted(
        findings,
        key=lambda finding: (
            -LEVELS[finding.level],
            -abs(finding.effect)
            * parts[places[_series_of(finding)]]
            * (_NARROWER_FIRST if finding.group else 1.0),
            *_strongest_first(finding),
        ),
    )


def _series_of(finding: Finding) -> tuple[str, str, str]:
    return finding.measure, finding.group, finding.segment


def _parts_of_offers(grid: _Grid) -> Floats:
    """The part of all offers that each series is measured on; the effect of a count is one of all anyway."""
    offers = grid.offers[:, : grid.references].mean(axis=1)
    measures = _numbered([(key[1], key[4]) for key in grid.keys])
    most = np.zeros(int(measures.max(initial=-1)) + 1)
    np.maximum.at(most, measures, offers)
    parts: Floats = np.where(grid.of_kind("count"), 1.0, offers / np.maximum(most[measures], 1e-300))
    return parts


def _finding(
    usual: _Usual, window: _Window, row: int, p_value: float, low: Floats, high: Floats, limits: Limits
) -> Finding | None:
    """The finding of a series, if it moved far enough to matter."""
    question, measure, group, segment, kind = usual.grid.keys[row]
    value, expected = float(window.value[row]), float(window.expected[row])
    change, factor = _effect(usual, row, value, expected)
    least = limits.least_effect(question, measure, group, segment, kind)
    if p_value < _share_of(limits.false_errors_per_day) and _is_large(change, factor, least.error):
        level = limits.most(question, measure, segment, kind, change)
    elif _is_large(change, factor, least.warn):
        level = "WARN"
    else:
        return None
    days, width = usual.expected[row, window.columns], float(window.width[row])
    usual_low = expected - width * float((days - low[window.columns]).mean())
    usual_high = expected + width * float((high[window.columns] - days).mean())
    least_value, greatest_value = _span(measure, kind)
    finding = Finding(
        question=question,
        measure=measure,
        group=group,
        segment=segment,
        level=level,
        value=value,
        usual=expected,
        usual_low=min(max(usual_low, least_value), expected),
        usual_high=max(min(usual_high, greatest_value), expected),
        effect=change,
        p_value=p_value,
        days=len(window.columns),
        sentence="",
    )
    return msgspec.structs.replace(finding, sentence=_sentence(finding, kind))


def _effect(usual: _Usual, row: int, value: float, expected: float) -> tuple[float, float]:
    """Change and factor (1 or more, in either direction) as :class:`LeastEffect` measures them."""
    kind = usual.grid.keys[row][4]
    if kind == "number":
        return (value - expected) / float(usual.grid.unit[row]), 1.0
    if kind == "share":
        return value - expected, _times(_odds(value), _odds(expected))
    # All offers of the day are the greatest of its counts.
    all_offers = float(usual.expected[usual.grid.of_kind("count"), -1].max())
    return (value - expected) / all_offers, _times(value, expected)


def _times(one: float, other: float) -> float:
    greater, lesser = max(one, other), min(one, other)
    return greater / lesser if lesser > 0 else float("inf")


def _odds(share: float) -> float:
    return share / (1 - share) if share < 1 else float("inf")


def _is_large(change: float, factor: float, least: LeastEffect) -> bool:
    return abs(change) >= least.change or (factor >= least.factor and abs(change) >= least.part)


def _strongest_first(finding: Finding) -> tuple[Any, ...]:
    return (
        -LEVELS[finding.level],
        -abs(finding.effect),
        finding.measure,
        finding.group,
        finding.segment,
        finding.days,
    )


def _span(measure: str, kind: Kind) -> tuple[float, float]:
    """Least and greatest value that a series can have."""
    if kind == "number":
        return SPANS.get(measure, (-np.inf, np.inf))
    return 0.0, 1.0 if kind == "share" else np.inf


def _sentence(finding: Finding, kind: Kind) -> str:
    """For example "offers, country IT: 0, usually 1,400–1,900"."""
    measure = finding.measure
    name = NAMES.get(measure, measure) if kind == "number" else measure
    what = ", ".join(part for part in (name, finding.group, finding.segment) if part)
    value, low, high = _in_words(measure, kind, finding.value, finding.usual_low, finding.usual_high)
    unit = "%" if kind == "share" else UNITS.get(measure, "") if kind == "number" else ""
    unit = f" {unit}" if unit else ""
    over = f" over {finding.days} days" if finding.days > 1 else ""
    dash = " to " if low.startswith("-") else "–"
    return f"{what}: {value}{unit}{over}, usually {low}{dash}{high}{unit}"


def _in_words(measure: str, kind: Kind, value: float, low: float, high: float) -> tuple[str, str, str]:
    """Value and range, with as many digits as it takes to tell the value from either end."""
    shown = [_shown(measure, kind, number) for number in (value, low, high)]
    decimals = [_decimals(kind, number) for number in shown]
    if kind == "share" and shown[1] < 0.05:
        decimals[1] = 0  # next to none
    for end in (1, 2):
        while shown[0] != shown[end] and max(decimals[0], decimals[end]) < _MOST_DECIMALS:
            if f"{shown[0]:.{decimals[0]}f}" != f"{shown[end]:.{decimals[end]}f}":
                break
            decimals[0] = decimals[end] = max(decimals[0], decimals[end]) + 1
    first, second, third = (f"{number:,.{places}f}" for number, places in zip(shown, decimals, strict=True))
    return first, second, third


def _shown(measure: str, kind: Kind, number: float) -> float:
    if kind == "share":
        return 100 * number
    return float(np.exp(number)) if measure == PRICE_OVER_USUAL else number


def _decimals(kind: Kind, shown: float) -> int:
    """Of a number by itself: about three digits, and of a small percentage the first that is not zero."""
    if kind == "count":
        return 0
    if kind == "share":
        return 1 if shown == 0 or shown >= 0.1 else min(int(np.ceil(-np.log10(shown))), _MOST_DECIMALS)
    return 2 if abs(shown) < 10 else 1 if abs(shown) < 100 else 0


def _taxonomy_in_force(grid: _Grid, limits: Limits) -> Judgement:
    """None is expected, so nothing is left to chance."""
    findings = []
    known = [
        place
        for place in range(len(grid))
        if np.isfinite(grid.value[place, -1]) and grid.offers[place, -1] > 0
    ]
    for place in known:
        question, measure, group, segment, kind = grid.keys[place]
        value = float(grid.value[place, -1])
        if value <= 0:
            continue
        finding = Finding(
            question=question,
            measure=measure,
            group=group,
            segment=segment,
            level="ERROR" if value > limits.stale_predictions_for_error else "WARN",
            value=value,
            usual=0.0,
            usual_low=0.0,
            usual_high=0.0,
            effect=value,
            p_value=0.0,
            days=1,
            sentence="",
        )
        what = ", ".join(part for part in (measure, group, segment) if part)
        percentage, _, _ = _in_words(measure, kind, value, 0.0, 0.0)
        sentence = f"{what}: {percentage} %, expected is none"
        findings.append(msgspec.structs.replace(finding, sentence=sentence))
    findings.sort(key=_strongest_first)
    level: Level = findings[0].level if findings else "OK" if known else "UNKNOWN"
    return Judgement(question=TAXONOMY_IN_FORCE, level=level, series=len(known), findings=findings)
