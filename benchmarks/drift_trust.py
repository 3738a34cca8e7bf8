"""How far monitoring can be trusted: false alarms on usual days, and what is caught of eight kinds of drift.

    python -m benchmarks.drift_trust --home DIR

The days are simulated (:mod:`benchmarks.drift_days`), so it is known on which of them something drifted. On
the same days stands Evidently's ``DataDriftPreset`` with its defaults, given the columns that a user would
give it. The models are trained in DIR, once (minutes); ``--worlds``, ``--days`` and ``--episodes`` make the
rest smaller.

An *episode* is one drift that begins on some day and goes on for a week. It is caught on the first day on
which a question that asks for this kind of drift says ERROR; the delay is the number of days before that one.
The same holds for Evidently, which is taken at its word on all columns together (half of them drifted) and,
separately, on the columns that this kind of drift changes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from benchmarks.drift_days import (
    KINDS,
    RESTLESS,
    STRENGTHS,
    USUAL,
    Day,
    Drift,
    Habits,
    Kind,
    Pool,
    World,
    make_pool,
)
from benchmarks.report import save, show
from ml.drift.frame import Frame
from ml.drift.series import Judgement, judge
from ml.stages import DriftReferenceParameters

REFERENCES = (28, 7, 3)
"""Days of reference; drift is measured with the first."""
HABITS = {"usual": USUAL, "restless": RESTLESS}
"""Shops' habits on days without drift; drift is measured with the first."""
EPISODE_DAYS = 7
EARLIER_DAYS = 6

_COLUMNS = {
    "country": "cat",
    "language": "cat",
    "shop_id": "cat",
    "shop_category": "cat",
    "brand": "cat",
    "price": "num",
    "currency": "cat",
    "title": "text",
    "category_path": "cat",
    "confidence": "num",
}
"""What a user would give Evidently, with the types that it tells itself."""
_DATASET_DRIFT_SHARE = 0.5
_EVIDENTLY_REFERENCE = 10_000
"""Offers of the reference that Evidently sees; with all of them a day takes twice the time."""


# The two sides


class Ours:
    """The questions of ``drift_report``, against one reference."""

    def __init__(self, days: Sequence[Day]) -> None:
        self._frame = Frame.fit({day.day: (day.rows, day.totals) for day in days})

    def series(self, day: Day) -> pa.Table:
        """All that a later day needs to know of this one."""
        return self._frame.series(day.day, day.rows, day.totals)

    def judged(self, day: Day, series: pa.Table, earlier: Sequence[pa.Table]) -> Answers:
        """The answers of a day, given those before it, the newest last."""
        reference = self._frame.reference_series(series)
        return Answers.of(judge(day.day, series, reference, earlier[-EARLIER_DAYS:]))


@dataclass(frozen=True)
class Answers:
    """What the questions said of one day."""

    levels: Mapping[str, str]
    sentences: Mapping[str, str]
    """Of the questions that found something, the strongest finding."""

    @classmethod
    def of(cls, judgements: Mapping[str, Judgement]) -> Answers:
        """From what is known of each question."""
        return cls(
            levels={question: judgement.level for question, judgement in judgements.items()},
            sentences={
                question: f"{judgement.level} {judgement.findings[0].sentence}"
                for question, judgement in judgements.items()
                if judgement.findings
            },
        )

    def questions(self, *levels: str) -> set[str]:
        """Questions with one of these answers."""
        return {question for question, level in self.levels.items() if level in levels}


