"""The model at work: a day's offers catalogued, and held against what the model was trained on."""

import dagster as dg
import msgspec

from ml.artifacts import ArtifactRef
from ml.evaluation.verification import same_offers
from ml.stages import STAGES, CataloguedOffersParameters, DriftParameters
from offer_assets import policies
from offer_assets.checks import partitioned_check
from offer_assets.metadata import materialization, row_count, schema, table
from resources.compute import Compute
from resources.endpoints import Endpoints


def operation_assets(days: dg.DailyPartitionsDefinition) -> list[dg.AssetsDefinition]:
    """``catalogued_offers`` and ``drift_report``, one partition per day."""

    @dg.asset(
        partitions_def=days,
        group_name=policies.OPERATION,
        kinds={"parquet"},
        owners=[policies.DATA_TEAM],
        metadata={
            "dagster/column_schema": schema(
                [
                    ("offer_id", "string", "As in the feed."),
                    ("category_id", "string", "Category that the model chose."),
                    ("category_path", "string", "Its names from the root."),
                    ("confidence", "double", "Calibrated probability of the category."),
                    ("model_version", "string", "Version that answered."),
                    ("taxonomy_version", "string", "Taxonomy that the category belongs to."),
                ]
            )
        },
        code_version=STAGES["catalogued_offers"].version,
    )
    def catalogued_offers(
        context: dg.AssetExecutionContext,
        offers: ArtifactRef,
        offer_endpoint: ArtifactRef,
        compute: Compute,
        endpoints: Endpoints,
    ) -> dg.MaterializeResult:
        """Clean offers of one day with their category, as the endpoint answered."""
        status = endpoints.status()
        if status is None:
            context.log.info("the endpoint does not answer (a restart of the machine?): bringing it up again")
            with endpoints.releasing():
                status = endpoints.deploy(compute.folder(offer_endpoint), offer_endpoint)
        result = compute.run(
            context,
            "catalogued_offers",
            {"offers": offers, "compiled_student": offer_endpoint},
            CataloguedOffersParameters(endpoint_url=status.url),
        )
        return materialization(result, metadata=row_count(result.manifest.metrics["offers"]))

    @dg.asset(
        deps=["training_sample"],
        partitions_def=days,
        group_name=policies.OPERATION,
        kinds={"evidently"},
        owners=[policies.ML_TEAM],
        code_version=STAGES["drift_report"].version,
    )
    def drift_report(
        context: dg.AssetExecutionContext,
        catalogued_offers: ArtifactRef,
        offers: ArtifactRef,
        offer_endpoint: ArtifactRef,
        compute: Compute,
    ) -> dg.MaterializeResult:
        """One day of offers and categories against the reference that the model was trained on."""
        result = compute.run(
            context,
            "drift_report",
            {
                "catalogued_offers": catalogued_offers,
                "offers": offers,
                # Not the newest sample: the one behind the model that serves.
                "training_sample": compute.origin(offer_endpoint, "student_checkpoint", "training_sample"),
                "compiled_student": offer_endpoint,
            },
            DriftParameters(day=context.partition_key),
        )
        folder = compute.folder(result.ref)
        drift = msgspec.json.decode((folder / "drift.json").read_bytes())
        return materialization(
            result,
            metadata={
                "columns_compared": table(drift["columns"]),
                "report": dg.MetadataValue.path(str(folder / "report.html")),
            },
        )

    return [catalogued_offers, drift_report]


def operation_checks(days: dg.DailyPartitionsDefinition) -> list[dg.AssetChecksDefinition]:
    """What must be true of a catalogued day."""

    @partitioned_check(
        asset="catalogued_offers", partitions_def=days, additional_ins={"offers": dg.AssetIn("offers")}
    )
    def every_clean_offer_is_catalogued(
        catalogued_offers: ArtifactRef, offers: ArtifactRef, compute: Compute
    ) -> dg.AssetCheckResult:
        """Each clean offer of the day is in the catalogue exactly once."""
        clean, catalogued, different = same_offers(compute.folder(offers), compute.folder(catalogued_offers))
        return dg.AssetCheckResult(
            passed=clean == catalogued and different == 0,
            description=f"{clean:,} clean offers, {catalogued:,} catalogued, {different:,} in one table only",
            metadata={"clean": clean, "catalogued": catalogued, "different": different},
        )

    @partitioned_check(asset="drift_report", partitions_def=days)
    def no_drift(drift_report: ArtifactRef, compute: Compute) -> dg.AssetCheckResult:
        """The day looks like the offers that the model was trained on."""
        metrics = drift_report.metrics
        drift = msgspec.json.decode((compute.folder(drift_report) / "drift.json").read_bytes())
        moved = [column["sentence"] for column in drift["columns"] if column["drifted"]]
        is_error = metrics["share_drifted"] >= policies.DRIFT_ERROR_SHARE
        summary = (
            f"{metrics['drifted_columns']} of {metrics['columns']} columns drifted (a warning; an error from "
            f"{policies.DRIFT_ERROR_SHARE:.0%} on)"
            if metrics["sufficient"]
            else f"{metrics['offers']} offers are too few to tell whether they drifted"
        )
        return dg.AssetCheckResult(
            passed=metrics["sufficient"] and not moved,
            severity=dg.AssetCheckSeverity.ERROR if is_error else dg.AssetCheckSeverity.WARN,
            description="; ".join([summary, *moved]),
            metadata={
                "share_drifted": metrics["share_drifted"],
                "drifted_columns": metrics["drifted_columns"],
            },
        )

    return [every_clean_offer_is_catalogued, no_drift]
