"""The model at work: a day's offers catalogued, and held against what the model was trained on."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec

from ml.artifacts import ArtifactRef
from ml.drift.answers import DayReport, Question
from ml.drift.questions import QUESTIONS
from ml.errors import InputError
from ml.evaluation.verification import same_offers
from ml.stages import (
    SERVABLE,
    STAGES,
    DriftParameters,
    DriftReferenceParameters,
)
from offer_assets import policies
from offer_assets.checks import answer_result, partitioned_check
from offer_assets.metadata import materialization, picture, row_count, schema, table
from offer_assets.taxonomy import taxonomy_in_force
from resources.artifact_store import ArtifactStore
from resources.cataloguing import Cataloguing
from resources.compute import AnyContext, Compute, StageResult
from resources.failures import input_errors_fail_plainly

DRIFT_REPORT = "drift_report"

_PAGE = "report.html"

_EARLIER_DAYS = 6
"""With the day itself a week: each weekday once."""


def operation_assets(days: dg.DailyPartitionsDefinition) -> list[dg.AssetsDefinition]:
    """``catalogued_offers`` and ``drift_report`` by day, and the reference between them."""

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
        cataloguing: Cataloguing,
    ) -> dg.MaterializeResult:
        """Clean offers of one day with their category, as the serving model answered."""
        result = cataloguing.catalogue(context, context.partition_key, offers, offer_endpoint)
        return materialization(result, metadata=row_count(result.manifest.metrics["offers"]))

    @dg.asset(
        partitions_def=days,
        group_name=policies.OPERATION,
        kinds={"evidently"},
        owners=[policies.ML_TEAM],
        code_version=STAGES[DRIFT_REPORT].version,
    )
    def drift_report(
        context: dg.AssetExecutionContext,
        catalogued_offers: ArtifactRef,
        offers: ArtifactRef,
        drift_reference: ArtifactRef,
        taxonomy_change: ArtifactRef,
        artifact_store: ArtifactStore,
        compute: Compute,
    ) -> dg.MaterializeResult:
        """One day of offers and categories against what was usual when the model was trained."""
        day = context.partition_key
        model = _model_of_day(catalogued_offers, artifact_store, compute)
        if compute.manifest(drift_reference).inputs["compiled_student"] != model.digest:
            # Another model serves by now; the day is held against what the one that catalogued it learned.
            drift_reference = reference_of(model, context, artifact_store, compute).ref
        inputs: dict[str, ArtifactRef | Mapping[str, ArtifactRef]] = {
            "catalogued_offers": catalogued_offers,
            "compiled_student": model,
            "offers": offers,
            "drift_reference": drift_reference,
            "catalog_taxonomy": taxonomy_in_force(taxonomy_change, compute),
            "earlier": earlier_reports(day, drift_reference, artifact_store, compute),
        }
        result = compute.run(
            context, DRIFT_REPORT, inputs, DriftParameters(day=day, complete=day < today_in_utc())
        )
        return materialization(result, metadata=_describe(compute.folder(result.ref)))

    return [catalogued_offers, drift_reference, drift_report]


@dg.asset(
    deps=["training_sample"],
    group_name=policies.OPERATION,
    kinds={"parquet"},
    owners=[policies.ML_TEAM],
    code_version=STAGES["drift_reference"].version,
)
def drift_reference(
    context: dg.AssetExecutionContext,
    offer_endpoint: ArtifactRef,
    artifact_store: ArtifactStore,
    compute: Compute,
) -> dg.MaterializeResult:
    """What was usual on the newest days that the serving model was trained on: made once per model."""
    return materialization(reference_of(offer_endpoint, context, artifact_store, compute))


def operation_checks(days: dg.DailyPartitionsDefinition) -> list[dg.AssetChecksDefinition]:
    """What must be true of a catalogued day; one check for each question of monitoring."""

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

    return [every_clean_offer_is_catalogued, *(_question_check(question, days) for question in QUESTIONS)]


@input_errors_fail_plainly()
def reference_of(
    model: ArtifactRef,
    context: AnyContext,
    artifact_store: ArtifactStore,
    compute: Compute,
) -> StageResult:
    """The drift reference of a compiled (or renamed) student, found or made.

    Its days are the newest of those that the student was trained on, not the newest there are.
    """
    parameters = DriftReferenceParameters()
    sample = compute.origin(model, "student_checkpoint", "training_sample")
    inputs: dict[str, ArtifactRef | Mapping[str, ArtifactRef]] = {
        "training_sample": sample,
        "compiled_student": model,
        "offers": _offers_behind(sample, parameters.days, artifact_store, compute),
    }
    return compute.run(context, "drift_reference", inputs, parameters)


def earlier_reports(
    day: str, reference: ArtifactRef, artifact_store: ArtifactStore, compute: Compute
) -> dict[str, ArtifactRef]:
    """Reports of the days right before ``day`` that were made against the same reference, by day."""
    date, reports = datetime.date.fromisoformat(day), {}
    for days_before in range(_EARLIER_DAYS, 0, -1):
        earlier = (date - datetime.timedelta(days=days_before)).isoformat()
        report = artifact_store.read_pointer(f"{DRIFT_REPORT}/{earlier}")
        if report is not None and _reference_behind(report, compute) == reference.digest:
            reports[earlier] = report
    return reports


def read_day_report(folder: Path) -> DayReport:
    """What a ``drift_report`` says."""
    return msgspec.json.decode((folder / "drift.json").read_bytes(), type=DayReport)


def today_in_utc() -> str:
    """ISO date; a day is over when it is over in UTC, as partitions are."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _question_check(question: Question, days: dg.DailyPartitionsDefinition) -> dg.AssetChecksDefinition:
    @partitioned_check(
        asset=DRIFT_REPORT,
        name=question.name,
        description=f"Asks of every day whether this is as the days of the training data let expect: "
        f"{question.title}. WARN: worth a look; ERROR: the day is not what the model knows.",
        partitions_def=days,
    )
    def check(drift_report: ArtifactRef, compute: Compute) -> dg.AssetCheckResult:
        folder = compute.folder(drift_report)
        answers = {answer.question: answer for answer in read_day_report(folder).answers}
        is_over = compute.manifest(drift_report).parameters["complete"]
        return answer_result(
            answers[question.name],
            folder / _PAGE,
            may_be_unknown=not is_over,  # it is looked at again when it is (offer_assets.jobs.day_is_over)
            complete=is_over,
        )

    return check


