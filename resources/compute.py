"""The door to computing power: have a stage make its artifact, here or elsewhere.

Light stages run in the calling process. Heavy ones are programs of their own (``python -m ml
<stage> --spec …``), so that they can run elsewhere, and so that the orchestrator never imports what
they need.
"""

import os
import subprocess
import sys
import tempfile
import threading
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import dagster as dg
import msgspec
from typing_extensions import override

import ml
from ml.artifacts import ArtifactRef, Manifest
from ml.errors import InputError
from ml.progress import Progress
from ml.ranks import how_it_ended
from ml.runner import StageSpec, key_of, run_stage
from ml.stages import Parameters, Stage, stage_named
from resources.artifact_store import ArtifactStore
from resources.atomic_files import only_one, write_atomically
from resources.failures import input_errors_fail_plainly

_CODE_ROOT = Path(ml.__file__).parent.parent
_SECONDS_TO_END = 20.0
_LINES_SHOWN = 15

_BESIDE_TRAINING = frozenset({"catalogued_offers", "drift_reference", "drift_report", "live_quality"})
"""Heavy stages that need not wait for others: new offers are catalogued and watched while a model trains."""

AnyContext = dg.AssetExecutionContext | dg.AssetCheckExecutionContext | dg.OpExecutionContext
StageInputs = Mapping[str, ArtifactRef | Mapping[str, ArtifactRef]]
"""Input artifacts by name; those of a partitioned input by partition."""


class StageResult(msgspec.Struct, frozen=True):
    """The artifact of a stage, and whether it was there already."""

    ref: ArtifactRef
    reused: bool
    manifest: Manifest


class Compute(dg.ConfigurableResource[Any], ABC):
    """Where stages run. What is known of an artifact comes from the store, wherever that is."""

    # Dagster reads this annotation as it stands: no postponed annotations in this module.
    store: dg.ResourceDependency[ArtifactStore]

    @abstractmethod
    def _make(self, context: AnyContext, stage: Stage, key: str, work: "StageWork") -> None:
        """Make an artifact that is not there yet; afterwards the store has it.

        Raises:
            InputError: inputs or parameters are wrong.
            dg.Failure: the stage ended otherwise.
        """

    @input_errors_fail_plainly()
    def run(
        self, context: AnyContext, stage_name: str, inputs: StageInputs, parameters: Parameters
    ) -> StageResult:
        """Make the artifact of a stage, or find it made.

        Args:
            context: Of the asset, check or op on whose behalf the stage runs; its log gets the progress.
            stage_name: A stage of ``ml.stages``.
            inputs: The input artifacts.
            parameters: Of the type that the stage has.

        Raises:
            InputFailure: inputs or parameters are wrong; one line, never retried.
            dg.Failure: the stage ended otherwise (a crash, a kill). It may be retried, and continues
                from its last checkpoint.
        """
        if found := self.find(context, stage_name, inputs, parameters):
            return found
        stage, flat = stage_named(stage_name), _by_partition(inputs)
        key = _key(stage, flat, parameters)
        self._make(context, stage, key, StageWork(inputs=flat, parameters=parameters))
        made = self.store.find(stage.name, key)
        if made is None:
            raise InputError(f"{stage.name} {key} was made, but the store does not have it: run again")
        return self._result(made, reused=False)

    @input_errors_fail_plainly()
    def find(
        self, context: AnyContext, stage_name: str, inputs: StageInputs, parameters: Parameters
    ) -> StageResult | None:
        """What :meth:`run` would find made; None: it would have to make it."""
        stage = stage_named(stage_name)
        found = self.store.find(stage.name, _key(stage, _by_partition(inputs), parameters))
        if found is None:
            return None
        context.log.info(f"{stage.name} is unchanged: found {found.uri}")
        return self._result(found, reused=True)

    @input_errors_fail_plainly()
    def folder(self, ref: ArtifactRef) -> Path:
        """The local, verified folder of an artifact.

        Raises:
            InputFailure: the artifact is gone or damaged.
        """
        return self.store.fetch(ref)

    @input_errors_fail_plainly()
    def manifest(self, ref: ArtifactRef) -> Manifest:
        """The manifest of an artifact.

        Raises:
            InputFailure: the artifact is gone.
        """
        return self.store.manifest(ref)

    @input_errors_fail_plainly()
    def origin(self, ref: ArtifactRef, *kinds: str) -> ArtifactRef:
        """What an artifact was made of, some steps back.

        Args:
            ref: The artifact.
            kinds: Kinds of the inputs to follow from it (each is also the input's name):
                ``student_checkpoint``, ``training_sample`` leads from a compiled student to the sample.

        Raises:
            InputFailure: an artifact on the way is gone, or was not made of such an input.
        """
        for kind in kinds:
            digest = self.manifest(ref).inputs.get(kind)
            found = self.store.find_by_digest(kind, digest) if digest is not None else None
            if found is None:
                raise InputError(
                    f"the {kind} that {ref.kind} {ref.version} was made of is gone: train and deploy again"
                )
            ref = found
        return ref

    def _run_here(self, stage: Stage, key: str, work: "StageWork", run: Callable[[StageSpec], Any]) -> None:
        """Have ``run`` make the artifact from local copies of its inputs, and give it to the store."""
        spec = StageSpec(
            stage=stage.name,
            # The runner verifies its inputs: checking them here too would read every file twice.
            inputs={name: str(self.store.fetch(ref, check=False)) for name, ref in work.inputs.items()},
            parameters=msgspec.to_builtins(work.parameters),
            output=str(self.store.destination(stage.name, key)),
            workspace=str(self.store.workspace(stage.name, key)),
        )
        run(spec)
        self.store.adopt(stage.name, key)

    def _result(self, ref: ArtifactRef, *, reused: bool) -> StageResult:
        return StageResult(ref=ref, reused=reused, manifest=self.manifest(ref))


