"""People decided about offers, or a newer day was catalogued: measure live quality."""

import hashlib

import dagster as dg
import msgspec
from dagster._core.storage.tags import RUN_KEY_TAG

from offer_assets.jobs import JOBS, MEASURE_QUALITY
from resources.artifact_store import ArtifactStore
from resources.corrections_feed import CorrectionsFeed

_ATTEMPTS = 3
"""Runs of one state, before somebody has to look why they fail."""

_ENDED_IN_VAIN = frozenset({dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED})


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """The last run that was asked for."""

    state: str = ""
    """Digest of the feed's files, the newest catalogued day, its content and the taxonomy."""
    attempt: int = 0

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
    f"when another taxonomy is in force, and when a run of it failed (at most {_ATTEMPTS} times).",
)
def new_corrections(
    context: dg.SensorEvaluationContext,
    corrections_feed: CorrectionsFeed,
    artifact_store: ArtifactStore,
) -> dg.SensorResult:
    """One run per state and attempt; the run key makes a repeat impossible."""
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
    if not files:
        return "the corrections feed has no file yet"
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
    last = _decode(context.cursor)
    if last.state != state.digest:
        return Cursor(state=state.digest, attempt=1)
    runs = context.instance.get_runs(filters=dg.RunsFilter(tags={RUN_KEY_TAG: last.run_key}))
    statuses = {run.status for run in runs}
    if not statuses:
        return last  # asked for and not launched: its key keeps it at one
    if statuses == {dg.DagsterRunStatus.FAILURE} and last.attempt < _ATTEMPTS:
        return Cursor(state=state.digest, attempt=last.attempt + 1)
    return _why_none(statuses, state.in_words)


def _why_none(statuses: set[dg.DagsterRunStatus], what: str) -> str:
    if dg.DagsterRunStatus.SUCCESS in statuses:
        return f"nothing new: {what} are measured"
    if statuses - _ENDED_IN_VAIN:
        return f"a run measures {what}"
    if dg.DagsterRunStatus.CANCELED in statuses:
        return f"the run for {what} was canceled: run {MEASURE_QUALITY} by hand"
    return f"gave up after {_ATTEMPTS} failed runs for {what}: run {MEASURE_QUALITY} by hand"


def _decode(cursor: str | None) -> Cursor:
    """The cursor; one that cannot be read is forgotten: asking again for a run that was starts none."""
    try:
        return msgspec.json.decode(cursor, type=Cursor) if cursor else Cursor()
    except msgspec.DecodeError:
        return Cursor()
