"""The two questions about the model, answered from labels that are compared with predictions.

Recent days are held against older ones at equal age of the labels: the decisions that come first are not
like those that come last, and a young day only has the former. No model is perfect, so what is judged is
always a change: what was the same before is shown, and nobody is called for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ml.drift.answers import LEVELS, Answer, Finding, Level
from ml.quality.questions import AGREEMENT, LIMITS, QUESTIONS, SHARES, Limits
from ml.quality.statistics import (
    Estimate,
    Floats,
    Integers,
    Spread,
    holm,
    interval_of,
    mean_of,
    overdispersion,
    p_value,
    share_differences,
    spread_between_days,
    weights_at_equal_age,
    weights_of_mix,
)

MOST_FINDINGS = 20
PREDICTED_TOO_OFTEN, PREDICTED_TOO_RARELY, AS_DECIDED = (
    "predicted too often",
    "predicted too rarely",
    "as decided",
)

_TITLES = {question.name: question.title for question in QUESTIONS}
_Z = 1.96


@dataclass(frozen=True)
class Labels:
    """Labels of some days, and what the offers of those days were like."""

    table: pd.DataFrame
    """As :data:`ml.quality.compared.COMPARED_SCHEMA`."""
    mix: Mapping[str, float]
    """Catalogued offers of the days by predicted category."""
    weights: Floats
    """By which the labels count; shape (labels,)."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def right(self) -> Floats:
        """1 for each label that is equal to the prediction, else 0."""
        return self.table["right"].to_numpy(np.float64)

    @property
    def day(self) -> Integers:
        """Number of each label's day."""
        return np.asarray(np.unique(self.table["day"].to_numpy(str), return_inverse=True)[1], np.int64)

    @property
    def days(self) -> int:
        """Days that have a label."""
        return int(self.table["day"].nunique())

    def mixed(self, department_of: Mapping[str, str]) -> Labels:
        """Weighted to the mix of predicted categories of all offers."""
        weights = weights_of_mix(
            self.table["predicted"].tolist(),
            self.table["predicted_top"].tolist(),
            self.mix,
            department_of,
            self.weights,
        )
        return Labels(self.table, self.mix, weights)

    def only(self, column: str, value: str) -> Labels:
        """Those with this value in a column."""
        inside = (self.table[column] == value).to_numpy(bool)
        return Labels(self.table[inside], self.mix, self.weights[inside])

    def accuracy(self, spread: Spread) -> Estimate:
        """Share right."""
        return mean_of(self.right, self.weights, self.day, spread)


@dataclass(frozen=True)
class Periods:
    """The recent days that are judged, and the older ones at the same age of their labels."""

    recent: Labels
    older: Labels
    recent_days: list[str]
    older_days: list[str]
    spread: Spread
    """Between the older days."""

    @classmethod
    def of(
        cls,
        labels: pd.DataFrame,
        traffic: Mapping[str, Mapping[str, int]],
        ages: Mapping[str, int],
        old_enough: Sequence[str],
        most_recent_days: int,
        limits: Limits = LIMITS,
    ) -> Periods:
        """Divide the days that are old enough.

        Recent are the newest days of one model version: of the newest that has enough labels, so that a new
        model is judged on its own days as soon as it can be. Older are all days before, whatever model they
        had. At most a third of the days is recent.
        """
        days = sorted(old_enough)
        recent_days = _recent_days(labels, days, most_recent_days, limits)
        older_days = [day for day in days if day < recent_days[0]] if recent_days else []
        recent = labels[labels["day"].isin(recent_days)]
        older = labels[labels["day"].isin(older_days)]
        per_day = recent["day"].value_counts()
        weights = weights_at_equal_age(
            older["delay_days"].to_numpy(np.int64),
            np.array([ages[day] for day in per_day.index], np.int64),
            np.asarray(per_day.to_numpy(), np.int64),
        )
        in_time = weights > 0
        older, weights = older[in_time], weights[in_time]
        seen = Labels(older, mix_of(traffic, older_days), weights)
        return cls(
            recent=Labels(recent, mix_of(traffic, recent_days), np.ones(len(recent))),
            older=seen,
            recent_days=recent_days,
            older_days=older_days,
            spread=spread_between_days(older["right"].to_numpy(bool), seen.day),
        )


