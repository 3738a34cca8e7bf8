"""A day of offers, from delivered to clean. What is wrong with a row is decided in ``ml.offers``."""

import datetime
from collections.abc import Iterator

import dagster as dg

from ml.artifacts import ArtifactRef
from ml.evaluation.verification import conservation, unknown_labels
from ml.offers import FEED_COLUMNS, REASONS
from ml.stages import STAGES, OffersParameters, RawOffersParameters
from ml.taxonomy_change.transitions import Transitions
from offer_assets import policies
from offer_assets.checks import partitioned_check
from offer_assets.metadata import (
    artifact_metadata,
    feed_schema,
    materialization,
    offer_schema,
    row_count,
    table,
)
from offer_assets.taxonomy import taxonomy_in_force
from resources.compute import Compute
from resources.offer_feed import OfferFeed

offer_feed_source = dg.AssetSpec(
    "offer_feed",
    description="Offers as shops send them: Parquet, CSV or JSON lines (OFFER_FEED), or the demo feed.",
    group_name=policies.FEED,
    kinds={"file"},
    owners=[policies.DATA_TEAM],
    metadata={
        "dagster/column_schema": feed_schema(),
        "needed": ", ".join(c.name for c in FEED_COLUMNS if c.needed),
    },
)


def feed_assets(days: dg.DailyPartitionsDefinition) -> list[dg.AssetsDefinition]:
    """``raw_offers``, ``offers`` and ``quarantined_offers``, one partition per day."""

    @dg.asset(
        deps=[offer_feed_source],
        partitions_def=days,
        group_name=policies.FEED,
        kinds={"parquet"},
        owners=[policies.DATA_TEAM],
        metadata={"dagster/column_schema": feed_schema()},
        code_version=STAGES["raw_offers"].version,
    )
    def raw_offers(
        context: dg.AssetExecutionContext, offer_feed: OfferFeed, compute: Compute
    ) -> dg.MaterializeResult:
        """Offers of one day exactly as delivered, with the file and row each came from."""
        day = context.partition_key
        files = offer_feed.files_of(day)
        if not files:
            raise dg.Failure(_silence(day, offer_feed.days()), allow_retries=False)
        result = compute.run(context, "raw_offers", {}, RawOffersParameters(files=files, day=day))
        return materialization(
            result,
            metadata={
                **row_count(result.manifest.metrics["rows"]),
                "files": table([{"file": file.uri, "first_seen": file.loaded_on} for file in files]),
            },
        )

    @dg.multi_asset(
        outs={
            "offers": dg.AssetOut(
                description="Clean, typed offers of one day.",
                code_version=STAGES["offers"].version,
                group_name=policies.FEED,
                kinds={"parquet", "duckdb"},
                owners=[policies.DATA_TEAM],
                metadata={"dagster/column_schema": offer_schema()},
            ),
            "quarantined_offers": dg.AssetOut(
                description="Offers of one day that could not be taken, with reasons and original content.",
                code_version=STAGES["offers"].version,
                group_name=policies.FEED,
                kinds={"parquet", "duckdb"},
                owners=[policies.DATA_TEAM],
                metadata={"dagster/column_schema": feed_schema()},
            ),
        },
        partitions_def=days,
    )
    def split_offers(
        context: dg.AssetExecutionContext,
        raw_offers: ArtifactRef,
        taxonomy_change: ArtifactRef,
        compute: Compute,
    ) -> Iterator[dg.MaterializeResult]:
        """Every raw offer ends in exactly one of the two tables."""
        result = compute.run(
            context,
            "offers",
            {
                "raw_offers": raw_offers,
                "catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute),
                "taxonomy_change": taxonomy_change,
            },
            OffersParameters(),
        )
        metrics = result.manifest.metrics
        yield materialization(result, asset_key="offers", metadata=row_count(metrics["clean"]))
        reasons = [
            {"reason": reason, "offers": metrics[reason], "meaning": meaning}
            for reason, meaning in REASONS.items()
            if metrics.get(reason)
        ]
        yield dg.MaterializeResult(
            asset_key="quarantined_offers",
            value=result.ref,
            data_version=dg.DataVersion(result.manifest.files["quarantine.parquet"].sha256),
            metadata={
                **artifact_metadata(result),
                **row_count(metrics["quarantined"]),
                "reasons": table(sorted(reasons, key=lambda row: -row["offers"])),
            },
        )

    return [raw_offers, split_offers]


