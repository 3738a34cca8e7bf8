"""From a compiled model to the endpoint. What the gate or a person refused is not served."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import dagster as dg
import msgspec
import pyarrow.parquet as pq
from pydantic import Field

from ml.artifacts import ArtifactRef, short_version
from ml.errors import InputError
from ml.evaluation import gate
from ml.stages import RenamedStudentParameters
from ml.taxonomy import Taxonomy
from ml.taxonomy_change.diff import TaxonomyDiff
from offer_assets import policies
from offer_assets.evaluation import metrics_for_the_gate
from offer_assets.metadata import table
from offer_assets.partitions import CPU
from offer_assets.promotion import ReleasePolicy, name_of, served_metadata
from offer_assets.taxonomy import taxonomy_in_force
from resources.compute import Compute
from resources.endpoints import Endpoints
from resources.tracking import Promotion, RegisteredVersion, Tracking, now

_REQUEST_BYTES = 4 << 20
"""Well below what an endpoint accepts (6,291,456)."""

_SENT_CHARACTERS = 10_000
"""Of each column; the text that a model reads is made of far fewer."""


NEWEST, PRODUCTION = "newest", "production"


class ModelChoice(dg.Config):
    """Which model is registered; the launchpad of a job shows it."""

    model: Literal["newest", "production"] = Field(
        default=NEWEST,
        description="newest: the one compiled last, if it passes the gate; production: the one that serves, "
        "under the names of the taxonomy in force, whatever was trained since.",
    )


@dg.asset(
    ins={"compiled_student": dg.AssetIn(partition_mapping=dg.SpecificPartitionsPartitionMapping([CPU]))},
    group_name=policies.RELEASE,
    kinds={"mlflow"},
    owners=[policies.ML_TEAM],
    code_version=policies.RELEASE_CODE_VERSION,
)
def model_version(
    context: dg.AssetExecutionContext,
    config: ModelChoice,
    student_evaluation: ArtifactRef,
    compiled_student: ArtifactRef,
    taxonomy_change: ArtifactRef,
    compute: Compute,
    tracking: Tracking,
    release_policy: ReleasePolicy,
) -> dg.MaterializeResult:
    """Registered model with its evaluation, the gate's verdict, and whether it waits for a person."""
    if config.model == PRODUCTION:
        return _production_renamed(context, taxonomy_change, compute, tracking)
    _refuse_if_not_of_one_student(compute, student_evaluation, compiled_student)
    verdict = gate.judge(
        metrics_for_the_gate(student_evaluation, compute, tracking), compiled_student.metrics, policies.GATE
    )
    model = _with_names_in_force(context, compiled_student, taxonomy_change, compute)
    registered = tracking.register(
        model,
        metrics=student_evaluation.metrics,
        tags={"verdict": "passed" if verdict.passed else "failed", "evaluation": student_evaluation.digest},
        approval=release_policy.at_registration if verdict.passed else None,
    )
    propositions = [
        {"proposition": p.name, "passed": p.passed, "value": p.value, "limit": p.limit}
        for p in verdict.propositions
    ]
    return _registered(model, registered, gate=table(propositions))


@dg.asset(
    group_name=policies.RELEASE,
    kinds={"http"},
    owners=[policies.ML_TEAM],
    code_version=policies.RELEASE_CODE_VERSION,
    # A version that waits for a person is not served: then there is nothing new to materialize.
    output_required=False,
)
def offer_endpoint(
    context: dg.AssetExecutionContext,
    model_version: ArtifactRef,
    compute: Compute,
    tracking: Tracking,
    endpoints: Endpoints,
) -> Iterator[dg.MaterializeResult]:
    """Live endpoint with the registered version; one that the gate or a person refused is not served."""
    registered = tracking.version_of(model_version)
    before = tracking.production()
    if registered is None or not registered.may_serve:
        _keep_serving(context, before, compute, endpoints)
        if registered is None or (objection := _objection(registered)):
            line = objection if registered else f"model version {model_version.version} is not registered"
            raise dg.Failure(f"{line}. What was serving goes on serving.", allow_retries=False)
        context.log.warning(
            f"{name_of(registered)} passed the gate and waits for a decision: run the job decide_version, or "
            f"`python -m offer_assets approve {registered.version} --reason …`. "
            "What was serving goes on serving."
        )
        return
    status = endpoints.deploy(compute.folder(model_version), model_version)
    promoted = tracking.promote(registered, _promotion(context, registered, before, compute))
    yield dg.MaterializeResult(
        value=model_version,
        data_version=dg.DataVersion(model_version.digest),
        metadata=served_metadata(status, promoted, tracking.history()),
    )


