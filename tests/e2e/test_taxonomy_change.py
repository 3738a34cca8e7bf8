"""The next version of the taxonomy is put into the watched folder, and everything is killed on the way.

What has to come out, whatever died when: one training, one new version that answers, one line of history.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from .conftest import Demo, run, running_dev, wait_for

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.timeout(4000)]

RUNS = """
{ runsOrError(filter: {pipelineName: "follow_taxonomy"}) { ... on Runs { results { runId status } } } }"""


@pytest.fixture(scope="module")
def followed(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Kill as soon as the sensor's run exists, kill again while the teacher learns, and let it finish."""
    log = tmp_path_factory.mktemp("follow") / "dev.log"
    teachers = set(demo.home.glob("artifacts/teacher_checkpoint/*"))
    before = ping(demo)
    with running_dev(demo.env, log) as dev:
        added = run(["offer_assets", "demo-taxonomy"], demo.env)
        assert added.returncode == 0, added.stderr
        wait_for(lambda: statuses(dev.ui), "a run of the sensor")
        dev.kill()
    assert ping(demo) == before  # the endpoint is a process of its own
    with running_dev(demo.env, log) as dev:
        wait_for(
            lambda: list(demo.home.glob("work/teacher_checkpoint/*/checkpoints/step-*[0-9]")),
            "a checkpoint of the teacher",
        )
        dev.kill()
    with running_dev(demo.env, log) as dev:
        wait_for(lambda: "SUCCESS" in statuses(dev.ui), "the end of the retraining")
        found = statuses(dev.ui)
    return {
        "before": before,
        "statuses": found,
        "new_teachers": set(demo.home.glob("artifacts/teacher_checkpoint/*")) - teachers,
    }


def ping(demo: Demo) -> dict[str, str]:
    answer: dict[str, str] = httpx.get(f"{demo.url}/ping", timeout=10, trust_env=False).json()
    return {name: answer[name] for name in ("model_version", "taxonomy_version")}


def statuses(ui) -> list[str]:
    return [run["status"] for run in ui.query(RUNS)["runsOrError"]["results"]]


def manifest(folder: Path) -> dict[str, object]:
    return json.loads((folder / "manifest.json").read_text())


def test_one_training_comes_out_whatever_was_killed(followed: dict) -> None:
    assert followed["statuses"].count("SUCCESS") == 1
    assert not {"STARTED", "STARTING", "QUEUED", "NOT_STARTED"} & set(followed["statuses"])
    assert len(followed["new_teachers"]) == 1


def test_the_training_started_from_the_model_in_production(followed: dict) -> None:
    (teacher,) = followed["new_teachers"]
    found = manifest(teacher)
    assert found["inputs"]["warm_start"]
    assert found["metrics"]["rows_kept"] > found["metrics"]["rows_new"]


def test_the_endpoint_answers_with_the_new_taxonomy(demo: Demo, followed: dict) -> None:
    after, before = ping(demo), followed["before"]
    assert after["taxonomy_version"] != before["taxonomy_version"]
    assert after["model_version"] != before["model_version"]


def test_the_history_has_one_line_more_that_says_why(demo: Demo, followed: dict) -> None:
    answer = run(["offer_assets", "history"], demo.env)
    lines = [line for line in answer.stdout.splitlines() if followed["before"]["model_version"] in line]
    assert answer.returncode == 0, answer.stderr
    assert ping(demo)["model_version"] in answer.stdout
    assert len(lines) == 2  # its own promotion, and the one that replaced it


def test_rolling_back_brings_the_version_before_back(demo: Demo, followed: dict) -> None:
    answer = run(["offer_assets", "rollback", "--reason", "end-to-end test"], demo.env)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert ping(demo) == followed["before"]
