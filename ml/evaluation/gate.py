"""The one place that says what a model has to reach before it may be released.

Every proposition is a function over stored metrics, so that the check shown in the graph and the
verdict on a model version are the same code with the same limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ml.errors import InputError
from ml.evaluation.comparison import Comparison

Share = Annotated[float, Meta(ge=0.0, le=1.0)]

_MOST_NAMED = 5
"""Segments that a sentence names."""


class GateLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of the gate."""

    min_share_of_teacher: Annotated[
        float, Meta(ge=0.0, description="Student's weighted F1 over the teacher's, at least.")
    ] = 0.95
    max_loss_to_production: Annotated[
        Share, Meta(description="Weighted F1 that may be lost to the version in production.")
    ] = 0.01
    max_segment_loss: Annotated[
        Share, Meta(description="Weighted F1 that may be lost to production in a segment of the offers.")
    ] = 0.03
    accept_incomparable_production: Annotated[
        bool,
        Meta(description="Pass although the version in production cannot be run on the evaluation set."),
    ] = False
    min_same_category_compiled: Annotated[
        Share, Meta(description="Offers that the compiled model puts into the same category, at least.")
    ] = 0.995
    max_error_of_cascade: Annotated[
        Share, Meta(description="Probability of finding a cascade too lossy that is not, at most.")
    ] = 0.05
    max_f1_loss_compiled: Annotated[Share, Meta(description="Weighted F1 that compiling may cost.")] = 0.002


