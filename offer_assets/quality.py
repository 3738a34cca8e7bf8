"""Quality where labels arrive later: what people decided, and what it says of the categories given."""

import datetime
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec

from ml.artifacts import ArtifactRef
from ml.errors import InputError
from ml.quality.questions import FEED_QUESTIONS, QUESTIONS
from ml.stages import STAGES, CorrectionsParameters, LiveQualityParameters
from offer_assets import policies
from offer_assets.checks import answer_result
from offer_assets.metadata import materialization, picture, row_count, schema, table
from offer_assets.taxonomy import taxonomy_in_force
from resources.artifact_store import ArtifactStore
from resources.compute import Compute
from resources.corrections_feed import CorrectionsFeed

CORRECTIONS = "corrections"
LIVE_QUALITY = "live_quality"

_OF_THE_MODEL = (
    "Asks of the newest days that are old enough whether this is as before. With too few labels to tell it "
    "passes and says so while the feed is young, for labels may come late; after that it warns"
)
_OF_THE_FEED = (
    "Asks whether the corrections still are what they were, without which nothing is known of the model"
)

_PLOTS = ("accuracy.png", "shares.png", "decisions.png")
_PAGE = "report.html"

corrections_feed_source = dg.AssetSpec(
    "corrections_feed",
    description="What people decided about offers later: Parquet, CSV or JSON lines (CORRECTIONS_FEED), or "
    "that of the demo feed.",
    group_name=policies.OPERATION,
    kinds={"file"},
    owners=[policies.DATA_TEAM],
    metadata={
        "dagster/column_schema": schema(
            [
                ("offer_id", "string", "Offer of the feed that somebody looked at."),
                (
                    "category_id",
                    "string",
                    "Category that they gave it; that of the model, where they confirm it.",
                ),
                ("decided_at", "string", "When: ISO 8601."),
            ]
        )
    },
)


def quality_assets() -> list[dg.AssetsDefinition]:
    """``corrections`` and ``live_quality``."""
    return [corrections, live_quality]


def quality_checks() -> list[dg.AssetChecksDefinition]:
    """What must be true of corrections; one check for each question of live quality."""
    return [
        every_corrections_file_was_read,
        few_corrections_are_quarantined,
        *(_question_check(question.name, f"{_OF_THE_MODEL}: {question.title}.") for question in QUESTIONS),
        *(
            _question_check(question.name, f"{_OF_THE_FEED}: {question.title}.")
            for question in FEED_QUESTIONS
        ),
    ]