def _describe(folder: Path) -> dict[str, Any]:
    """A day's report as the UI shows it."""
    report = read_day_report(folder)
    answers = [
        {
            "question": answer.title,
            "level": answer.level,
            "answer": answer.sentence,
            "series_tested": answer.series,
            "findings": answer.found,
        }
        for answer in report.answers
    ]
    pictures = {
        f"plot_{answer.question}": picture((folder / answer.picture).read_bytes())
        for answer in report.answers
        if answer.picture
    }
    distances = [
        {"column": column.column, "distance": column.distance, "usual_below": column.usual_high}
        for column in report.columns
    ]
    return {
        "summary": report.sentence,
        "answers": table(answers),
        "report": dg.MetadataValue.path(folder / _PAGE),
        **pictures,
        "distances_of_columns": table(distances),
    }


def _model_of_day(catalogued: ArtifactRef, artifact_store: ArtifactStore, compute: Compute) -> ArtifactRef:
    """The model that catalogued a day, under the names it had then."""
    digest = compute.manifest(catalogued).inputs["compiled_student"]
    for kind in SERVABLE:
        if found := artifact_store.find_by_digest(kind, digest):
            return found
    raise dg.Failure(
        f"model {digest[:12]}, which catalogued the day, is gone: materialize catalogued_offers of it again",
        allow_retries=False,
    )


def _offers_behind(
    sample: ArtifactRef, newest: int, artifact_store: ArtifactStore, compute: Compute
) -> dict[str, ArtifactRef]:
    """The newest days of offers that a training sample was drawn from, as they were then, by day."""
    prefix = "offers/"
    digests = {
        name.removeprefix(prefix): digest
        for name, digest in compute.manifest(sample).inputs.items()
        if name.startswith(prefix)
    }
    current, found = artifact_store.list_pointers("offers"), {}
    for day in sorted(digests, reverse=True)[:newest]:
        ref = current.get(day)
        if ref is None or ref.digest != digests[day]:  # the day was taken again since
            ref = artifact_store.find_by_digest("offers", digests[day])
        if ref is not None:
            found[day] = ref
    if not found:
        raise InputError(
            f"the offers that training_sample {sample.version} was drawn from are gone: train and deploy "
            "again"
        )
    return dict(sorted(found.items()))


def _reference_behind(report: ArtifactRef, compute: Compute) -> str | None:
    """Digest of the reference of a report; None where the report is gone or from before there were any."""
    try:
        return compute.manifest(report).inputs.get("drift_reference")
    except InputError:
        return None
