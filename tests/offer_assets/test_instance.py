"""Where Dagster keeps its state, and which unfinished runs are called dead."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster import DagsterRunStatus
from dagster._core.test_utils import create_run_for_test

from ml.errors import InputError
from offer_assets.instance import fail_dead_runs, instance_for, instance_of_the_ui, process_tag
from resources.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
TAG = "offer_assets/process"


@pytest.fixture(autouse=True)
def dagster_home(monkeypatch):
    for name in ("DAGSTER_HOME", "OFFER_ASSETS_POSTGRES_URL"):
        monkeypatch.setenv(name, "")  # whatever is exported is taken back at the end


@pytest.fixture
def instance(tmp_path):
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def status_of(instance, tags):
    run = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags=tags)
    fail_dead_runs(instance)
    return instance.get_run_by_id(run.run_id).status


def test_a_run_of_a_living_process_goes_on(instance):
    assert status_of(instance, process_tag()) == DagsterRunStatus.STARTED


def test_a_run_whose_process_is_gone_is_failed(instance):
    tag = process_tag()[TAG].replace(str(os.getpid()), "1", 1)
    assert status_of(instance, {TAG: tag}) == DagsterRunStatus.FAILURE


def test_a_run_of_another_machine_is_not_for_us_to_judge(instance):
    tag = process_tag()[TAG].replace(str(os.getpid()), "1", 1).replace(socket.gethostname(), "elsewhere")
    assert status_of(instance, {TAG: tag}) == DagsterRunStatus.STARTED


def test_postgresql_keeps_runs_and_its_address_stands_in_no_file(tmp_path, postgres_url):
    settings = Settings(home=tmp_path, postgres_url=postgres_url)
    with instance_for(settings) as instance:
        run = create_run_for_test(instance, status=DagsterRunStatus.SUCCESS)
    text = (tmp_path / "dagster" / "dagster.yaml").read_text()
    assert yaml.safe_load(text)["storage"] == {
        "postgres": {"postgres_url": {"env": "OFFER_ASSETS_POSTGRES_URL"}}
    }
    assert postgres_url not in text
    with instance_for(settings) as again:
        assert again.get_run_by_id(run.run_id) is not None


def test_only_the_first_ui_of_a_database_calls_unfinished_runs_dead(tmp_path, postgres_url):
    settings = Settings(home=tmp_path / "one", postgres_url=postgres_url)
    with instance_for(settings) as instance:
        left_behind = create_run_for_test(instance, status=DagsterRunStatus.STARTED)
        # A UI on another machine: it becomes another program by exec, and keeps the lock.
        other = subprocess.Popen(
            [
                *(sys.executable, "-c"),
                "import os, sys\n"
                "from offer_assets.instance import instance_of_the_ui\n"
                "from resources.settings import Settings\n"
                "instance_of_the_ui(Settings(home=sys.argv[1], postgres_url=sys.argv[2]))\n"
                "os.execv('/bin/sh', ['sh', '-c', 'echo ready; exec cat'])",
                *(str(tmp_path / "two"), postgres_url),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"ready\n"
            assert instance.get_run_by_id(left_behind.run_id).status == DagsterRunStatus.FAILURE
            of_the_other = create_run_for_test(instance, status=DagsterRunStatus.STARTED)
            instance_of_the_ui(settings)
            assert instance.get_run_by_id(of_the_other.run_id).status == DagsterRunStatus.STARTED
        finally:
            other.communicate()


def test_a_database_that_does_not_answer_is_one_line_without_its_password(tmp_path):
    url = "postgresql+psycopg2://me:hidden@127.0.0.1:1/dagster"
    with pytest.raises(
        InputError, match=r"^OFFER_ASSETS_POSTGRES_URL: the database does not answer"
    ) as error:
        instance_of_the_ui(Settings(home=tmp_path, postgres_url=url))
    assert "hidden" not in str(error.value)