class Proposition(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that has to be true, and whether it is."""

    name: str
    passed: bool
    value: float | None
    """What was measured; None if there was nothing to measure."""
    limit: float
    sentence: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a model may be released: only if every proposition holds."""

    passed: bool
    propositions: list[Proposition]


def judge(
    evaluation_metrics: Mapping[str, Any],
    compiled_metrics: Mapping[str, Any],
    limits: GateLimits | None = None,
) -> Verdict:
    """Hold the metrics of ``student_evaluation`` and ``compiled_student`` against the limits.

    Raises:
        InputError: a metric that is needed is not there.
    """
    limits = limits or GateLimits()
    propositions = [
        student_is_close_to_teacher(evaluation_metrics, limits),
        student_is_not_worse_than_production(evaluation_metrics, limits),
        no_segment_is_worse_than_production(evaluation_metrics, limits),
        compiled_matches_uncompiled(compiled_metrics, limits),
        cascade_keeps_the_student(compiled_metrics, limits),
    ]
    return Verdict(passed=all(p.passed for p in propositions), propositions=propositions)


def student_is_close_to_teacher(metrics: Mapping[str, Any], limits: GateLimits) -> Proposition:
    """The student keeps at least ``min_share_of_teacher`` of the teacher's weighted F1.

    It fails when it keeps less *and* that is not chance: even the upper end of the 95 % interval of the
    difference is under the limit. On a small evaluation set a point more or less is luck.
    """
    student, teacher = _number(metrics, "student_weighted_f1"), _number(metrics, "teacher_weighted_f1")
    share = _number(metrics, "student_share_of_teacher")
    upper = 1 + _number(metrics, "student_minus_teacher_high") / teacher if teacher else math.nan
    return Proposition(
        name="student_is_close_to_teacher",
        passed=share >= limits.min_share_of_teacher or upper >= limits.min_share_of_teacher,
        value=share,
        limit=limits.min_share_of_teacher,
        sentence=f"Weighted F1 of the student is {student:.4f}, {share:.1%} of the teacher's {teacher:.4f} "
        f"(up to {upper:.1%} with 95 % confidence, at least {limits.min_share_of_teacher:.1%} wanted).",
    )


def student_is_not_worse_than_production(metrics: Mapping[str, Any], limits: GateLimits) -> Proposition:
    """The student loses no more than ``max_loss_to_production`` of weighted F1 to production.

    It fails when the loss measured is larger than the limit *and* not chance: the whole confidence
    interval lies below zero. Demanding the interval's lower end above the limit would turn away
    most equal models on a small evaluation set; looking at the difference alone would too, by luck.
    A first version, with none in production, passes; so does the version in production itself, of
    which the caller has to say so (``student_is_production``): its metrics cannot know.
    """
    name, limit = "student_is_not_worse_than_production", -limits.max_loss_to_production
    if nothing := _nothing_to_compare(name, limit, metrics, limits):
        return nothing
    difference = _number(metrics, "student_minus_production")
    low = _number(metrics, "student_minus_production_low")
    high = _number(metrics, "student_minus_production_high")
    return Proposition(
        name=name,
        passed=difference >= limit or high >= 0,
        value=difference,
        limit=limit,
        sentence=f"Weighted F1 differs from the version in production by {difference:+.4f} "
        f"(95 % interval {low:+.4f} to {high:+.4f}; a loss beyond {limits.max_loss_to_production:.4f} "
        "that is not chance is too much).",
    )


def no_segment_is_worse_than_production(metrics: Mapping[str, Any], limits: GateLimits) -> Proposition:
    """In no segment of the offers the student loses more than ``max_segment_loss`` to production.

    Segments are countries, top-level categories, and categories that are unchanged, changed or new
    since production's taxonomy. As with the overall figure, a segment counts as worse when the loss
    is beyond the limit and its whole interval lies below zero. Intervals are wide enough to hold all at
    once: among equal models, one in twenty at most would fail. Segments that are too small to be judged
    are counted in the sentence.
    """
    name, limit = "no_segment_is_worse_than_production", -limits.max_segment_loss
    if nothing := _nothing_to_compare(name, limit, metrics, limits):
        return nothing
    too_small = _number(metrics, "segments_too_small")
    segments = [c for c in _comparisons(metrics) if c.group != "overall"]
    if not segments:
        return Proposition(
            name=name,
            passed=True,
            value=None,
            limit=limit,
            sentence=f"None of {too_small:,.0f} segments is large enough to be judged on its own.",
        )
    worst_first = sorted(segments, key=lambda c: (c.difference, c.group, c.segment))
    # Written so that a figure that is not a number counts as worse.
    worse = [c for c in worst_first if not (c.difference >= limit or c.high >= 0)]
    found = (
        f"worse in {len(worse)} of {len(segments)} segments: {'; '.join(map(_in_words, worse[:_MOST_NAMED]))}"
        + (f"; and {len(worse) - _MOST_NAMED} more" if len(worse) > _MOST_NAMED else "")
        if worse
        else f"not worse in any of {len(segments)} segments; the lowest is {_in_words(worst_first[0])}"
    )
    return Proposition(
        name=name,
        passed=not worse,
        value=(worse or worst_first)[0].difference,
        limit=limit,
        sentence=f"Against the version in production the student is {found} (a loss of weighted F1 beyond "
        f"{limits.max_segment_loss:.4f} that is not chance is too much)"
        + (f"; {too_small:,.0f} more are too small to be judged." if too_small else "."),
    )


def compiled_matches_uncompiled(metrics: Mapping[str, Any], limits: GateLimits) -> Proposition:
    """The compiled model answers like the original on the same offers, and is as good.

    Few offers say little: agreement counts as too low when even the upper end of its 95 % interval
    (Wilson 1927) is under the limit.
    """
    same, offers = _number(metrics, "same_category"), _number(metrics, "offers")
    upper = wilson_upper(same, offers)
    loss = _number(metrics, "weighted_f1_original") - _number(metrics, "weighted_f1_compiled")
    return Proposition(
        name="compiled_matches_uncompiled",
        passed=offers >= 1
        and upper >= limits.min_same_category_compiled
        and loss <= limits.max_f1_loss_compiled,
        value=same,
        limit=limits.min_same_category_compiled,
        sentence=f"Compiled and original agree on {same:.1%} of {offers:,.0f} offers (up to {upper:.1%} with "
        f"95 % confidence, at least {limits.min_same_category_compiled:.1%} wanted), weighted F1 changes by "
        f"{-loss:+.4f} (a loss of {limits.max_f1_loss_compiled:.4f} is allowed).",
    )


def cascade_keeps_the_student(metrics: Mapping[str, Any], limits: GateLimits) -> Proposition:
    """Letting the fast model answer costs no more accuracy than was stated when thresholds were chosen.

    They were chosen on validation offers; here are others. It fails when the loss measured is larger than
    stated *and* not chance.
    """
    loss, stated = _number(metrics, "cascade_loss"), _number(metrics, "cascade_max_loss")
    offers, p_value = _number(metrics, "cascade_offers"), _number(metrics, "cascade_loss_p_value")
    fast, review = _number(metrics, "cascade_share_fast"), _number(metrics, "cascade_share_review")
    return Proposition(
        name="cascade_keeps_the_student",
        passed=loss <= stated or (loss > stated and p_value >= limits.max_error_of_cascade),
        value=loss,
        limit=stated,
        sentence=f"The fast model answers {fast:.1%} of {offers:,.0f} offers, {review:.1%} are marked for "
        f"review; accuracy differs by {-loss:+.4f} from the student's alone (a loss beyond {stated:.4f} "
        "that is not chance is too much).",
    )


def _nothing_to_compare(
    name: str, limit: float, metrics: Mapping[str, Any], limits: GateLimits
) -> Proposition | None:
    """The proposition where there is no comparison with production to look at."""
    passed = True
    if metrics.get("student_is_production"):
        sentence = "This is the version in production: there is no other to compare it with."
    elif reason := metrics.get("production_not_comparable"):
        passed = limits.accept_incomparable_production
        sentence = f"The version in production could not be compared: {reason}."
    elif "student_minus_production" not in metrics:
        sentence = "There is no version in production yet."
    else:
        return None
    return Proposition(name=name, passed=passed, value=None, limit=limit, sentence=sentence)


def _in_words(comparison: Comparison) -> str:
    return (
        f"{comparison.title} {comparison.difference:+.4f} (interval "
        f"{comparison.low:+.4f} to {comparison.high:+.4f}, {comparison.offers:,} offers)"
    )


def _comparisons(metrics: Mapping[str, Any]) -> list[Comparison]:
    try:
        return msgspec.convert(metrics["comparisons"], list[Comparison])
    except KeyError:
        raise _missing("comparisons", metrics) from None
    except msgspec.ValidationError as error:
        raise InputError(f"metric comparisons cannot be read: {error}; make the artifact anew") from None


def wilson_upper(share: float, trials: float, z: float = 1.96) -> float:
    """Upper end of Wilson's score interval (1927) for a share that was seen in so many trials."""
    if trials < 1:
        return math.nan
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return (centre + spread) / (1 + z * z / trials)


def _number(metrics: Mapping[str, Any], name: str) -> float:
    """The metric as a number; NaN fails every comparison that a proposition makes."""
    value = metrics.get(name)
    if value is None:
        raise _missing(name, metrics)
    return float(value) if isinstance(value, int | float) else math.nan


def _missing(name: str, metrics: Mapping[str, Any]) -> InputError:
    return InputError(
        f"metric {name} is missing, the gate cannot judge without it; make the artifact anew (found "
        f"{', '.join(sorted(metrics)) or 'no metrics'})"
    )
