"""A person approved a version: have it served."""

from collections.abc import Sequence

import dagster as dg
from dagster._core.storage.tags import RUN_KEY_TAG

from offer_assets.jobs import JOBS, START_ENDPOINT
from offer_assets.promotion import MODEL_VERSION, make_next, name_of
from resources.artifact_store import ArtifactStore
from resources.failures import InputFailure
from resources.tracking import Promotion, RegisteredVersion, Tracking

_ATTEMPTS = 3
"""Runs that try to serve one approved version, before somebody has to look why they fail."""


@dg.sensor(
    name="decided_versions",
    jobs=[job for job in JOBS if job.name == START_ENDPOINT],
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Has the version served that a person approved last, by the job decide_version, the command "
    "line, the tag `approval` in MLflow or, in AWS, SageMaker's model registry; tries at most "
    f"{_ATTEMPTS} times. Says which version waits for a decision.",
)
def decided_versions(
    context: dg.SensorEvaluationContext, tracking: Tracking, artifact_store: ArtifactStore
) -> dg.SensorResult:
    """One run per decision and attempt; what was promoted after a decision has overtaken it."""
    if artifact_store.read_pointer(MODEL_VERSION) is None:
        return dg.SensorResult(skip_reason="no version of the model is registered yet")
    versions, refused = _with_decisions_noted(tracking)
    wanted = _to_be_served(versions)
    if wanted is None:
        return dg.SensorResult(skip_reason="; ".join([*refused, _nothing_to_do(versions)]))
    decided_at = wanted.decision.at if wanted.decision else ""
    keys = [f"deploy:{wanted.ref.digest}:{decided_at}:{attempt}" for attempt in range(1, _ATTEMPTS + 1)]
    key, reason = _next_key(context.instance, keys, wanted)
    if key is None:
        return dg.SensorResult(skip_reason="; ".join([*refused, reason]))
    # The asset model_version may name another version: approving this one made it the next.
    event = make_next(wanted, artifact_store)
    return dg.SensorResult(
        run_requests=[dg.RunRequest(run_key=key, job_name=START_ENDPOINT)],
        asset_events=[event] if event is not None else [],
    )


def _with_decisions_noted(tracking: Tracking) -> tuple[list[RegisteredVersion], list[str]]:
    """All versions, newest first, and decisions of MLflow's pages that do not count.

    A tag set there tells neither who nor when; it is noted as of now, so that decisions have an order.
    """
    versions, noted, refused = tracking.versions(), False, list[str]()
    for version in versions:
        decision = version.decision
        if decision is None or decision.at:
            continue
        try:
            tracking.decide(version, decision.decision, decision.by, decision.reason)
            noted = True
        except InputFailure as failure:
            refused.append(str(failure))
    return (tracking.versions() if noted else versions), refused


def _to_be_served(versions: Sequence[RegisteredVersion]) -> RegisteredVersion | None:
    """The version that was approved last, if no version went into production since."""
    last = _last_promotion(versions)
    last_promotion = last.at if last else ""
    approved = [
        (decision.at, version)
        for version in versions
        if version.may_serve and (decision := version.decision) is not None
    ]
    # Of several with the same time, the newest version: they come newest first.
    at, latest = max(approved, key=lambda pair: pair[0], default=("", None))
    return latest if latest is not None and not latest.in_production and at > last_promotion else None


def _last_promotion(versions: Sequence[RegisteredVersion]) -> Promotion | None:
    """Apart from those of a model that served already and only got other names."""
    promotions = [
        promotion for version in versions for promotion in version.promotions if promotion.kind != "rename"
    ]
    return max(promotions, key=lambda promotion: promotion.at, default=None)


def _next_key(
    instance: dg.DagsterInstance, keys: Sequence[str], version: RegisteredVersion
) -> tuple[str | None, str]:
    """The run key to ask for, or None and why there is none."""
    runs = instance.get_runs(filters=dg.RunsFilter(tags={RUN_KEY_TAG: list(keys)}))
    for key in keys:
        statuses = {run.status for run in runs if run.tags[RUN_KEY_TAG] == key}
        if not statuses:
            return key, ""
        if not statuses <= {
            dg.DagsterRunStatus.SUCCESS,
            dg.DagsterRunStatus.FAILURE,
            dg.DagsterRunStatus.CANCELED,
        }:
            return None, f"{name_of(version)} was approved and is being deployed"
        if dg.DagsterRunStatus.CANCELED in statuses:
            return None, (
                f"{name_of(version)} was approved, but somebody canceled its deployment: start the job "
                f"{START_ENDPOINT} by hand"
            )
    return None, (
        f"gave up on {name_of(version)}, which was approved, after {len(keys)} runs that did not bring it "
        f"into production: see their errors, then start the job {START_ENDPOINT} by hand. "
        "What was serving goes on serving"
    )


def _nothing_to_do(versions: Sequence[RegisteredVersion]) -> str:
    production = next((version for version in versions if version.in_production), None)
    last = _last_promotion(versions)
    newer_than = int(last.registry_version) if last else 0
    waiting = [
        version
        for version in versions
        if version.passed and version.approval == "pending" and int(version.version) > newer_than
    ]
    if waiting:
        return "; ".join(
            f"{name_of(version)} waits for a decision since {version.registered_at}: run the job "
            f"decide_version, or `python -m offer_assets approve {version.version} --reason …`"
            for version in waiting
        )
    if production is None:
        return "no version is in production and none was approved"
    return f"{name_of(production)} is in production, and no other was approved since"
