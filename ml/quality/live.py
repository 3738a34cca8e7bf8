"""Live quality: how right the categories were that the model gave, as far as people have decided since.

Labels come late and are chosen by people. So every figure says how many labels it rests on and how many are
still expected, young days are compared with older ones at equal age of the labels only, and shares are
weighted to the mix of all offers. The questions about the model are answered in :mod:`ml.quality.answers`,
those about the feed in :mod:`ml.quality.feed`.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ml.drift.answers import LEVELS, Answer
from ml.quality.answers import (
    CategoryShares,
    Labels,
    Periods,
    agreement,
    category_shares,
    interval,
    mix_of,
    shares_answer,
)
from ml.quality.compared import COMPARED_SCHEMA, Comparison, Unmatched, compare
from ml.quality.feed import about_catalogued, keep_coming
from ml.quality.questions import AGREEMENT, CATALOGUED, COMING, LIMITS, SHARES
from ml.quality.statistics import Floats, arrival_curve, arrived_at, spread_between_days
from ml.stages import LiveQualityParameters
from ml.taxonomy import Taxonomy
from ml.taxonomy_change.transitions import Transitions

if TYPE_CHECKING:
    from ml.runner import StageContext

REPORT_FILE = "quality.json"
COMPARED_FILE = "compared.parquet"
DAYS_FILE = "days.parquet"
GROUPS_FILE = "groups.parquet"
SHARES_FILE = "shares.parquet"
ACCURACY_PLOT = "accuracy.png"
SHARES_PLOT = "shares.png"
DECISIONS_PLOT = "decisions.png"
PAGE_FILE = "report.html"

_PLOT_OF = {
    AGREEMENT: ACCURACY_PLOT,
    SHARES: SHARES_PLOT,
    COMING: DECISIONS_PLOT,
    CATALOGUED: DECISIONS_PLOT,
}

_GROUPS = (("country", "country"), ("department", "predicted_top"), ("model version", "model_version"))


class DayQuality(msgspec.Struct, frozen=True, kw_only=True):
    """One catalogued day, as far as people have decided."""

    day: str
    offers: int
    labels: int
    age_days: int
    """From the day to the newest decision of the feed."""
    completeness: float
    """Expected share of its labels that have come by that age."""
    too_young: bool
    recent: bool
    """Whether it is one of the days that are judged."""
    right: float
    low: float
    high: float
    usual: float | None
    """Share right of the older days' labels that came within the same age; None of older days themselves."""
    wrong_per_1000: float
    """Labels that differ from the prediction, by catalogued offers."""


class GroupQuality(msgspec.Struct, frozen=True, kw_only=True):
    """The share right of one country, department or model version, on all days that are old enough."""

    kind: str
    group: str
    labels: int
    right: float
    low: float
    high: float


class Delays(msgspec.Struct, frozen=True, kw_only=True):
    """How late labels come."""

    labels_by_delay: list[int]
    """Labels that took 0, 1, 2 … days."""
    arrived: list[float]
    """Expected share of a day's labels after 0, 1, 2 … days."""
    median_days: int
    days_until_90_percent: int


class QualityReport(msgspec.Struct, frozen=True, kw_only=True):
    """Content of ``quality.json``."""

    newest_day: str
    labels_until: str
    """ISO date of the newest decision; empty without one."""
    labels: int
    """Decisions that are compared with a prediction."""
    confirmed: int
    """Those that are equal to it, in the model's own taxonomy."""
    unmatched: dict[str, int]
    """Decisions that are compared with nothing, by why."""
    right: float
    """Share right of all labels of the days that are old enough, as they are."""
    right_low: float
    right_high: float
    right_weighted: float
    """The same, weighted to the mix of predicted categories of all offers."""
    weighted_low: float
    weighted_high: float
    right_in_force: float
    """The same as :attr:`right` in today's taxonomy, where old answers are the most likely successors."""
    promised: float
    """Mean confidence of the same offers: what the model promised, by its calibration at release."""
    judged_model: str
    """Model version whose newest days are judged; empty without any."""
    may_be_unknown: bool
    """Whether it is no news that the questions about the model have no answer."""
    delays: Delays
    days: list[DayQuality]
    groups: list[GroupQuality]
    answers: list[Answer]
    sentence: str


