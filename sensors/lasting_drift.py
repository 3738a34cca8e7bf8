"""Drift lasts: train anew by policy, and tell people where that did not cure it."""

import datetime

import dagster as dg
import msgspec

from ml.artifacts import ArtifactRef, short_version
from ml.drift.answers import LEVELS, Level
from ml.errors import InputError
from ml.quality.questions import AGREEMENT
from ml.quality.questions import QUESTIONS as QUALITY_QUESTIONS
from offer_assets import policies
from offer_assets.instance import FEED_TAG, feed_tag
from offer_assets.jobs import FINISHED, JOBS, TRAIN_AND_RELEASE, open_trainings
from offer_assets.operation import DRIFT_REPORT
from offer_assets.partitions import CPU
from offer_assets.plan import RetrainPolicy
from offer_assets.promotion import MODEL_VERSION, model_of
from offer_assets.quality import LIVE_QUALITY
from resources.alerts import Alerts, News
from resources.artifact_store import ArtifactStore
from resources.compute import Compute
from resources.offer_feed import OfferFeed
from resources.tracking import Tracking
from sensors.drift_decision import (
    ATTEMPT_TAG,
    DAY_TAG,
    MODEL_TAG,
    ROUND_TAG,
    Decision,
    Outcome,
    Situation,
    Training,
    Window,
    decide,
)

_DAYS_LOOKED_AT = 60
"""Newest reports that are looked at for those of the model that serves."""
_RUNS_LOOKED_AT = 50
_LEVEL_OF: dict[int, Level] = {number: level for level, number in LEVELS.items()}


class _JudgedDay(msgspec.Struct, frozen=True):
    day: str
    too_young: bool
    usual: float | None
    """None of the older days, with which the others are compared; agreement is judged on the others."""


class _JudgedDays(msgspec.Struct, frozen=True):
    """Of the report of ``live_quality``; reading all of it would import what measures it."""

    days: list[_JudgedDay]


@dg.sensor(
    name="lasting_drift",
    jobs=[job for job in JOBS if job.name == TRAIN_AND_RELEASE],
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Starts train_and_release when a check that OFFER_ASSETS_RETRAIN_ON_DRIFT names is ERROR on "
    "the newest days in a row: once within OFFER_ASSETS_RETRAIN_COOLDOWN_DAYS. Drift that lasts all the same "
    "becomes CRITICAL instead of starting another.",
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
    """Look, decide, and tell; the run key makes a repeat impossible."""
    try:
        situation = _situation(context.instance, retrain_policy, artifact_store, compute, tracking)
        decision = decide(situation)
        if decision.action in ("start", "escalate"):
            # Only now, for it lists the feed: whether those days are the newest, or history that is replayed.
            newest = offer_feed.days()[-1]
            decision = decide(msgspec.structs.replace(situation, newest_day_of_feed=newest))
    except (InputError, dg.Failure) as error:
        return dg.SensorResult(skip_reason=_line(error))
    if decision.action == "escalate":
        alerts.tell([_news(decision, check, situation.now) for check in decision.checks])
    if decision.request is None:
        return dg.SensorResult(skip_reason=decision.reason)
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
    model = model_of(endpoint, compute) if endpoint is not None else None
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
        windows=_quality(model, store, compute) if model else {},
        trainings=_trainings(instance, feed, store, tracking) if model else [],
        open_run=f"run {open_run.run_id[:8]} of {open_run.job_name}" if open_run else "",
    )


def _levels(model: str, store: ArtifactStore, compute: Compute) -> dict[str, dict[str, Level]]:
    """Level of every check by day, of the newest days that ``model`` (under whatever names) catalogued."""
    reports = store.list_pointers(DRIFT_REPORT)
    models: dict[str, str | None] = {}
    levels: dict[str, dict[str, Level]] = {}
    for day in sorted(reports, reverse=True)[:_DAYS_LOOKED_AT]:
        reference = _input_of(reports[day], "drift_reference", compute)
        if reference is None:
            continue
        if reference not in models:
            models[reference] = _model_behind(reference, store, compute)
        if models[reference] == model:
            levels[day] = _levels_of(reports[day])
    return levels


