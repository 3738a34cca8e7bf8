"""Jobs and schedules: which assets are made together, and when."""

import datetime
from collections.abc import Mapping

import dagster as dg

from ml.artifacts import ArtifactRef
from ml.errors import InputError
from offer_assets.instance import FEED_TAG, feed_tag
from offer_assets.models import WARM
from offer_assets.partitions import CPU
from offer_assets.release import PRODUCTION
from resources.artifact_store import ArtifactStore

ADOPT_TAXONOMY = "adopt_taxonomy"
REFRESH_NAMES = "refresh_names"
FOLLOW_TAXONOMY = "follow_taxonomy"
INGEST_DAY = "ingest_day"
TRAIN_AND_RELEASE = "train_and_release"
START_ENDPOINT = "start_endpoint"
CATALOGUE_DAY = "catalogue_day"
PROCESS_DAY = "process_day"
MEASURE_QUALITY = "measure_quality"
BENCHMARK_SERVING = "benchmark_serving"
COMPARE_ENCODERS = "compare_encoders"
SEARCH_HYPERPARAMETERS = "search_hyperparameters"
EXPLAIN_MISTAKES = "explain_mistakes"

_WEEKS_LOOKED_AT = 4
"""An outage of the whole feed is noticed for so long; a feed of workdays is expected on workdays only."""

FINISHED = frozenset({dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED})

_TAXONOMY = ("catalog_taxonomy", "taxonomy_change")
_INGESTION = ("raw_offers", "offers", "quarantined_offers")
_TRAINING = (
    "migrated_labels",
    "evaluation_set",
    "training_sample",
    "teacher_checkpoint",
    "teacher_labels",
    "fast_checkpoint",
    "student_checkpoint",
    "student_evaluation",
    "compiled_student",
)
_RELEASE = ("model_version", "offer_endpoint")
_CATALOGUING = ("catalogued_offers", "drift_reference", "drift_report")
_QUALITY = ("corrections", "live_quality")
_EXCLUSIVE = frozenset({ADOPT_TAXONOMY, REFRESH_NAMES, FOLLOW_TAXONOMY, TRAIN_AND_RELEASE})

adopt_taxonomy = dg.define_asset_job(
    ADOPT_TAXONOMY,
    selection=dg.AssetSelection.assets(*_TAXONOMY),
    description="Take the newest release of the taxonomy and say what it changes; nothing is trained.",
)

refresh_names = dg.define_asset_job(
    REFRESH_NAMES,
    selection=dg.AssetSelection.assets(*_TAXONOMY, *_RELEASE),
    config={"ops": {"model_version": {"config": {"model": PRODUCTION}}}},
    description="Take a release that renames categories only: the endpoint answers with the new names, "
    "nothing is trained.",
)

follow_taxonomy = dg.define_asset_job(
    FOLLOW_TAXONOMY,
    selection=dg.AssetSelection.assets(*_TAXONOMY, *_TRAINING, *_RELEASE),
    config={
        "ops": {asset: {"config": {"start": WARM}} for asset in ("teacher_checkpoint", "student_checkpoint")}
    },
    description="Take a release of the taxonomy, carry the labels over, train on from the model in "
    "production, gate, serve. What a new release starts by itself.",
)

ingest_day = dg.define_asset_job(
    INGEST_DAY,
    selection=dg.AssetSelection.assets(*_INGESTION),
    description="Take one day of the feed: raw, clean and quarantined offers.",
)

train_and_release = dg.define_asset_job(
    TRAIN_AND_RELEASE,
    selection=dg.AssetSelection.assets(*_TRAINING, *_RELEASE),
    description="Train afresh on everything taken so far, compile, register, pass the gate, serve.",
)

start_endpoint = dg.define_asset_job(
    START_ENDPOINT,
    selection=dg.AssetSelection.assets("offer_endpoint"),
    description="Bring the registered version up if it is not, after a restart of the machine for instance.",
)

catalogue_day = dg.define_asset_job(
    CATALOGUE_DAY,
    selection=dg.AssetSelection.assets(*_CATALOGUING),
    description="Catalogue one day of clean offers through the endpoint and look for drift.",
)

process_day = dg.define_asset_job(
    PROCESS_DAY,
    selection=dg.AssetSelection.assets(*_INGESTION, *_CATALOGUING),
    description="Take one day of the feed and catalogue it: what new offers start by themselves.",
)

measure_quality = dg.define_asset_job(
    MEASURE_QUALITY,
    selection=dg.AssetSelection.assets(*_QUALITY),
    description="Take what people decided about offers since, and hold the categories that were given "
    "against it: what new corrections start by themselves.",
)

