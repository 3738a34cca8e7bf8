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
from offer_assets.evaluation import metrics_for_the_gate, student_of
from offer_assets.metadata import table
from offer_assets.partitions import CPU
from offer_assets.promotion import ReleasePolicy, model_of, name_of, served_metadata
from offer_assets.taxonomy import taxonomy_in_force
from resources.artifact_store import ArtifactStore
from resources.compute import Compute
from resources.endpoints import Endpoints, RolledBackError, variant_name
from resources.tracking import TARGET_TAG, Decision, Promotion, RegisteredVersion, Tracking, now

_REQUEST_BYTES = 4 << 20
"""Well below what an endpoint accepts (6,291,456)."""

_SENT_CHARACTERS = 10_000
"""Of each column; the text that a model reads is made of far fewer."""


CHAMPION_TAG = "champion"
"""Of a registered version: digest of the student that was in production when the gate judged it."""

_ROLL_OUT = "the roll-out"
"""Who rejects a version whose alarm tripped."""

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
    champion = _champion_of(student_evaluation, compute, tracking)
    verdict = gate.judge(
        metrics_for_the_gate(student_evaluation, compute, tracking), compiled_student.metrics, policies.GATE
    )
    model = _with_names_in_force(context, compiled_student, taxonomy_change, compute)
    registered = tracking.register(
        model,
        metrics=student_evaluation.metrics,
        tags={
            "verdict": "passed" if verdict.passed else "failed",
            "evaluation": student_evaluation.digest,
            CHAMPION_TAG: champion,
            TARGET_TAG: target_of(compute, model),
            **msgspec.structs.asdict(lineage_of(compute, model)),
        },
        approval=release_policy.at_registration if verdict.passed else None,
        carried=_last_decision(model, compute, tracking),
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
    artifact_store: ArtifactStore,
    compute: Compute,
    tracking: Tracking,
    endpoints: Endpoints,
) -> Iterator[dg.MaterializeResult]:
    """Live endpoint with the registered version; one that the gate or a person refused is not served."""
    # The result is yielded in here as well: its pointer is written before anybody else may release.
    with endpoints.releasing():
        version = tracking.version_of(model_version)
        before = tracking.production()
        if version is None:
            objection = f"model version {model_version.version} is not registered"
        elif not (objection := _objection(version) or _overtaken(version, before, compute, tracking)):
            change = artifact_store.read_pointer("taxonomy_change")
            version = _under_names_in_force(context, version, change, compute, tracking)
            objection = _objection(version)
        if version is None or objection or not version.may_serve:
            _keep_serving(context, before, compute, endpoints)
            if version is None or objection:
                raise dg.Failure(f"{objection}. What was serving goes on serving.", allow_retries=False)
            context.log.warning(
                f"{name_of(version)} passed the gate and waits for a decision: run the job "
                f"decide_version, or `python -m offer_assets approve {version.version} --reason …`. "
                "What was serving goes on serving."
            )
            return
        try:
            status = endpoints.deploy(
                compute.folder(version.ref), version.ref, at_once=_is_tried(version, before, compute)
            )
        except RolledBackError as error:
            # It would be rolled out and back again by whatever starts this next; a person may approve it.
            tracking.decide(version, "rejected", _ROLL_OUT, str(error))
            raise
        promoted = tracking.promote(version, _promotion(context, version, before, compute))
        yield dg.MaterializeResult(
            value=version.ref,
            data_version=dg.DataVersion(version.ref.digest),
            metadata=served_metadata(status, promoted, tracking.history()),
        )


