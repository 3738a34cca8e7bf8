"""How good the models are, on offers that none of them has seen."""

from collections.abc import Mapping
from typing import Any

import dagster as dg
import msgspec

from ml.artifacts import ArtifactRef
from ml.evaluation import gate
from ml.stages import STAGES, EvaluationParameters
from offer_assets import policies
from offer_assets.checks import check_result
from offer_assets.metadata import materialization, picture, row_count, table
from offer_assets.taxonomy import taxonomy_in_force
from resources.compute import Compute
from resources.tracking import RegisteredVersion, Tracking


@dg.asset(
    group_name=policies.EVALUATION,
    kinds={"pytorch"},
    owners=[policies.ML_TEAM],
    retry_policy=policies.CONTINUE_ONCE,
    code_version=STAGES["student_evaluation"].version,
)
def student_evaluation(
    context: dg.AssetExecutionContext,
    evaluation_set: ArtifactRef,
    taxonomy_change: ArtifactRef,
    student_checkpoint: ArtifactRef,
    teacher_checkpoint: ArtifactRef,
    fast_checkpoint: ArtifactRef,
    training_sample: ArtifactRef,
    compute: Compute,
    tracking: Tracking,
) -> dg.MaterializeResult:
    """Teacher, student, fast model and the version in production, side by side on the evaluation set."""
    inputs: dict[str, ArtifactRef] = {
        "evaluation_set": evaluation_set,
        "catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute),
        "taxonomy_change": taxonomy_change,
        "student_checkpoint": student_checkpoint,
        "teacher_checkpoint": teacher_checkpoint,
        "fast_checkpoint": fast_checkpoint,
        "training_sample": training_sample,
    }
    production = tracking.production()
    if production and not _is_in_production(student_checkpoint.digest, compute, tracking):
        inputs["production_model"] = production.ref
    result = compute.run(context, "student_evaluation", inputs, EvaluationParameters())
    tracking.record(result.manifest, result.ref)
    folder = compute.folder(result.ref)
    evaluation = msgspec.json.decode((folder / "evaluation.json").read_bytes())
    return materialization(
        result,
        metadata={
            **row_count(result.manifest.metrics["offers"]),
            "models": table(_side_by_side(result.ref.metrics)),
            "student_minus_production": table(result.ref.metrics.get("comparisons", [])),
            "best_categories": table(evaluation["best_categories"]),
            "worst_categories": table(evaluation["worst_categories"]),
            **{path.stem: picture(path.read_bytes()) for path in sorted(folder.glob("*.png"))},
        },
    )


def _side_by_side(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per model that was measured."""
    figures = ("accuracy", "weighted_f1", "macro_f1", "mean_weighted_f1", "ece", "offers_per_second")
    return [
        {"model": model, **{figure: metrics[f"{model}_{figure}"] for figure in figures}}
        for model in ("teacher", "student", "fast", "production")
        if f"{model}_accuracy" in metrics
    ]


@dg.asset_check(asset="student_evaluation")
def student_is_close_to_teacher(student_evaluation: ArtifactRef) -> dg.AssetCheckResult:
    """The student kept what the teacher knows."""
    return check_result(gate.student_is_close_to_teacher(student_evaluation.metrics, policies.GATE))


@dg.asset_check(asset="student_evaluation")
def student_is_not_worse_than_production(
    student_evaluation: ArtifactRef, compute: Compute, tracking: Tracking
) -> dg.AssetCheckResult:
    """The student is not significantly worse than the version in production, on the same offers."""
    metrics = metrics_for_the_gate(student_evaluation, compute, tracking)
    return check_result(gate.student_is_not_worse_than_production(metrics, policies.GATE))


@dg.asset_check(asset="student_evaluation")
def no_segment_is_worse_than_production(
    student_evaluation: ArtifactRef, compute: Compute, tracking: Tracking
) -> dg.AssetCheckResult:
    """In no country, top-level category or group of changed categories is the student significantly worse."""
    metrics = metrics_for_the_gate(student_evaluation, compute, tracking)
    return check_result(gate.no_segment_is_worse_than_production(metrics, policies.GATE))


def metrics_for_the_gate(evaluation: ArtifactRef, compute: Compute, tracking: Tracking) -> dict[str, Any]:
    """Metrics of the evaluation, and whether its student is the one in production."""
    evaluated = compute.manifest(evaluation).inputs["student_checkpoint"]
    return {**evaluation.metrics, "student_is_production": _is_in_production(evaluated, compute, tracking)}


def student_of(version: RegisteredVersion | None, compute: Compute) -> str:
    """Digest of the student that a version was made of, whatever its names; empty for no version."""
    return compute.manifest(version.ref).inputs["student_checkpoint"] if version else ""


def _is_in_production(student_digest: str, compute: Compute, tracking: Tracking) -> bool:
    return student_of(tracking.production(), compute) == student_digest
