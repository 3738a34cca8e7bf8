"""Failed runs: what they are called, and what in them failed."""

from __future__ import annotations

from typing import Any

import dagster as dg
import msgspec
from dagster import AssetKey, DagsterEventType

from offer_assets.event_log import LoggedEvent
from offer_assets.wording import error_line, failure_line
from resources.redaction import without_secrets

_LONGEST_SELECTION = 100

_OF_A_FAILED_RUN = {
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


class FailedSteps(msgspec.Struct, frozen=True, kw_only=True):
    """What failed in a run."""

    lines: list[str] = []
    """A line of every failed step that no check explains."""
    assets: list[AssetKey] = []
    """Assets of the failed steps; of the whole run where none failed."""
    raised: dict[dg.AssetCheckKey, tuple[float, str]] = {}
    """Checks that raised, when, and how."""
    are_explained: bool = False
    """Whether every failed step is a check that did not pass or raised."""

    @classmethod
    def of(cls, instance: dg.DagsterInstance, run_id: str) -> FailedSteps:
        """Those of a run; none where its log is gone or cannot be read."""
        try:
            records = instance.get_records_for_run(run_id, of_type=_OF_A_FAILED_RUN).records
        except Exception:  # one row that cannot be read: that the run failed is known without it
            return cls()
        failures, assets = dict[str, Any](), dict[str, list[AssetKey]]()
        checks, evaluated = dict[str, list[dg.AssetCheckKey]](), set[dg.AssetCheckKey]()
        for record in records:
            event = record.event_log_entry.get_dagster_event()
            step = event.step_key or ""
            if event.event_type == DagsterEventType.STEP_FAILURE:
                failures[step] = (record.event_log_entry.timestamp, event.step_failure_data)
            elif event.event_type == DagsterEventType.ASSET_CHECK_EVALUATION:
                evaluated.add(event.asset_check_evaluation_data.asset_check_key)
            elif event.event_type == DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED:
                checks.setdefault(step, []).append(event.asset_check_planned_data.asset_check_key)
            elif event.asset_key is not None:
                assets.setdefault(step, []).append(event.asset_key)
        lines, raised = list[str](), dict[dg.AssetCheckKey, tuple[float, str]]()
        for step, (at, failure) in failures.items():
            missing = [key for key in checks.get(step, []) if key not in evaluated]
            if step not in assets and missing:
                raised |= {key: (at, failure_line(failure)) for key in missing}
            elif failure.error is None or failure.error.cls_name != _BLOCKED:
                lines.append(f"{step}: {failure_line(failure)}")
        of_failed = [key for step in failures for key in assets.get(step, [])]
        return cls(
            lines=lines,
            assets=list(dict.fromkeys(of_failed or (key for keys in assets.values() for key in keys))),
            raised=raised,
            are_explained=bool(failures) and not lines,
        )


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


def run_note(run: dg.DagsterRun | None) -> str:
    """Which run it was; a check may also be reported from outside of runs."""
    if run is None:
        return ""
    return f"Run {run.run_id[:8]} of {run_name(run)} (/runs/{run.run_id})."


def run_error(event: LoggedEvent) -> str:
    """Why a run failed in which no step did: its process was killed, or never came up."""
    logged = event.entry.get_dagster_event()
    error = logged.job_failure_data.error if logged.event_specific_data is not None else None
    return (
        error_line(error) if error is not None else without_secrets(logged.message or "no error was reported")
    )