@dg.asset_check(asset="offer_endpoint")
def endpoint_answers(offer_endpoint: ArtifactRef, endpoints: Endpoints) -> dg.AssetCheckResult:
    """The endpoint is up and serves the version that was deployed last."""
    status = endpoints.status()
    answering = [variant for variant in status.variants if not variant.is_shadow] if status else []
    serving = ", ".join(variant.model_version for variant in answering if variant.weight) or "nothing"
    return dg.AssetCheckResult(
        passed=offer_endpoint.version in serving.split(", "),
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
    answered = [
        prediction["category_id"] for prediction in endpoints.invoke(offers, variant_name(offer_endpoint))
    ]
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


def target_of(compute: Compute, ref: ArtifactRef) -> str:
    """What a compiled (or renamed) student is compiled for."""
    compiled = compute.origin(ref, "compiled_student") if ref.kind == "renamed_student" else ref
    return str(compute.manifest(compiled).parameters.get("target", CPU))


def _production_renamed(
    context: dg.AssetExecutionContext, taxonomy_change: ArtifactRef, compute: Compute, tracking: Tracking
) -> dg.MaterializeResult:
    """The model in production under newer names: the same answers, so its verdict and evaluation hold."""
    production = tracking.production()
    if production is None:
        raise dg.Failure("no version is in production whose names could be refreshed", allow_retries=False)
    model = _with_names_in_force(context, production.ref, taxonomy_change, compute)
    champion = student_of(production, compute)
    registered = _register_under_other_names(model, production, champion, compute, tracking)
    return _registered(model, registered, renamed=name_of(production))


def _under_names_in_force(
    context: dg.AssetExecutionContext,
    version: RegisteredVersion,
    taxonomy_change: ArtifactRef | None,
    compute: Compute,
    tracking: Tracking,
) -> RegisteredVersion:
    """What is served for a version: its copy, if names changed while it waited for a person.

    The version in production stays as it is, so that a way back to other names lasts.
    """
    if taxonomy_change is None or version.in_production or not version.may_serve:
        return version
    model = _with_names_in_force(context, version.ref, taxonomy_change, compute)
    if model.digest == version.ref.digest:
        return version
    context.log.info(f"{name_of(version)} is served as model {model.version}, under the names in force")
    return _register_under_other_names(model, version, version.tags.get(CHAMPION_TAG, ""), compute, tracking)


def _register_under_other_names(
    model: ArtifactRef, version: RegisteredVersion, champion: str, compute: Compute, tracking: Tracking
) -> RegisteredVersion:
    """The same answers: verdict, evaluation and what people decided hold for the copy too."""
    return tracking.register(
        model,
        metrics=version.metrics,
        tags={
            **{name: version.tags[name] for name in ("verdict", "evaluation")},
            CHAMPION_TAG: champion,
            TARGET_TAG: target_of(compute, model),
            **msgspec.structs.asdict(lineage_of(compute, model)),
        },
        approval="automatic" if version.passed else None,
        carried=version.decision,
    )


def _last_decision(model: ArtifactRef, compute: Compute, tracking: Tracking) -> Decision | None:
    """What a person last decided about this model, under whatever names."""
    compiled = model_of(model, compute)
    decisions = [
        version.decision
        for version in tracking.versions()
        if version.decision is not None and model_of(version.ref, compute) == compiled
    ]
    return max(decisions, key=lambda decision: decision.at, default=None)


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
    renamed = _is_tried(version, before, compute)
    decision = None if renamed else version.decision
    lineage = lineage_of(compute, version.ref)
    return Promotion(
        at=now(),
        by=decision.by if decision else f"job {context.run.job_name}",
        reason=decision.reason if decision else _occasion(context.run.tags, renamed),
        run_id=context.run.run_id,
        kind="rename" if renamed else "promotion",
        registry_version=version.version,
        model_version=version.model_version,
        replaced=before.model_version if before else None,
        evaluation=version.tags.get("evaluation", ""),
        taxonomy_version=lineage.taxonomy_version,
        data=lineage.data,
        code_revision=lineage.code_revision,
    )


def _occasion(tags: Mapping[str, str], renamed: bool) -> str:
    """Why a version that nobody had to decide on is served."""
    why = "the same model under other names" if renamed else "passed the gate"
    if release := tags.get(policies.TAXONOMY_RELEASE_TAG):
        return f"{why}; for release {release} of the taxonomy"
    if checks := tags.get(policies.DRIFT_CHECKS_TAG):
        return f"{why}; trained for drift: {checks.replace(',', ', ')}"
    return why


def _is_tried(version: RegisteredVersion, before: RegisteredVersion | None, compute: Compute) -> bool:
    """Whether this very model is in production already, under whatever names."""
    return before is not None and model_of(before.ref, compute) == model_of(version.ref, compute)


def _overtaken(
    version: RegisteredVersion, before: RegisteredVersion | None, compute: Compute, tracking: Tracking
) -> str:
    """Why a version may not take the place of the one in production, which is not what it was held against.

    A person who approves it after that one was promoted (or rolled back to) has the last word.
    """
    if before is None or before.version == version.version or not version.may_serve:
        return ""
    if student_of(before, compute) in (version.tags.get(CHAMPION_TAG), student_of(version, compute)):
        return ""
    if decision := version.decision:
        since = [p for p in tracking.history() if p.kind != "rename" and p.at > decision.at]
        if not decision.at or not since:
            return ""
    return (
        f"{name_of(version)} was not compared with {name_of(before)}, which is in production by now: "
        "materialize student_evaluation and what follows again, or approve it (job decide_version)"
    )


def _objection(version: RegisteredVersion) -> str:
    """Why gate or people refuse a version; empty where it may be served, or only waits."""
    if version.may_serve:
        return ""
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
    model: ArtifactRef,
    taxonomy_change: ArtifactRef,
    compute: Compute,
) -> ArtifactRef:
    """The model under the names of the taxonomy in force, if these are all that differs."""
    compiled = compute.origin(model, "compiled_student") if model.kind == "renamed_student" else model
    taxonomy = taxonomy_in_force(taxonomy_change, compute)
    known, in_force = (Taxonomy.load(compute.folder(ref)) for ref in (compiled, taxonomy))
    difference = TaxonomyDiff.between(known, in_force)
    if difference.is_empty:
        return compiled
    if not difference.only_names:
        return model
    inputs = {
        "compiled_student": compiled,
        "student_checkpoint": compute.origin(compiled, "student_checkpoint"),
        "catalog_taxonomy": taxonomy,
    }
    return compute.run(context, "renamed_student", inputs, RenamedStudentParameters()).ref


def _champion_of(evaluation: ArtifactRef, compute: Compute, tracking: Tracking) -> str:
    """Student in production, empty if none is: the one that the evaluation compared with, or measured.

    Raises:
        dg.Failure: another one went into production since.
    """
    made_of, production = compute.manifest(evaluation).inputs, tracking.production()
    compared = tracking.find(made_of.get("production_model", ""))
    champion = student_of(production, compute)
    if champion not in (student_of(compared, compute), made_of["student_checkpoint"]):
        there_was, there_is = (
            name_of(version) if version else "no version" for version in (compared, production)
        )
        raise dg.Failure(
            f"production has changed: student_evaluation compared with {there_was}, and {there_is} is in "
            "production by now. Materialize student_evaluation again, then this",
            allow_retries=False,
        )
    return champion


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
