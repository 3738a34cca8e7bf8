"""One stage from inputs to a sealed artifact: found again, never half visible, made once."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from ml import runner, stages
from ml.artifacts import read_manifest
from ml.errors import InputError
from ml.runner import StageSpec, key_of, parameters_of, run_stage
from ml.stages import OPERATIONAL, Parameters, Stage

CALLS = threading.local()

HOLD_THE_LOCK = """
import sys, time
from pathlib import Path
from ml.progress import Progress
from ml.runner import _only_process_in

with _only_process_in(Path(sys.argv[1]), Progress("x")):
    print("locked", flush=True)
    time.sleep(600)
"""


class EchoParameters(Parameters, frozen=True, kw_only=True):
    text: str
    speed: stages.Annotated[int, msgspec.Meta(extra=OPERATIONAL)] = 1


def echo(context: runner.StageContext, parameters: EchoParameters) -> dict[str, int]:
    CALLS.count = getattr(CALLS, "count", 0) + 1
    upstream = context.optional_input("upstream")
    prefix = (upstream / "text").read_text() if upstream else ""
    if parameters.text == "fail":
        (context.output / "half").write_text("half")
        raise RuntimeError("in the middle")
    (context.output / "text").write_text(prefix + parameters.text)
    return {"characters": len(prefix + parameters.text)}


@pytest.fixture(autouse=True)
def echo_stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    stage = Stage(
        name="echo",
        version="1",
        summary="Write a text.",
        entry_point="none:none",
        parameters=EchoParameters,
        optional_inputs=("upstream",),
    )
    monkeypatch.setitem(stages.STAGES, "echo", stage)
    monkeypatch.setattr(Stage, "function", lambda _self: echo)
    CALLS.count = 0
    return stage


def spec(folder: Path, text: str = "hello", upstream: Path | None = None, **parameters) -> StageSpec:
    return StageSpec(
        stage="echo",
        inputs={"upstream": str(upstream)} if upstream else {},
        parameters={"text": text, **parameters},
        output=str(folder / "out" / text),
        workspace=str(folder / "work" / text),
    )


def test_a_stage_is_made_once_and_found_afterwards(tmp_path: Path) -> None:
    made = run_stage(spec(tmp_path))
    found = run_stage(spec(tmp_path))
    assert made == found
    assert CALLS.count == 1
    assert made.metrics == {"characters": 5}
    assert not (tmp_path / "work" / "hello").exists()


def test_the_manifest_names_inputs_by_digest_and_no_operational_parameters(tmp_path: Path) -> None:
    first = run_stage(spec(tmp_path, "a"))
    second = run_stage(spec(tmp_path, "b", upstream=Path(first.uri)))
    manifest = read_manifest(Path(second.uri))
    assert manifest.inputs == {"upstream": first.digest}
    assert manifest.parameters == {"text": "b"}


def test_a_changed_input_is_refused(tmp_path: Path) -> None:
    first = run_stage(spec(tmp_path, "a"))
    (Path(first.uri) / "text").write_text("tampered")
    with pytest.raises(InputError, match="differs from its digest"):
        run_stage(spec(tmp_path, "b", upstream=Path(first.uri)))


def test_a_failed_stage_leaves_nothing_visible(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="in the middle"):
        run_stage(spec(tmp_path, "fail"))
    assert not (tmp_path / "out" / "fail").exists()


def test_an_output_made_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    made = run_stage(spec(tmp_path, "a"))
    other = msgspec.structs.replace(spec(tmp_path, "b"), output=made.uri)
    with pytest.raises(InputError, match="choose another --output"):
        run_stage(other)


def test_operational_parameters_are_not_part_of_the_key(echo_stage: Stage) -> None:
    def key(**given) -> str:
        return key_of(echo_stage, parameters_of(echo_stage, given), {})

    assert key(text="a", speed=1) == key(text="a", speed=9)
    assert key(text="a") != key(text="b")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"text": 1}, "parameters of echo.*str.*int"),
        ({}, "parameters of echo.*text"),
        ({"text": "a", "sped": 2}, "parameters of echo.*sped"),
    ],
)
def test_wrong_parameters_are_named(echo_stage: Stage, parameters, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parameters_of(echo_stage, parameters)


def test_unknown_inputs_and_stages_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="echo has no input wrong; it takes upstream"):
        run_stage(msgspec.structs.replace(spec(tmp_path), inputs={"wrong": str(tmp_path)}))
    with pytest.raises(InputError, match="no stage 'nonsense'; the stages are catalog_taxonomy"):
        run_stage(msgspec.structs.replace(spec(tmp_path), stage="nonsense"))


def test_two_processes_that_want_the_same_artifact_make_it_once(tmp_path: Path) -> None:
    """The first holds the workspace; the second waits for it and then finds the artifact."""
    feed = tmp_path / "taxonomy.csv"
    feed.write_text("category_id,parent_id,name\n1,,A\n2,1,B\n")
    command = [
        sys.executable,
        "-m",
        "ml",
        "catalog_taxonomy",
        "--source",
        str(feed),
        "--output",
        str(tmp_path / "t"),
    ]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outcomes = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outcomes
    assert sum("unchanged, found" in stderr for _, stderr in outcomes) == 1


def test_a_killed_process_releases_its_workspace(tmp_path: Path) -> None:
    workspace = tmp_path / "work"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_LOCK, str(workspace)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    made = run_stage(msgspec.structs.replace(spec(tmp_path), workspace=str(workspace)))
    assert made.metrics["characters"] == 5


def test_a_wrong_command_line_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "ml",
            "teacher_checkpoint",
            "--epochs",
            "none",
            "--output",
            str(tmp_path / "t"),
        ],
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: --epochs none:")
    assert answer.stderr.count("\n") == 1