def write_live_quality(context: StageContext, parameters: LiveQualityParameters) -> dict[str, Any]:
    """Stage ``live_quality``: ``quality.json``, its tables, its plots and a page of all of it.

    Without a correction, or without a catalogued day, the answers are UNKNOWN and say why.
    """
    taxonomy = Taxonomy.load(context.input("catalog_taxonomy"))
    transitions = Transitions.read(context.input("taxonomy_change"))
    found = compare(context, taxonomy, transitions, parameters.newest_day)
    context.progress.say(f"{len(found.labels):,} decisions are about catalogued offers")
    department_of = {category: taxonomy.ancestor_at(category, 1) for category in taxonomy}

    def name_of(category_id: str) -> str:
        return taxonomy.path(category_id) if category_id in taxonomy else category_id or "(none)"

    ages = _ages(found)
    curve = _arrival_curve(found, ages)
    old_enough = [
        day
        for day, age in ages.items()
        if arrived_at(curve, age) >= LIMITS.least_completeness and (found.labels["day"] == day).any()
    ]
    periods = Periods.of(found.labels, found.traffic, ages, old_enough, parameters.recent_days)
    judged = _labels_of(found, old_enough)
    shares = category_shares(judged, periods, department_of)
    answers = [
        agreement(periods, department_of, name_of),
        shares_answer(shares, periods, judged, name_of),
        keep_coming(found.decided, found.deliveries, parameters.newest_day),
        about_catalogued(found.decided, min(found.traffic, default=parameters.newest_day)),
    ]
    report = _report(
        parameters.newest_day, found, judged, periods, ages, curve, department_of, name_of, answers
    )
    pictures = _pictures(report, found, shares, name_of)
    report = msgspec.structs.replace(report, answers=[_shown(answer, pictures) for answer in answers])
    _write(context.output, report, found, shares, name_of, pictures)
    context.progress.say(report.sentence)
    return _metrics(report)


def read_quality_report(folder: Path) -> QualityReport:
    """What a ``live_quality`` says."""
    return msgspec.json.decode((folder / REPORT_FILE).read_bytes(), type=QualityReport)


def _pictures(
    report: QualityReport,
    found: Comparison,
    shares: Sequence[CategoryShares],
    name_of: Callable[[str], str],
) -> dict[str, bytes]:
    """The plots that there is something to draw for, by file name."""
    from ml.quality.plots import accuracy_plot, decisions_plot, shares_plot

    pictures = {}
    if any(day.labels for day in report.days):
        pictures[ACCURACY_PLOT] = accuracy_plot(report.days)
    if shares:
        pictures[SHARES_PLOT] = shares_plot(shares, name_of)
    if found.decided:
        pictures[DECISIONS_PLOT] = decisions_plot(found.decided, report.newest_day)
    return pictures


def _shown(answer: Answer, pictures: Mapping[str, bytes]) -> Answer:
    plot = _PLOT_OF[answer.question]
    return msgspec.structs.replace(answer, picture=plot if plot in pictures else "")


def _ages(found: Comparison) -> dict[str, int]:
    """Days from each catalogued day to the newest decision; negative where all decisions are older."""
    if not found.labels_until:
        return dict.fromkeys(found.traffic, -1)
    until = datetime.date.fromisoformat(found.labels_until)
    return {day: (until - datetime.date.fromisoformat(day)).days for day in found.traffic}


def _arrival_curve(found: Comparison, ages: Mapping[str, int]) -> Floats:
    delays = {day: of_day.to_numpy(np.int64) for day, of_day in found.labels.groupby("day")["delay_days"]}
    nothing = np.zeros(0, np.int64)
    return arrival_curve(list(ages.values()), [delays.get(day, nothing) for day in ages])


def _labels_of(found: Comparison, days: list[str]) -> Labels:
    labels = found.labels[found.labels["day"].isin(days)]
    return Labels(labels, mix_of(found.traffic, days), np.ones(len(labels)))


