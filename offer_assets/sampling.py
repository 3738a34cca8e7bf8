"""Which offers a model learns from, and which it is measured on."""

import dagster as dg

from ml.artifacts import ArtifactRef
from ml.evaluation.verification import shared_groups, unknown_labels
from ml.stages import STAGES
from offer_assets import policies
from offer_assets.metadata import materialization, offer_schema, row_count
from offer_assets.plan import TrainingPlan
from resources.artifact_store import ArtifactStore
from resources.compute import Compute


@dg.asset(
    group_name=policies.TRAINING,
    kinds={"parquet", "duckdb"},
    owners=[policies.ML_TEAM],
    metadata={"dagster/column_schema": offer_schema()},
    code_version=STAGES["evaluation_set"].version,
)
def evaluation_set(
    context: dg.AssetExecutionContext,
    offers: dict[str, ArtifactRef],
    catalog_taxonomy: ArtifactRef,
    artifact_store: ArtifactStore,
    compute: Compute,
    plan: TrainingPlan,
) -> dg.MaterializeResult:
    """Labelled offers that no model learns from: kept from run to run, extended where they are few."""
    inputs: dict[str, ArtifactRef | dict[str, ArtifactRef]] = {
        "offers": offers,
        "catalog_taxonomy": catalog_taxonomy,
    }
    if previous := artifact_store.read_pointer("evaluation_set"):
        inputs["previous"] = previous
    result = compute.run(context, "evaluation_set", inputs, plan.evaluation_set())
    return materialization(result, metadata=row_count(result.manifest.metrics["offers"]))


@dg.asset(
    group_name=policies.TRAINING,
    kinds={"parquet", "duckdb"},
    owners=[policies.ML_TEAM],
    metadata={"dagster/column_schema": offer_schema()},
    code_version=STAGES["training_sample"].version,
)
def training_sample(
    context: dg.AssetExecutionContext,
    offers: dict[str, ArtifactRef],
    catalog_taxonomy: ArtifactRef,
    evaluation_set: ArtifactRef,
    compute: Compute,
    plan: TrainingPlan,
) -> dg.MaterializeResult:
    """Capped sample of labelled and unlabelled offers, split by product, apart from the evaluation set."""
    result = compute.run(
        context,
        "training_sample",
        {"offers": offers, "catalog_taxonomy": catalog_taxonomy, "evaluation_set": evaluation_set},
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
        "catalog_taxonomy": dg.AssetIn("catalog_taxonomy"),
    },
)
def sampled_labels_exist_in_taxonomy(
    training_sample: ArtifactRef, evaluation_set: ArtifactRef, catalog_taxonomy: ArtifactRef, compute: Compute
) -> dg.AssetCheckResult:
    """Every label that a model learns from or is measured on is a category of the current taxonomy."""
    tables = [
        compute.folder(training_sample) / "labelled.parquet",
        compute.folder(evaluation_set) / "offers.parquet",
    ]
    unknown = unknown_labels(tables, compute.folder(catalog_taxonomy))
    return dg.AssetCheckResult(
        passed=not unknown,
        description=f"unknown labels: {', '.join(list(unknown)[:5])}" if unknown else "every label is known",
        metadata={"unknown_labels": len(unknown), "offers": sum(unknown.values())},
    )
