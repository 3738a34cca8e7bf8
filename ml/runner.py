"""Runs one stage: find or make the artifact, survive a kill, publish in one step.

While a stage works, everything it writes lies in its *workspace*. Checkpoints there outlive a
killed process; a lock keeps a second process from doing the same work at the same time. Only the
finished, sealed folder is moved to its place.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ml.artifacts import ArtifactRef, artifact_key, read_manifest, reference, verify, write_manifest
from ml.errors import InputError
from ml.progress import Progress, Silence
from ml.ranks import end_with_leader, leading
from ml.stages import Parameters, Stage, stage_named
from ml.world import World, world_from_environment


class StageSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``python -m ml <stage> --spec`` reads: one stage, with its inputs and its place."""

    stage: str
    inputs: dict[str, str]
    """Folder of each input artifact, by input name (``name/partition`` for partitioned inputs)."""
    parameters: dict[str, Any]
    output: str
    """Folder that will hold the artifact."""
    workspace: str
    """Folder for work in progress, on the same file system as ``output``."""
    checkpoints: str = ""
    """Folder whose content outlives the workspace, perhaps on another file system: whoever names it keeps it
    when the artifact is published. Empty: in the workspace."""
    at_hand: dict[str, str] = {}
    """What to read in place of a parameter's value, by parameter: a local copy of what it names. Key and
    manifest speak of the value itself."""


class StageContext:
    """What a stage function gets to work with."""

    def __init__(
        self,
        inputs: Mapping[str, Path],
        output: Path,
        checkpoints: Path,
        progress: Progress,
        *,
        is_first: bool = True,
    ) -> None:
        self._inputs = dict(inputs)
        self.output = output
        """Empty folder; what lies here when the function returns becomes the artifact."""
        self.checkpoints = checkpoints
        """Folder whose content survives a kill, and is of no use once the artifact is published."""
        self.scratch = output.parent / "scratch"
        """Place for a folder of what a kill may take (tables that do not fit into memory)."""
        self.progress = progress
        self.is_first = is_first
        """Whether this process writes output and checkpoints; others that share the work need not."""

    def input(self, name: str) -> Path:
        """Folder of the input artifact ``name``."""
        return self._inputs[name]

    def optional_input(self, name: str) -> Path | None:
        """Folder of the input artifact ``name``, if it was given."""
        return self._inputs.get(name)

    def partitions(self, name: str) -> dict[str, Path]:
        """Folders of the partitioned input ``name``, by partition, in order."""
        prefix = name + "/"
        return {
            key.removeprefix(prefix): self._inputs[key]
            for key in sorted(self._inputs)
            if key.startswith(prefix)
        }


def parameters_of(stage: Stage, given: Mapping[str, Any]) -> Parameters:
    """Typed parameters of ``stage``.

    Raises:
        InputError: a parameter is unknown, missing or of the wrong type.
    """
    try:
        return msgspec.convert(dict(given), stage.parameters)
    except msgspec.ValidationError as error:
        raise InputError(f"parameters of {stage.name}: {error}") from None


def key_of(stage: Stage, parameters: Parameters, input_digests: Mapping[str, str]) -> str:
    """Key of the artifact that ``stage`` makes of these inputs and parameters."""
    return artifact_key(stage.name, stage.version, relevant_parameters(stage, parameters), input_digests)


