"""Teacher, its labels, and the two models that learn from them."""

from pathlib import Path
from typing import Any, Literal

import dagster as dg
import msgspec
from pydantic import Field

from ml.artifacts import ArtifactRef
from ml.stages import STAGES
from offer_assets import policies
from offer_assets.metadata import materialization, picture, row_count
from offer_assets.plan import TrainingPlan
from offer_assets.taxonomy import pinned_model, taxonomy_in_force
from resources.compute import Compute, StageResult
from resources.tracking import Tracking

FRESH, WARM = "fresh", "warm"


class TrainingStart(dg.Config):
    """Where a training starts: the launchpad of a job shows it."""

    start: Literal["fresh", "warm"] = Field(
        default=FRESH,
        description="fresh: from the pretrained encoder; warm: from the model that was in production when "
        "the taxonomy changed, if there was one (and OFFER_ASSETS_WARM_START allows it).",
    )


@dg.asset(
    group_name=policies.TRAINING,
    kinds={"pytorch", "huggingface"},
    owners=[policies.ML_TEAM],
    retry_policy=policies.CONTINUE_ONCE,
    code_version=STAGES["teacher_checkpoint"].version,
)
def teacher_checkpoint(
    context: dg.AssetExecutionContext,
    config: TrainingStart,
    training_sample: ArtifactRef,
    taxonomy_change: ArtifactRef,
    compute: Compute,
    tracking: Tracking,
    plan: TrainingPlan,
) -> dg.MaterializeResult:
    """Large pretrained encoder, fine-tuned on the labelled offers: the best judge, too slow to serve."""
    warm = _warm_start("teacher_checkpoint", config, taxonomy_change, compute, plan)
    result = compute.run(
        context,
        "teacher_checkpoint",
        {
            "training_sample": training_sample,
            "catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute),
            **warm,
        },
        plan.teacher(warm=bool(warm)),
    )
    return _trained(result, compute, tracking)


@dg.asset(
    group_name=policies.TRAINING,
    kinds={"pytorch", "parquet"},
    owners=[policies.ML_TEAM],
    retry_policy=policies.CONTINUE_ONCE,
    code_version=STAGES["teacher_labels"].version,
)
def teacher_labels(
    context: dg.AssetExecutionContext,
    teacher_checkpoint: ArtifactRef,
    training_sample: ArtifactRef,
    compute: Compute,
    plan: TrainingPlan,
) -> dg.MaterializeResult:
    """What the teacher and its encoder alone think of each offer: top-k logits and the mass of the rest."""
    result = compute.run(
        context,
        "teacher_labels",
        {"teacher_checkpoint": teacher_checkpoint, "training_sample": training_sample},
        plan.teacher_labels(),
    )
    metrics = result.manifest.metrics
    return materialization(result, metadata=row_count(metrics["labelled"] + metrics["unlabelled"]))


@dg.asset(
    group_name=policies.TRAINING,
    kinds={"scikitlearn"},
    owners=[policies.ML_TEAM],
    retry_policy=policies.CONTINUE_ONCE,
    code_version=STAGES["fast_checkpoint"].version,
)
def fast_checkpoint(
    context: dg.AssetExecutionContext,
    training_sample: ArtifactRef,
    teacher_labels: ArtifactRef,
    taxonomy_change: ArtifactRef,
    compute: Compute,
    tracking: Tracking,
    plan: TrainingPlan,
) -> dg.MaterializeResult:
    """The traditional model: n-grams and a linear classifier, on human and confident teacher labels."""
    result = compute.run(
        context,
        "fast_checkpoint",
        {
            "training_sample": training_sample,
            "teacher_labels": teacher_labels,
            "catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute),
        },
        plan.fast_model(),
    )
    tracking.record(result.manifest, result.ref)
    return materialization(result)


@dg.asset(
    group_name=policies.TRAINING,
    kinds={"pytorch", "huggingface"},
    owners=[policies.ML_TEAM],
    retry_policy=policies.CONTINUE_ONCE,
    code_version=STAGES["student_checkpoint"].version,
)
def student_checkpoint(
    context: dg.AssetExecutionContext,
    config: TrainingStart,
    training_sample: ArtifactRef,
    teacher_labels: ArtifactRef,
    teacher_checkpoint: ArtifactRef,
    taxonomy_change: ArtifactRef,
    compute: Compute,
    tracking: Tracking,
    plan: TrainingPlan,
) -> dg.MaterializeResult:
    """Small pretrained encoder, distilled from the teacher: what serves the offers."""
    warm = _warm_start("student_checkpoint", config, taxonomy_change, compute, plan)
    result = compute.run(
        context,
        "student_checkpoint",
        {
            "training_sample": training_sample,
            "teacher_labels": teacher_labels,
            "teacher_checkpoint": teacher_checkpoint,
            "catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute),
            **warm,
        },
        plan.student(warm=bool(warm)),
    )
    return _trained(result, compute, tracking)


def _warm_start(
    kind: str, config: TrainingStart, taxonomy_change: ArtifactRef, compute: Compute, plan: TrainingPlan
) -> dict[str, ArtifactRef]:
    """Inputs that make a training start from the model which was in production at the taxonomy's change."""
    if config.start != WARM or not plan.warm_start:
        return {}
    model = pinned_model(taxonomy_change, kind, compute)
    return {"warm_start": model, "taxonomy_change": taxonomy_change} if model else {}


def _trained(result: StageResult, compute: Compute, tracking: Tracking) -> dg.MaterializeResult:
    """Record a training in the tracker and show its learning curve."""
    from ml.evaluation.plots import learning_curves

    curve = _learning_curve(compute.folder(result.ref))
    tracking.record(result.manifest, result.ref, learning_curve=curve)
    return materialization(
        result, metadata={"learning_curve": picture(learning_curves({result.ref.kind: curve}))}
    )


def _learning_curve(folder: Path) -> list[dict[str, Any]]:
    return msgspec.json.decode((folder / "learning_curve.json").read_bytes(), type=list[dict[str, Any]])