def _recent_days(
    labels: pd.DataFrame, days: Sequence[str], most_recent_days: int, limits: Limits
) -> list[str]:
    labels_of = labels["day"].value_counts().to_dict()
    # A day has one model, but for one that was catalogued while another was deployed.
    version_of = labels.groupby("day")["model_version"].agg(lambda of_day: of_day.mode().iloc[0]).to_dict()
    candidates = []
    for version in dict.fromkeys(version_of[day] for day in reversed(days)):
        own = [day for day in days if version_of[day] == version]
        up_to = sum(day <= own[-1] for day in days)
        recent = own[-min(most_recent_days, max(1, up_to // 3)) :]
        if sum(labels_of[day] for day in recent) >= limits.least_recent_labels:
            return recent
        candidates.append(recent)
    return candidates[0] if candidates else []


def mix_of(traffic: Mapping[str, Mapping[str, int]], days: Sequence[str]) -> dict[str, float]:
    """Catalogued offers of these days by predicted category."""
    mix: dict[str, float] = {}
    for day in days:
        for category, offers in traffic.get(day, {}).items():
            mix[category] = mix.get(category, 0.0) + offers
    return mix


def too_few(periods: Periods, limits: Limits = LIMITS) -> str:
    """Why nothing can be said, in words; empty if something can."""
    if len(periods.recent) < limits.least_recent_labels:
        return (
            f"{len(periods.recent):,} labels of the recent days, "
            f"at least {limits.least_recent_labels} are needed"
        )
    if len(periods.older_days) < limits.least_older_days or len(periods.older) < limits.least_older_labels:
        return (
            f"{len(periods.older):,} labels of {len(periods.older_days)} older days at equal age, at least "
            f"{limits.least_older_labels} of {limits.least_older_days} days are needed"
        )
    confirmed = float(np.mean(periods.older.right))
    if confirmed < limits.least_confirmed:
        return (
            f"people confirm {confirmed:.1%} of what they look at: the feed holds mistakes only, and "
            "their share says nothing of the model"
        )
    return ""


def agreement(
    periods: Periods,
    department_of: Mapping[str, str],
    name_of: Callable[[str], str],
    limits: Limits = LIMITS,
) -> Answer:
    """Whether people confirm as many of the recent days' categories as of the older days'.

    All labels together (weighted to the mix of all offers) are one family of tests; countries and departments
    (as they are) another, corrected for their number.
    """
    if reason := too_few(periods, limits):
        return _unknown(AGREEMENT, reason)
    whole = _Fall("", periods.recent.mixed(department_of), periods.older.mixed(department_of), periods.spread)
    groups = [
        _Fall(
            f"{title} {name_of(value) if column == 'predicted_top' else value}", recent, older, periods.spread
        )
        for title, column in (("country", "country"), ("predicted as", "predicted_top"))
        for value in sorted(set(periods.recent.table[column]) - {""})
        if len(recent := periods.recent.only(column, value)) >= limits.least_group_labels
        and len(older := periods.older.only(column, value)) >= limits.least_group_labels
    ]
    corrected = holm({fall.group: fall.p_value for fall in groups})
    days = len(periods.recent_days)
    findings = [
        fall.finding(p, days, level)
        for fall, p in [(whole, whole.p_value), *((fall, corrected[fall.group]) for fall in groups)]
        if (level := fall.level(p, limits)) is not None
    ]
    standing = (
        f"{whole.now.value:.1%} right on the newest {_days(days)} old enough "
        f"({len(periods.recent):,} labels), {whole.before.value:.1%} on {_days(len(periods.older_days))} "
        f"before at equal age of the labels ({len(periods.older):,})"
    )
    return _answer(AGREEMENT, standing, findings, 1 + len(groups))


@dataclass(frozen=True)
class _Fall:
    """The share right of a group of offers, now and before."""

    group: str
    recent: Labels
    older: Labels
    spread: Spread

    @property
    def now(self) -> Estimate:
        return self.recent.accuracy(self.spread)

    @property
    def before(self) -> Estimate:
        return self.older.accuracy(self.spread)

    @property
    def p_value(self) -> float:
        now, before = self.now, self.before
        return p_value(
            now.value - before.value, now.variance + before.variance, self.spread.freedom, one_sided=True
        )

    def level(self, p: float, limits: Limits) -> Level | None:
        loss = self.before.value - self.now.value
        if p < limits.error_p and loss >= limits.error_loss:
            return "ERROR"
        return "WARN" if p < limits.warn_p and loss >= limits.warn_loss else None

    def finding(self, p: float, days: int, level: Level) -> Finding:
        now, before = self.now, self.before
        half = _Z * float(np.sqrt(now.variance + before.variance))
        low, high = max(0.0, before.value - half), min(1.0, before.value + half)
        return Finding(
            question=AGREEMENT,
            measure="share right",
            group=self.group,
            segment="",
            level=level,
            value=now.value,
            usual=before.value,
            usual_low=low,
            usual_high=high,
            effect=now.value - before.value,
            p_value=p,
            days=days,
            sentence=f"share right{', ' + self.group if self.group else ''}: {now.value:.1%} of "
            f"{len(self.recent):,} labels, usually {low:.1%}–{high:.1%}",
        )


@dataclass(frozen=True)
class CategoryShares:
    """Shares of one category, weighted to the mix of all offers; and as they are."""

    level: str
    """``department`` or ``category``."""
    category_id: str
    labels: int
    """Labels whose predicted or actual category it is."""
    predicted: float
    actual: float
    difference: float
    low: float
    high: float
    """95 % interval of the difference."""
    raw_difference: float
    """Without the weights."""
    older_difference: float
    """Of the older days, at equal age of the labels."""
    recent_difference: float
    p_value: float
    """That there is no difference, corrected for the number of categories."""
    change_p_value: float
    """That it did not change from the older days to the recent, likewise."""

    @property
    def verdict(self) -> str:
        """In words; what may be chance is as decided."""
        if self.p_value >= LIMITS.warn_p:
            return AS_DECIDED
        return PREDICTED_TOO_OFTEN if self.difference > 0 else PREDICTED_TOO_RARELY


def category_shares(
    judged: Labels, periods: Periods, department_of: Mapping[str, str], limits: Limits = LIMITS
) -> list[CategoryShares]:
    """Predicted and actual share of every department, and of categories with enough labels.

    Args:
        judged: All labels of all days that are old enough, whatever their age.
        periods: The same divided, for what changed.
        department_of: Top-level category of every category.
        limits: How many labels are enough.
    """
    found: list[CategoryShares] = []
    for level, columns in (
        ("department", ("predicted_top", "actual_top")),
        ("category", ("predicted", "actual")),
    ):
        names, codes = np.unique(judged.table[list(columns)].to_numpy(str), return_inverse=True)
        if not len(names):
            continue
        labels = np.bincount(codes.ravel(), minlength=len(names))
        place = {name: number for number, name in enumerate(names.tolist())}
        all_days = _differences(judged.mixed(department_of), columns, place, periods.spread)
        raw = _differences(judged, columns, place, periods.spread)
        recent = _differences(periods.recent.mixed(department_of), columns, place, periods.spread)
        older = _differences(periods.older.mixed(department_of), columns, place, periods.spread)
        freedom = periods.spread.freedom
        for name, number in place.items():
            if labels[number] < limits.least_group_labels or not name:
                continue
            half = _Z * float(np.sqrt(all_days.variance[number]))
            found.append(
                CategoryShares(
                    level=level,
                    category_id=name,
                    labels=int(labels[number]),
                    predicted=float(all_days.predicted[number]),
                    actual=float(all_days.actual[number]),
                    difference=float(all_days.difference[number]),
                    low=float(all_days.difference[number]) - half,
                    high=float(all_days.difference[number]) + half,
                    raw_difference=float(raw.difference[number]),
                    older_difference=float(older.difference[number]),
                    recent_difference=float(recent.difference[number]),
                    p_value=p_value(all_days.difference[number], all_days.variance[number], freedom),
                    change_p_value=p_value(
                        recent.difference[number] - older.difference[number],
                        recent.variance[number] + older.variance[number],
                        freedom,
                    )
                    if len(periods.recent) and len(periods.older)
                    else 1.0,
                )
            )
    return _corrected(found)


@dataclass(frozen=True)
class _Differences:
    predicted: Floats
    actual: Floats
    difference: Floats
    variance: Floats


def _differences(
    labels: Labels, columns: tuple[str, str], place: Mapping[str, int], spread: Spread
) -> _Differences:
    predicted, actual = (
        np.array([place[name] for name in labels.table[column]], np.int64) for column in columns
    )
    as_predicted, as_decided, difference, variance = share_differences(
        predicted, actual, labels.weights, len(place)
    )
    right = float(labels.right.mean()) if len(labels) else 0.0
    factor = overdispersion(spread, right, len(labels), labels.days)
    return _Differences(as_predicted, as_decided, difference, variance * factor)


def _corrected(found: list[CategoryShares]) -> list[CategoryShares]:
    standing = holm({f"{share.level} {share.category_id}": share.p_value for share in found})
    change = holm({f"{share.level} {share.category_id}": share.change_p_value for share in found})
    corrected = [
        replace(
            share,
            p_value=standing[f"{share.level} {share.category_id}"],
            change_p_value=change[f"{share.level} {share.category_id}"],
        )
        for share in found
    ]
    return sorted(
        corrected, key=lambda share: (share.level == "category", -abs(share.difference), share.category_id)
    )


def shares_answer(
    found: Sequence[CategoryShares],
    periods: Periods,
    judged: Labels,
    name_of: Callable[[str], str],
    limits: Limits = LIMITS,
) -> Answer:
    """Whether predicted shares are as close as before to those that people decide for.

    A finding is a difference that the recent days have and the older, at equal age of the labels, do not. One
    that is the same on all days is in the table and the figure only.
    """
    if reason := too_few(periods, limits):
        return _unknown(SHARES, reason)
    findings = []
    for share in found:
        if (level := _change_level(share, limits)) is not None:
            findings.append(_change_finding(share, level, name_of, len(periods.recent_days)))
    apart = 0.5 * sum(abs(share.difference) for share in found if share.level == "department")
    standing = (
        f"{apart:.1%} of offers would have to change department for the predicted shares to be those that "
        f"people decide for ({len(judged):,} labels of {_days(judged.days)}, weighted to all offers)"
    )
    return _answer(SHARES, standing, findings, len(found))


def _change_level(share: CategoryShares, limits: Limits) -> Level | None:
    if abs(share.recent_difference) <= abs(share.older_difference):
        return None  # a difference that became smaller is what a better model does
    size = abs(share.recent_difference - share.older_difference)
    if share.change_p_value < limits.error_p and size >= limits.error_share:
        return "ERROR"
    return "WARN" if share.change_p_value < limits.warn_p and size >= limits.warn_share else None


def _change_finding(share: CategoryShares, level: Level, name_of: Callable[[str], str], days: int) -> Finding:
    return Finding(
        question=SHARES,
        measure="predicted less actual share",
        group=share.level,
        segment=name_of(share.category_id),
        level=level,
        value=share.recent_difference,
        usual=share.older_difference,
        usual_low=share.older_difference - LIMITS.warn_share,
        usual_high=share.older_difference + LIMITS.warn_share,
        effect=share.recent_difference - share.older_difference,
        p_value=share.change_p_value,
        days=days,
        sentence=f"{name_of(share.category_id)}: predicted {_points(share.recent_difference)} than people "
        f"decide, before {_points(share.older_difference)}",
    )


def _points(difference: float) -> str:
    return f"{abs(difference) * 100:.1f} points {'more' if difference > 0 else 'less'} often"


def _days(number: int) -> str:
    return f"{number} day{'' if number == 1 else 's'}"


def _unknown(question: str, reason: str) -> Answer:
    return Answer(
        question=question,
        title=_TITLES[question],
        level="UNKNOWN",
        sentence=f"too few to tell: {reason}",
        series=0,
        findings=[],
        found=0,
    )


def _answer(question: str, standing: str, findings: list[Finding], series: int) -> Answer:
    strongest = sorted(findings, key=lambda f: (-LEVELS[f.level], f.p_value, f.group, f.segment))
    shown = "; ".join(finding.sentence for finding in strongest[:3])
    more = f"; and {len(strongest) - 3} more" if len(strongest) > 3 else ""
    return Answer(
        question=question,
        title=_TITLES[question],
        level=strongest[0].level if strongest else "OK",
        sentence=f"{shown}{more}. All labels: {standing}" if strongest else standing,
        series=series,
        findings=strongest[:MOST_FINDINGS],
        found=len(strongest),
    )


def interval(labels: Labels, spread: Spread) -> tuple[float, float, float]:
    """Share right with its 95 % interval."""
    found = labels.accuracy(spread)
    return (found.value, *interval_of(found))
