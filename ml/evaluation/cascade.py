"""What a cascade does on offers with a known category, beside the deep answer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from ml.evaluation import plots
from ml.evaluation.metrics import Array, Calibration, Floats, calibration, scores, scores_by_level
from ml.learning.risk_control import CONFIDENCE, paired_loss_p_value
from ml.serving.cascade import Cascade, CascadeSettings, Mask
from ml.taxonomy import Taxonomy

FAST, DEEP, CASCADE = "fast model", "student", "cascade"
"""As the pictures call them; the student with the fast model's word weighed in."""

_POINTS = 60
"""Of a curve."""


class CascadeAnswers(msgspec.Struct, frozen=True, kw_only=True):
    """What the parts of a cascade say of the same offers; each array (offers,)."""

    truth: Array
    fast: Array
    """Best category of the fast model."""
    fast_confidence: Floats
    deep: Array
    """Best category of the deep answer."""
    deep_confidence: Floats
    by_fast: Mask
    """Whether the fast model answers."""
    is_marked: Mask
    """Whether the answer is marked for review."""
    given: Array
    """Category that is answered: of a marked offer one that may lie above the best."""

    @property
    def best(self) -> Array:
        """Best category of whichever answers."""
        return np.where(self.by_fast, self.fast, self.deep)

    @property
    def confidence(self) -> Floats:
        """Its probability."""
        return np.where(self.by_fast, self.fast_confidence, self.deep_confidence)

    @property
    def calibrations(self) -> dict[str, Calibration]:
        """Of each part on all offers, and of what is answered."""
        return {
            FAST: calibration(self.fast_confidence, self.fast == self.truth),
            DEEP: calibration(self.deep_confidence, self.deep == self.truth),
            CASCADE: calibration(self.confidence, self.best == self.truth),
        }


class CascadeCurves(msgspec.Struct, frozen=True, kw_only=True):
    """What the pictures show."""

    shares: list[float]
    """Of all offers, ascending."""
    losses: list[float]
    """Accuracy lost against the deep answer if the fast model answers the share that it is surest of."""
    precisions: list[float]
    """Share right among the share of answers that are surest."""
    calibrations: dict[str, Calibration]


def cascade_answers(
    cascade: Cascade,
    fast_labels: Sequence[str],
    fast: np.ndarray[Any, Any],
    student: np.ndarray[Any, Any],
    truth: Sequence[str],
    countries: Sequence[str],
) -> CascadeAnswers:
    """Let a cascade answer.

    Args:
        cascade: The cascade.
        fast_labels: Of the fast model's output.
        fast: Probabilities by the fast model's own temperature, (offers, its labels).
        student: The same of the student.
        truth: Category of each offer.
        countries: Of each offer.
    """
    places = [cascade.country(country) for country in countries]
    fast = cascade.fast_probabilities(fast, places)
    by_fast = cascade.is_answered_fast(fast, places)
    deep = cascade.deep_probabilities(fast, student, places)
    fast_best = np.array(fast_labels, dtype=str)[fast.argmax(axis=1)]
    deep_best = np.array(cascade.labels, dtype=str)[deep.argmax(axis=1)]
    deep_confidence = deep.max(axis=1).astype(np.float64)
    is_marked = ~by_fast & np.array([cascade.needs_review(each) for each in deep_confidence], bool)
    given = np.where(by_fast, fast_best, deep_best).tolist()
    for row in np.flatnonzero(is_marked):
        given[row] = cascade.sure_enough(deep[row])[0]
    return CascadeAnswers(
        truth=np.array(truth, dtype=str),
        fast=fast_best,
        fast_confidence=fast.max(axis=1).astype(np.float64),
        deep=deep_best,
        deep_confidence=deep_confidence,
        by_fast=by_fast,
        is_marked=is_marked,
        given=np.array(given, dtype=str),
    )


