"""The whole way in one command: from a feed to a live endpoint and a catalogued day, headless."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec

from ml.artifacts import ArtifactRef
from ml.drift.questions import QUESTIONS
from ml.errors import InputError
from offer_assets.definitions import build_defs
from offer_assets.headless import FailedCheck, HeadlessRuns, MadeAsset
from offer_assets.incidents import collect, observations
from offer_assets.instance import instance_for
from offer_assets.jobs import (
    ADOPT_TAXONOMY,
    CATALOGUE_DAY,
    INGEST_DAY,
    MEASURE_QUALITY,
    START_ENDPOINT,
    TRAIN_AND_RELEASE,
)
from offer_assets.operation import DRIFT_REPORT
from offer_assets.partitions import CPU
from resources.alerts import Alerts, Delivery, News
from resources.artifact_store import ArtifactStore
from resources.environment import resources_for
from resources.offer_feed import OfferFeed
from resources.redaction import without_secrets
from resources.settings import Settings

_ASSETS_ADOPTED = 2
"""catalog_taxonomy, taxonomy_change"""
_ASSETS_PER_DAY = 3
"""raw_offers, offers, quarantined_offers"""
_ASSETS_TRAINED = 11
_ASSETS_CATALOGUED = 3
"""catalogued_offers, drift_reference, drift_report"""
_ASSETS_MEASURED = 2
"""corrections, live_quality"""
_SECONDS_TO_DELIVER = 40.0
_DRIFT_CHECKS = frozenset(question.name for question in QUESTIONS)


def run_demo(settings: Settings) -> bool:
    """Make everything, say what came out; True only if all of it happened."""
    started_at = time.monotonic()
    resources = resources_for(settings)
    feed: OfferFeed = resources["offer_feed"]
    resources["endpoints"].check_available()
    days = feed.days()
    print(f"Offer Assets: {describe_feed(settings)}, {len(days)} days to {days[-1]}, in {settings.home}")
    print(f"{feed.left_out_line()}\n")
    runs = HeadlessRuns(
        definitions=build_defs(settings),
        instance=instance_for(settings),
        assets_in_all=_ASSETS_ADOPTED
        + _ASSETS_PER_DAY * len(days)
        + _ASSETS_TRAINED
        + _ASSETS_CATALOGUED
        + _ASSETS_MEASURED,
    )
    with runs.instance:
        adopted = runs.run(ADOPT_TAXONOMY)
        # A day that cannot be taken does not stop the others, but it is not forgotten either.
        taken = [day for day in days if adopted and runs.run(INGEST_DAY, day)]
        trained = bool(taken) and runs.run(TRAIN_AND_RELEASE, CPU)
        waits = trained and not runs.of("offer_endpoint")
        finished = trained and (waits or (runs.run(CATALOGUE_DAY, taken[-1]) and runs.run(MEASURE_QUALITY)))
    succeeded = finished and taken == days and not _broken(runs)
    _write_timings(settings.home / "demo_timings.json", runs, time.monotonic() - started_at)
    if succeeded and waits:
        print(
            "\nThe version passed the gate and waits for a decision (OFFER_ASSETS_APPROVAL=required):\n"
            "  python -m offer_assets versions\n"
            "  python -m offer_assets approve VERSION --reason '…' --deploy"
        )
    elif succeeded:
        print(summary(settings, runs, resources["artifact_store"], time.monotonic() - started_at))
    else:
        print(failure(settings, runs), file=sys.stderr)
    return succeeded


def run_drifted_day(settings: Settings) -> bool:
    """Add a drifted day to the demo feed and process it; True if a drift check found it to be an error."""
    if not settings.is_demo:
        raise InputError(
            "demo-drift adds a day to the demo feed; unset OFFER_FEED and CATALOG_TAXONOMY to use it"
        )
    resources = resources_for(settings)
    if resources["artifact_store"].read_pointer("offer_endpoint") is None:
        raise InputError("there is no endpoint yet to catalogue a day with; run `make demo` first")
    day = resources["offer_feed"].add_drifted_day()
    definitions = build_defs(settings)
    runs = HeadlessRuns(
        definitions=definitions,
        instance=instance_for(settings),
        assets_in_all=_ASSETS_PER_DAY + _ASSETS_CATALOGUED + 1,
    )
    with runs.instance:
        # The endpoint is started again if it has been stopped since.
        if not (runs.run(INGEST_DAY, day) and runs.run(START_ENDPOINT) and runs.run(CATALOGUE_DAY, day)):
            print(failure(settings, runs), file=sys.stderr)
            return False
        told, delivery = tell_incidents(runs.instance, definitions, resources)
    drift = [check for check in runs.failed_checks if check.name in _DRIFT_CHECKS]
    if not any(check.severity == "ERROR" for check in drift):
        print(failure(settings, runs), file=sys.stderr)
        return False
    report = str(runs.of("drift_report")[-1].metadata["report"])
    print(drift_summary(day, drift, report, resources["alerts"], told, delivery))
    return True


def tell_incidents(
    instance: dg.DagsterInstance, definitions: dg.Definitions, resources: Mapping[str, Any]
) -> tuple[list[News], Delivery]:
    """What the sensors ``incidents`` and ``alert_delivery`` do while a daemon runs."""
    alerts: Alerts = resources["alerts"]
    told = collect(
        instance,
        alerts,
        graph=definitions.resolve_asset_graph(),
        offer_feed=resources["offer_feed"],
        artifact_store=resources["artifact_store"],
        tracking=resources["tracking"],
    )
    for observation in observations(told):
        instance.report_runless_asset_event(observation)
    return told, alerts.deliver(_SECONDS_TO_DELIVER)


def drift_summary(
    day: str,
    drift: Sequence[FailedCheck],
    report: str,
    alerts: Alerts,
    told: Sequence[News],
    delivery: Delivery,
) -> str:
    """The failed drift checks of a day, its report, and what people were told of it."""
    checks = sorted(drift, key=lambda check: check.severity)  # ERROR before WARN
    keys = {f"check:{DRIFT_REPORT}:{check.name}" for check in drift}
    is_new = any(news.incident in keys for news in told)
    return "\n".join(
        [
            "",
            f"The drifted day {day} was caught:",
            *(f"  {check.severity:<5}  {check.name}: {check.description}" for check in checks),
            "",
            f"Report: {report}",
            "Alerts:",
            *(
                f"  {incident.severity:<8}  {incident.title} (since {incident.opened_at[:19]}Z)"
                for incident in alerts.incidents()
                if incident.key in keys
            ),
            *(f"  {line}" for line in _delivery_lines(alerts, delivery, is_new=is_new)),
            "  list them        python -m offer_assets alerts",
            "",
        ]
    )


def _delivery_lines(alerts: Alerts, delivery: Delivery, *, is_new: bool) -> list[str]:
    """What became of the messages, as the channels say."""
    if not alerts.channels():
        return ["kept in the outbox (OFFER_ASSETS_ALERT_ROUTES sends them)"]
    lines = [f"sent to {line}" for line in delivery.sent]
    lines += [f"not taken, tried again later: {line}" for line in delivery.failed]
    if (waiting := delivery.waiting - len(delivery.failed)) > 0:
        messages = "1 message" if waiting == 1 else f"{waiting} messages"
        lines.append(f"{messages} waiting: `python -m offer_assets alerts --deliver` sends what is due")
    if lines:
        return lines
    return [
        "nothing was sent: no route is for it" if is_new else "nothing new: people were told when it began"
    ]


def describe_feed(settings: Settings) -> str:
    """Which feed this is, for people."""
    return "the demo feed" if settings.is_demo else f"feed {without_secrets(settings.offer_feed)}"


def summary(settings: Settings, runs: HeadlessRuns, store: ArtifactStore, seconds: float) -> str:
    """What came out, as a person wants to read it."""
    offers = runs.of("offers")
    evaluation = _only(runs, "student_evaluation").metadata
    teacher, student, fast, compiled = (
        _only(runs, name).metadata
        for name in ("teacher_checkpoint", "student_checkpoint", "fast_checkpoint", "compiled_student")
    )
    endpoint = _only(runs, "offer_endpoint").metadata
    catalogued = runs.of("catalogued_offers")[-1]
    raw_count = sum(made.metadata["dagster/row_count"] for made in runs.of("raw_offers"))
    clean_count = sum(made.metadata["dagster/row_count"] for made in offers)
    quarantined_count = sum(made.metadata["dagster/row_count"] for made in runs.of("quarantined_offers"))
    broken = _broken(runs)
    findings = [check for check in runs.failed_checks if check not in broken]
    lines = [
        "",
        f"Done in {seconds:,.0f} s.",
        "",
        f"  offers in        {raw_count:>10,}   over {len(offers)} day(s)",
        f"  clean            {clean_count:>10,}",
        f"  quarantined      {quarantined_count:>10,}   ({quarantined_count / max(raw_count, 1):.2%})",
        f"  categories       {_only(runs, 'catalog_taxonomy').metadata['categories']:>10,}   "
        f"of which {evaluation['categories']:,} are in the evaluation set",
        "",
        f"  quality on {evaluation['offers']:,} held-out offers (split by {settings.split_by})",
        f"  {'':16} {'weighted F1':>12} {'macro F1':>10} {'mean F1 of levels':>18} {'size':>10}",
    ]
    for name, size in (("teacher", teacher), ("student", student), ("fast", fast)):
        lines.append(
            f"  {name:16} {evaluation[f'{name}_weighted_f1']:>12.3f} {evaluation[f'{name}_macro_f1']:>10.3f} "
            f"{evaluation[f'{name}_mean_weighted_f1']:>18.3f} {_megabytes(size['size_bytes']):>10}"
        )
    lines += [
        f"  {'cascade':16} {compiled['cascade_weighted_f1']:>12.3f} {'':>10} "
        f"{compiled['cascade_mean_weighted_f1']:>18.3f} {_megabytes(compiled['size_bytes']):>10}",
        "  student: with the fast model's word; cascade: as served, the fast model alone where it is sure",
        "",
        f"  compiled by      {compiled['backend']}   {compiled['same_category']:.2%} of the student's "
        "categories as uncompiled",
        f"  catalogued       {catalogued.metadata['offers']:>10,}   offers of {catalogued.partition} at "
        f"{catalogued.metadata['offers_per_second']:,.0f} offers/s through the endpoint",
        f"  checks           {runs.passed_checks:>10,}   passed, {len(findings)} to look at",
        *(f"    {check.severity}: {check.name}: {check.description}" for check in findings),
        f"  drift report     {runs.of('drift_report')[-1].metadata['report']}",
        "",
        f"  endpoint         {endpoint['url']}   model {endpoint['model_version']}",
        f"  try it           {_curl(endpoint['url'], store)}",
        "  stop it          make stop",
        "  open the UI      make dev",
        "",
    ]
    return "\n".join(lines)


def failure(settings: Settings, runs: HeadlessRuns) -> str:
    """What did not work and what to do."""
    lines = ["", "Not everything worked:"]
    lines += [f"  {error}" for error in runs.errors]
    lines += [f"  check {check.name} of {check.asset}: {check.description}" for check in _broken(runs)]
    lines += [
        "",
        "What was made is kept: the next `make demo` finds it and goes on from there. `make dev` shows each",
        f"run, its log and its checks. Everything is in {settings.home}.",
    ]
    return "\n".join(lines)


def _broken(runs: HeadlessRuns) -> list[FailedCheck]:
    """Failed checks that mean that something did not work; drift is a finding about the offers."""
    return [
        check for check in runs.failed_checks if check.severity == "ERROR" and check.name not in _DRIFT_CHECKS
    ]


def _only(runs: HeadlessRuns, asset: str) -> MadeAsset:
    return runs.of(asset)[-1]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _curl(url: str, store: ArtifactStore) -> str:
    """A command that asks the endpoint for one offer of the evaluation set."""
    import pyarrow.parquet as pq

    evaluation: ArtifactRef | None = store.read_pointer("evaluation_set")
    if evaluation is None:
        return f"curl {url}/ping"
    rows = pq.read_table(
        Path(store.fetch(evaluation)) / "offers.parquet", columns=["offer_id", "shop_id", "title", "country"]
    )
    body = json.dumps({"offers": rows.slice(0, 1).to_pylist()}, ensure_ascii=False)
    return f"curl -s {url}/invocations -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _write_timings(path: Path, runs: HeadlessRuns, seconds: float) -> None:
    """Time per asset of this run, for the benchmark that the README quotes."""
    timings: dict[str, Any] = {
        "seconds": seconds,
        "cores": os.cpu_count(),
        "assets": [
            {
                "asset": made.name,
                "partition": made.partition,
                "seconds": made.seconds,
                "stage_seconds": made.metadata.get("seconds", 0.0) if made.was_made else 0.0,
                "made": made.was_made,
            }
            for made in runs.made
        ],
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(timings), indent=2))