class Evidently:
    """``DataDriftPreset`` with its defaults, without its drawings; see :meth:`check`."""

    def __init__(self, days: Sequence[Day]) -> None:
        rows = pd.concat([day.rows[list(_COLUMNS)] for day in days], ignore_index=True)
        self._rows = rows.sample(min(_EVIDENTLY_REFERENCE, len(rows)), random_state=0, ignore_index=True)
        self._columns = {name: self._rows[name].dropna() for name in _COLUMNS}

    def drifted(self, day: Day) -> frozenset[str]:
        """The columns that drifted."""
        from evidently.legacy.calculations.stattests import get_stattest
        from evidently.legacy.core import ColumnType

        found = set()
        for name, of_type in _COLUMNS.items():
            reference, current, column_type = (
                self._columns[name],
                day.rows[name].dropna(),
                ColumnType(of_type),
            )
            column_type = ColumnType(of_type)
            test = get_stattest(reference, current, column_type, None)
            if test(reference, current, column_type, None).drifted:
                found.add(name)
        return frozenset(found)

    def check(self, day: Day) -> None:
        """Hold :meth:`drifted` against the preset itself, which takes ten times as long.

        Raises:
            RuntimeError: they do not agree, or the preset has other defaults by now.
        """
        results = self._tests("DataDriftPreset", self._rows, day)
        drifted = frozenset(name for name in _COLUMNS if results[f"Value Drift for column {name}"])
        share_is_default = f"Share of Drifted Columns: Less {_DATASET_DRIFT_SHARE:.3f}" in results
        if drifted != self.drifted(day) or not share_is_default:
            raise RuntimeError(f"the preset says {results}, this program {sorted(self.drifted(day))}")

    def failed_summary_tests(self, day: Day) -> int:
        """How many tests fail that ``DataSummaryPreset`` makes of a reference as large as the day."""
        return sum(self._tests("DataSummaryPreset", self._rows[: len(day.rows)], day).values())

    def _tests(self, preset: str, reference: pd.DataFrame, day: Day) -> dict[str, bool]:
        """Whether each test failed, by name."""
        from evidently import Dataset, Report, presets

        rows = day.rows[list(_COLUMNS)]
        report = Report([getattr(presets, preset)()], include_tests=True)
        results = report.run(Dataset.from_pandas(rows), Dataset.from_pandas(reference)).tests_results
        return {result.name: result.status.value == "FAIL" for result in results}


def dataset_drifted(columns: frozenset[str]) -> bool:
    """The preset's word on all columns together."""
    return len(columns) >= _DATASET_DRIFT_SHARE * len(_COLUMNS)


# The measurement