def cascade_figures(answers: CascadeAnswers, taxonomy: Taxonomy, settings: CascadeSettings) -> dict[str, Any]:
    """Figures of a cascade.

    Returns:
        ``offers``; ``max_loss`` and ``min_precision``, as stated; ``share_fast`` (answered by the fast
        model) and ``share_review`` (marked); ``loss`` of accuracy against the deep answer alone, and
        ``loss_p_value``, of "no more than that is lost"; ``accuracy`` and ``weighted_f1`` of the best
        category, ``mean_weighted_f1`` over the levels of the taxonomy, and the same of the deep answer with
        ``student_`` before them; ``precision_unmarked`` (absent if all are marked); ``marked_right``: share
        of marked answers that name the true category or one above it (absent if none is marked); expected
        calibration errors ``fast_ece``, ``student_ece``, ``ece``.
    """
    truth, best = answers.truth, answers.best
    right, deep_right = best == truth, answers.deep == truth
    losses, gains = int((deep_right & ~right).sum()), int((right & ~deep_right).sum())
    figures: dict[str, Any] = {
        "offers": len(truth),
        "share_fast": float(answers.by_fast.mean()),
        "share_review": float(answers.is_marked.mean()),
        "max_loss": settings.max_loss,
        "min_precision": settings.min_precision,
        "loss": (losses - gains) / len(truth),
        # The other way round: the probability of so large a loss if no more than the stated one were lost.
        "loss_p_value": paired_loss_p_value(gains, losses, len(truth), -settings.max_loss, 1 - CONFIDENCE),
    }
    for prefix, predicted in (("", best), ("student_", answers.deep)):
        overall = scores(truth, predicted)
        levels = scores_by_level(truth, predicted, taxonomy.ancestor_at, taxonomy.levels)
        figures |= {
            f"{prefix}accuracy": overall.accuracy,
            f"{prefix}weighted_f1": overall.weighted_f1,
            f"{prefix}mean_weighted_f1": float(np.mean([level.weighted_f1 for level in levels])),
        }
    marked = answers.is_marked
    if not marked.all():
        figures["precision_unmarked"] = float(right[~marked].mean())
    if marked.any():
        pairs = zip(answers.given[marked].tolist(), truth[marked].tolist(), strict=True)
        figures["marked_right"] = float(np.mean([_is_at_or_above(g, t, taxonomy) for g, t in pairs]))
    errors = {name: each.expected_calibration_error for name, each in answers.calibrations.items()}
    figures |= {"fast_ece": errors[FAST], "student_ece": errors[DEEP], "ece": errors[CASCADE]}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in figures.items()}


def cascade_curves(answers: CascadeAnswers) -> CascadeCurves:
    """How a cascade's figures would move with its thresholds, and its reliability."""
    right = answers.best == answers.truth
    lost = (answers.deep == answers.truth).astype(float) - (answers.fast == answers.truth)
    by_fast = np.argsort(-answers.fast_confidence, kind="stable")
    by_confidence = np.argsort(-answers.confidence, kind="stable")
    offers = len(right)
    numbers = np.unique(np.linspace(1, offers, _POINTS).round().astype(int))
    return CascadeCurves(
        shares=(numbers / offers).tolist(),
        losses=(np.cumsum(lost[by_fast])[numbers - 1] / offers).tolist(),
        precisions=(np.cumsum(right[by_confidence])[numbers - 1] / numbers).tolist(),
        calibrations=answers.calibrations,
    )


def cascade_pictures(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG by name, ``reliability`` and ``risk_coverage``, from the metrics of a ``compiled_student``."""
    curves = msgspec.convert(metrics["cascade_curves"], CascadeCurves)
    return {
        "reliability": plots.reliability(curves.calibrations),
        "risk_coverage": plots.risk_coverage(
            curves.shares,
            curves.losses,
            curves.precisions,
            share_fast=metrics["cascade_share_fast"],
            max_loss=metrics["cascade_max_loss"],
            share_unmarked=1 - metrics["cascade_share_review"],
            min_precision=metrics["cascade_min_precision"],
        ),
    }


def _is_at_or_above(given: str, truth: str, taxonomy: Taxonomy) -> bool:
    return truth in taxonomy and given in taxonomy.ancestors(truth)
