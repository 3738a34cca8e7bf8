"""Command line of the project: what the Makefile calls."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ml.errors import InputError
from resources.settings import Settings

_EXIT_INPUT_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m offer_assets", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(name, help=command.__doc__)
        subparser.set_defaults(command=command)
        if name == "dev":
            subparser.add_argument("--port", type=int, default=3000, help="port of the UI (default: 3000)")
    options = parser.parse_args(arguments)
    try:
        return int(options.command(Settings.from_environment(), options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_INPUT_ERROR


def _demo(settings: Settings, _options: argparse.Namespace) -> int:
    """Materialize the whole graph headless and start the endpoint."""
    from offer_assets.demo import run_demo

    return 0 if run_demo(settings) else 1


def _demo_drift(settings: Settings, _options: argparse.Namespace) -> int:
    """Add a drifted day to the demo feed and process it."""
    from offer_assets.demo import run_drifted_day

    return 0 if run_drifted_day(settings) else 1


def _dev(settings: Settings, options: argparse.Namespace) -> int:
    """Start the Dagster UI with its daemon."""
    from offer_assets.instance import instance_of_the_ui

    instance_of_the_ui(settings)
    workspace = Path(__file__).resolve().parent.parent / "workspace.yaml"
    command = [
        sys.executable,
        "-m",
        "dagster",
        "dev",
        "--workspace",
        str(workspace),
        "--port",
        str(options.port),
    ]
    os.execv(sys.executable, command)


def _stop(settings: Settings, _options: argparse.Namespace) -> int:
    """Stop the local endpoint."""
    from resources.environment import resources_for

    stopped = resources_for(settings)["endpoints"].stop()
    print("the endpoint was stopped" if stopped else "no endpoint was running")
    return 0


_COMMANDS = {"demo": _demo, "demo-drift": _demo_drift, "dev": _dev, "stop": _stop}


if __name__ == "__main__":
    sys.exit(main())