class StageWork(msgspec.Struct, frozen=True):
    """What a stage gets: its input artifacts, under the names that the runner knows, and parameters."""

    inputs: dict[str, ArtifactRef]
    parameters: Parameters


class LocalCompute(Compute):
    """This machine: light stages in this process, heavy ones in a subprocess."""

    program: str = "ml"
    """Module whose command line knows the heavy stages."""

    @override
    def _make(self, context: AnyContext, stage: Stage, key: str, work: StageWork) -> None:
        if stage.heavy:
            self._run_here(stage, key, work, lambda spec: self._run_heavy(context, spec))
        else:
            self._run_here(
                stage, key, work, lambda spec: run_stage(spec, Progress(stage.name, context.log.info))
            )

    def _run_heavy(self, context: AnyContext, spec: StageSpec) -> None:
        """Run a program; of those that use every core, one at a time on this machine.

        The lock is the kernel's: whatever is killed, it is free again. It is taken before that of the
        artifact, and who has only the latter (a stage run by hand) never asks for this one.
        """
        if spec.stage in _BESIDE_TRAINING:
            _run_program(context, self.program, spec)
            return
        lock = Path(spec.workspace).parents[2] / "heavy.lock"
        with only_one(lock, lambda: context.log.info(f"{spec.stage} is waiting for another heavy stage")):
            _run_program(context, self.program, spec)


def _by_partition(inputs: StageInputs) -> dict[str, ArtifactRef]:
    """Inputs under the names that the runner knows: ``name``, or ``name/partition``."""
    flat = {}
    for name, given in inputs.items():
        if isinstance(given, ArtifactRef):
            flat[name] = given
        else:
            flat |= {f"{name}/{partition}": ref for partition, ref in given.items()}
    return flat


def _key(stage: Stage, inputs: Mapping[str, ArtifactRef], parameters: Parameters) -> str:
    return key_of(stage, parameters, {name: ref.digest for name, ref in inputs.items()})


def _run_program(context: AnyContext, program: str, spec: StageSpec) -> None:
    """Run a stage as a program, through Dagster Pipes, with its stderr shown here and kept in a log.

    ``PipesSubprocessClient`` would do, but tells neither exit status nor last words of a program.
    """
    workspace = Path(spec.workspace)
    workspace.parent.mkdir(parents=True, exist_ok=True)
    spec_file = workspace.with_name(workspace.name + ".spec.json")
    log_file = workspace.with_name(workspace.name + ".log")
    ignore_preview_of_pipes()
    write_atomically(spec_file, msgspec.json.format(msgspec.json.encode(spec)))
    context.log.info(f"by hand: python -m {program} {spec.stage} --spec {spec_file} (log: {log_file})")
    with tempfile.TemporaryDirectory(prefix="offer-assets-") as scratch:
        error_file = Path(scratch, "error.txt")
        command = [sys.executable, "-m", program, spec.stage, "--spec", str(spec_file)]
        command += ["--error-file", str(error_file)]
        with dg.open_pipes_session(
            context=context.op_execution_context,
            context_injector=dg.PipesTempFileContextInjector(),
            message_reader=dg.PipesTempFileMessageReader(),
        ) as session:
            status, last_lines = _run_logged(command, session.get_bootstrap_env_vars(), log_file)
        if status == 0:
            return
        if error_file.exists():
            raise InputError(error_file.read_text(encoding="utf-8"))
    raise dg.Failure(
        f"{spec.stage} {how_it_ended(status)}; run it again and it continues from its last checkpoint. "
        f"Log: {log_file}",
        metadata={"log": dg.MetadataValue.path(log_file), "last lines": "\n".join(last_lines)},
    )


def ignore_preview_of_pipes() -> None:
    """Dagster warns, where a session opens, of a preview property that is its own."""
    warnings.filterwarnings("ignore", message=".*expected_writer_count", category=dg.PreviewWarning)


def _run_logged(command: list[str], environment: Mapping[str, str], log_file: Path) -> tuple[int, deque[str]]:
    """Run ``command``; returns its exit status and its last lines.

    The program stays in this process group, so that Ctrl-C and a kill of the group reach it too.
    One whose parent was killed alone ends at its next line, for nobody reads its stderr.
    """
    last_lines: deque[str] = deque(maxlen=_LINES_SHOWN)
    with log_file.open("ab", buffering=0) as log, _ended_with_us(command, environment) as process:
        assert process.stderr is not None
        reader = threading.Thread(target=_tee, args=(process.stderr, log, last_lines), daemon=True)
        reader.start()
        status = process.wait()
        reader.join(_SECONDS_TO_END)
    return status, last_lines


@contextmanager
def _ended_with_us(command: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command,
        cwd=_CODE_ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _tee(source: IO[bytes], log: IO[bytes], last_lines: deque[str]) -> None:
    for line in source:
        log.write(line)
        text = line.decode(errors="replace")
        last_lines.append(text.rstrip())
        sys.stderr.write(text)
