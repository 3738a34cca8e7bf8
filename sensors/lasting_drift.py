"""Drift lasts: train anew by policy, and tell people where that did not cure it."""

import datetime
from collections.abc import Mapping, Sequence

import dagster as dg
import msgspec
from dagster._core.definitions.data_version import DATA_VERSION_TAG

from ml.artifacts import ArtifactRef, short_version
from ml.drift.answers import LEVELS, Level
from ml.errors import InputError
from ml.quality.questions import QUESTIONS as QUALITY_QUESTIONS
from offer_assets import policies
from offer_assets.incidents import observations
from offer_assets.instance import FEED_TAG, feed_tag
from offer_assets.jobs import JOBS, TRAIN_AND_RELEASE, open_trainings
from offer_assets.operation import DRIFT_REPORT
from offer_assets.partitions import CPU
from offer_assets.plan import RetrainPolicy
from offer_assets.promotion import DECIDE_VERSION, MODEL_VERSION, model_of, name_of
from offer_assets.quality import LIVE_QUALITY
from offer_assets.wording import sentences
from resources.alerts import Alerts, News
from resources.artifact_store import ArtifactStore
from resources.compute import Compute
from resources.offer_feed import OfferFeed
from resources.tracking import RegisteredVersion, Tracking
from sensors.drift_decision import (
    ATTEMPT_TAG,
    ATTEMPTS,
    DAY_TAG,
    MODEL_TAG,
    ROUND_TAG,
    Outcome,
    Situation,
    Training,
    Uncured,
    Window,
    decide,
)

_DAYS_LOOKED_AT = 60
"""Newest reports that are looked at for those of the model that serves."""
_RUNS_LOOKED_AT = 50
_LOOKS_AT_QUALITY = 200
"""Newest results of ``live_quality`` that are looked at."""
_LEVEL_OF: dict[int, Level] = {number: level for level, number in LEVELS.items()}
_OUTCOME: dict[dg.DagsterRunStatus, Outcome] = {
    dg.DagsterRunStatus.SUCCESS: "succeeded",
    dg.DagsterRunStatus.FAILURE: "failed",
    dg.DagsterRunStatus.CANCELED: "canceled",
}
"""Of runs that are finished."""


@dg.sensor(
    name="lasting_drift",
    jobs=[job for job in JOBS if job.name == TRAIN_AND_RELEASE],
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Starts train_and_release when a check that OFFER_ASSETS_RETRAIN_ON_DRIFT names is ERROR on "
    "the newest days in a row, once within OFFER_ASSETS_RETRAIN_COOLDOWN_DAYS. Drift that lasts all the same "
    "becomes CRITICAL; it starts another only after a day without it, or once a model serves that people or "
    "another job released.",
)
def lasting_drift(
    context: dg.SensorEvaluationContext,
    retrain_policy: RetrainPolicy,
    offer_feed: OfferFeed,
    artifact_store: ArtifactStore,
    compute: Compute,
    tracking: Tracking,
    alerts: Alerts,
) -> dg.SensorResult:
    """Look, decide, and tell; the run key makes a repeat impossible. What cannot be looked at raises."""
    situation = _situation(context.instance, retrain_policy, artifact_store, compute, tracking)
    decision = decide(situation)
    if decision.action in ("start", "escalate"):
        # Only now, for it lists the feed: whether those days are the newest, or history that is replayed.
        newest = offer_feed.days()[-1]
        decision = decide(msgspec.structs.replace(situation, newest_day_of_feed=newest))
    told = alerts.tell(_news(decision.uncured, alerts, situation.now)) if decision.uncured else []
    if decision.request is None:
        return dg.SensorResult(skip_reason=decision.reason, asset_events=observations(told))
    context.log.warning(f"starting {TRAIN_AND_RELEASE}: {decision.reason}")
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(
                run_key=decision.request.run_key,
                job_name=TRAIN_AND_RELEASE,
                partition_key=CPU,
                tags=decision.request.tags,
            )
        ]
    )


