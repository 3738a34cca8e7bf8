"""Runs jobs of the graph in this process and tells a terminal, asset by asset, how far they are."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
from dagster import DagsterEventType

from offer_assets.instance import process_tag
from offer_assets.wording import error_line, failure_line

_LOGGER = "terminal"


@dataclass
class MadeAsset:
    """One materialization of a headless run."""

    name: str
    partition: str | None
    seconds: float
    metadata: Mapping[str, Any]

    @property
    def was_made(self) -> bool:
        """False if the artifact was found unchanged."""
        return bool(self.metadata.get("made_in_this_run", True))


@dataclass
class FailedCheck:
    """One check that did not pass."""

    asset: str
    name: str
    severity: str
    description: str


@dataclass
class HeadlessRuns:
    """What a sequence of jobs made; grows with each :meth:`run`."""

    definitions: dg.Definitions
    instance: dg.DagsterInstance
    assets_in_all: int
    made: list[MadeAsset] = field(default_factory=list)
    passed_checks: int = 0
    failed_checks: list[FailedCheck] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def run(
        self,
        job_name: str,
        partition_key: str | None = None,
        run_config: Mapping[str, Any] | None = None,
    ) -> bool:
        """Run one job to its end; False if it failed.

        Args:
            job_name: A job of the definitions.
            partition_key: Partition to run, of a job that has them.
            run_config: In place of the job's own, section by section.
        """
        terminal = _Terminal(self, partition_key)
        job = self.definitions.resolve_job_def(job_name)
        _Terminal.current = terminal
        result = job.execute_in_process(
            instance=self.instance,
            partition_key=partition_key,
            run_config={**(job.run_config or {}), **(run_config or {}), "loggers": {_LOGGER: {}}},
            tags=process_tag(),
            raise_on_error=False,
        )
        for event in result.all_events:
            if event.event_type == DagsterEventType.ASSET_CHECK_EVALUATION:
                self._note_check(event.asset_check_evaluation_data)
        return result.success

    def of(self, asset: str) -> list[MadeAsset]:
        """Materializations of one asset, oldest first."""
        return [made for made in self.made if made.name == asset]

    def _note_check(self, evaluation: Any) -> None:
        if evaluation.passed:
            self.passed_checks += 1
            return
        self.failed_checks.append(
            FailedCheck(
                asset=evaluation.asset_key.to_user_string(),
                name=evaluation.check_name,
                severity=evaluation.severity.value,
                description=evaluation.description or "",
            )
        )


class _Terminal(logging.Handler):
    """Turns Dagster's events into one line per asset."""

    current: _Terminal

    def __init__(self, runs: HeadlessRuns, partition_key: str | None) -> None:
        super().__init__()
        self._runs = runs
        self._partition_key = partition_key
        self._started_at: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        event: dg.DagsterEvent | None = getattr(record, "dagster_meta", {}).get("dagster_event")
        if event is None:
            if record.levelno >= logging.WARNING and "Dependencies for step" not in record.getMessage():
                _say(f"    {record.getMessage().rsplit(' - ', 1)[-1]}")
        elif event.event_type == DagsterEventType.STEP_START and event.step_key is not None:
            self._started_at[event.step_key] = time.monotonic()
        elif event.event_type == DagsterEventType.ASSET_MATERIALIZATION:
            self._materialized(event)
        elif event.event_type == DagsterEventType.STEP_UP_FOR_RETRY:
            _say(f"        {event.step_key} is tried again: {error_line(event.step_retry_data.error)}")
        elif event.event_type == DagsterEventType.STEP_FAILURE:
            self._failed(event)
        elif event.event_type == DagsterEventType.ASSET_CHECK_EVALUATION:
            self._checked(event.asset_check_evaluation_data)

    def _materialized(self, event: dg.DagsterEvent) -> None:
        materialization = event.step_materialization_data.materialization
        metadata = {name: value.value for name, value in materialization.metadata.items()}
        made = MadeAsset(
            name=materialization.asset_key.to_user_string(),
            partition=materialization.partition,
            seconds=time.monotonic() - self._started_at.get(event.step_key or "", time.monotonic()),
            metadata=metadata,
        )
        self._runs.made.append(made)
        name = f"{made.name} [{made.partition}]" if made.partition else made.name
        rows = metadata.get("dagster/row_count")
        _say(
            f"[{len(self._runs.made):2d}/{self._runs.assets_in_all}] {name:<36} {made.seconds:7.1f} s  "
            f"{'made     ' if made.was_made else 'unchanged'}"
            + (f"  {rows:>9,} rows" if rows is not None else "")
        )

    def _checked(self, evaluation: Any) -> None:
        if not evaluation.passed:
            severity = evaluation.severity.value
            _say(f"        check {evaluation.check_name} failed ({severity}): {evaluation.description}")

    def _failed(self, event: dg.DagsterEvent) -> None:
        message = failure_line(event.step_failure_data)
        self._runs.errors.append(f"{event.step_key}: {message}")
        _say(f"        {event.step_key} failed: {message}")


@dg.logger(description="One line per asset, for a headless run at a terminal.")
def terminal_logger(_init_context: dg.InitLoggerContext) -> logging.Logger:
    """Logger of the run that :class:`HeadlessRuns` has under way."""
    logger = logging.Logger(_LOGGER)
    logger.addHandler(_Terminal.current)
    return logger


LOGGERS = {_LOGGER: terminal_logger}


def _say(line: str) -> None:
    print(line, file=sys.stdout, flush=True)
