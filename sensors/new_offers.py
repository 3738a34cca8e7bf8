"""Offers arrived: process their day."""

import hashlib

import dagster as dg
import msgspec

from ml.stages import FeedFile
from offer_assets.jobs import INGEST_DAY, JOBS, PROCESS_DAY
from resources.artifact_store import ArtifactStore
from resources.offer_feed import OfferFeed

_RUNS_PER_TICK = 10
"""A first look at a long feed starts its days in portions, oldest first."""


@dg.sensor(
    name="new_offers",
    jobs=[job for job in JOBS if job.name in {INGEST_DAY, PROCESS_DAY}],
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Starts a day's run when the feed has files of it that no run has seen in this state.",
)
def new_offers(
    context: dg.SensorEvaluationContext, offer_feed: OfferFeed, artifact_store: ArtifactStore
) -> dg.SensorResult | dg.SkipReason:
    """One run per day and state of its files; the run key makes a repeat impossible."""
    seen: dict[str, str] = msgspec.json.decode(context.cursor) if context.cursor else {}
    states = {day: _state_of(files) for day, files in offer_feed.files_by_day().items()}
    changed = [day for day, state in states.items() if seen.get(day) != state]
    if not changed:
        return dg.SkipReason(f"nothing new: all {len(states)} days of the feed were started before")
    job = PROCESS_DAY if artifact_store.read_pointer("offer_endpoint") else INGEST_DAY
    taken = changed[:_RUNS_PER_TICK]
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(run_key=f"{job}:{day}:{states[day]}", job_name=job, partition_key=day)
            for day in taken
        ],
        cursor=msgspec.json.encode({**seen, **{day: states[day] for day in taken}}).decode(),
    )


def _state_of(files: list[FeedFile]) -> str:
    """Digest of the files that hold offers of a day."""
    fingerprints = sorted(f"{file.uri} {file.fingerprint}" for file in files)
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()[:16]
