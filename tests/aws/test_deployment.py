"""Workflows, compose file and Dagster's settings of a deployment, as far as they can be judged from here."""

import re
import shlex
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from dagster._core.instance.config import dagster_instance_config
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.container import IMAGES, ROOT, closure, instructions, requirements_of

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DEPLOY = ROOT / "deploy"

every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def test_there_is_a_workflow_for_every_purpose():
    assert {path.stem for path in WORKFLOWS} == {"deploy", "images", "tests", "train"}


@every_workflow
def test_a_workflow_may_only_read_and_an_identity_is_asked_for_where_it_is_used(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        more = {name: value for name, value in job.get("permissions", {}).items() if value != "read"}
        uses_aws = any("configure-aws-credentials" in step.get("uses", "") for step in job["steps"])
        assert more == ({"id-token": "write"} if uses_aws else {})


@every_workflow
def test_an_action_is_pinned_and_leaves_no_credentials_behind(path):
    for step in _steps(path):
        if "uses" in step:
            owner, _, version = step["uses"].partition("@")
            pinned = r"[0-9a-f]{40}" if owner.startswith("actions/") else r"([0-9a-f]{40}|v\d+(\.\d+)*)"
            assert re.fullmatch(pinned, version), step["uses"]
            if owner == "actions/checkout":
                assert step["with"]["persist-credentials"] is False


@every_workflow
def test_a_workflow_calls_the_make_targets_that_a_person_calls(path):
    targets = _make_targets()
    commands = [step["run"] for step in _steps(path) if "run" in step]
    called = [command for command in commands if "make " in command]
    assert called or ".ci/run" in commands
    for command in called:
        program, target, *variables = shlex.split(command)
        assert (program, target in targets) == ("make", True), command
        assert all("=" in each for each in variables)


@every_workflow
def test_a_workflow_holds_no_secret_and_puts_no_input_into_a_command(path):
    assert "secrets." not in path.read_text()
    for step in _steps(path):
        assert "${{" not in step.get("run", ""), "hand it over by env"


@every_workflow
def test_a_target_that_a_workflow_calls_can_be_made(path):
    for step in _steps(path):
        if step.get("run", "").startswith("make "):
            made = subprocess.run(
                ["make", "--dry-run", *shlex.split(step["run"])[1:]],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            assert made.returncode == 0, made.stderr


def test_what_runs_the_tests_of_a_commit_calls_the_target_of_a_person():
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_images_workflow_builds_every_image():
    (job,) = yaml.safe_load((ROOT / ".github/workflows/images.yml").read_text())["jobs"].values()
    assert set(job["strategy"]["matrix"]["image"]) == {
        path.name.removesuffix(".Dockerfile") for path in IMAGES.glob("*.Dockerfile")
    }


def test_training_is_started_by_hand_or_by_dispatch():
    workflow = yaml.safe_load((ROOT / ".github/workflows/train.yml").read_text())
    assert set(workflow[True]) == {"workflow_dispatch", "repository_dispatch"}  # YAML 1.1 reads `on` so
    from offer_assets.partitions import COMPILE_TARGETS

    targets = workflow[True]["workflow_dispatch"]["inputs"]["target"]["options"]
    assert targets == COMPILE_TARGETS.get_partition_keys()


def test_the_compose_file_runs_the_image_that_is_built_and_what_it_copied():
    compose = yaml.safe_load((DEPLOY / "compose.example.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"code", "daemon", "postgres", "webserver"}
    copied = {
        f"{rest.split()[-1]}{Path(source).name}"
        for word, rest in instructions(IMAGES / "dagster.Dockerfile")
        if word == "COPY" and rest.split()[-1].endswith("/")
        for source in rest.split()[:-1]
    }
    for name in ("code", "webserver", "daemon"):
        assert services[name]["image"] == "${REPOSITORY:-offer-assets}/dagster:${TAG:?the commit to run}"
        workspace = [each for each in services[name].get("command", ()) if each.endswith("workspace.yaml")]
        assert set(workspace) <= copied
    assert all("healthcheck" in service for service in services.values())
    assert all(address.startswith("127.0.0.1:") for address in services["webserver"]["ports"])
    assert re.search(r":\d+\.\d+", services["postgres"]["image"])


def test_what_the_compose_file_needs_from_the_machine_is_never_committed():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/deploy/production.env", "/deploy/postgres.password"} <= set(ignored)


def test_a_deployment_has_dagsters_settings_of_the_repository_but_for_where_things_lie():
    here = yaml.safe_load((ROOT / "dagster.yaml").read_text())
    there = yaml.safe_load((DEPLOY / "dagster.yaml").read_text())
    places = {"storage", "local_artifact_storage", "compute_logs"}
    assert {name: value for name, value in here.items() if name not in places} == {
        name: value for name, value in there.items() if name not in places
    }
    assert set(here) == set(there)
    assert there["storage"] == {"postgres": {"postgres_url": {"env": "OFFER_ASSETS_POSTGRES_URL"}}}


def test_dagster_takes_the_settings_of_a_deployment(tmp_path):
    (tmp_path / "dagster.yaml").write_text((DEPLOY / "dagster.yaml").read_text())
    settings, _ = dagster_instance_config(str(tmp_path))
    assert "postgres" in settings["storage"]


def test_a_deployment_knows_the_code_location_by_the_same_name():
    here = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"][0]["python_module"]
    there = yaml.safe_load((DEPLOY / "workspace.yaml").read_text())["load_from"][0]["grpc_server"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["dagster"]
    assert here["location_name"] == there["location_name"] == project["code_location_name"]
    served = [rest for word, rest in instructions(IMAGES / "dagster.Dockerfile") if word == "CMD"][-1]
    assert f'"--port", "{there["port"]}"' in served
    assert f'"--module-name", "{here["module_name"]}"' in served
    assert f'"--location-name", "{there["location_name"]}"' in served


@pytest.mark.parametrize("page", ["docs/security.md", "deploy/iam/README.md", "deploy/images/README.md"])
def test_what_a_page_names_is_there(page):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`((?:ml|resources|deploy|tests|\.github)/[\w./-]*)`", text))
    assert all((ROOT / place).exists() for place in named), named
    for variable in re.findall(r"`(OFFER_ASSETS_\w+[A-Z])", text):
        assert variable in (ROOT / ".env.example").read_text(), variable


def test_every_dependency_is_pinned_to_one_version():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line), line


def test_what_is_installed_is_what_is_pinned():
    pinned = {
        canonicalize_name(name): version
        for name, _, version in (
            line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines()
        )
    }
    for name in sorted(_needed_by_the_project()):
        installed = metadata.version(name).partition("+")[0]
        assert pinned.get(name) == installed, f"{name} {installed} is installed: pin it in constraints.txt"


def _needed_by_the_project() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["aws"]]
    asked = [Requirement(each) for each in requirements]
    for group in ("serving", "training"):
        asked += requirements_of(group)
    return closure(asked)


def _steps(path):
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


def _make_targets() -> set[str]:
    """Targets that ``make help`` tells a person of."""
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