def _silence(day: str, days: list[str]) -> str:
    """That the feed has nothing of a day, and for how long it has had nothing."""
    known = ", ".join(days[-5:]) or "none"
    earlier = [other for other in days if other < day]
    last = ""
    if earlier:
        distance = (datetime.date.fromisoformat(day) - datetime.date.fromisoformat(earlier[-1])).days
        last = f"{distance} day{'' if distance == 1 else 's'} since the last offers ({earlier[-1]}); "
    return f"the feed has no offers of {day}; {last}the newest days it has: {known}"


def feed_checks(days: dg.DailyPartitionsDefinition) -> list[dg.AssetChecksDefinition]:
    """What must be true of a day's offers."""

    @partitioned_check(asset="raw_offers", partitions_def=days)
    def every_feed_file_was_read(raw_offers: ArtifactRef) -> dg.AssetCheckResult:
        """No file of the day was unreadable; the others were loaded all the same."""
        unreadable = raw_offers.metrics["unreadable_files"]
        return dg.AssetCheckResult(
            passed=not unreadable,
            description="; ".join(unreadable) or f"all {raw_offers.metrics['files']} files were read",
            metadata={"unreadable_files": len(unreadable)},
        )

    @partitioned_check(
        asset="offers",
        partitions_def=days,
        blocking=True,
        additional_ins={"raw_offers": dg.AssetIn("raw_offers")},
    )
    def no_offer_is_lost(
        offers: ArtifactRef, raw_offers: ArtifactRef, compute: Compute
    ) -> dg.AssetCheckResult:
        """Every delivered offer is either clean or in quarantine, none twice and none invented."""
        found = conservation(compute.folder(raw_offers), compute.folder(offers))
        return dg.AssetCheckResult(
            passed=found.holds,
            description=(
                f"{found.raw:,} delivered = {found.clean:,} clean + {found.quarantined:,} quarantined; "
                f"{found.lost:,} lost, {found.invented:,} invented"
            ),
            metadata={
                "delivered": found.raw,
                "clean": found.clean,
                "quarantined": found.quarantined,
                "lost": found.lost,
                "invented": found.invented,
            },
        )

    @partitioned_check(
        asset="offers",
        partitions_def=days,
        blocking=True,
        additional_ins={"taxonomy_change": dg.AssetIn("taxonomy_change")},
    )
    def labels_exist_in_taxonomy(
        offers: ArtifactRef, taxonomy_change: ArtifactRef, compute: Compute
    ) -> dg.AssetCheckResult:
        """Every human label of a clean offer is a category of the taxonomy in force or of an earlier one."""
        table_file = compute.folder(offers) / "offers.parquet"
        in_force = taxonomy_in_force(taxonomy_change, compute)
        retired = {t.from_id for t in Transitions.read(compute.folder(taxonomy_change)).transitions}
        missing = unknown_labels([table_file], compute.folder(in_force))
        unknown = {label: offers for label, offers in missing.items() if label not in retired}
        of_earlier_versions = sum(missing.values()) - sum(unknown.values())
        return dg.AssetCheckResult(
            passed=not unknown,
            description=f"{len(unknown)} labels are unknown: {', '.join(list(unknown)[:5])}"
            if unknown
            else f"every label is known, {of_earlier_versions:,} from an earlier version of the taxonomy",
            metadata={
                "unknown_labels": len(unknown),
                "offers_with_unknown_label": sum(unknown.values()),
                "labels_of_earlier_versions": of_earlier_versions,
                "labelled_offers": offers.metrics["labelled"],
            },
        )

    @partitioned_check(asset="quarantined_offers", partitions_def=days)
    def few_offers_are_quarantined(quarantined_offers: ArtifactRef) -> dg.AssetCheckResult:
        """The share of quarantined offers is what a healthy feed has."""
        metrics = quarantined_offers.metrics
        share = metrics["quarantined"] / max(metrics["raw"], 1)
        is_error = share > policies.QUARANTINE_ERROR_SHARE
        return dg.AssetCheckResult(
            passed=share <= policies.QUARANTINE_WARNING_SHARE,
            severity=dg.AssetCheckSeverity.ERROR if is_error else dg.AssetCheckSeverity.WARN,
            description=(
                f"{share:.2%} of {metrics['raw']:,} offers are in quarantine (warning above "
                f"{policies.QUARANTINE_WARNING_SHARE:.0%}, error above {policies.QUARANTINE_ERROR_SHARE:.0%})"
            ),
            metadata={"share": share, "quarantined": metrics["quarantined"]},
        )

    return [every_feed_file_was_read, no_offer_is_lost, labels_exist_in_taxonomy, few_offers_are_quarantined]