@dg.asset_check(asset="offer_endpoint")
def endpoint_answers(offer_endpoint: ArtifactRef, endpoints: Endpoints) -> dg.AssetCheckResult:
    """The endpoint is up and serves the version that was deployed last."""
    status = endpoints.status()
    serving = status.model_version if status else "nothing"
    return dg.AssetCheckResult(
        passed=serving == offer_endpoint.version,
        description=f"{serving} is serving, {offer_endpoint.version} was deployed",
        metadata={"serving": serving, "deployed": offer_endpoint.version},
    )


@dg.asset_check(asset="offer_endpoint", additional_ins={"evaluation_set": dg.AssetIn("evaluation_set")})
def endpoint_answers_the_same(
    offer_endpoint: ArtifactRef, evaluation_set: ArtifactRef, compute: Compute, endpoints: Endpoints
) -> dg.AssetCheckResult:
    """Over HTTP, the endpoint gives the categories that the artifact gives in this process."""
    from ml.serving.predictor import Predictor

    offers = endpoint_sample(compute.folder(evaluation_set) / "offers.parquet")
    expected = [
        prediction.category_id
        for prediction in Predictor.load(compute.folder(offer_endpoint)).predict(offers)
    ]
    answered = [prediction["category_id"] for prediction in endpoints.invoke(offers)]
    same = sum(left == right for left, right in zip(expected, answered, strict=True))
    return dg.AssetCheckResult(
        passed=same == len(offers),
        description=f"{same:,} of {len(offers):,} offers get the same category over HTTP and in process",
        metadata={"offers": len(offers), "same": same},
    )


def endpoint_sample(table_file: Path) -> list[dict[str, str]]:
    """First offers of a table, with what an endpoint needs to know of them, within one request's size.

    Args:
        table_file: Parquet file with ``offer_id`` and the columns that make an offer's text.

    Returns:
        At most ``ENDPOINT_SAMPLE_OFFERS`` offers; absent values are left out, long ones cut.
    """
    from ml.serving.predictor import TEXT_COLUMNS

    rows = pq.read_table(table_file, columns=["offer_id", *TEXT_COLUMNS])
    sample, size = list[dict[str, str]](), 0
    for row in rows.slice(0, policies.ENDPOINT_SAMPLE_OFFERS).to_pylist():
        offer = {name: value[:_SENT_CHARACTERS] for name, value in row.items() if value is not None}
        size += len(msgspec.json.encode(offer)) + 1
        if sample and size > _REQUEST_BYTES:
            break
        sample.append(offer)
    return sample


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """What a served model was made of; each empty where the artifact that would tell is gone."""

    taxonomy_version: str = ""
    data: str = ""
    """Training sample, the short form of its digest."""
    code_revision: str = ""
    """Of the code that trained the student."""


def lineage_of(compute: Compute, ref: ArtifactRef) -> Lineage:
    """Taxonomy, data and code behind a compiled (or renamed) student."""
    try:
        student = compute.manifest(compute.origin(ref, "student_checkpoint"))
        # A renamed student has the weights of its student, and the taxonomy of its own.
        taxonomy = (compute.manifest(ref) if ref.kind == "renamed_student" else student).inputs
    except InputError:
        return Lineage()
    return Lineage(
        taxonomy_version=short_version(taxonomy.get("catalog_taxonomy", "")),
        data=short_version(student.inputs.get("training_sample", "")),
        code_revision=student.code_revision or "",
    )


