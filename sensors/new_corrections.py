"""People decided about offers, or a newer day was catalogued: measure live quality.

Every run reads the whole feed, so there is one at a time and one an hour: what comes meanwhile is measured
together by the next.
"""

import datetime
import hashlib

import dagster as dg
import msgspec
from dagster._core.storage.tags import RUN_KEY_TAG

from offer_assets.jobs import FINISHED, JOBS, MEASURE_QUALITY
from offer_assets.quality import CORRECTIONS
from resources.artifact_store import ArtifactStore
from resources.corrections_feed import CorrectionsFeed

_ATTEMPTS = 3
"""Runs of one state, before somebody has to look why they fail."""

_LEAST_DISTANCE = datetime.timedelta(hours=1)
"""Between the starts of two runs."""

_ENDED_IN_VAIN = frozenset({dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED})


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """The last run that was asked for."""

    state: str = ""
    """Digest of the feed's files, the newest catalogued day, its content and the taxonomy."""
    attempt: int = 0
    asked_at: datetime.datetime | None = None

    @property
    def run_key(self) -> str:
        """Dagster starts one run per key, however often it is asked for."""
        return f"{MEASURE_QUALITY}:{self.state}:{self.attempt}"


@dg.sensor(
    name="new_corrections",
    jobs=[job for job in JOBS if job.name == MEASURE_QUALITY],
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Measures live quality when the corrections feed changed, when a newer day was catalogued or "
    f"when another taxonomy is in force, and when a run of it failed (at most {_ATTEMPTS} times): one run at "
    "a time, and one an hour.",
)
def new_corrections(
    context: dg.SensorEvaluationContext,
    corrections_feed: CorrectionsFeed,
    artifact_store: ArtifactStore,
) -> dg.SensorResult:
    """One run per state and attempt, none beside another; the run key makes a repeat impossible."""
    to_measure = _to_measure(corrections_feed, artifact_store)
    wanted = to_measure if isinstance(to_measure, str) else _next_run(context, to_measure)
    if isinstance(wanted, str):
        return dg.SensorResult(skip_reason=wanted, cursor=context.cursor)
    return dg.SensorResult(
        run_requests=[dg.RunRequest(run_key=wanted.run_key, job_name=MEASURE_QUALITY)],
        cursor=msgspec.json.encode(wanted).decode(),
    )


class _State(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to measure."""

    digest: str
    in_words: str


def _to_measure(corrections_feed: CorrectionsFeed, artifact_store: ArtifactStore) -> _State | str:
    """The state of all that goes into a run, or why there is nothing to run for."""
    if not corrections_feed.is_there:
        return "no corrections feed is set: CORRECTIONS_FEED names its file, folder, glob or URI"
    change = artifact_store.read_pointer("taxonomy_change")
    catalogued = artifact_store.list_pointers("catalogued_offers")
    if change is None or not catalogued:
        return "no day is catalogued yet, so corrections say nothing"
    files = corrections_feed.files()
    taken = artifact_store.read_pointer(CORRECTIONS)
    if not files and (taken is None or not taken.metrics.get("files")):
        return "the corrections feed has no file yet"  # where it had some, the run says that it lost them
    newest = max(catalogued)
    seen = sorted(f"{file.uri} {file.fingerprint}" for file in files)
    content = "\n".join([*seen, newest, catalogued[newest].digest, change.digest])
    delivered = "1 file" if len(files) == 1 else f"{len(files):,} files"
    return _State(
        digest=hashlib.sha256(content.encode()).hexdigest()[:16],
        in_words=f"{delivered} of corrections and the catalogued days to {newest}",
    )


def _next_run(context: dg.SensorEvaluationContext, state: _State) -> Cursor | str:
    """The run that this state needs now, or why it needs none."""
    last, now = _decode(context.cursor), _now()
    if last.state != state.digest:
        wanted = Cursor(state=state.digest, attempt=1, asked_at=now)
    else:
        runs = context.instance.get_runs(filters=dg.RunsFilter(tags={RUN_KEY_TAG: last.run_key}))
        statuses = {run.status for run in runs}
        if not statuses:
            return last  # asked for and not launched: its key keeps it at one
        if statuses != {dg.DagsterRunStatus.FAILURE} or last.attempt >= _ATTEMPTS:
            return _why_none(statuses, state.in_words)
        wanted = Cursor(state=state.digest, attempt=last.attempt + 1, asked_at=now)
    return _what_it_waits_for(context.instance, last, now, state.in_words) or wanted


def _what_it_waits_for(instance: dg.DagsterInstance, last: Cursor, now: datetime.datetime, what: str) -> str:
    """Why another run cannot start now, in words; empty if it can."""
    unfinished = [status for status in dg.DagsterRunStatus if status not in FINISHED]
    open_runs = instance.get_runs(
        filters=dg.RunsFilter(job_name=MEASURE_QUALITY, statuses=unfinished), limit=1
    )
    if open_runs:
        return f"run {open_runs[0].run_id[:8]} of {MEASURE_QUALITY} is not finished: {what} wait for it"
    if last.asked_at is not None and now - last.asked_at < _LEAST_DISTANCE:
        until = last.asked_at + _LEAST_DISTANCE
        return f"one run an hour: {what} are measured from {until:%H:%M} UTC on"
    return ""


def _why_none(statuses: set[dg.DagsterRunStatus], what: str) -> str:
    if dg.DagsterRunStatus.SUCCESS in statuses:
        return f"nothing new: {what} are measured"
    if statuses - _ENDED_IN_VAIN:
        return f"a run measures {what}"
    if dg.DagsterRunStatus.CANCELED in statuses:
        return f"the run for {what} was canceled: run {MEASURE_QUALITY} by hand"
    return f"gave up after {_ATTEMPTS} failed runs for {what}: run {MEASURE_QUALITY} by hand"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _decode(cursor: str | None) -> Cursor:
    """The cursor; one that cannot be read is forgotten: asking again for a run that was starts none."""
    try:
        return msgspec.json.decode(cursor, type=Cursor) if cursor else Cursor()
    except msgspec.DecodeError:
        return Cursor()
