"""Which offers a model learns from, and which it is measured on."""

import dagster as dg

from ml.artifacts import ArtifactRef
from ml.evaluation.verification import shared_groups, unknown_labels
from ml.stages import STAGES
from offer_assets import policies
from offer_assets.metadata import materialization, offer_schema, row_count, schema
from offer_assets.plan import TrainingPlan
from offer_assets.taxonomy import pinned_model, taxonomy_in_force
from resources.artifact_store import ArtifactStore
from resources.compute import Compute

_LABEL_COLUMNS = (
    ("labelled_as", "string", "Category that people gave, in the taxonomy of that time."),
    (
        "label_source",
        "string",
        "human, migrated (carried over from an earlier taxonomy), by_evidence (the same, where the teacher "
        "chose among several places) or weak (the teacher's proposal).",
    ),
    ("text", "string", "What a model reads of the offer."),
)
_LABEL_CONFIDENCE = (
    "label_confidence",
    "double",
    "That the label is right, 1 where people gave it; guesses count by it in training.",
)


@dg.asset(
    group_name=policies.TRAINING,
    kinds={"pytorch", "parquet"},
    owners=[policies.ML_TEAM],
    retry_policy=policies.CONTINUE_ONCE,
    metadata={
        "dagster/column_schema": schema(
            [
                ("offer_id", "string", "As in the feed."),
                ("delivered_on", "string", "Day of the offers it was labelled in."),
                ("labelled_as", "string", "Category that people gave."),
                ("category_id", "string", "Category of today's taxonomy; null: put aside."),
                ("decision", "string", "official, inferred, by_evidence or put_aside."),
                ("confidence", "double", "That the category is right."),
            ]
        )
    },
    code_version=STAGES["migrated_labels"].version,
)
def migrated_labels(
    context: dg.AssetExecutionContext,
    offers: dict[str, ArtifactRef],
    taxonomy_change: ArtifactRef,
    compute: Compute,
    plan: TrainingPlan,
) -> dg.MaterializeResult:
    """Where labels of earlier taxonomies belong today, row by row, and weak labels for new categories."""
    inputs: dict[str, ArtifactRef | dict[str, ArtifactRef]] = {
        "offers": offers,
        "taxonomy_change": taxonomy_change,
        "catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute),
    }
    if teacher := pinned_model(taxonomy_change, "teacher_checkpoint", compute):
        inputs["teacher_checkpoint"] = teacher
    result = compute.run(context, "migrated_labels", inputs, plan.migrated_labels())
    metrics = result.manifest.metrics
    return materialization(result, metadata=row_count(metrics["migrated"] + metrics["put_aside"]))


@dg.asset(
    group_name=policies.TRAINING,
    kinds={"parquet", "duckdb"},
    owners=[policies.ML_TEAM],
    metadata={"dagster/column_schema": offer_schema(*_LABEL_COLUMNS)},
    code_version=STAGES["evaluation_set"].version,
)
def evaluation_set(
    context: dg.AssetExecutionContext,
    offers: dict[str, ArtifactRef],
    migrated_labels: ArtifactRef,
    taxonomy_change: ArtifactRef,
    artifact_store: ArtifactStore,
    compute: Compute,
    plan: TrainingPlan,
) -> dg.MaterializeResult:
    """Labelled offers that no model learns from: kept from run to run, extended where they are few."""
    inputs: dict[str, ArtifactRef | dict[str, ArtifactRef]] = {
        "offers": offers,
        "catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute),
        "taxonomy_change": taxonomy_change,
        "migrated_labels": migrated_labels,
    }
    if previous := artifact_store.read_pointer("evaluation_set"):
        inputs["previous"] = previous
    result = compute.run(context, "evaluation_set", inputs, plan.evaluation_set())
    return materialization(result, metadata=row_count(result.manifest.metrics["offers"]))


@dg.asset(
    group_name=policies.TRAINING,
    kinds={"parquet", "duckdb"},
    owners=[policies.ML_TEAM],
    metadata={"dagster/column_schema": offer_schema(*_LABEL_COLUMNS, _LABEL_CONFIDENCE)},
    code_version=STAGES["training_sample"].version,
)
def training_sample(
    context: dg.AssetExecutionContext,
    offers: dict[str, ArtifactRef],
    migrated_labels: ArtifactRef,
    taxonomy_change: ArtifactRef,
    evaluation_set: ArtifactRef,
    compute: Compute,
    plan: TrainingPlan,
) -> dg.MaterializeResult:
    """Capped sample of labelled and unlabelled offers, split by product, apart from the evaluation set."""
    result = compute.run(
        context,
        "training_sample",
        {
            "offers": offers,
            "catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute),
            "migrated_labels": migrated_labels,
            "evaluation_set": evaluation_set,
        },
        plan.training_sample(),
    )
    metrics = result.manifest.metrics
    return materialization(
        result, metadata=row_count(metrics["train"] + metrics["validation"] + metrics["unlabelled"])
    )


@dg.asset_check(
    asset="training_sample", blocking=True, additional_ins={"evaluation_set": dg.AssetIn("evaluation_set")}
)
def no_product_is_on_both_sides(
    training_sample: ArtifactRef, evaluation_set: ArtifactRef, compute: Compute, plan: TrainingPlan
) -> dg.AssetCheckResult:
    """No training offer shares a product id, GTIN or title (split by shop: or a shop) with a held-out one."""
    shared = shared_groups(compute.folder(training_sample), compute.folder(evaluation_set), plan.split_by)
    found = {name: offers for name, offers in shared.items() if offers}
    return dg.AssetCheckResult(
        passed=not found,
        description="; ".join(f"{offers:,} training offers share {name}" for name, offers in found.items())
        or "the sides share nothing",
        metadata=dict(shared),
    )


@dg.asset_check(
    asset="training_sample",
    blocking=True,
    additional_ins={
        "evaluation_set": dg.AssetIn("evaluation_set"),
        "taxonomy_change": dg.AssetIn("taxonomy_change"),
    },
)
def sampled_labels_exist_in_taxonomy(
    training_sample: ArtifactRef, evaluation_set: ArtifactRef, taxonomy_change: ArtifactRef, compute: Compute
) -> dg.AssetCheckResult:
    """Every label that a model learns from or is measured on is a category of the current taxonomy."""
    tables = [
        compute.folder(training_sample) / "labelled.parquet",
        compute.folder(evaluation_set) / "offers.parquet",
    ]
    unknown = unknown_labels(tables, compute.folder(taxonomy_in_force(taxonomy_change, compute)))
    return dg.AssetCheckResult(
        passed=not unknown,
        description=f"unknown labels: {', '.join(list(unknown)[:5])}" if unknown else "every label is known",
        metadata={"unknown_labels": len(unknown), "offers": sum(unknown.values())},
    )