benchmark_serving = dg.define_asset_job(
    BENCHMARK_SERVING,
    selection=dg.AssetSelection.assets("serving_benchmark"),
    description="Measure the compiled student on this machine (half a minute, best with nothing beside it), "
    "and say which instance serves the peak load at the least cost. By hand: no release waits for it.",
)

compare_encoders = dg.define_asset_job(
    COMPARE_ENCODERS,
    selection=dg.AssetSelection.assets("encoder_comparison"),
    description="Train several encoders alike on the training sample, and compare quality, throughput and "
    "size. By hand: a training per encoder, and the log says first how long that may take.",
)

search_hyperparameters = dg.define_asset_job(
    SEARCH_HYPERPARAMETERS,
    selection=dg.AssetSelection.assets("hyperparameter_search"),
    description="Look for better parameters of the teacher, the student or the fast model (the partition): "
    "trials until their number or the budget is reached. By hand: what it finds is shown, not applied.",
)

explain_mistakes = dg.define_asset_job(
    EXPLAIN_MISTAKES,
    selection=dg.AssetSelection.assets("mistakes_explained"),
    description="Say which words and which labelled offers led to the student's most confident mistakes. By "
    "hand: no release waits for it.",
)

JOBS = [
    adopt_taxonomy,
    refresh_names,
    follow_taxonomy,
    ingest_day,
    train_and_release,
    start_endpoint,
    catalogue_day,
    process_day,
    measure_quality,
    benchmark_serving,
    compare_encoders,
    search_hyperparameters,
    explain_mistakes,
]


@dg.schedule(
    job=train_and_release,
    cron_schedule="0 3 * * 0",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every Sunday at 03:00 UTC, train on the newest sample; unchanged inputs make nothing new. "
    "Left out while a release of the taxonomy is taken or a model is trained.",
)
def weekly_training(
    context: dg.ScheduleEvaluationContext, artifact_store: ArtifactStore
) -> dg.RunRequest | dg.SkipReason:
    """One run a week for the target that serves here, unless another run changes the same pointers."""
    feed = feed_tag(artifact_store)
    if (run := next(iter(open_trainings(context.instance, feed)), None)) is not None:
        return dg.SkipReason(f"run {run.run_id[:8]} of {run.job_name} is not finished: it trains, or has to")
    return dg.RunRequest(run_key=f"{context.scheduled_execution_time:%Y-%m-%d}", partition_key=CPU, tags=feed)


def open_trainings(instance: dg.DagsterInstance, feed: dict[str, str]) -> list[dg.DagsterRun]:
    """Unfinished runs that take a release of the taxonomy or train, of this feed or of an unknown one."""
    unfinished = [status for status in dg.DagsterRunStatus if status not in FINISHED]
    mine = feed.get(FEED_TAG)
    return [
        run
        for run in instance.get_runs(filters=dg.RunsFilter(statuses=unfinished))
        if run.job_name in _EXCLUSIVE and run.tags.get(FEED_TAG, mine) == mine
    ]


@dg.schedule(
    job=process_day,
    cron_schedule="0 1 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Every day at 01:00 UTC, look at the day before again now that it is over: only then can its "
    "volume be judged. A day without any offer fails if the same weekday of one of the four weeks before had "
    "some, or any day if the feed is younger than a week.",
)
def day_is_over(
    context: dg.ScheduleEvaluationContext, artifact_store: ArtifactStore
) -> dg.RunRequest | dg.SkipReason:
    """One run for the day before, if its report is from before its end, or if it brought nothing at all."""
    date = context.scheduled_execution_time.date() - datetime.timedelta(days=1)
    day = date.isoformat()
    if artifact_store.read_pointer("offer_endpoint") is None:
        return dg.SkipReason("there is no endpoint yet to catalogue a day with")
    report = artifact_store.read_pointer(f"drift_report/{day}")
    if report is not None and _is_of_a_whole_day(artifact_store, report):
        return dg.SkipReason(f"{day} was looked at after its end")
    if _is_expected(date, artifact_store.list_pointers("offers")):
        return dg.RunRequest(run_key=day, partition_key=day)
    return dg.SkipReason(f"the feed brought no offers of {day}, and none were expected")


def _is_expected(date: datetime.date, taken: Mapping[str, object]) -> bool:
    """Whether the feed should have offers of a day, or has, by the days that were taken so far."""
    before = [(date - day).days for day in map(datetime.date.fromisoformat, taken) if day <= date]
    if any(days % 7 == 0 and days <= 7 * _WEEKS_LOOKED_AT for days in before):
        return True
    return bool(before) and max(before) < 7


def _is_of_a_whole_day(artifact_store: ArtifactStore, report: ArtifactRef) -> bool:
    try:
        return bool(artifact_store.manifest(report).parameters.get("complete"))
    except InputError:
        return False


SCHEDULES = [weekly_training, day_is_over]