@dataclass
class UsualDays:
    """What was said of days on which nothing drifted, day by day."""

    answers: list[Answers] = field(default_factory=list)
    columns: list[frozenset[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Episode:
    """What was said of the days of one drift, by each side until there was no more for it to say."""

    answers: Sequence[Answers]
    columns: Sequence[frozenset[str]]


@dataclass
class Outcome:
    """Everything that was said."""

    usual: dict[tuple[str, int], UsualDays] = field(
        default_factory=lambda: {(shops, days): UsualDays() for shops in HABITS for days in REFERENCES}
    )
    """By the habits of shops and the days of reference."""
    failed_summary_tests: list[int] = field(default_factory=list)
    episodes: dict[tuple[str, str], list[Episode]] = field(
        default_factory=lambda: {(kind.name, strength): [] for kind in KINDS for strength in STRENGTHS}
    )


def measure(pool: Pool, worlds: int, usual_days: int, episodes: int, seed: int = 0) -> Outcome:
    """Go through the worlds; each has its references, usual days, and episodes that begin on some of these.

    Args:
        pool: What days are drawn from.
        worlds: Shop landscapes with habits of their own.
        usual_days: In each world.
        episodes: Per kind and strength, dealt out to the worlds in turn.
        seed: Of the first world; the next ones follow.
    """
    outcome = Outcome()
    drifted_days = len(outcome.episodes) * episodes * EPISODE_DAYS
    progress = _Progress(worlds * len(outcome.usual) * usual_days + drifted_days)
    for number in range(worlds):
        all_days = {shops: _Days(pool, seed + number, usual_days, habits) for shops, habits in HABITS.items()}
        for (shops, length), usual in outcome.usual.items():
            _add_usual_days(usual, all_days[shops].usual, *_sides(all_days[shops], length))
            progress.add(usual_days, f"world {number + 1}: {shops} shops, {length} days of reference")
        days = all_days["usual"]
        ours, evidently = _sides(days, REFERENCES[0])
        if number == 0:
            evidently.check(days.usual[0])
        outcome.failed_summary_tests.append(evidently.failed_summary_tests(days.usual[0]))
        series = [ours.series(day) for day in days.usual]
        for (name, strength), found in outcome.episodes.items():
            for episode in range(number, episodes, worlds):
                found.append(_episode(days, name, strength, episode, series, ours, evidently))
                progress.add(EPISODE_DAYS, f"world {number + 1}: {name}, {strength}")
    return outcome


def _sides(days: _Days, length: int) -> tuple[Ours, Evidently]:
    reference = days.reference(length)
    return Ours(reference), Evidently(reference)


class _Days:
    """The days of a world: those that may be reference, then usual ones."""

    def __init__(self, pool: Pool, number: int, usual_days: int, habits: Habits) -> None:
        self.pool = pool
        self._world = World(pool, seed=number, days=REFERENCES[0] + usual_days, habits=habits)
        self.usual = [self._world.day(REFERENCES[0] + place) for place in range(usual_days)]

    def reference(self, length: int) -> list[Day]:
        """The newest days before the usual ones, sampled as ``drift_reference`` does."""
        parameters = DriftReferenceParameters()
        sampled = min(parameters.offers_per_day, parameters.max_offers // length)
        return [self._world.day(REFERENCES[0] - length + n, sampled=sampled) for n in range(length)]

    def drifted(self, number: int, drift: Drift) -> Day:
        """Day ``number`` of the usual ones, had there been this drift."""
        return self._world.day(REFERENCES[0] + number, drift)


def _add_usual_days(usual: UsualDays, days: Sequence[Day], ours: Ours, evidently: Evidently) -> None:
    earlier: list[pa.Table] = []
    for day in days:
        series = ours.series(day)
        usual.answers.append(ours.judged(day, series, earlier))
        usual.columns.append(evidently.drifted(day))
        earlier.append(series)


def _episode(
    days: _Days,
    name: str,
    strength: str,
    number: int,
    usual_series: Sequence[pa.Table],
    ours: Ours,
    evidently: Evidently,
) -> Episode:
    place = [kind.name for kind in KINDS].index(name)
    chance = np.random.default_rng([number, place, STRENGTHS.index(strength)])
    drift = Drift.draw(days.pool, KINDS[place], strength, chance)
    first = int(chance.integers(EARLIER_DAYS, len(days.usual) - EPISODE_DAYS + 1))
    earlier = list(usual_series[:first])
    answers: list[Answers] = []
    columns: list[frozenset[str]] = []
    for offset in range(EPISODE_DAYS):
        day = days.drifted(first + offset, drift)
        if not any(a.questions("ERROR") & set(KINDS[place].questions) for a in answers):
            series = ours.series(day)
            answers.append(ours.judged(day, series, earlier))
            earlier.append(series)
        if not any(map(dataset_drifted, columns)):
            columns.append(evidently.drifted(day))
    return Episode(answers, columns)


class _Progress:
    """A line now and then, with the time that is left."""

    def __init__(self, days: int) -> None:
        self._days, self._done = days, 0
        self._started_at = self._said_at = time.monotonic()

    def add(self, days: int, text: str) -> None:
        """Count ``days`` more."""
        self._done += days
        now = time.monotonic()
        if now - self._said_at < 15 and self._done < self._days:
            return
        self._said_at = now
        left = (now - self._started_at) * (self._days - self._done) / self._done
        print(f"{self._done:,} of {self._days:,} days, about {left:,.0f} s left; {text}", flush=True)


# Figures


def usual_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Days with a false alarm, by the habits of shops and the length of the reference."""
    return [
        {
            "shops": shops,
            "reference_days": length,
            "days": len(usual.answers),
            "any_error": sum(bool(answers.questions("ERROR")) for answers in usual.answers),
            "any_warn_or_error": sum(bool(answers.questions("WARN", "ERROR")) for answers in usual.answers),
            "any_unknown": sum(bool(answers.questions("UNKNOWN")) for answers in usual.answers),
            "evidently_dataset": sum(map(dataset_drifted, usual.columns)),
            "evidently_any_column": sum(map(bool, usual.columns)),
        }
        for (shops, length), usual in outcome.usual.items()
    ]


def usual_details(outcome: Outcome) -> dict[str, Any]:
    """Which questions and columns the false alarms were of, and in which words."""
    return {
        f"{shops} shops, {length} days of reference": {
            **{
                level: Counter(name for answers in usual.answers for name in answers.questions(level))
                for level in ("ERROR", "WARN", "UNKNOWN")
            },
            "sentences": [sentence for answers in usual.answers for sentence in answers.sentences.values()],
            "evidently_columns": Counter(name for columns in usual.columns for name in columns),
        }
        for (shops, length), usual in outcome.usual.items()
    }


def drift_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Share caught and delay, by kind and strength."""
    kinds = {kind.name: kind for kind in KINDS}
    usual = outcome.usual["usual", REFERENCES[0]].columns
    return [
        {
            **_drift_row(kinds[name], strength, episodes),
            "evidently_fitting_column_on_usual_days": _share(
                bool(columns & set(kinds[name].columns)) for columns in usual
            ),
        }
        for (name, strength), episodes in outcome.episodes.items()
        if episodes
    ]


def _drift_row(kind: Kind, strength: str, episodes: Sequence[Episode]) -> dict[str, Any]:
    fitting = set(kind.questions)
    others = Counter(
        question
        for episode in episodes
        for question in {q for answers in episode.answers for q in answers.questions("ERROR")} - fitting
    )
    return {
        "kind": kind.name,
        "strength": strength,
        "amount": kind.amounts[STRENGTHS.index(strength)],
        "unit": kind.unit,
        "episodes": len(episodes),
        **_caught("error", [e.answers for e in episodes], lambda a: bool(a.questions("ERROR") & fitting)),
        **_caught(
            "warn_or_error",
            [e.answers for e in episodes],
            lambda answers: bool(answers.questions("WARN", "ERROR") & fitting),
        ),
        **_caught("any_question_error", [e.answers for e in episodes], lambda a: bool(a.questions("ERROR"))),
        **_caught("evidently_dataset", [e.columns for e in episodes], dataset_drifted),
        **_caught(
            "evidently_fitting_column",
            [e.columns for e in episodes],
            lambda columns: bool(columns & set(kind.columns)),
        ),
        "episodes_with_error_of_other_questions": dict(others.most_common()),
        "example": next(
            (
                episode.answers[-1].sentences[question]
                for episode in episodes
                for question in kind.questions
                if question in episode.answers[-1].sentences
            ),
            "",
        ),
    }


def _share(cases: Iterable[bool]) -> float | None:
    found = list(cases)
    return sum(found) / len(found) if found else None


def _caught(name: str, episodes: Sequence[Sequence[Any]], alarms: Callable[[Any], bool]) -> dict[str, Any]:
    """Share of the episodes with an alarm; mean, median and largest delay of these."""
    delays = [
        delay
        for days in episodes
        if (delay := next((place for place, day in enumerate(days) if alarms(day)), None)) is not None
    ]
    return {
        f"{name}_caught": len(delays) / len(episodes),
        f"{name}_mean_delay": float(np.mean(delays)) if delays else None,
        f"{name}_median_delay": float(np.median(delays)) if delays else None,
        f"{name}_largest_delay": max(delays, default=None),
    }


_SHOWN = {
    "error_caught": "ERROR",
    "error_mean_delay": "delay",
    "warn_or_error_caught": "WARN+",
    "warn_or_error_mean_delay": "delay ",
    "evidently_dataset_caught": "Evidently dataset",
    "evidently_dataset_mean_delay": "delay  ",
    "evidently_fitting_column_caught": "Evidently column",
    "evidently_fitting_column_mean_delay": "delay   ",
    "evidently_fitting_column_on_usual_days": "of usual days",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    os.environ.setdefault("DO_NOT_TRACK", "1")  # Evidently reads it when it is imported
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or threads that train fight over a busy core
    parser = _parser()
    options = parser.parse_args(arguments)
    usual_days = -(-options.days // options.worlds)
    if usual_days < EARLIER_DAYS + EPISODE_DAYS:
        parser.error(f"--days: at least {EARLIER_DAYS + EPISODE_DAYS} for each of {options.worlds} worlds")
    pool = make_pool(options.home, options.offers_per_day)
    started_at = time.monotonic()
    outcome = measure(pool, options.worlds, usual_days, options.episodes, options.seed)
    seconds = time.monotonic() - started_at
    usual, drift, details = usual_rows(outcome), drift_rows(outcome), usual_details(outcome)
    print(f"\nDays on which nothing drifted ({seconds:,.0f} s in all)\n")
    show(usual)
    print("\nShare of episodes that were caught within a week, and the mean delay of these in days\n")
    show(
        [
            {
                "kind": f"{row['kind']} {row['strength']}",
                "amount": row["amount"],
                **{title: row[name] for name, title in _SHOWN.items()},
            }
            for row in drift
        ]
    )
    failed = outcome.failed_summary_tests
    some = f"on {sum(map(bool, failed))} of {len(failed)} days at least one"
    print(
        "\nEvidently's DataSummaryPreset on usual days, with a reference as large as the day: "
        f"{np.mean(failed):.1f} tests failed on average, {some}\n"
    )
    for reference, of_reference in details.items():
        for sentence in of_reference["sentences"]:
            if sentence.startswith("ERROR"):
                print(f"false alarm, {reference}: {sentence}")
    figures = {
        "seconds": seconds,
        "pool_offers": len(pool.offers),
        "worlds": options.worlds,
        "seed": options.seed,
        "usual_days": usual,
        "false_alarms": details,
        "failed_tests_of_the_summary_preset_on_usual_days": outcome.failed_summary_tests,
        "drift": drift,
    }
    save(options.result, figures)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drift_trust", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, metavar="DIR", help="for feed, models and pool")
    parser.add_argument("--offers-per-day", type=int, default=20_000, metavar="N", help="of the demo feed")
    parser.add_argument("--worlds", type=int, default=10, help="shop landscapes (default: %(default)s)")
    parser.add_argument("--days", type=int, default=200, help="usual days in all (default: %(default)s)")
    parser.add_argument(
        "--episodes", type=int, default=20, help="of each kind and strength (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=100, help="of the first landscape: none that limits were set with"
    )
    parser.add_argument("--result", default="drift_trust", help="name of the file (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
