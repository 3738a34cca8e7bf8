"""On which machines the heavy stages run in ``aws``, and for how long at most.

Every stage has a default; a TOML file changes what it names (``jobs.example.toml`` explains it to people, and
a test reads it).
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ml.errors import InputError
from ml.stages import STAGES, Stage

_GPU = "ml.g6.xlarge"
"""One GPU that computes bf16: the smallest that trains the large encoders."""
_ONLY_HERE = {
    "catalogued_offers": "it asks the endpoint, and jobs have no network",
    "encoder_comparison": "it measures this machine, and jobs have no network to get encoders from",
    "serving_measurement": "it measures this machine; on another one, run python -m ml device-report",
}
"""Stages that cannot be jobs, and why."""


class JobMachines(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a stage runs, on what and for how long."""

    where: Literal["job", "here"] = "job"
    """A job of its own, or the machine of the orchestrator."""
    instance_type: Annotated[str, Meta(pattern=r"^ml\.[a-z0-9-]+\.[a-z0-9]+$")] = "ml.m7i.2xlarge"
    instance_count: Annotated[int, Meta(ge=1, le=64)] = 1
    spot: bool = True
    """On spare capacity, cheaper; interrupted, the job waits for some and continues from its checkpoints."""
    volume_gb: Annotated[int, Meta(ge=1, le=16_384)] = 100
    """Disk, for types that have none of their own."""
    max_hours: Annotated[float, Meta(gt=0, le=28 * 24)] = 4.0
    """Computing time after which the service ends the job. On spot, waiting may take as long again."""

    @property
    def max_instance_hours(self) -> float:
        """Upper bound of what is paid for."""
        return self.max_hours * self.instance_count if self.where == "job" else 0.0


JobPlan = Mapping[str, JobMachines]
"""By stage; of those that it lacks, the defaults of :class:`JobMachines` hold."""

_DEFAULTS: dict[str, JobMachines] = {
    "teacher_checkpoint": JobMachines(instance_type=_GPU, max_hours=24),
    "teacher_labels": JobMachines(instance_type=_GPU, max_hours=12),
    "student_checkpoint": JobMachines(instance_type=_GPU, max_hours=24),
    "encoder_comparison": JobMachines(where="here"),
    "hyperparameter_search": JobMachines(instance_type=_GPU, max_hours=24),
    "student_evaluation": JobMachines(instance_type=_GPU),
    "mistakes_explained": JobMachines(instance_type=_GPU),
    "migrated_labels": JobMachines(instance_type=_GPU),
    "taxonomy_change": JobMachines(instance_type=_GPU),
    "compiled_student": JobMachines(instance_type="ml.c7i.2xlarge", spot=False, max_hours=2),
    "serving_measurement": JobMachines(where="here"),
    "catalogued_offers": JobMachines(where="here"),
    "drift_report": JobMachines(spot=False, max_hours=2),
    "live_quality": JobMachines(spot=False, max_hours=2),
}


def read_plan(path: str) -> JobPlan:
    """Machines of every heavy stage, by the TOML file ``path``; empty: by default.

    Raises:
        InputError: one line that names the file, the stage and the key.
    """
    plan = {stage.name: _DEFAULTS.get(stage.name, JobMachines()) for stage in STAGES.values() if stage.heavy}
    if not path:
        return plan
    try:
        for name, table in _tables(Path(path)).items():
            plan[name] = _changed(name, table, plan)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return plan


def machines_for(plan: JobPlan, stage: Stage) -> JobMachines:
    """Where ``stage`` runs; light stages always run here."""
    return plan.get(stage.name, JobMachines()) if stage.heavy else JobMachines(where="here")


def plan_table(plan: JobPlan) -> str:
    """The plan for people: what would be started where, and what it may cost at most in instance hours."""
    rows = [("stage", "runs as", "instances", "at most")]
    for name, machines in plan.items():
        if machines.where == "here":
            rows.append((name, "program here", "", ""))
            continue
        instances = f"{machines.instance_count} x {machines.instance_type}"
        rows.append(
            (name, "spot job" if machines.spot else "job", instances, f"{machines.max_instance_hours:g} h")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    total = sum(machines.max_instance_hours for machines in plan.values())
    lines.append(
        "A run that makes everything, with no job that fails and is tried again, "
        f"pays for {total:g} instance hours at most."
    )
    return "\n".join(lines)


def _tables(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("there is no such file; jobs.example.toml is one to start from") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"is not TOML: {error}") from None
    if unknown := sorted(set(content) - {"stages"}):
        raise InputError(f"has the key {unknown[0]!r}; tables are called [stages.<stage>]")
    tables = content.get("stages", {})
    if not isinstance(tables, dict):
        raise InputError("stages must be tables: [stages.<stage>]")
    return tables


def _changed(name: str, table: Any, plan: JobPlan) -> JobMachines:
    place = f"stages.{name}"
    if name not in plan:
        light = name in STAGES
        raise InputError(
            f"{place} is a light stage, which runs here" if light else f"{place} {_nearest(name, plan)}"
        )
    if not isinstance(table, dict):
        raise InputError(f"{place} must be a table: [{place}]")
    known = JobMachines.__struct_fields__
    for key in table:
        if key not in known:
            raise InputError(f"{place} has the key {key!r}, which {_nearest(key, known)}")
    try:
        machines = msgspec.convert({**msgspec.to_builtins(plan[name]), **table}, JobMachines)
    except msgspec.ValidationError as error:
        problem, _, where = str(error).partition(" - at `$.")
        raise InputError(f"{place}: {where.rstrip('`')} is wrong: {problem}") from None
    if machines.where == "job" and name in _ONLY_HERE:
        raise InputError(f'{place}: where = "job" cannot be: {_ONLY_HERE[name]}')
    if machines.instance_count > 1 and not _shares_work(STAGES[name]):
        others = ", ".join(other.name for other in STAGES.values() if _shares_work(other))
        raise InputError(
            f"{place}: instance_count = {machines.instance_count}, but only {others} share their work among "
            "machines; take a larger instance_type"
        )
    return machines


def _shares_work(stage: Stage) -> bool:
    """Whether several processes can; others would do all of it on each machine."""
    return "devices" in stage.parameters.__struct_fields__


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
    return f"is unknown; did you mean {nearest}? ({', '.join(known)})"