def _report(
    newest_day: str,
    found: Comparison,
    judged: Labels,
    periods: Periods,
    ages: Mapping[str, int],
    curve: Floats,
    department_of: Mapping[str, str],
    name_of: Callable[[str], str],
    answers: list[Answer],
) -> QualityReport:
    spread = spread_between_days(judged.table["right"].to_numpy(bool), judged.day)
    right, low, high = interval(judged, spread)
    weighted, weighted_low, weighted_high = interval(judged.mixed(department_of), spread)
    days = [_day_quality(day, found, periods, ages, curve) for day in found.traffic]
    return QualityReport(
        newest_day=newest_day,
        labels_until=found.labels_until,
        labels=len(found.labels),
        confirmed=int(found.labels["right"].sum()),
        unmatched=asdict(found.unmatched),
        right=right,
        right_low=low,
        right_high=high,
        right_weighted=weighted,
        weighted_low=weighted_low,
        weighted_high=weighted_high,
        right_in_force=_mean(judged.table["right_in_force"]),
        promised=_mean(judged.table["confidence"]),
        judged_model=_model_of(periods.recent.table),
        may_be_unknown=_may_be_unknown(found, newest_day),
        delays=_delays(found.labels, curve),
        days=days,
        groups=_group_qualities(judged, spread, name_of),
        answers=answers,
        sentence=_sentence(found, judged, right, (low, high), days),
    )


def _model_of(labels: pd.DataFrame) -> str:
    return str(labels["model_version"].mode().iloc[0]) if len(labels) else ""


def _may_be_unknown(found: Comparison, newest_day: str) -> bool:
    """Whether it is no news that nothing can be said of the model.

    So it is without any label, while the feed is young, and where people report mistakes only. Otherwise the
    labels were enough once, or should be by now.
    """
    if found.labels.empty or found.labels["right"].mean() < LIMITS.least_confirmed:
        return True
    decided_on = pd.to_datetime(found.labels["day"]) + pd.to_timedelta(found.labels["delay_days"], unit="D")
    first: pd.Timestamp = decided_on.min()
    return (datetime.date.fromisoformat(newest_day) - first.date()).days < LIMITS.settling_days


def _day_quality(
    day: str, found: Comparison, periods: Periods, ages: Mapping[str, int], curve: Floats
) -> DayQuality:
    labels = _labels_of(found, [day])
    offers = sum(found.traffic[day].values())
    right, low, high = interval(labels, periods.spread)
    return DayQuality(
        day=day,
        offers=offers,
        labels=len(labels),
        age_days=ages[day],
        completeness=arrived_at(curve, ages[day]),
        too_young=arrived_at(curve, ages[day]) < LIMITS.least_completeness,
        recent=day in periods.recent_days,
        right=right,
        low=low,
        high=high,
        usual=None if day in periods.older_days else _usual_at(periods.older.table, ages[day]),
        wrong_per_1000=1000 * (len(labels) - int(labels.right.sum())) / offers if offers else 0.0,
    )


def _usual_at(older: pd.DataFrame, age: int) -> float | None:
    in_time = older[older["delay_days"] <= age]
    return float(in_time["right"].mean()) if len(in_time) else None


def _group_qualities(judged: Labels, spread: Any, name_of: Callable[[str], str]) -> list[GroupQuality]:
    groups = []
    for kind, column in _GROUPS:
        for value in sorted(set(judged.table[column])):
            inside = judged.only(column, value)
            right, low, high = interval(inside, spread)
            name = name_of(value) if column == "predicted_top" else value or "(unknown)"
            groups.append(
                GroupQuality(kind=kind, group=name, labels=len(inside), right=right, low=low, high=high)
            )
    return groups


def _delays(labels: pd.DataFrame, curve: Floats) -> Delays:
    by_delay = Counter(labels["delay_days"].tolist())
    return Delays(
        labels_by_delay=[by_delay[delay] for delay in range(len(curve))],
        arrived=curve.tolist(),
        median_days=int(np.searchsorted(curve, 0.5)) if len(curve) else 0,
        days_until_90_percent=int(np.searchsorted(curve, 0.9)) if len(curve) else 0,
    )


