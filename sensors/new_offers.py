"""Offers arrived: process their day."""

import hashlib
from collections.abc import Iterable

import dagster as dg
import msgspec
from dagster._core.storage.tags import RUN_KEY_TAG

from ml.artifacts import ArtifactRef, short_version
from ml.errors import InputError
from ml.stages import FeedFile
from offer_assets.jobs import INGEST_DAY, JOBS, PROCESS_DAY
from resources.artifact_store import ArtifactStore
from resources.compute import Compute
from resources.offer_feed import OfferFeed

_RUNS_PER_TICK = 10
"""A first look at a long feed starts its days in portions, oldest first."""

_ATTEMPTS = 3
"""Runs of one state of a day, before somebody has to look why they fail."""

_SUCCEEDED, _CANCELED, _FAILED = "succeeded", "canceled", "failed"


class RequestedDay(msgspec.Struct, frozen=True, array_like=True):
    """The last run that was asked for of a day."""

    state: str
    """Digest of the files that hold its offers; with the taxonomy, where that made the day be taken again."""
    job: str
    attempt: int = 1
    outcome: str = ""
    """How it ended for good; empty while that is not known."""

    def run_key(self, day: str) -> str:
        """Dagster starts one run per key, however often it is asked for."""
        return f"{self.job}:{day}:{self.state}:{self.attempt}"


class Cursor(msgspec.Struct, frozen=True):
    """What the sensor remembers from tick to tick."""

    days: dict[str, RequestedDay] = {}


@dg.sensor(
    name="new_offers",
    jobs=[job for job in JOBS if job.name in {INGEST_DAY, PROCESS_DAY}],
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Starts a day's run when the feed has files of it that no run has seen in this state, when a "
    f"run of it failed (at most {_ATTEMPTS} times), when there is an endpoint to catalogue it with, and when "
    "a newer taxonomy may know the categories for which offers of it were put into quarantine.",
)
def new_offers(
    context: dg.SensorEvaluationContext,
    offer_feed: OfferFeed,
    artifact_store: ArtifactStore,
    compute: Compute,
) -> dg.SensorResult:
    """One run per day, state of its files, job and attempt; the run key makes a repeat impossible."""
    change = artifact_store.read_pointer("taxonomy_change")
    if change is None:
        return dg.SensorResult(
            skip_reason="there is no taxonomy yet: the sensor taxonomy_changed adopts it first",
            cursor=context.cursor,
        )
    files = offer_feed.files()
    left_out = offer_feed.left_out_line(files)
    states = {day: _state_of(files_of_day) for day, files_of_day in offer_feed.files_by_day(files).items()}
    job = PROCESS_DAY if artifact_store.read_pointer("offer_endpoint") else INGEST_DAY
    known = _decode(context.cursor).days
    known = {day: requested for day, requested in known.items() if day in states}
    statuses = _statuses_of_open_runs(context.instance, known)
    known = {day: _with_outcome(requested, statuses.get(day, [])) for day, requested in known.items()}
    states = _with_taxonomy(states, known, _days_to_take_again(change, artifact_store, compute))

    wanted = {
        day: request
        for day, state in states.items()
        if (request := _next_request(known.get(day), state, job, day in statuses)) is not None
    }
    taken = dict(list(wanted.items())[:_RUNS_PER_TICK])
    cursor = msgspec.json.encode(Cursor({**known, **taken})).decode()
    if not taken:
        reason = "; ".join(filter(None, [_nothing_to_do(known), left_out]))
        return dg.SensorResult(skip_reason=reason, cursor=cursor)
    if left_out:
        context.log.warning(left_out)
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(run_key=request.run_key(day), job_name=request.job, partition_key=day)
            for day, request in taken.items()
        ],
        cursor=cursor,
    )


def _decode(cursor: str | None) -> Cursor:
    """The cursor; one that cannot be read is forgotten: asking again for a run that was starts none."""
    try:
        return msgspec.json.decode(cursor, type=Cursor) if cursor else Cursor()
    except msgspec.DecodeError:
        return Cursor()


