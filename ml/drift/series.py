"""Whether a day's series are what the days of the reference let expect.

One series is one number per day: a share of offers, a count of offers, or the mean of a number. Days differ
for two reasons. Offers are drawn (known from their number), and days differ (shops send more or less; only
the reference can tell). A test that knows of the first alone finds "drift" every day, because with thousands
of offers everything is significant; and a reference of some days tells little of the second for a single
series, but much for all series of a measure together. Hence, per series (of which :mod:`ml.drift.grid` makes
rows):

0. **Bad days** (:mod:`ml.drift.bad_days`): an outage that the reference holds is not to make the next one
   usual, so a day that is far from what the series is on the others counts as one at the edge of it.
1. **Expectation** (:mod:`ml.drift.expected`): weighted mean of the reference days. Where the reference has
   every weekday at least twice, the expectation is the weekday's, pulled towards the mean as far as weekdays
   explain no more than chance would (positive-part James-Stein; Efron & Morris 1973).
2. **Residual** (:mod:`ml.drift.scales`) of each day on a scale on which its standard deviation is one if days
   differ as they do in the measure as a whole: the variance-stabilising transform of an overdispersed
   binomial (shares), of a negative binomial (counts; Anscombe 1948), or a plain difference (numbers).
3. **Moderated variance** (:mod:`ml.drift.usual`): the series' own mean square of residuals, pulled towards
   that of the measure's other series (Smyth 2004, limma; of dispersions Lund et al. 2012, edgeR's
   quasi-likelihood). How strongly is estimated from how alike the series are, and bounded by how many
   independent ones there are. What is supposed of days in general (:data:`ml.drift.questions.BETWEEN_DAYS`)
   counts as some days of reference, so that a reference of one day gives wide, finite ranges.
4. **Tests** (:mod:`ml.drift.significance`, as is the correction of step 5): t of the day, and of the mean of
   the last week, whose days are taken as correlated. Of small counts, also the exact test of two rates
   (Przyborowski & Wilenski 1940): the greater p-value holds, because no transform makes three offers normal.
5. **Levels**: Holm's correction (1979) over all series and both windows of a question, at a chance of false
   alarms that the questions share equally; and an effect that is large enough to matter, in a direction that
   does (:mod:`ml.drift.findings`). What is missing altogether needs no test (:mod:`ml.drift.vanished`).

Here belongs what leads through these steps and gives a question its level.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from ml.drift.answers import LEVELS, Finding, Level
from ml.drift.findings import findings_of, strongest_first
from ml.drift.grid import KEY_COLUMNS, Grid
from ml.drift.questions import LIMITS, QUESTIONS, TAXONOMY_IN_FORCE, Limits
from ml.drift.sentences import in_words
from ml.drift.significance import is_tested, warning_chances, window_of
from ml.drift.usual import Usual
from ml.drift.vanished import offers_of_groups, vanished_series

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
        it on every day and today's offers of the group are enough (:mod:`ml.drift.vanished`).
    """
    judgements = {}
    grid = Grid.of(day, today, reference, earlier, limits)
    of_group = offers_of_groups(grid)
    for question in QUESTIONS:
        part = grid.of_question(question.name)
        if question.name == TAXONOMY_IN_FORCE:
            judgements[question.name] = _taxonomy_in_force(part, limits)
        else:
            vanished = vanished_series(question.name, part, of_group, limits)
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
    grid = Grid.of(day, today, reference, earlier, limits).of_question(question)
    if not len(grid) or question == TAXONOMY_IN_FORCE:
        return EXPECTATION_SCHEMA.empty_table()
    usual = Usual.of(grid, limits)
    tested = is_tested(grid, usual, limits)
    low, high = usual.ranges(warning_chances(grid, tested, limits), np.arange(len(grid)))
    rows, columns = len(grid), len(grid.days)
    table: dict[str, Any] = {"day": np.tile(np.array(grid.days, dtype=object), rows)}
    for place, name in enumerate(KEY_COLUMNS):
        table[name] = np.repeat(np.array([key[place] for key in grid.keys], dtype=object), columns)
    for name, numbers in (("value", grid.value), ("expected", usual.expected), ("low", low), ("high", high)):
        table[name] = pa.array(numbers.ravel(), from_pandas=True)
    return pa.table(table, schema=EXPECTATION_SCHEMA)


def _judgement(question: str, grid: Grid, vanished: Sequence[Finding], limits: Limits) -> Judgement:
    if not len(grid):
        return Judgement(question=question, level="UNKNOWN", series=0, findings=[])
    usual = Usual.of(grid, limits)
    tested = is_tested(grid, usual, limits)
    windows = [window_of(usual, tested, [len(grid.days) - 1], limits)]
    if len(week := list(range(grid.references, len(grid.days)))) >= limits.least_window_days:
        windows.append(window_of(usual, tested, week, limits))
    found = findings_of(usual, windows, warning_chances(grid, tested, limits), limits)
    # What is no longer measured may hide anything.
    findings = sorted([*vanished, *found], key=lambda finding: -LEVELS[finding.level])
    level: Level = findings[0].level if findings else "OK" if tested.any() else "UNKNOWN"
    return Judgement(
        question=question, level=level, series=int(tested.sum()) + len(vanished), findings=findings
    )


def _taxonomy_in_force(grid: Grid, limits: Limits) -> Judgement:
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
        percentage, _, _ = in_words(measure, kind, value, 0.0, 0.0)
        sentence = f"{what}: {percentage} %, expected is none"
        findings.append(msgspec.structs.replace(finding, sentence=sentence))
    findings.sort(key=strongest_first)
    level: Level = findings[0].level if findings else "OK" if known else "UNKNOWN"
    return Judgement(question=TAXONOMY_IN_FORCE, level=level, series=len(known), findings=findings)
