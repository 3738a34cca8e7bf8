"""Command line of ``ml``: every stage by hand, bulk classification, server and jobs, the demo feed."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ml.artifacts import ArtifactRef
from ml.errors import EXIT_INPUT_ERROR, InputError
from ml.progress import Listener, Progress
from ml.runner import StageSpec, run_rank, run_stage
from ml.stages import STAGES, Stage

# Threads that wait for each other must sleep, not spin: on a machine that is busy with something else, two
# spinning torch threads fell from 70 to 6 offers/s. OpenMP reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        if options_error_file := getattr(options, "error_file", None):
            Path(options_error_file).write_text(str(error), encoding="utf-8")
        return EXIT_INPUT_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ml", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for stage in STAGES.values():
        _add_stage(commands, stage)
    _add_program(
        commands, "classify", "ml.serving.classify", "Assign a category to every offer of a feed file."
    )
    _add_program(
        commands,
        "explain",
        "ml.explanation.command",
        "Say which words and labelled offers led to a category.",
    )
    _add_program(
        commands, "serve", "ml.serving.server", "Answer /ping and /invocations with a compiled model."
    )
    _add_program(commands, "train", "ml.training_job", "Run the stage that lies in /opt/ml, in a container.")
    _add_rank(commands)
    _add_program(
        commands,
        "route",
        "ml.serving.router",
        "One port for several compiled models, by weight.",
    )
    _add_program(commands, "demo-feed", "ml.demo.feed", "Write days of the demo feed, and its taxonomies.")
    _add_program(
        commands, "device-report", "ml.serving.device_measurement", "Measure a compiled model on this host."
    )
    return parser


def _add_program(commands: Any, name: str, module: str, summary: str) -> None:
    """A command whose module has its own ``main(arguments)``; imported only when it is called."""

    def run(options: argparse.Namespace) -> None:
        from importlib import import_module

        import_module(module).main(options.arguments)

    command = commands.add_parser(name, help=summary, add_help=False, prefix_chars="\0")
    command.add_argument("arguments", nargs=argparse.REMAINDER)
    command.set_defaults(command=run)


def _add_rank(commands: Any) -> None:
    """What a stage starts beside itself where several GPUs share its work; not for use by hand."""
    command = commands.add_parser("rank", help="Share the work of a stage; started by the stage itself.")
    command.add_argument("--spec", type=Path, required=True, help="JSON file with the stage's spec")
    command.add_argument("--checkpoints", type=Path, required=True, help="folder of the stage's checkpoints")
    command.add_argument("--error-file", type=Path, required=True, help="where to write what was wrong")
    command.set_defaults(command=_run_rank)


def _add_stage(commands: Any, stage: Stage) -> None:
    command = commands.add_parser(
        stage.name,
        help=stage.summary,
        description=stage.summary,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "--spec", type=Path, help="JSON file with inputs, parameters and places; instead of the rest"
    )
    command.add_argument("--error-file", type=Path, help="where to write the line that says what was wrong")
    command.add_argument("--output", type=Path, help="folder that will hold the artifact")
    command.add_argument("--workspace", type=Path, help="folder for checkpoints (default: OUTPUT.work)")
    for name in (*stage.inputs, *stage.optional_inputs):
        command.add_argument(_flag(name), metavar="DIR", help=f"artifact: {name}", dest=f"input:{name}")
    for name in (*stage.partitioned_inputs, *stage.optional_partitioned_inputs):
        command.add_argument(
            _flag(name),
            metavar="DIR",
            nargs="+",
            help=f"artifacts: {name}, one per partition",
            dest=f"inputs:{name}",
        )
    for field in msgspec.structs.fields(stage.parameters):
        has_default = field.default is not msgspec.NODEFAULT  # a list or dict has a factory instead
        command.add_argument(
            _flag(field.name),
            dest=f"parameter:{field.name}",
            metavar=field.name.upper(),
            help=_description(field.type) or field.name.replace("_", " "),
            default=field.default if has_default else None,
        )
    command.set_defaults(command=lambda options: _run_stage(stage, options))


def _run_stage(stage: Stage, options: argparse.Namespace) -> None:
    spec = _read_spec(options.spec) if options.spec else _spec_from_flags(stage, options)
    if spec.stage != stage.name:
        raise InputError(f"{options.spec} is for stage {spec.stage}, not {stage.name}")
    if "DAGSTER_PIPES_CONTEXT" in os.environ:
        _run_under_pipes(spec)
    else:
        artifact = run_stage(spec)
        if artifact is not None:
            print(artifact.uri)


def _run_rank(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.spec.parent) as scratch:
        run_rank(_read_spec(options.spec), options.checkpoints, Path(scratch))


def _run_under_pipes(spec: StageSpec) -> ArtifactRef | None:
    """Progress goes to the orchestrator that started this process, by its own protocol."""
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as pipes:
        listener: Listener = pipes.log.info
        return run_stage(spec, Progress(spec.stage, listener))


def _read_spec(path: Path) -> StageSpec:
    try:
        return msgspec.json.decode(path.read_bytes(), type=StageSpec)
    except FileNotFoundError:
        raise InputError(f"--spec {path}: no such file") from None
    except msgspec.DecodeError as error:
        raise InputError(f"--spec {path}: {error}") from None


def _spec_from_flags(stage: Stage, options: argparse.Namespace) -> StageSpec:
    if options.output is None:
        raise InputError(f"{stage.name} needs --output DIR (or --spec FILE)")
    given = vars(options)
    inputs = {name: given[f"input:{name}"] for name in (*stage.inputs, *stage.optional_inputs)}
    for name in (*stage.partitioned_inputs, *stage.optional_partitioned_inputs):
        inputs |= {f"{name}/{Path(folder).name}": folder for folder in given[f"inputs:{name}"] or ()}
    parameters: dict[str, Any] = {}
    for field in msgspec.structs.fields(stage.parameters):
        value = given[f"parameter:{field.name}"]
        if value is not None:
            parameters[field.name] = _typed(field.name, value, field.type)
    return StageSpec(
        stage=stage.name,
        inputs={name: folder for name, folder in inputs.items() if folder is not None},
        parameters=parameters,
        output=str(options.output),
        workspace=str(options.workspace or options.output.with_name(options.output.name + ".work")),
    )


def _typed(name: str, value: Any, wanted: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        if typing.get_origin(_plain(wanted)) in (list, dict):
            return msgspec.json.decode(value)
        return msgspec.to_builtins(msgspec.convert(value, wanted, strict=False))
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise InputError(f"{_flag(name)} {value}: {error}") from None


def _plain(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _description(annotation: Any) -> str | None:
    for meta in getattr(annotation, "__metadata__", ()):
        if isinstance(meta, msgspec.Meta) and meta.description:
            return meta.description.replace("%", "%%")
    return None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
