"""Failed runs: what they are called, what in them failed, and what they did not make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg
import msgspec
from dagster import AssetKey, DagsterEventType

from offer_assets.event_log import LoggedEvent
from offer_assets.wording import error_line, failure_line
from resources.redaction import without_secrets

_LONGEST_SELECTION = 100

_OF_A_FAILED_RUN = {
    DagsterEventType.ASSET_MATERIALIZATION,
    DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
    DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED,
    DagsterEventType.ASSET_CHECK_EVALUATION,
    DagsterEventType.STEP_FAILURE,
}
_BLOCKED = "DagsterAssetCheckFailedError"
"""What Dagster raises in the step of a blocking check that did not pass."""
_PARTITION_TAG = "dagster/partition"
_RANGE_TAGS = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
_IMPLICIT_JOB = "__ASSET_JOB"


Piece = tuple[str, str]
"""An asset, and a partition of it; empty where it has none."""


class Unmade(msgspec.Struct, frozen=True, array_like=True):
    """What a failed run was to make and did not: once it is there, whoever made it, the failure is over."""

    at: float
    """Unix time of the failure."""
    pieces: list[Piece]


class FailedSteps(msgspec.Struct, frozen=True, kw_only=True):
    """What failed in a run."""

    lines: list[str] = []
    """A line of every failed step that no check explains."""
    explained: list[str] = []
    """A line of every failed step that is a check that did not pass or raised."""
    assets: list[AssetKey] = []
    """Assets of the failed steps; of the whole run where none failed."""
    raised: dict[dg.AssetCheckKey, tuple[float, str]] = {}
    """Checks that raised, when, and how."""
    made: dict[Piece, float] = {}
    """What was made all the same, and when."""
    unmade: list[Piece] = []
    """What was to be made and was not; empty for a run of several days, which only another such run mends."""

    @classmethod
    def of(cls, instance: dg.DagsterInstance, run_id: str) -> FailedSteps:
        """Those of a run; none where its log is gone or cannot be read."""
        try:
            records = instance.get_records_for_run(run_id, of_type=_OF_A_FAILED_RUN).records
        except Exception:  # one row that cannot be read: that the run failed is known without it
            return cls()
        failures, assets = dict[str, Any](), dict[str, list[AssetKey]]()
        checks, evaluated = dict[str, list[dg.AssetCheckKey]](), set[dg.AssetCheckKey]()
        planned, made, of_range = list[Piece](), dict[Piece, float](), False
        for record in records:
            event = record.event_log_entry.get_dagster_event()
            step = event.step_key or ""
            if event.event_type == DagsterEventType.STEP_FAILURE:
                failures[step] = (record.event_log_entry.timestamp, event.step_failure_data)
            elif event.event_type == DagsterEventType.ASSET_CHECK_EVALUATION:
                evaluated.add(event.asset_check_evaluation_data.asset_check_key)
            elif event.event_type == DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED:
                checks.setdefault(step, []).append(event.asset_check_planned_data.asset_check_key)
            elif event.event_type == DagsterEventType.ASSET_MATERIALIZATION:
                made[_piece(event.asset_key, event.partition)] = record.event_log_entry.timestamp
            elif event.asset_key is not None:
                plan = event.asset_materialization_planned_data
                planned.append(_piece(event.asset_key, plan.partition))
                of_range = of_range or plan.partitions_subset is not None
                assets.setdefault(step, []).append(event.asset_key)
        lines, explained = list[str](), list[str]()
        raised = dict[dg.AssetCheckKey, tuple[float, str]]()
        for step, (at, failure) in failures.items():
            missing = [key for key in checks.get(step, []) if key not in evaluated]
            line = f"{step}: {failure_line(failure)}"
            if step not in assets and missing:
                raised |= {key: (at, failure_line(failure)) for key in missing}
                explained.append(line)
            elif failure.error is not None and failure.error.cls_name == _BLOCKED:
                explained.append(line)
            else:
                lines.append(line)
        of_failed = [key for step in failures for key in assets.get(step, [])]
        return cls(
            lines=lines,
            explained=explained,
            assets=list(dict.fromkeys(of_failed or (key for keys in assets.values() for key in keys))),
            raised=raised,
            made=made,
            unmade=[] if of_range else [piece for piece in planned if piece not in made],
        )


def made_in(instance: dg.DagsterInstance, run_id: str) -> dict[Piece, float]:
    """What a run made, and when; nothing where its log is gone or cannot be read."""
    return FailedSteps.of(instance, run_id).made


def take_out(made: Mapping[Piece, float], unmade: dict[str, Unmade]) -> list[str]:
    """Take what was made out of what is missing; returns the incidents for which nothing is any more."""
    over = list[str]()
    for incident, missing in list(unmade.items()):
        left = [piece for piece in missing.pieces if made.get(piece, 0.0) <= missing.at]
        unmade[incident] = Unmade(missing.at, left)
        if not left:
            del unmade[incident]
            over.append(incident)
    return over


def partition_of(run: dg.DagsterRun) -> str:
    """Partition of a run, the newest one of a range; empty if it has none."""
    return run.tags.get(_PARTITION_TAG) or run.tags.get(_RANGE_TAGS[1], "")


def run_name(run: dg.DagsterRun) -> str:
    """The job, or the assets where they were materialized without one."""
    if not run.job_name.startswith(_IMPLICIT_JOB):
        return run.job_name
    assets = sorted(key.to_user_string() for key in run.asset_selection or ())
    checks = sorted(key.to_user_string() for key in (run.asset_check_selection or ()) if not assets)
    names = "+".join(assets or checks)
    if len(names) <= _LONGEST_SELECTION:
        return names or run.job_name
    return f"{names[:_LONGEST_SELECTION]}…(of {len(assets or checks)})"


def run_incident(run: dg.DagsterRun) -> str:
    """Runs of the same thing for the same partition are one incident, however often it is tried."""
    start, end = (run.tags.get(tag, "") for tag in _RANGE_TAGS)
    partition = run.tags.get(_PARTITION_TAG) or "..".join(filter(None, dict.fromkeys((start, end))))
    return ":".join(filter(None, ("run", run_name(run), partition)))


def decode_unmade(bookmark: str | None) -> dict[str, Unmade]:
    """By incident, as it was kept; what cannot be read is forgotten."""
    try:
        return msgspec.json.decode(bookmark, type=dict[str, Unmade]) if bookmark else {}
    except msgspec.DecodeError:
        return {}


def run_error(event: LoggedEvent) -> str:
    """Why a run failed in which no step did: its process was killed, or never came up."""
    logged = event.entry.get_dagster_event()
    error = logged.job_failure_data.error if logged.event_specific_data is not None else None
    return (
        error_line(error) if error is not None else without_secrets(logged.message or "no error was reported")
    )


def _piece(asset: AssetKey, partition: str | None) -> Piece:
    return asset.to_user_string(), partition or ""
