"""A drifted day arrives while ``make dev`` runs: red checks, a report, a message, a training by policy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ml.drift.questions import QUESTIONS
from resources.alerting import OutboxAlerts
from tests.conftest import system_program
from tests.receivers import HttpReceiver, SmtpReceiver

from .conftest import Demo, Ui, run, running_dev, wait_for

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.timeout(4000)]

ROUTES = """
[channels.hook]
type = "webhook"
url = "{hook}"
secret = "${{HOOK_SECRET}}"

[channels.mail]
type = "email"
host = "127.0.0.1"
port = {port}
tls = "none"
from = "alerts@example.com"
to = ["on-call@example.com"]

[[routes]]
minimum_severity = "ERROR"
groups = ["operation"]
channels = ["hook", "mail"]

[[routes]]
default = true
channels = ["mail"]
"""
CHECKS = """
{ assetNodeOrError(assetKey: {path: ["drift_report"]}) { ... on AssetNode {
    assetChecksOrError { ... on AssetChecks { checks { name executionForLatestMaterialization {
      status evaluation { success severity description metadataEntries { label } } } } } } } } }"""
RUNS = """
{ runsOrError(filter: {pipelineName: "train_and_release"}) { ... on Runs { results {
    runId status tags { key value } } } } }"""
OBSERVATIONS = """
{ assetOrError(assetKey: {path: ["alerts"]}) { ... on Asset {
    assetObservations(limit: 50) { description } } } }"""


@dataclass
class DriftedDay:
    """What the day led to."""

    ui: Ui
    day: str
    hook: HttpReceiver
    mails: SmtpReceiver
    checks: dict[str, dict[str, Any]]
    trainings: list[dict[str, Any]]


@pytest.fixture(scope="module")
def drifted_day(demo: Demo, drifted: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DriftedDay]:
    """The second drifted day in a row: the first was made before, without a daemon, channels and policy.

    Its incidents are closed by hand, as somebody does who takes them for mended.
    """
    folder = tmp_path_factory.mktemp("drift")
    with HttpReceiver(honours_keys=True) as hook, SmtpReceiver() as mails:
        routes = folder / "routes.toml"
        routes.write_text(ROUTES.format(hook=hook.url, port=mails.port))
        env = {
            **demo.env,
            "OFFER_ASSETS_ALERT_ROUTES": str(routes),
            "HOOK_SECRET": "a-secret",
            "OFFER_ASSETS_RETRAIN_ON_DRIFT": "default",
            "OFFER_ASSETS_RETRAIN_AFTER_DAYS": "2",
            # What comes of the training is not looked at here: whether it passes the gate may be either.
            "OFFER_ASSETS_LABELLED_OFFERS": "400",
            "OFFER_ASSETS_UNLABELLED_OFFERS": "0",
            "OFFER_ASSETS_TEACHER_EPOCHS": "1",
            "OFFER_ASSETS_STUDENT_EPOCHS": "2",
        }
        for incident in OutboxAlerts(home=str(demo.home)).incidents():
            closed = run(["offer_assets", "alerts", "--resolve", incident.key], demo.env)
            assert closed.returncode == 0, closed.stderr
        before = len(list(demo.home.glob("artifacts/student_evaluation/*")))
        with running_dev(env, folder / "dev.log") as dev:
            known = run_ids(dev.ui)
            arrived = run(
                ["ml", "demo-feed", "--output", str(demo.home / "demo_feed"), "--next-day", "--drifted"], env
            )
            assert arrived.returncode == 0, arrived.stderr
            day = max(
                path.stem.removeprefix("offers-") for path in demo.home.glob("demo_feed/offers-*.parquet")
            )
            wait_for(lambda: day in report_folders(demo), "the report of the day")
            checks = wait_for(lambda: red_checks(dev.ui), "a red check")
            wait_for(lambda: hook.effects and mails.mails, "an alert")
            wait_for(lambda: run_ids(dev.ui) - known, "a training")
            wait_for(lambda: not unfinished(dev.ui, known), "the end of the training")
            trainings = [each for each in runs(dev.ui) if each["runId"] not in known]
            assert len(list(demo.home.glob("artifacts/student_evaluation/*"))) == before + 1
            yield DriftedDay(dev.ui, day, hook, mails, checks, trainings)


def report_folders(demo: Demo) -> dict[str, Path]:
    """Finished drift reports by day."""
    return {
        json.loads((manifest.parent / "drift.json").read_text())["day"]: manifest.parent
        for manifest in demo.home.glob("artifacts/drift_report/*/manifest.json")
    }


def runs(ui: Ui) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ui.query(RUNS)["runsOrError"]["results"]
    return found


def run_ids(ui: Ui) -> set[str]:
    return {each["runId"] for each in runs(ui)}


def unfinished(ui: Ui, known: set[str]) -> list[str]:
    return [
        each["status"]
        for each in runs(ui)
        if each["runId"] not in known and each["status"] not in {"SUCCESS", "FAILURE", "CANCELED"}
    ]


def red_checks(ui: Ui) -> dict[str, dict[str, Any]]:
    """Checks of the newest report, by name, once one of them is an ERROR; empty before."""
    found = {
        check["name"]: check["executionForLatestMaterialization"]["evaluation"]
        for check in ui.query(CHECKS)["assetNodeOrError"]["assetChecksOrError"]["checks"]
        if (check["executionForLatestMaterialization"] or {}).get("evaluation")
    }
    is_red = any(not check["success"] and check["severity"] == "ERROR" for check in found.values())
    return found if is_red and len(found) == len(QUESTIONS) else {}


def failed(day: DriftedDay, severity: str) -> set[str]:
    return {
        name for name, check in day.checks.items() if not check["success"] and check["severity"] == severity
    }


def test_what_drifted_is_red_and_says_what_moved(drifted_day: DriftedDay) -> None:
    """The day has new shops, new words, higher prices, and none of a country's offers."""
    assert {"volume_is_usual", "shop_mix_is_usual", "languages_are_usual"} <= failed(drifted_day, "ERROR")
    assert "country IT" in drifted_day.checks["volume_is_usual"]["description"]
    labels = {entry["label"] for entry in drifted_day.checks["volume_is_usual"]["metadataEntries"]}
    assert {"report", "plot"} <= labels