def _state_of(files: list[FeedFile]) -> str:
    """Digest of the files that hold offers of a day."""
    fingerprints = sorted(f"{file.uri} {file.fingerprint}" for file in files)
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()[:16]


def _days_to_take_again(
    change: ArtifactRef, artifact_store: ArtifactStore, compute: Compute
) -> dict[str, str]:
    """Days with offers of a category unknown to an earlier taxonomy; each with the one in force."""
    in_force = compute.manifest(change).inputs["catalog_taxonomy"]
    days = {}
    for day, offers in artifact_store.list_pointers("offers").items():
        if not offers.metrics.get("unknown_category"):
            continue
        try:
            taken_with = compute.manifest(offers).inputs.get("catalog_taxonomy")
        except InputError:
            continue  # they are gone: what made the day once makes it again, not a newer taxonomy
        if taken_with != in_force:
            days[day] = short_version(in_force)
    return days


def _with_taxonomy(
    states: dict[str, str], known: dict[str, RequestedDay], to_take_again: dict[str, str]
) -> dict[str, str]:
    """States of the days, with the taxonomy for which a day is to be taken again, or was last.

    A day whose run is under way is left alone: that run may take it with the newer taxonomy already.
    """
    with_taxonomy = {}
    for day, state in states.items():
        last = known.get(day)
        same_files = last is not None and last.state.split("@")[0] == state
        if last is not None and same_files and (day not in to_take_again or not last.outcome):
            with_taxonomy[day] = last.state
        elif day in to_take_again:
            with_taxonomy[day] = f"{state}@{to_take_again[day]}"
        else:
            with_taxonomy[day] = state
    return with_taxonomy


def _statuses_of_open_runs(
    instance: dg.DagsterInstance, known: dict[str, RequestedDay]
) -> dict[str, list[dg.DagsterRunStatus]]:
    """Statuses of the runs whose end is not known yet, by day, in one query."""
    day_of = {requested.run_key(day): day for day, requested in known.items() if not requested.outcome}
    statuses: dict[str, list[dg.DagsterRunStatus]] = {}
    if day_of:
        for run in instance.get_runs(filters=dg.RunsFilter(tags={RUN_KEY_TAG: list(day_of)})):
            statuses.setdefault(day_of[run.tags[RUN_KEY_TAG]], []).append(run.status)
    return statuses


def _with_outcome(requested: RequestedDay, statuses: Iterable[dg.DagsterRunStatus]) -> RequestedDay:
    """With how it ended, if it did. Several runs share a key where Dagster or a person ran one again."""
    found = set(statuses)
    if requested.outcome or not found:
        return requested
    outcome = ""
    if dg.DagsterRunStatus.SUCCESS in found:
        outcome = _SUCCEEDED
    elif found == {dg.DagsterRunStatus.FAILURE}:
        outcome = _FAILED
    elif found <= {dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED}:
        outcome = _CANCELED
    return msgspec.structs.replace(requested, outcome=outcome)


def _next_request(last: RequestedDay | None, state: str, job: str, run_exists: bool) -> RequestedDay | None:
    """The run that a day needs now, or None."""
    if last is None or last.state != state:
        return RequestedDay(state, job)
    if not last.outcome:
        # One that was asked for and is not there was not launched; its key keeps it at one.
        return None if run_exists else last
    if job == PROCESS_DAY and last.job == INGEST_DAY:
        return RequestedDay(state, job)
    if last.outcome == _FAILED and last.attempt < _ATTEMPTS:
        return RequestedDay(state, last.job, last.attempt + 1)
    return None


def _nothing_to_do(known: dict[str, RequestedDay]) -> str:
    running = sum(not requested.outcome for requested in known.values())
    failed = [day for day, requested in known.items() if requested.outcome == _FAILED]
    parts = [f"nothing new: all {len(known)} days of the feed were started before"]
    if running:
        parts.append(f"{running} of them are under way")
    if failed:
        parts.append(f"gave up after {_ATTEMPTS} failed runs on {', '.join(failed)}: run them by hand")
    return "; ".join(parts)