def _situation(
    instance: dg.DagsterInstance,
    policy: RetrainPolicy,
    store: ArtifactStore,
    compute: Compute,
    tracking: Tracking,
) -> Situation:
    endpoint = store.read_pointer("offer_endpoint") if policy.checks else None
    model, windows = None, dict[str, Window]()
    if endpoint is not None:
        model = model_of(endpoint, compute)
        windows = _quality((short_version(model), endpoint.version), instance, store)
    feed = feed_tag(store)
    open_run = next(iter(open_trainings(instance, feed)), None) if model else None
    return Situation(
        checks=tuple(policy.checks),
        after_days=policy.after_days,
        cooldown_days=policy.cooldown_days,
        now=_now(),
        feed=feed.get(FEED_TAG, ""),
        model=short_version(model) if model else None,
        days=_levels(model, store, compute) if model else {},
        windows=windows,
        trainings=_trainings(instance, feed, model, store, compute, tracking) if model else [],
        open_run=f"run {open_run.run_id[:8]} of {open_run.job_name}" if open_run else "",
    )


def _levels(model: str, store: ArtifactStore, compute: Compute) -> dict[str, dict[str, Level]]:
    """Level of every check by day, of the newest days that ``model`` (under whatever names) catalogued.

    A day that is not over was looked at, but says nothing yet.
    """
    reports = store.list_pointers(DRIFT_REPORT)
    models: dict[str, str | None] = {}
    levels: dict[str, dict[str, Level]] = {}
    for day in sorted(reports, reverse=True)[:_DAYS_LOOKED_AT]:
        try:
            made_of = compute.manifest(reports[day])
        except InputError:  # it is gone
            continue
        reference = made_of.inputs["drift_reference"]
        if reference not in models:
            models[reference] = _model_behind(reference, store, compute)
        if models[reference] == model:
            levels[day] = _levels_of(reports[day]) if made_of.parameters.get("complete", True) else {}
    return levels


def _quality(names: Sequence[str], instance: dg.DagsterInstance, store: ArtifactStore) -> dict[str, Window]:
    """What corrections say of the model that serves, by its versions: nothing while they judge another."""
    quality = store.read_pointer(LIVE_QUALITY)
    if quality is None or quality.metrics.get("judged_model") not in names:
        return {}
    return {
        check: Window(
            last_day=str(quality.metrics["judged_until"]),
            level=level,
            good_at=_good_at(check, instance) if level == "ERROR" else None,
        )
        for check, level in _levels_of(quality).items()
    }


def _good_at(check: str, instance: dg.DagsterInstance) -> datetime.datetime | None:
    """When corrections last were looked at and a check could tell and was not ERROR."""
    looks = instance.fetch_materializations(dg.AssetKey(LIVE_QUALITY), limit=_LOOKS_AT_QUALITY)
    for look in looks.records:
        materialization = look.asset_materialization
        level = materialization.metadata.get(f"level_{check}") if materialization is not None else None
        if level is not None and level.value in (LEVELS["OK"], LEVELS["WARN"]):
            return datetime.datetime.fromtimestamp(look.timestamp, datetime.UTC)
    return None


def _levels_of(report: ArtifactRef) -> dict[str, Level]:
    prefix = "level_"
    return {
        name.removeprefix(prefix): _LEVEL_OF[int(level)]
        for name, level in report.metrics.items()
        if name.startswith(prefix)
    }


def _model_behind(reference: str, store: ArtifactStore, compute: Compute) -> str | None:
    """Compiled student that a drift reference (a digest) was made for; None where it is gone."""
    found = store.find_by_digest("drift_reference", reference)
    return _compiled(_input_of(found, "compiled_student", compute), store, compute) if found else None


def _compiled(digest: str | None, store: ArtifactStore, compute: Compute) -> str | None:
    """The compiled student that a model (a digest) is, under whatever names."""
    renamed = store.find_by_digest("renamed_student", digest) if digest else None
    return model_of(renamed, compute) if renamed is not None else digest


def _input_of(ref: ArtifactRef, name: str, compute: Compute) -> str | None:
    try:
        return compute.manifest(ref).inputs.get(name)
    except InputError:
        return None