def _quality(model: str, store: ArtifactStore, compute: Compute) -> dict[str, Window]:
    """What corrections say of ``model``: nothing while days of another one are among those judged."""
    quality = store.read_pointer(LIVE_QUALITY)
    if quality is None:
        return {}
    try:
        file = store.fetch(quality, check=False) / "quality.json"
    except InputError:
        return {}
    days = msgspec.json.decode(file.read_bytes(), type=_JudgedDays).days
    catalogued = store.list_pointers("catalogued_offers")
    windows = {}
    for check, level in _levels_of(quality).items():
        judged = [
            day.day for day in days if not day.too_young and (day.usual is not None or check != AGREEMENT)
        ]
        models = {
            _input_of(catalogued[day], "compiled_student", compute) for day in judged if day in catalogued
        }
        if {_compiled(digest, store, compute) for digest in models} == {model}:
            windows[check] = Window(first_day=min(judged), last_day=max(judged), level=level)
    return windows


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
    instance: dg.DagsterInstance, feed: dict[str, str], store: ArtifactStore, tracking: Tracking
) -> list[Training]:
    """Runs that drift started, of this feed, newest first."""
    records = instance.get_run_records(
        filters=dg.RunsFilter(job_name=TRAIN_AND_RELEASE, tags=feed), limit=_RUNS_LOOKED_AT
    )
    trainings = [
        Training(
            run_id=run.run_id,
            model=run.tags[MODEL_TAG],
            checks=tuple(run.tags.get(policies.DRIFT_CHECKS_TAG, "").split(",")),
            newest_day=run.tags.get(DAY_TAG, ""),
            round=int(run.tags[ROUND_TAG]),
            attempt=int(run.tags[ATTEMPT_TAG]),
            started=record.create_timestamp.astimezone(datetime.UTC),
            outcome=_outcome(run),
        )
        for record in records
        if MODEL_TAG in (run := record.dagster_run).tags
    ]
    return [
        msgspec.structs.replace(training, outcome="refused")
        if place == 0 and training.outcome == "failed" and _was_refused(training, instance, store, tracking)
        else training
        for place, training in enumerate(trainings)
    ]


def _outcome(run: dg.DagsterRun) -> Outcome:
    if run.status not in FINISHED:
        return "open"
    if run.status == dg.DagsterRunStatus.CANCELED:
        return "canceled"
    return "succeeded" if run.status == dg.DagsterRunStatus.SUCCESS else "failed"


def _was_refused(
    training: Training, instance: dg.DagsterInstance, store: ArtifactStore, tracking: Tracking
) -> bool:
    """Whether a run failed because gate or people do not let its model serve: another would do the same."""
    event = instance.get_latest_materialization_event(dg.AssetKey(MODEL_VERSION))
    candidate = store.read_pointer(MODEL_VERSION)
    if event is None or event.run_id != training.run_id or candidate is None:
        return False
    version = tracking.version_of(candidate)
    return version is not None and not version.may_serve


def _news(decision: Decision, check: str, now: datetime.datetime) -> News:
    last = decision.round
    assert last is not None
    asset = LIVE_QUALITY if check in {question.name for question in QUALITY_QUESTIONS} else DRIFT_REPORT
    return News(
        id=f"retrain:{last.model}:{last.round}:{check}",
        incident=f"check:{asset}:{check}",
        state="failing",
        severity="CRITICAL",
        title=f"A new training did not cure the drift: {check}",
        text=f"{decision.reason}. It is not tried again until then: see the findings of the check and the "
        "report of the newest day, and whether the feed, the labels or the gate's limits are the cause.",
        asset=asset,
        link=f"/assets/{asset}?view=checks&checkDetail={check}",
        group=policies.OPERATION,
        owners=(policies.ML_TEAM,),
        at=now.isoformat(timespec="seconds"),
    )


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _line(error: BaseException) -> str:
    text = error.description if isinstance(error, dg.Failure) and error.description else str(error)
    return text.strip().split("\n", maxsplit=1)[0] or type(error).__name__
