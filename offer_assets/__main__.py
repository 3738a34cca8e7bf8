"""Command line of the project: what the Makefile calls."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        for add_options in _OPTIONS.get(name, ()):
            add_options(subparser)
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


def _demo_taxonomy(settings: Settings, _options: argparse.Namespace) -> int:
    """Put the next version of the demo feed's taxonomy into the watched folder."""
    from resources.environment import resources_for

    if not settings.is_demo:
        raise InputError("demo-taxonomy is for the demo feed; put releases of yours into CATALOG_TAXONOMY")
    written = resources_for(settings)["taxonomy_source"].add_next_version()
    print(f"written: {written}")
    print(
        f"Under `make dev`, taxonomy_changed follows it {settings.taxonomy_settle_seconds:.0f} s later; "
        "the job preview_taxonomy shows first what it changes."
    )
    return 0


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


def _versions(settings: Settings, _options: argparse.Namespace) -> int:
    """List the registered versions of the model, newest first."""
    from offer_assets.versions import versions_table

    print(versions_table(settings))
    return 0


def _history(settings: Settings, _options: argparse.Namespace) -> int:
    """List what went into production when, why and by whom, newest first."""
    from offer_assets.versions import history_table

    print(history_table(settings))
    return 0


def _alerts(settings: Settings, options: argparse.Namespace) -> int:
    """List what is wrong and was told, oldest first; look after the channels."""
    from offer_assets import alerts

    if options.send_test:
        alerts.send_test(settings, options.send_test)
    elif options.resolve:
        alerts.resolve(settings, options.resolve, by=_user())
    elif options.deliver:
        return 0 if alerts.deliver(settings) else 1
    elif options.channels:
        print(alerts.channels_text(settings))
    else:
        print(alerts.incidents_text(settings, all_of_them=options.all))
    return 0


def _approve(settings: Settings, options: argparse.Namespace) -> int:
    """Approve a version, so that it is served."""
    from offer_assets.versions import approve

    return 0 if approve(settings, **_given(options)) else 1


def _reject(settings: Settings, options: argparse.Namespace) -> int:
    """Reject a version, so that it is never served."""
    from offer_assets.versions import reject

    return 0 if reject(settings, **_given(options)) else 1


def _rollback(settings: Settings, options: argparse.Namespace) -> int:
    """Serve the version before the one in production again, and reject the latter."""
    from offer_assets.versions import roll_back

    return 0 if roll_back(settings, **_given(options)) else 1


def _deploy(settings: Settings, _options: argparse.Namespace) -> int:
    """Serve the version that is registered or was approved last, now."""
    from offer_assets.versions import deploy

    return 0 if deploy(settings) else 1


def _jobs(settings: Settings, _options: argparse.Namespace) -> int:
    """Show which heavy stages run as jobs in AWS, on what and at what cost at most; starts nothing."""
    from resources.job_plan import plan_table, read_plan

    print(plan_table(read_plan(settings.aws_jobs)))
    return 0


def _launch(settings: Settings, options: argparse.Namespace) -> int:
    """Start a job on a deployment through its UI, and wait for its outcome."""
    from offer_assets.launch import launch

    return 0 if launch(options.url or settings.ui_url, options.job, options.partition) else 1


def _iam(settings: Settings, options: argparse.Namespace) -> int:
    """Print a policy of deploy/ for the account that the settings name; nothing is applied."""
    from offer_assets.iam import render

    print(render(settings, options.document, options.repository))
    return 0


def _endpoint(settings: Settings, _options: argparse.Namespace) -> int:
    """Show what serves: variants, their shares, and what was seen of them."""
    from offer_assets.versions import endpoint_table

    print(endpoint_table(settings))
    return 0


def _shadow(settings: Settings, options: argparse.Namespace) -> int:
    """Let a version see copies of the requests; its answers go nowhere."""
    from offer_assets.versions import shadow

    return 0 if shadow(settings, **_given(options)) else 1


def _split(settings: Settings, options: argparse.Namespace) -> int:
    """Share the requests between versions (A/B), until the next deployment."""
    from offer_assets.versions import split

    return 0 if split(settings, **_given(options)) else 1


def _given(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "command"}


def _port_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=3000, help="port of the UI (default: 3000)")


def _version_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "version", help="number in the registry, or the beginning of the model version (see versions)"
    )


def _earlier_version_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "version", nargs="?", default="", help="as for approve (default: the one that served before)"
    )


def _shadow_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("version", nargs="?", default="", help="as for approve; one that passed the gate")
    parser.add_argument("--percent", type=float, default=10.0, help="of the requests (default: 10)")
    parser.add_argument("--end", action="store_true", help="send no more copies")
    parser.add_argument("--reason", default="", help="what it is to show; kept with the run")
    parser.add_argument("--by", default=_user(), help="who wants it (default: $USER); kept with the run")


def _shares_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shares",
        nargs="+",
        metavar="VERSION=WEIGHT",
        help="versions as for approve; the one in production has to be among them, and ends a split alone",
    )


def _user() -> str:
    """Who is at the terminal; empty where the system does not tell."""
    try:
        return os.environ.get("USER") or getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return ""


def _reason_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", required=True, help="why; kept in the registry")
    parser.add_argument("--by", default=_user(), help="who decides (default: $USER); kept in the registry")


def _approval_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--despite-gate", action="store_true", help="although it did not pass the gate")
    parser.add_argument("--deploy", action="store_true", help="serve it now, without waiting for the daemon")


def _alert_options(parser: argparse.ArgumentParser) -> None:
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--all", action="store_true", help="also what was resolved, and what was told once")
    one.add_argument("--channels", action="store_true", help="how every channel is doing")
    one.add_argument("--send-test", metavar="CHANNEL", default="", help="send a test message to a channel")
    one.add_argument("--deliver", action="store_true", help="send what is due now, without the daemon")
    one.add_argument(
        "--resolve", metavar="KEY", default="", help="close an incident that nothing closes by itself"
    )


def _launch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", help="name of the job, such as train_and_release")
    parser.add_argument("--url", default="", help="of the Dagster UI (default: OFFER_ASSETS_UI_URL)")
    parser.add_argument("--partition", default="", help="for a job with partitions: cpu, 2026-11-01")


def _iam_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "document", help="such as orchestrator, jobs-role or bucket-policy (deploy/iam/README.md)"
    )
    parser.add_argument("--repository", default="", help="owner/name on GitHub, for deployer-trust")


_COMMANDS = {
    "demo": _demo,
    "demo-drift": _demo_drift,
    "demo-taxonomy": _demo_taxonomy,
    "dev": _dev,
    "stop": _stop,
    "versions": _versions,
    "history": _history,
    "alerts": _alerts,
    "approve": _approve,
    "reject": _reject,
    "rollback": _rollback,
    "deploy": _deploy,
    "jobs": _jobs,
    "launch": _launch,
    "iam": _iam,
    "endpoint": _endpoint,
    "shadow": _shadow,
    "split": _split,
}

_OPTIONS = {
    "dev": [_port_option],
    "alerts": [_alert_options],
    "approve": [_version_argument, _reason_options, _approval_options],
    "reject": [_version_argument, _reason_options],
    "rollback": [_earlier_version_argument, _reason_options],
    "launch": [_launch_options],
    "iam": [_iam_options],
    "shadow": [_shadow_options],
    "split": [_shares_argument, _reason_options],
}


if __name__ == "__main__":
    sys.exit(main())
