"""``python -m ml train``: a stage in a container, as SageMaker runs training jobs.

The container has no network: what goes in and out are folders under ``/opt/ml``.

- ``input/data/stage``: ``spec.json`` says what to do (:class:`JobSpec`), ``pipes-context.json`` is the
  context of the orchestrator's run, if it listens.
- ``input/data/artifacts``: the input artifacts; ``input/data/encoder``: a pretrained encoder, where needed.
- ``input/config/resourceconfig.json``: the machines of the job.
- ``checkpoints``: kept by the service, and there again when a job of the same artifact is started.
- ``model``: gets the finished artifact. ``output/failure``: gets the line that says why there is none.

Progress goes to stdout as messages of Dagster Pipes and to stderr as lines; the service keeps both as logs.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ml.artifacts import MANIFEST
from ml.errors import EXIT_INPUT_ERROR, InputError
from ml.progress import Listener, Progress
from ml.runner import StageSpec, run_stage

INPUT_ERROR = "InputError: "
"""Begins the failure of a job that no repetition mends."""
SPEC_FILE = "spec.json"
PIPES_CONTEXT_FILE = "pipes-context.json"
STAGE_CHANNEL, ARTIFACTS_CHANNEL, ENCODER_CHANNEL = "stage", "artifacts", "encoder"

_FAILURE_CHARACTERS = 900
"""The service tells 1,024 of them, with some of its own around."""
_MASTER_PORT = 29_500
_EXIT_FAILURE = 1
_EXIT_TERMINATED = 128 + signal.SIGTERM


class JobSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``spec.json``: what a job is to make, with places relative to its channels."""

    stage: str
    inputs: dict[str, str]
    """Folder of each input artifact in the channel ``artifacts``, by input name."""
    parameters: dict[str, Any]
    from_encoder_channel: list[str] = []
    """Parameters that name the encoder that lies in its channel."""


class Host(msgspec.Struct, frozen=True):
    """One machine of a job."""

    rank: int
    hosts: tuple[str, ...]
    interface: str = ""
    """Network interface between them; empty: whichever."""

    @property
    def environment(self) -> dict[str, str]:
        """What tells the training where the others are; nothing, where there are none."""
        if len(self.hosts) == 1:
            return {}
        names = {
            "MASTER_ADDR": self.hosts[0],
            "MASTER_PORT": str(_MASTER_PORT),
            "NODE_RANK": str(self.rank),
            "NNODES": str(len(self.hosts)),
        }
        if self.interface:
            names |= {"NCCL_SOCKET_IFNAME": self.interface, "GLOO_SOCKET_IFNAME": self.interface}
        return names


def main(arguments: Sequence[str] = ()) -> None:
    """Run the job that lies under ``SAGEMAKER_BASE_DIR`` (``/opt/ml``), and exit with its status."""
    if arguments:
        raise InputError(f"train takes no arguments, but was given {' '.join(arguments)}")
    signal.signal(signal.SIGTERM, _end)  # as the container's first process there is no default
    # A line is only a log line once it is written.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(run_job(Path(os.environ.get("SAGEMAKER_BASE_DIR", "/opt/ml"))))


def run_job(base: Path) -> int:
    """Run the job that lies in ``base``; returns the exit status of the container."""
    try:
        host = _host(base / "input" / "config" / "resourceconfig.json")
        os.environ.update(host.environment)
        channels = base / "input" / "data"
        spec = _job_spec(channels / STAGE_CHANNEL / SPEC_FILE)
        with _listener(channels / STAGE_CHANNEL / PIPES_CONTEXT_FILE, host) as listener:
            _make(spec, base, channels, host, Progress(spec.stage, listener))
    except InputError as error:
        _tell_failure(base, f"{INPUT_ERROR}{error}")
        return EXIT_INPUT_ERROR
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        _tell_failure(base, f"{type(error).__name__}: {error}")
        return _EXIT_FAILURE
    return 0


