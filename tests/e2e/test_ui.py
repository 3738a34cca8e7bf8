"""A real ``dagster dev``: webserver and daemon, driven through GraphQL and looked at in a browser."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import system_program

from .conftest import DEADLINE_SECONDS, ROOT, Demo, Ui, running_dev, wait_for

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.timeout(4000)]

LOCATION = 'repositoryLocationName: "offer_assets", repositoryName: "__repository__"'
LAUNCH = """
mutation ($job: String!, $partition: String!) {
  launchRun(executionParams: {
    selector: {LOCATION, jobName: $job},
    executionMetadata: {tags: [{key: "dagster/partition", value: $partition}]}
  }) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}""".replace("LOCATION", LOCATION)
RUN_STATUS = "query ($run: ID!) { runOrError(runId: $run) { ... on Run { status } } }"
CHECKS = """
{ assetNodes { assetKey { path } assetChecksOrError { ... on AssetChecks { checks {
    name executionForLatestMaterialization { status evaluation { success description } } } } } } }"""
# One by one: asked for several at once, Dagster 1.13 answers without their ticks.
SENSOR = """
query ($name: String!) { sensorOrError(sensorSelector: {LOCATION, sensorName: $name}) { ... on Sensor {
    sensorState { status ticks(limit: 5) { status skipReason runIds } } } } }""".replace("LOCATION", LOCATION)
NEURON = """
import dagster as dg
from offer_assets.definitions import build_defs
from offer_assets.instance import instance_for
from resources.settings import Settings

settings = Settings.from_environment()
result = build_defs(settings).resolve_implicit_global_asset_job_def().execute_in_process(
    asset_selection=[dg.AssetKey("compiled_student")],
    partition_key="neuron",
    instance=instance_for(settings),
    raise_on_error=False,
)
print([e.step_failure_data.user_failure_data.description for e in result.all_events if e.is_step_failure])
"""


@pytest.fixture(scope="module")
def ui(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    with running_dev(demo.env, tmp_path_factory.mktemp("dev") / "dev.log") as dev:
        yield dev.ui


def finished(ui: Ui, run_id: str) -> str | None:
    status: str = ui.query(RUN_STATUS, run=run_id)["runOrError"]["status"]
    return status if status in {"SUCCESS", "FAILURE", "CANCELED"} else None


def test_a_run_launched_through_the_ui_catalogues_a_day(ui: Ui, demo: Demo) -> None:
    day = sorted(path.stem.removeprefix("offers-") for path in demo.home.glob("demo_feed/offers-*.parquet"))[
        0
    ]
    launched = ui.query(LAUNCH, job="process_day", partition=day)["launchRun"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run_id = launched["run"]["runId"]
    assert wait_for(lambda: finished(ui, run_id), "the end of the run") == "SUCCESS"


def test_checks_show_their_numbers(ui: Ui) -> None:
    checks = {
        check["name"]: check["executionForLatestMaterialization"]
        for node in ui.query(CHECKS)["assetNodes"]
        for check in (node["assetChecksOrError"] or {}).get("checks", [])
    }
    assert len(checks) >= 12
    assert checks["student_is_close_to_teacher"]["evaluation"]["success"] is True
    assert "% of the teacher" in checks["student_is_close_to_teacher"]["evaluation"]["description"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("new_offers", "nothing new"), ("taxonomy_changed", "release v"), ("decided_versions", "in production")],
)
def test_the_sensors_are_running_and_say_what_they_did(ui: Ui, name: str, reason: str) -> None:
    def ticks() -> list[dict[str, Any]]:
        state = ui.query(SENSOR, name=name)["sensorOrError"]["sensorState"]
        assert state["status"] == "RUNNING"
        return [tick for tick in state["ticks"] if tick["status"] in {"SUCCESS", "SKIPPED"}]

    tick = wait_for(ticks, f"a tick of {name}")[0]
    assert tick["runIds"] or reason in tick["skipReason"]


def test_the_neuron_partition_says_what_it_needs(ui: Ui, demo: Demo) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", NEURON],
        cwd=ROOT,
        env=demo.env,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert "torch_neuronx" in answer.stdout, answer.stdout + answer.stderr[-3000:]


@pytest.mark.browser
def test_the_pages_look_as_they_should(ui: Ui, drifted: str, tmp_path: Path) -> None:
    """The asset graph, an asset's page with its plot, and a failed check, in a real browser."""
    from playwright.sync_api import sync_playwright

    chromium = system_program("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"],
        )
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
        for name, path, text in (
            ("groups", "/asset-groups", "operation"),
            ("graph", "/locations/offer_assets/asset-groups/training/lineage", "teacher_checkpoint"),
            ("asset", "/assets/student_evaluation?view=overview", "worst_categories"),
            ("check", "/assets/drift_report?view=checks&checkDetail=volume_is_usual", "series_tested"),
        ):
            page.goto(ui.url + path)
            page.get_by_text(text).first.wait_for(timeout=300_000)
            page.screenshot(path=folder / f"{name}.png")
            assert (folder / f"{name}.png").stat().st_size > 20_000
        browser.close()
