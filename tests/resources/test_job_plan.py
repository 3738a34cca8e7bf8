"""On what the heavy stages run: defaults that the service knows, and a file whose mistakes are named."""

from __future__ import annotations

import re
from pathlib import Path

import botocore.session
import pytest

from ml.errors import InputError
from ml.stages import STAGES
from offer_assets.__main__ import main
from resources.job_plan import JobMachines, machines_for, plan_table, read_plan

EXAMPLE = Path(__file__).parent.parent.parent / "jobs.example.toml"


def plan_of(folder: Path, text: str) -> str:
    file = folder / "jobs.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_every_heavy_stage_has_its_machines_by_default_and_the_service_knows_them():
    plan = read_plan("")
    assert list(plan) == [stage.name for stage in STAGES.values() if stage.heavy]
    model = botocore.session.get_session().get_service_model("sagemaker")
    known = model.shape_for("TrainingInstanceType").enum
    assert {machines.instance_type for machines in plan.values()} <= set(known)


def test_what_asks_the_endpoint_or_measures_this_machine_and_light_stages_run_here():
    plan = read_plan("")
    assert plan["catalogued_offers"].where == plan["serving_measurement"].where == "here"
    assert machines_for(plan, STAGES["offers"]).where == "here"
    assert machines_for(plan, STAGES["teacher_checkpoint"]).where == "job"


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path):
    by_default = read_plan("")
    file = plan_of(
        tmp_path, '[stages.teacher_checkpoint]\ninstance_type = "ml.g6.48xlarge"\ninstance_count = 2\n'
    )
    changed = read_plan(file)
    teacher = changed["teacher_checkpoint"]
    assert (teacher.instance_type, teacher.instance_count) == ("ml.g6.48xlarge", 2)
    assert teacher.max_hours == by_default["teacher_checkpoint"].max_hours
    assert teacher.max_instance_hours == 2 * teacher.max_hours
    assert {name: value for name, value in changed.items() if name != "teacher_checkpoint"} == {
        name: value for name, value in by_default.items() if name != "teacher_checkpoint"
    }


def test_the_example_can_be_read_and_shows_every_key():
    assert read_plan(str(EXAMPLE)) != read_plan("")
    shown = set(re.findall(r"^(\w+) = ", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert shown == set(JobMachines.__struct_fields__)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[stages.teacher]", "stages.teacher is unknown; did you mean teacher_"),
        ("[stages.offers]", "stages.offers is a light stage, which runs here"),
        ("[jobs.teacher_labels]", "has the key 'jobs'; tables are called [stages.<stage>]"),
        ("stages = 1", "stages must be tables"),
        ("[stages]\nteacher_labels = 1", "stages.teacher_labels must be a table"),
        ("[stages.teacher_labels]\ninstance = 1", "which is unknown; did you mean instance_"),
        ('[stages.teacher_labels]\ninstance_type = "g6.xlarge"', "instance_type is wrong: Expected `str`"),
        ("[stages.teacher_labels]\nmax_hours = 0", "max_hours is wrong"),
        (
            "[stages.fast_checkpoint]\ninstance_count = 2",
            "but only teacher_checkpoint, teacher_labels, student_",
        ),
        ('[stages.catalogued_offers]\nwhere = "job"', "it asks the endpoint, and jobs have no network"),
        ('[stages.serving_measurement]\nwhere = "job"', "it measures this machine; on another one, run"),
        ('[stages.teacher_labels]\nwhere = "there"', "where is wrong"),
        ("[stages", "is not TOML"),
    ],
)
def test_mistakes_are_named_with_file_stage_and_key(tmp_path, text, expected):
    file = plan_of(tmp_path, text)
    with pytest.raises(InputError, match=re.escape(expected)) as error:
        read_plan(file)
    assert str(error.value).startswith(f"{file}: ")


def test_a_file_that_is_not_there_is_told_with_one_to_start_from(tmp_path):
    with pytest.raises(InputError, match=r"jobs\.example\.toml is one to start from"):
        read_plan(str(tmp_path / "none.toml"))


def test_the_plan_is_shown_with_its_upper_bound_before_anything_is_started():
    table = plan_table({"a": JobMachines(max_hours=3, spot=False), "b": JobMachines(where="here")})
    assert [line.split() for line in table.splitlines()[1:3]] == [
        ["a", "job", "1", "x", "ml.m7i.2xlarge", "3", "h"],
        ["b", "program", "here"],
    ]
    assert table.endswith("pays for 3 instance hours at most.")


def test_a_person_sees_the_plan_of_the_settings_and_their_mistakes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(
        "OFFER_ASSETS_AWS_JOBS", plan_of(tmp_path, "[stages.teacher_labels]\nmax_hours = 1000\n")
    )
    assert main(["jobs"]) == 2
    assert "error: OFFER_ASSETS_AWS_JOBS: " in capsys.readouterr().err
    monkeypatch.setenv(
        "OFFER_ASSETS_AWS_JOBS", plan_of(tmp_path, "[stages.teacher_labels]\nmax_hours = 77\n")
    )
    assert main(["jobs"]) == 0
    assert "77 h" in capsys.readouterr().out
