"""A container without an engine: an image's entry point, environment and packages, on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "deploy" / "images"

_ONLY_THESE_PACKAGES = '''
import json, os, sys

class NotInTheImage:
    """Everything but the standard library, the project and what the image installs is not there."""
    allowed = frozenset(json.loads(os.environ["PACKAGES_OF_THE_IMAGE"])) | {"ml", "__main__"}

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        is_python = top in sys.stdlib_module_names or top.startswith("_sysconfigdata")
        if top not in self.allowed and not is_python:
            raise ModuleNotFoundError(f"No module named {name!r} (not in the image)", name=name)

sys.meta_path.insert(0, NotInTheImage())
'''


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continued lines joined, comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (s.partition(" ") for s in joined.splitlines() if s)
    ]


def last(dockerfile: Path, instruction: str) -> str:
    """Arguments of the instruction that counts: of the final stage, the last one."""
    return [rest for word, rest in _final_stage(dockerfile) if word == instruction][-1]


def command_of(dockerfile: Path, *arguments: str) -> list[str]:
    """What ``docker run IMAGE ARGUMENTS`` starts, with this interpreter as the image's."""
    program = json.loads(last(dockerfile, "ENTRYPOINT"))
    return [_python(program[0]), *program[1:], *(arguments or json.loads(last(dockerfile, "CMD")))]


def health_check_of(dockerfile: Path) -> list[str]:
    """The command that the engine asks the container's health with."""
    program = json.loads(last(dockerfile, "HEALTHCHECK").partition("CMD")[2])
    return [_python(program[0]), *program[1:]]


def environment_of(group: str, folder: Path, base: Path, **variables: str) -> dict[str, str]:
    """Environment of a container whose image installs ``group``, with ``/opt/ml`` at ``base``.

    Args:
        group: Dependency group of ``pyproject.toml``.
        folder: Where what closes the other packages off is put.
        base: Stands for ``/opt/ml``.
        variables: What SageMaker sets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_ONLY_THESE_PACKAGES)
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PACKAGES_OF_THE_IMAGE": json.dumps(sorted(modules_of(group))),
        "SAGEMAKER_BASE_DIR": str(base),
        **variables,
    }


def modules_of(group: str) -> set[str]:
    """Top-level modules of a dependency group and of everything that it needs."""
    installed = closure(requirements_of(group))
    return {
        module
        for module, distributions in metadata.packages_distributions().items()
        if any(canonicalize_name(name) in installed for name in distributions)
    }


def requirements_of(group: str) -> list[Requirement]:
    """A dependency group of ``pyproject.toml``, with those that it includes."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    found: list[Requirement] = []
    for entry in groups[group]:
        found += requirements_of(entry["include-group"]) if isinstance(entry, dict) else [Requirement(entry)]
    return found


def closure(requirements: list[Requirement]) -> set[str]:
    """Names (canonical) of all distributions that these lead to, as they are installed here."""
    names: set[str] = set()
    waiting = [(canonicalize_name(each.name), frozenset(each.extras)) for each in requirements]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # for another accelerator, say: the lock is held elsewhere
        names.add(name)
        for requirement in map(Requirement, needed):
            environments = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            marker = requirement.marker
            if marker is None or any(marker.evaluate(environment) for environment in environments):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return names


def run(command: list[str], environment: dict[str, str], seconds: float = 60) -> subprocess.CompletedProcess:
    """Run a short-lived container to its end."""
    return subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, timeout=seconds, check=False
    )


def _final_stage(dockerfile: Path) -> list[tuple[str, str]]:
    found = instructions(dockerfile)
    begin = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return found[begin:]


def _python(program: str) -> str:
    assert program == "python"
    return sys.executable