def _trainings(
    instance: dg.DagsterInstance,
    feed: dict[str, str],
    model: str,
    store: ArtifactStore,
    compute: Compute,
    tracking: Tracking,
) -> list[Training]:
    """Runs that drift started, of this feed, newest first."""
    tags: dict[str, str | list[str]] = {**feed, ATTEMPT_TAG: [str(1 + n) for n in range(ATTEMPTS)]}
    records = instance.get_run_records(
        filters=dg.RunsFilter(job_name=TRAIN_AND_RELEASE, tags=tags), limit=_RUNS_LOOKED_AT
    )
    trainings = []
    for place, record in enumerate(records):
        run = record.dagster_run
        registered = _registered(instance, run)
        trained = _compiled(registered, store, compute)
        outcome, standing = _OUTCOME.get(run.status, "open"), ""
        if outcome == "failed" and trained == model:
            outcome = "succeeded"  # what failed came after its model was served
        # The registry is asked only while it matters: the newest was to take the place of what still serves.
        elif place == 0 and outcome != "open" and registered and run.tags[MODEL_TAG] == short_version(model):
            outcome, standing = _standing(tracking.find(registered)) or (outcome, "")
        trainings.append(
            Training(
                run_id=run.run_id,
                model=run.tags[MODEL_TAG],
                checks=tuple(run.tags[policies.DRIFT_CHECKS_TAG].split(",")),
                newest_day=run.tags[DAY_TAG],
                round=int(run.tags[ROUND_TAG]),
                attempt=int(run.tags[ATTEMPT_TAG]),
                started=record.create_timestamp.astimezone(datetime.UTC),
                outcome=outcome,
                trained=short_version(trained) if trained is not None else None,
                standing=standing,
            )
        )
    return trainings


def _registered(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str | None:
    """Digest of the model that a run registered, if it came so far."""
    logged = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    for record in logged.records:
        materialization = record.asset_materialization
        if materialization is not None and materialization.asset_key == dg.AssetKey(MODEL_VERSION):
            return (materialization.tags or {}).get(DATA_VERSION_TAG)
    return None


def _standing(version: RegisteredVersion | None) -> tuple[Outcome, str] | None:
    """Why a version does not serve, if that is up to gate or people."""
    if version is None or version.may_serve:
        return None
    decision = version.decision
    if decision is not None and decision.decision == "rejected":
        return "refused", f"{name_of(version)} was rejected by {decision.by}: {decision.reason}"
    if version.passed:
        return "waits", (
            f"{name_of(version)} passed the gate and waits for a decision: run the job {DECIDE_VERSION}, or "
            f"`python -m offer_assets approve {version.version} --reason …` (or reject)"
        )
    return "refused", f"{name_of(version)} did not pass the gate: see the gate of {MODEL_VERSION}"


def _news(uncured: Sequence[Uncured], alerts: Alerts, now: datetime.datetime) -> list[News]:
    """One for each check; told again if its incident was resolved and is open again."""
    numbers = {incident.key: incident.number for incident in alerts.incidents(all_of_them=True)}
    return [_news_of(each, check, numbers, now) for each in uncured for check in each.checks]


def _news_of(uncured: Uncured, check: str, numbers: Mapping[str, int], now: datetime.datetime) -> News:
    asset = LIVE_QUALITY if check in {question.name for question in QUALITY_QUESTIONS} else DRIFT_REPORT
    incident, begun, outcome = f"check:{asset}:{check}", uncured.round.first, uncured.round.outcome
    if outcome == "waits":
        title, then = "The model trained for the drift waits for a decision", "Until then the drift lasts."
    else:
        title = "A training did not cure the drift"
        then = (
            "See the findings of the check and the newest report, and whether the feed, the labels or the "
            "gate's limits are the cause. No other training is started for it before a day without an ERROR "
            "of this check, or before a model serves that people or another job released."
        )
    return News(
        id=f"retrain:{begun.model}:{begun.round}:{check}:{outcome}:{numbers.get(incident, 1)}",
        incident=incident,
        state="failing",
        severity="CRITICAL",
        title=f"{title}: {check}",
        text=sentences(uncured.reason, then),
        asset=asset,
        link=f"/assets/{asset}?view=checks&checkDetail={check}",
        group=policies.OPERATION,
        owners=(policies.ML_TEAM,),
        at=now.isoformat(timespec="seconds"),
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
