"""The Dockerfiles, as far as they can be judged without an engine."""

import ast
import importlib.util
import json
import re
import sys
import tomllib
from fnmatch import fnmatch

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.container import IMAGES, ROOT, instructions, last, modules_of, requirements_of

DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
SAGEMAKER = [path for path in DOCKERFILES if path.stem != "dagster"]
INSTRUCTIONS = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "STOPSIGNAL",
    "USER", "WORKDIR",
}  # fmt: skip
AS_ROOT = {"training.Dockerfile", "neuron.Dockerfile"}
"""SageMaker mounts the folders that a job writes to for root alone."""

_OF_THE_NEURON_SDK = {"libneuronxla", "neuronxcc", "torch_neuronx", "torch_xla"}
_EXTRAS = {"openvino"}
"""What only who asks for it installs."""

every_image = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
every_sagemaker_image = pytest.mark.parametrize("dockerfile", SAGEMAKER, ids=lambda path: path.stem)


def test_there_is_an_image_for_every_purpose():
    assert {path.stem for path in DOCKERFILES} == {"dagster", "neuron", "serving", "training"}


@every_image
def test_every_instruction_is_one_that_docker_knows(dockerfile):
    assert {word for word, _ in instructions(dockerfile)} <= INSTRUCTIONS


@every_image
def test_the_base_is_pinned_by_a_version_that_a_build_argument_can_replace(dockerfile):
    found = instructions(dockerfile)
    (name, _, base), *_ = [rest.partition("=") for word, rest in found if word == "ARG"]
    assert found[0] == ("ARG", f"{name}={base}")
    assert {rest.split(" ")[0] for word, rest in found if word == "FROM"} == {f"${{{name}}}"}
    assert re.search(r":[^:@/]*\d+\.\d+\.\d+[^:@/]*$", base), base
    assert "latest" not in base


@every_image
def test_what_installs_packages_is_not_root(dockerfile):
    user = "root"
    for word, rest in instructions(dockerfile):
        if word == "FROM":
            user = "root"
        elif word == "USER":
            user = rest
        elif word == "RUN" and "pip install" in rest:
            assert user == "builder", rest


@every_image
def test_it_runs_as_root_only_where_sagemaker_leaves_no_choice(dockerfile):
    user = last(dockerfile, "USER")
    assert (user == "root") == (dockerfile.name in AS_ROOT), user


@every_image
def test_what_is_installed_is_pinned_and_kept_out_of_caches(dockerfile):
    installs = [rest for word, rest in instructions(dockerfile) if word == "RUN" and "pip install" in rest]
    assert installs
    for line in installs:
        for command in re.findall(r"pip install ([^&]*)", line):
            assert "--constraint constraints.txt" in command or re.fullmatch(r"pip==\d+\.\d+\s*", command)
        assert "--mount=type=secret,id=pip" in line  # credentials of an index stay out of the layers
    assert "PIP_NO_CACHE_DIR=1" in " ".join(rest for word, rest in instructions(dockerfile) if word == "ENV")


@every_image
def test_the_context_holds_what_it_copies_and_nothing_secret(dockerfile):
    patterns = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] not in "#*"
    ]
    assert all(pattern.startswith("!") for pattern in patterns)
    let_in = {pattern[1:] for pattern in patterns}
    for word, rest in instructions(dockerfile):
        if word != "COPY" or rest.startswith("--from="):
            continue
        *sources, _ = rest.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(source == each or source.startswith(f"{each}/") for each in let_in), source
    assert not any(fnmatch(secret, each) for each in let_in for secret in (".env", ".git", "deploy"))


@every_sagemaker_image
def test_serve_and_train_are_commands_of_the_entry_point(dockerfile):
    program = json.loads(last(dockerfile, "ENTRYPOINT"))
    assert program == ["python", "-m", "ml"]
    assert importlib.util.find_spec("ml.__main__")
    assert json.loads(last(dockerfile, "CMD"))[0] in {"serve", "train"}


@every_sagemaker_image
def test_an_image_that_serves_has_a_health_check_and_lets_its_port_be_chosen(dockerfile):
    serves = json.loads(last(dockerfile, "CMD")) == ["serve"]
    assert (last(dockerfile, "HEALTHCHECK") != "NONE") == serves
    assert ("accept-bind-to-port" in last(dockerfile, "LABEL")) == serves
    if serves:
        assert "/ping" in last(dockerfile, "HEALTHCHECK")


@every_image
def test_an_image_knows_the_commit_that_it_was_made_of(dockerfile):
    assert "CODE_REVISION=${CODE_REVISION}" in last(dockerfile, "ENV")
    assert "org.opencontainers.image.revision" in last(dockerfile, "LABEL")


@every_image
def test_an_image_is_made_with_the_python_that_the_project_supports(dockerfile):
    _, _, base = instructions(dockerfile)[0][1].partition("=")
    version = re.search(r"python:(\d+\.\d+)|py(3)(\d+)", base)
    python = version[1] or f"{version[2]}.{version[3]}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python)


def test_the_training_image_installs_everything_that_ml_imports():
    assert _imported_by(ROOT / "ml") - modules_of("training") - _OF_THE_NEURON_SDK - _EXTRAS == set()


def test_the_serving_image_installs_nothing_that_trains_or_orchestrates():
    heavy = {"torch", "transformers", "mlflow", "evidently", "dagster", "sklearn", "pandas", "boto3"}
    assert heavy & modules_of("serving") == set()


def test_the_torch_of_the_training_image_is_the_one_of_the_constraints():
    (default,) = [
        rest.partition("=")[2]
        for word, rest in instructions(IMAGES / "training.Dockerfile")
        if word == "ARG" and rest.startswith("TORCH=")
    ]
    assert default in (ROOT / "constraints.txt").read_text().splitlines()


@pytest.mark.parametrize("group", ["serving", "training", "neuron"])
def test_a_group_asks_for_what_the_project_asks_for(group):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = {canonicalize_name(Requirement(each).name): str(Requirement(each)) for each in project}
    for requirement in requirements_of(group):
        assert str(requirement) == wanted[canonicalize_name(requirement.name)]


def _imported_by(folder) -> set[str]:
    """Top-level modules that the code imports anywhere, without the standard library and itself."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {folder.name}