def _production_renamed(
    context: dg.AssetExecutionContext, taxonomy_change: ArtifactRef, compute: Compute, tracking: Tracking
) -> dg.MaterializeResult:
    """The model in production under newer names: the same answers, so its verdict and evaluation hold."""
    production = tracking.production()
    if production is None:
        raise dg.Failure("no version is in production whose names could be refreshed", allow_retries=False)
    compiled = production.ref
    if compiled.kind == "renamed_student":
        compiled = compute.origin(compiled, "compiled_student")
    model = _with_names_in_force(context, compiled, taxonomy_change, compute)
    registered = tracking.register(
        model,
        metrics=production.metrics,
        tags={name: production.tags[name] for name in ("verdict", "evaluation")},
        approval="automatic",
    )
    return _registered(model, registered, renamed=name_of(production))


def _registered(
    model: ArtifactRef, version: RegisteredVersion, **metadata: dg.MetadataValue | str
) -> dg.MaterializeResult:
    return dg.MaterializeResult(
        value=model,
        data_version=dg.DataVersion(model.digest),
        metadata={
            "dagster/uri": model.uri,
            "registered": f"{version.name} version {version.version}",
            "model_version": model.version,
            "verdict": version.tags["verdict"],
            "approval": version.approval if version.passed else "none",
            **metadata,
        },
    )


def _promotion(
    context: dg.AssetExecutionContext,
    version: RegisteredVersion,
    before: RegisteredVersion | None,
    compute: Compute,
) -> Promotion:
    decision = version.decision
    lineage = lineage_of(compute, version.ref)
    return Promotion(
        at=now(),
        by=decision.by if decision else f"job {context.run.job_name}",
        reason=decision.reason if decision else _occasion(context.run.tags),
        run_id=context.run.run_id,
        kind="promotion",
        registry_version=version.version,
        model_version=version.model_version,
        replaced=before.model_version if before else None,
        evaluation=version.tags.get("evaluation", ""),
        taxonomy_version=lineage.taxonomy_version,
        data=lineage.data,
        code_revision=lineage.code_revision,
    )


def _occasion(tags: Mapping[str, str]) -> str:
    """Why a version that nobody had to decide on is served."""
    release = tags.get(policies.TAXONOMY_RELEASE_TAG)
    return f"passed the gate; for release {release} of the taxonomy" if release else "passed the gate"


def _objection(version: RegisteredVersion) -> str:
    """Why a version is refused; empty where it only waits."""
    decision = version.decision
    if decision is not None and decision.decision == "rejected":
        return f"{name_of(version)} was rejected by {decision.by} and is not served: {decision.reason}"
    if not version.passed:
        return (
            f"{name_of(version)} did not pass the gate and is not served; see the checks of "
            "student_evaluation and compiled_student, or approve it despite the gate (job decide_version)"
        )
    return ""


def _keep_serving(
    context: dg.AssetExecutionContext,
    production: RegisteredVersion | None,
    compute: Compute,
    endpoints: Endpoints,
) -> None:
    """Bring the version in production up where nothing answers: a restart of the machine, for instance."""
    if production is None or endpoints.status() is not None:
        return
    context.log.info(f"the endpoint does not answer: bringing {name_of(production)} up again")
    endpoints.deploy(compute.folder(production.ref), production.ref)


def _with_names_in_force(
    context: dg.AssetExecutionContext,
    compiled_student: ArtifactRef,
    taxonomy_change: ArtifactRef,
    compute: Compute,
) -> ArtifactRef:
    """The model under the names of the taxonomy in force, if these are all that differs."""
    taxonomy = taxonomy_in_force(taxonomy_change, compute)
    known, in_force = (Taxonomy.load(compute.folder(ref)) for ref in (compiled_student, taxonomy))
    if not TaxonomyDiff.between(known, in_force).only_names:
        return compiled_student
    inputs = {
        "compiled_student": compiled_student,
        "student_checkpoint": compute.origin(compiled_student, "student_checkpoint"),
        "catalog_taxonomy": taxonomy,
    }
    return compute.run(context, "renamed_student", inputs, RenamedStudentParameters()).ref


def _refuse_if_not_of_one_student(compute: Compute, evaluation: ArtifactRef, compiled: ArtifactRef) -> None:
    evaluated, built = (
        compute.manifest(artifact).inputs["student_checkpoint"] for artifact in (evaluation, compiled)
    )
    if evaluated != built:
        raise dg.Failure(
            f"student_evaluation measured student {evaluated[:12]}, compiled_student[{CPU}] was made of "
            f"{built[:12]}; materialize both again, from the same student_checkpoint",
            allow_retries=False,
        )