@dg.asset(
    deps=[corrections_feed_source],
    group_name=policies.OPERATION,
    kinds={"parquet", "duckdb"},
    owners=[policies.DATA_TEAM],
    metadata={
        "dagster/column_schema": schema(
            [
                ("offer_id", "string", "As delivered."),
                ("category_id", "string", "Of the taxonomy in force."),
                ("decided_as", "string", "As delivered, perhaps of an earlier taxonomy."),
                ("decided_at", "timestamp", "UTC."),
                ("standing", "string", "newest (it counts), superseded or repeated."),
                ("source_file", "string", "Where it came from."),
                ("source_row", "int", "Row in that file."),
            ]
        )
    },
    code_version=STAGES[CORRECTIONS].version,
)
def corrections(
    context: dg.AssetExecutionContext,
    taxonomy_change: ArtifactRef,
    corrections_feed: CorrectionsFeed,
    artifact_store: ArtifactStore,
    compute: Compute,
) -> dg.MaterializeResult:
    """All decisions of people in the categories of today; what is wrong is in quarantine with its reasons."""
    files = corrections_feed.files()
    before = artifact_store.read_pointer(CORRECTIONS)
    if corrections_feed.is_there and not files and before is not None and before.metrics.get("files"):
        raise dg.Failure(
            f"the corrections feed has no file any more; it had {before.metrics['files']:,} before: see "
            "whether CORRECTIONS_FEED still names it, and whether whoever delivers it stopped",
            allow_retries=False,
        )
    result = compute.run(
        context,
        CORRECTIONS,
        {"catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute), "taxonomy_change": taxonomy_change},
        CorrectionsParameters(files=files),
    )
    metrics = result.manifest.metrics
    return materialization(
        result,
        metadata={
            **row_count(metrics["corrections"]),
            "decided": f"{metrics['decided_from']} to {metrics['decided_until']}"
            if metrics["corrections"]
            else "none",
            "reasons_for_quarantine": table(_reasons(metrics)),
            "files": table([{"file": file.uri, "first_seen": file.loaded_on} for file in files]),
        },
    )


@dg.asset(
    deps=["catalogued_offers"],
    group_name=policies.OPERATION,
    kinds={"parquet", "duckdb"},
    owners=[policies.ML_TEAM],
    code_version=STAGES[LIVE_QUALITY].version,
)
def live_quality(
    context: dg.AssetExecutionContext,
    corrections: ArtifactRef,
    taxonomy_change: ArtifactRef,
    artifact_store: ArtifactStore,
    compute: Compute,
) -> dg.MaterializeResult:
    """How right the categories of the last weeks were, as far as people have decided since."""
    every_day = artifact_store.list_pointers("catalogued_offers")
    if not every_day:
        raise dg.Failure(
            "no day is catalogued yet, so corrections say nothing: materialize catalogued_offers first",
            allow_retries=False,
        )
    newest_day = max(every_day)
    parameters = LiveQualityParameters(newest_day=newest_day)
    first_day = (
        datetime.date.fromisoformat(newest_day) - datetime.timedelta(days=parameters.days - 1)
    ).isoformat()
    catalogued = {day: ref for day, ref in every_day.items() if first_day <= day}
    result = compute.run(
        context,
        LIVE_QUALITY,
        {
            "corrections": corrections,
            "catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute),
            "taxonomy_change": taxonomy_change,
            "catalogued_offers": catalogued,
            "offers": _offers_behind(catalogued, artifact_store, compute),
        },
        parameters,
    )
    return materialization(result, metadata=_describe(compute.folder(result.ref)))


@dg.asset_check(asset=CORRECTIONS)
def every_corrections_file_was_read(corrections: ArtifactRef) -> dg.AssetCheckResult:
    """No file of the feed was unreadable; the others count all the same."""
    unreadable = corrections.metrics["unreadable_files"]
    files = corrections.metrics["files"]
    return dg.AssetCheckResult(
        passed=not unreadable,
        description="; ".join(unreadable)
        or (f"all {files:,} files were read" if files else "there is no file of corrections yet"),
        metadata={"unreadable_files": len(unreadable)},
    )


@dg.asset_check(asset=CORRECTIONS)
def few_corrections_are_quarantined(corrections: ArtifactRef) -> dg.AssetCheckResult:
    """The share of quarantined decisions is what a healthy feed has, in the files of the newest week.

    Those of all time are shown beside. Decisions in a category that the taxonomy divided since are shown too,
    but are not the feed's fault.
    """
    metrics = corrections.metrics
    at_fault = metrics["quarantined_by_fault_of_the_feed"]
    rows = metrics["recent_rows"]
    share = metrics["recent_quarantined_by_fault_of_the_feed"] / max(rows, 1)
    share_of_all = at_fault / max(metrics["rows"], 1)
    divided = metrics["quarantined"] - at_fault
    beside = f"; {divided:,} more wait for where their category's offers went" if divided else ""
    since = f" of the files since {metrics['recent_since']}" if rows else ""
    is_error = share > policies.QUARANTINE_ERROR_SHARE
    return dg.AssetCheckResult(
        passed=share <= policies.QUARANTINE_WARNING_SHARE,
        severity=dg.AssetCheckSeverity.ERROR if is_error else dg.AssetCheckSeverity.WARN,
        description=f"{share:.2%} of {rows:,} decisions{since} are in quarantine (warning above "
        f"{policies.QUARANTINE_WARNING_SHARE:.0%}, error above "
        f"{policies.QUARANTINE_ERROR_SHARE:.0%}); {share_of_all:.2%} of {metrics['rows']:,} in all{beside}",
        metadata={
            "share": share,
            "share_of_all": share_of_all,
            "quarantined": metrics["quarantined"],
            "reasons": table(_reasons(metrics)),
        },
    )


def _question_check(name: str, description: str) -> dg.AssetChecksDefinition:
    is_of_the_feed = name in {question.name for question in FEED_QUESTIONS}

    @dg.asset_check(asset=LIVE_QUALITY, name=name, description=description)
    def check(live_quality: ArtifactRef, compute: Compute) -> dg.AssetCheckResult:
        from ml.quality.live import read_quality_report

        folder = compute.folder(live_quality)
        report = read_quality_report(folder)
        (answer,) = (answer for answer in report.answers if answer.question == name)
        return answer_result(answer, folder / _PAGE, may_be_unknown=is_of_the_feed or report.may_be_unknown)

    return check


def _offers_behind(
    catalogued: dict[str, ArtifactRef], artifact_store: ArtifactStore, compute: Compute
) -> dict[str, ArtifactRef]:
    """The offers that each day's categories were given to, for their country; days that lost them are out."""
    current, found = artifact_store.list_pointers("offers"), {}
    for day, ref in catalogued.items():
        try:
            digest = compute.manifest(ref).inputs.get("offers")
        except InputError:
            continue
        offers = current.get(day)
        if digest and (offers is None or offers.digest != digest):  # the day was taken again since
            offers = artifact_store.find_by_digest("offers", digest)
        if offers is not None:
            found[day] = offers
    return found


def _reasons(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    from ml.quality.corrections import REASONS

    rows = [
        {"reason": reason, "decisions": metrics[reason], "meaning": meaning}
        for reason, meaning in REASONS.items()
        if metrics[reason]
    ]
    return sorted(rows, key=lambda row: -row["decisions"])


def _describe(folder: Path) -> dict[str, Any]:
    """What people look at: a sentence, the page, the plots, the days and the groups."""
    from ml.quality.live import read_quality_report

    report = read_quality_report(folder)
    return {
        "summary": report.sentence,
        "report": dg.MetadataValue.path(folder / _PAGE),
        **{
            f"plot_{name.removesuffix('.png')}": picture((folder / name).read_bytes())
            for name in _PLOTS
            if (folder / name).exists()
        },
        "days_by_quality": table([msgspec.structs.asdict(day) for day in report.days if day.labels]),
        "groups": table([msgspec.structs.asdict(group) for group in report.groups]),
        "delay": f"half of a day's labels come within {report.delays.median_days} days, 90 % within "
        f"{report.delays.days_until_90_percent}",
    }