def _sentence(
    found: Comparison, judged: Labels, right: float, ends: tuple[float, float], days: list[DayQuality]
) -> str:
    parts = []
    if not found.labels_until:
        parts.append("no correction has come yet")
    elif not found.traffic:
        parts.append("no day is catalogued yet")
    elif not len(judged):
        parts.append("no correction is about an offer of a catalogued day that is old enough")
    else:
        parts.append(
            f"{right:.1%} of {len(judged):,} labelled offers of {judged.days} days are right "
            f"(95 % interval {ends[0]:.1%} to {ends[1]:.1%}); labels until {found.labels_until}"
        )
    if found.labels_until and (young := [day.day for day in days if day.too_young]):
        parts.append(_young_in_words(young))
    if missed := _unmatched_in_words(found.unmatched):
        parts.append(missed)
    return "; ".join(parts)


def _young_in_words(days: list[str]) -> str:
    if len(days) == 1:
        return f"{days[0]} is too young to judge"
    return f"{len(days):,} days are too young to judge ({min(days)} to {max(days)})"


def _unmatched_in_words(unmatched: Unmatched) -> str:
    counts = (
        (unmatched.unknown, "of offers that no catalogued day has"),
        (unmatched.too_early, "made before their offer was catalogued"),
        (unmatched.before, "made before the first of these days"),
    )
    told = ", ".join(f"{number:,} {what}" for number, what in counts if number)
    return f"corrections compared with nothing: {told}" if told else ""


def _write(
    output: Path,
    report: QualityReport,
    found: Comparison,
    shares: list[CategoryShares],
    name_of: Callable[[str], str],
    pictures: Mapping[str, bytes],
) -> None:
    from ml.quality.page import page

    (output / REPORT_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    compared = pa.Table.from_pandas(found.labels, COMPARED_SCHEMA, preserve_index=False)
    pq.write_table(compared.replace_schema_metadata(), output / COMPARED_FILE, compression="zstd")
    _write_rows(output / DAYS_FILE, [msgspec.structs.asdict(day) for day in report.days], DayQuality)
    _write_rows(
        output / GROUPS_FILE, [msgspec.structs.asdict(group) for group in report.groups], GroupQuality
    )
    pq.write_table(_shares_table(shares, name_of), output / SHARES_FILE)
    for name, png in pictures.items():
        (output / name).write_bytes(png)
    (output / PAGE_FILE).write_text(page(report, shares, name_of, pictures), encoding="utf-8")


_ARROW_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
}


def _write_rows(path: Path, rows: list[dict[str, Any]], kind: type[msgspec.Struct]) -> None:
    types: dict[str, pa.DataType] = {
        field.name: _ARROW_TYPES.get(field.type, pa.float64()) for field in msgspec.structs.fields(kind)
    }
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(types)), path)


def _shares_table(shares: list[CategoryShares], name_of: Callable[[str], str]) -> pa.Table:
    texts = ("level", "category_id", "path", "verdict")
    rows = [
        asdict(share) | {"path": name_of(share.category_id), "verdict": share.verdict} for share in shares
    ]
    fields = ["level", "category_id", "path", "labels", "predicted", "actual", "difference", "low", "high"]
    fields += [
        "raw_difference",
        "older_difference",
        "recent_difference",
        "p_value",
        "change_p_value",
        "verdict",
    ]
    schema = pa.schema(
        [
            (name, pa.string() if name in texts else pa.int64() if name == "labels" else pa.float64())
            for name in fields
        ]
    )
    return pa.Table.from_pylist(rows, schema)


def _metrics(report: QualityReport) -> dict[str, Any]:
    return {
        "labels": report.labels,
        "confirmed": report.confirmed,
        "unmatched": sum(report.unmatched.values()),
        "days": len(report.days),
        "days_too_young": sum(day.too_young for day in report.days),
        "labels_until": report.labels_until,
        "judged_from": min((day.day for day in report.days if day.recent), default=""),
        "judged_until": max((day.day for day in report.days if day.recent), default=""),
        "judged_model": report.judged_model,
        "right": report.right,
        "right_weighted": report.right_weighted,
        "right_in_force": report.right_in_force,
        "promised_less_right": report.promised - report.right,
        "median_delay_days": report.delays.median_days,
        "sentence": report.sentence,
        **{f"level_{answer.question}": LEVELS[answer.level] for answer in report.answers},
    }


def _mean(column: pd.Series[Any]) -> float:
    return float(column.mean()) if column.notna().any() else 0.0