def _make(spec: JobSpec, base: Path, channels: Path, host: Host, progress: Progress) -> None:
    """Make the artifact beside, for ``model`` is uploaded whatever lies there."""
    with tempfile.TemporaryDirectory(prefix="stage-") as scratch:
        output = Path(scratch, "output")
        run_stage(
            StageSpec(
                stage=spec.stage,
                inputs={
                    name: str(_artifact(channels / ARTIFACTS_CHANNEL, folder))
                    for name, folder in spec.inputs.items()
                },
                parameters=spec.parameters,
                output=str(output),
                workspace=str(Path(scratch, "work")),
                checkpoints=str(base / "checkpoints"),
                at_hand={name: str(channels / ENCODER_CHANNEL) for name in spec.from_encoder_channel},
            ),
            progress,
        )
        if host.rank == 0:
            _publish(output, base / "model")


def _publish(output: Path, model: Path) -> None:
    """Move the artifact into ``model`` (a mount, which cannot be replaced), manifest last."""
    model.mkdir(parents=True, exist_ok=True)
    for entry in sorted(output.iterdir(), key=lambda entry: entry.name == MANIFEST):
        shutil.move(entry, model / entry.name)


def _artifact(channel: Path, folder: str) -> Path:
    """Where an input lies; whether the service repeats the manifest file's prefix is not documented."""
    found = next(iter(channel.glob(f"**/{folder}/{MANIFEST}")), None)
    if found is None:
        raise InputError(f"{channel} holds no artifact {folder}; it is gone from the store: make it again")
    return found.parent


def _job_spec(path: Path) -> JobSpec:
    try:
        return msgspec.json.decode(path.read_bytes(), type=JobSpec)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the job has to have a channel {STAGE_CHANNEL!r}") from None
    except msgspec.DecodeError as error:
        raise InputError(f"{path}: {error}; image and orchestrator are of different versions") from None


def _host(path: Path) -> Host:
    try:
        config = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return Host(rank=0, hosts=("localhost",))
    hosts = tuple(sorted(config["hosts"]))
    return Host(
        rank=hosts.index(config["current_host"]),
        hosts=hosts,
        interface=config.get("network_interface_name", ""),
    )


@contextmanager
def _listener(context_file: Path, host: Host) -> Iterator[Listener | None]:
    """Who hears of the progress: the orchestrator, of one machine, and if it listens at all.

    What is ended early says no goodbye: after an interruption the same job begins again, and goes on talking.
    """
    if host.rank > 0 or not context_file.exists():
        yield None
        return
    import dagster_pipes

    writer = dagster_pipes.PipesDefaultMessageWriter
    places = {
        dagster_pipes.DAGSTER_PIPES_CONTEXT_ENV_VAR: {"path": str(context_file)},
        dagster_pipes.DAGSTER_PIPES_MESSAGES_ENV_VAR: {writer.STDIO_KEY: writer.STDOUT},
    }
    pipes = dagster_pipes.open_dagster_pipes(
        params_loader=dagster_pipes.PipesMappingParamsLoader(
            {name: dagster_pipes.encode_param(place) for name, place in places.items()}
        )
    )
    try:
        yield pipes.log.info
    except Exception:
        pipes.close()
        raise
    pipes.close()


def _tell_failure(base: Path, line: str) -> None:
    line = " ".join(line.split())
    print(f"error: {line}", file=sys.stderr)
    if len(line) > _FAILURE_CHARACTERS:
        line = line[: _FAILURE_CHARACTERS - 1] + "…"
    failure = base / "output" / "failure"
    failure.parent.mkdir(parents=True, exist_ok=True)
    failure.write_text(line, encoding="utf-8")


def _end(*_: object) -> None:
    """Leave by way of all ``finally`` blocks, which end processes that were started."""
    sys.exit(_EXIT_TERMINATED)