def run_stage(spec: StageSpec, progress: Progress | None = None) -> ArtifactRef | None:
    """Make the artifact that ``spec`` describes, or find it made.

    Returns:
        The artifact; None on a machine that shares the work and is not the first, where nothing is published.

    Raises:
        InputError: inputs, parameters or the place of the output are wrong.
        RankEnded: one of the processes that share the work is gone.
    """
    stage = stage_named(spec.stage)
    parameters = parameters_of(stage, spec.parameters)
    inputs = {name: Path(folder) for name, folder in spec.inputs.items()}
    _check_input_names(stage, inputs)
    digests = {name: read_manifest(folder).digest for name, folder in inputs.items()}
    key = key_of(stage, parameters, digests)
    output, workspace = Path(spec.output), Path(spec.workspace)
    kept = Path(spec.checkpoints) if spec.checkpoints else workspace
    progress = progress or Progress(stage.name)

    with _only_process_in(workspace, progress):
        if output.exists():
            _check_is_same(output, key)
            shutil.rmtree(workspace, ignore_errors=True)
            progress.say(f"unchanged, found at {output}")
            return reference(output)
        for name, folder in inputs.items():
            verify(folder, digest=digests[name])
        _forget_other_work(kept, key)
        unfinished, checkpoints = workspace / "output", kept / "checkpoints"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        checkpoints.mkdir(exist_ok=True)
        started_at = time.monotonic()
        with _processes(spec, parameters, checkpoints, progress) as world:
            metrics = stage.function()(
                StageContext(
                    inputs,
                    unfinished,
                    checkpoints,
                    progress if world.is_first else Silence(stage.name),
                    is_first=world.is_first,
                ),
                msgspec.structs.replace(parameters, **spec.at_hand),
            )
        if not world.is_first:
            shutil.rmtree(workspace, ignore_errors=True)
            return None
        write_manifest(
            unfinished,
            kind=stage.name,
            key=key,
            inputs=digests,
            code_version=stage.version,
            code_revision=code_revision(),
            parameters=relevant_parameters(stage, parameters),
            metrics=metrics,
            seconds=time.monotonic() - started_at,
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(output)
        shutil.rmtree(workspace, ignore_errors=True)
    return reference(output)


def run_rank(spec: StageSpec, checkpoints: Path, scratch: Path) -> None:
    """Share the work of a stage that another process of this machine runs, and end with it.

    Args:
        spec: What that process runs; it has checked the inputs.
        checkpoints: Its folder of them.
        scratch: Empty folder for what this process need not have written.

    Raises:
        InputError: inputs or parameters are wrong.
    """
    from ml.learning import distributed

    end_with_leader()
    stage = stage_named(spec.stage)
    world = world_from_environment()
    distributed.join(world)
    inputs = {name: Path(folder) for name, folder in spec.inputs.items()}
    context = StageContext(inputs, scratch, checkpoints, Silence(stage.name), is_first=world.is_first)
    parameters = parameters_of(stage, spec.parameters)
    stage.function()(context, msgspec.structs.replace(parameters, **spec.at_hand))
    distributed.leave()


@contextmanager
def _processes(
    spec: StageSpec, parameters: Parameters, checkpoints: Path, progress: Progress
) -> Iterator[World]:
    """The processes that share the work of the stage, seen from this one; mostly it is alone."""
    devices: int | None = getattr(parameters, "devices", None)
    if devices is None:
        yield World()
        return
    given = msgspec.structs.replace(spec, parameters=msgspec.to_builtins(parameters))
    folder = Path(spec.workspace) / "ranks"
    with leading(msgspec.json.encode(given), checkpoints, folder, devices, progress) as world:
        yield world


def code_revision() -> str | None:
    """Commit of the checkout that this code runs from, or ``CODE_REVISION``, or None."""
    if revision := os.environ.get("CODE_REVISION"):
        return revision
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


@contextmanager
def _only_process_in(workspace: Path, progress: Progress) -> Iterator[None]:
    """Hold the workspace's lock; it is released by the system however the process ends."""
    workspace.mkdir(parents=True, exist_ok=True)
    lock_path = workspace.parent / (workspace.name + ".lock")
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say("another process is making the same artifact, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
            workspace.mkdir(parents=True, exist_ok=True)
        yield


def _forget_other_work(kept: Path, key: str) -> None:
    """Checkpoints are of use only to a run with the same inputs and parameters."""
    kept.mkdir(parents=True, exist_ok=True)
    mark = kept / "key"
    if not mark.exists() or mark.read_text(encoding="utf-8") != key:
        shutil.rmtree(kept / "checkpoints", ignore_errors=True)
        mark.write_text(key, encoding="utf-8")


def relevant_parameters(stage: Stage, parameters: Parameters) -> dict[str, Any]:
    """Parameters that decide what comes out. The others may hold credentials (addresses of files, say)."""
    return {
        field.name: msgspec.to_builtins(getattr(parameters, field.name))
        for field in msgspec.structs.fields(stage.parameters)
        if not _is_operational(field.type)
    }


def _is_operational(annotation: Any) -> bool:
    metas = getattr(annotation, "__metadata__", ())
    return any(isinstance(meta, msgspec.Meta) and (meta.extra or {}).get("operational") for meta in metas)


def _check_input_names(stage: Stage, inputs: Mapping[str, Path]) -> None:
    known = {*stage.inputs, *stage.optional_inputs}
    may_be_partitioned = {*stage.partitioned_inputs, *stage.optional_partitioned_inputs}
    given = {name for name in inputs if name.split("/")[0] not in may_be_partitioned}
    partitioned = {name.split("/")[0] for name in inputs} & set(stage.partitioned_inputs)
    missing = [name for name in stage.inputs if name not in given]
    missing += [name for name in stage.partitioned_inputs if name not in partitioned]
    if missing:
        raise InputError(f"{stage.name} needs {', '.join(missing)} as input")
    if unknown := sorted(given - known):
        raise InputError(
            f"{stage.name} has no input {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )


def _check_is_same(output: Path, key: str) -> None:
    found = read_manifest(output)
    if found.key != key:
        raise InputError(
            f"{output} holds an artifact made of other inputs or parameters (key {found.key}, this one "
            f"would be {key}); artifacts are never overwritten: choose another --output"
        )