def test_the_stored_report_is_there(demo: Demo, drifted_day: DriftedDay) -> None:
    assert (report_folders(demo)[drifted_day.day] / "report.html").stat().st_size > 100_000


def test_the_alert_arrives_once_on_every_channel_and_links_to_the_check(drifted_day: DriftedDay) -> None:
    lines = [line for effect in drifted_day.hook.effects for line in json.loads(effect.body)["lines"]]
    opened = [line["incident"] for line in lines if line["kind"] == "opened"]
    expected = {f"check:drift_report:{name}" for name in failed(drifted_day, "ERROR")}
    assert expected <= set(opened)
    assert len(opened) == len(set(opened))
    link = next(line["link"] for line in lines if line["incident"] == "check:drift_report:volume_is_usual")
    assert link.startswith("http://localhost:3000/assets/drift_report?")
    assert "volume_is_usual" in drifted_day.mails.mails[0].message.get_body(("plain",)).get_content()


def test_the_ui_has_the_history_of_alerts(drifted_day: DriftedDay) -> None:
    found = drifted_day.ui.query(OBSERVATIONS)["assetOrError"]["assetObservations"]
    assert any("volume_is_usual" in observation["description"] for observation in found)


def test_the_policy_started_one_training_that_says_why(drifted_day: DriftedDay) -> None:
    (training,) = drifted_day.trainings
    assert training["status"] in {"SUCCESS", "FAILURE"}
    tags = {tag["key"]: tag["value"] for tag in training["tags"]}
    assert any("shop_mix_is_usual" in value for value in tags.values()), tags


@pytest.mark.browser
def test_the_page_of_a_red_check_shows_what_moved(drifted_day: DriftedDay, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=system_program("chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"],
        )
        page = browser.new_page(viewport={"width": 1600, "height": 1300})
        for name, path, text in (
            ("drift-check", "/assets/drift_report?view=checks&checkDetail=volume_is_usual", "country IT"),
            ("drift-report", "/assets/drift_report?view=overview", "distances_of_columns"),
            ("alerts", "/assets/alerts?view=events", "Observed"),
        ):
            page.goto(drifted_day.ui.url + path)
            page.get_by_text(text).first.wait_for(timeout=300_000)
            page.screenshot(path=folder / f"{name}.png")
        browser.close()
