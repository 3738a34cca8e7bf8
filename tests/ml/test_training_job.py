"""``python -m ml train`` as a container would run it: only folders under ``/opt/ml``, no network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ml import runner, stages
from ml.artifacts import read_manifest, verify
from ml.runner import StageSpec, run_stage
from ml.training_job import INPUT_ERROR, JobSpec, run_job
from tests.resources.stand_in import STAND_INS


@pytest.fixture(autouse=True)
def _stand_in_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stage in STAND_INS.items():
        monkeypatch.setitem(stages.STAGES, name, stage)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a job sets for its training goes with the test."""
    for name in (
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "NNODES",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
    ):
        monkeypatch.setenv(name, "")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An ``/opt/ml`` as the service prepares it."""
    for folder in (
        "input/data/stage",
        "input/data/artifacts",
        "input/config",
        "model",
        "output",
        "checkpoints",
    ):
        (tmp_path / "ml" / folder).mkdir(parents=True)
    return tmp_path / "ml"


def give(base: Path, stage: str = "heavy", inputs: dict[str, str] | None = None, **parameters: Any) -> None:
    spec = JobSpec(stage=stage, inputs=inputs or {}, parameters=parameters)
    (base / "input/data/stage/spec.json").write_bytes(msgspec.json.encode(spec))


def give_hosts(base: Path, current: str, *hosts: str) -> None:
    config = {"current_host": current, "hosts": hosts, "network_interface_name": "eth0"}
    (base / "input/config/resourceconfig.json").write_text(json.dumps(config))


def artifact(folder: Path, text: str) -> Path:
    run_stage(
        StageSpec(
            stage="light",
            inputs={},
            parameters={"text": text},
            output=str(folder),
            workspace=str(folder.with_name(folder.name + ".work")),
        )
    )
    return folder


def failure(base: Path) -> str:
    return (base / "output/failure").read_text(encoding="utf-8")


def container(base: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.resources.stand_in", "train", *arguments],
        env={**os.environ, "SAGEMAKER_BASE_DIR": str(base)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_finished_artifact_lies_in_model_and_nothing_else_does(base):
    give(base, text="abc")
    assert run_job(base) == 0
    manifest = verify(base / "model", kinds=["heavy"])
    assert manifest.metrics == {"characters": 3, "continued": 0}
    assert sorted(path.name for path in (base / "model").iterdir()) == ["manifest.json", "text"]
    assert not (base / "output/failure").exists()


@pytest.mark.parametrize("prefix", ["", "offer-assets/artifacts"])
def test_inputs_are_found_whether_or_not_the_service_repeats_their_prefix(base, prefix):
    upstream = artifact(base / "input/data/artifacts" / prefix / "light/0123", "up ")
    give(base, inputs={"upstream": "light/0123"}, text="down")
    assert run_job(base) == 0
    assert (base / "model/text").read_text() == "up down"
    assert read_manifest(base / "model").inputs == {"upstream": read_manifest(upstream).digest}


def test_an_input_that_is_not_there_is_named(base):
    give(base, inputs={"upstream": "light/0123"})
    assert run_job(base) == 2
    assert failure(base).startswith(INPUT_ERROR)
    assert "holds no artifact light/0123" in failure(base)


def test_a_damaged_input_is_refused(base):
    upstream = artifact(base / "input/data/artifacts/light/0123", "up ")
    (upstream / "text").write_text("tampered")
    give(base, inputs={"upstream": "light/0123"})
    assert run_job(base) == 2
    assert "differs from its digest" in failure(base)


def test_what_is_the_readers_to_mend_is_marked_as_such(base):
    give(base, behaviour="input error")
    assert run_job(base) == 2
    assert failure(base) == "InputError: offers.csv row 7: price is 'abc', expected a number"
    assert not list((base / "model").iterdir())


def test_a_crash_is_told_with_its_type_and_is_not_marked(base):
    give(base, behaviour="crash")
    assert run_job(base) == 1
    assert failure(base) == "RuntimeError: something broke"


def test_a_long_reason_is_cut_to_what_the_service_tells(base, monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError("x" * 5_000)

    monkeypatch.setattr(stages.Stage, "function", lambda _: fail)
    give(base)
    assert run_job(base) == 1
    assert 800 < len(failure(base)) <= 900
    assert failure(base).startswith("ValueError: xxx")


@pytest.mark.parametrize("content", [None, b"{", b'{"stage": "heavy", "surprise": 1}'])
def test_a_job_without_a_readable_spec_says_so(base, content):
    if content is not None:
        (base / "input/data/stage/spec.json").write_bytes(content)
    assert run_job(base) == 2
    assert "spec.json" in failure(base)


def test_checkpoints_are_kept_for_the_next_job_of_the_same_artifact(base):
    give(base, behaviour="crash")
    assert run_job(base) == 1
    assert (base / "checkpoints/checkpoints/begun").exists()
    assert run_job(base) == 1
    give(base, behaviour="be killed once", text="other")  # another artifact: those are not its
    (base / "checkpoints/checkpoints/begun").touch()
    killed = container(base)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert run_job(base) == 0
    assert read_manifest(base / "model").metrics["continued"] == 1
    assert (base / "checkpoints/checkpoints/begun").exists(), "the service, and not the job, forgets them"


def test_the_artifact_of_a_job_is_that_of_a_stage_run_by_hand(base, tmp_path):
    give(base, text="abc")
    assert run_job(base) == 0
    by_hand = run_stage(
        StageSpec(
            stage="heavy",
            inputs={},
            parameters={"text": "abc"},
            output=str(tmp_path / "out"),
            workspace=str(tmp_path / "work"),
        )
    )
    made = read_manifest(base / "model")
    assert (made.key, made.digest) == (by_hand.key, by_hand.digest)


def test_an_encoder_at_hand_is_read_and_not_part_of_what_is_made(base, monkeypatch):
    seen = []

    def function(_stage: Any) -> Any:
        return lambda context, parameters: seen.append(parameters.text) or {}

    monkeypatch.setattr(stages.Stage, "function", function)
    spec = JobSpec(
        stage="heavy", inputs={}, parameters={"text": "s3://b/encoder"}, from_encoder_channel=["text"]
    )
    (base / "input/data/stage/spec.json").write_bytes(msgspec.json.encode(spec))
    assert run_job(base) == 0
    assert seen == [str(base / "input/data/encoder")]
    manifest = read_manifest(base / "model")
    assert manifest.parameters["text"] == "s3://b/encoder"
    parameters = runner.parameters_of(STAND_INS["heavy"], {"text": "s3://b/encoder"})
    assert manifest.key == runner.key_of(STAND_INS["heavy"], parameters, {})


def test_one_of_several_machines_publishes_and_all_know_the_first(base):
    for current, published in (("algo-2", False), ("algo-1", True)):
        give(base)
        give_hosts(base, current, "algo-2", "algo-1")
        assert run_job(base) == 0
        assert (base / "model/manifest.json").exists() is published
        assert os.environ["NODE_RANK"] == ("0" if published else "1")
    assert (os.environ["MASTER_ADDR"], os.environ["NNODES"]) == ("algo-1", "2")
    assert int(os.environ["MASTER_PORT"]) > 1024
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"


def test_a_machine_of_its_own_is_no_cluster(base):
    give(base)
    give_hosts(base, "algo-1", "algo-1")
    assert run_job(base) == 0
    assert os.environ["NNODES"] == ""


def test_progress_travels_on_stdout_as_messages_and_on_stderr_as_lines(base):
    give(base, text="abc")
    (base / "input/data/stage/pipes-context.json").write_text('{"asset_keys": null, "extras": {}}')
    with container(base) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0
    messages = [json.loads(line) for line in stdout.splitlines()]
    assert [message["method"] for message in messages] == ["opened", "log", "closed"]
    assert "writes abc" in messages[1]["params"]["message"]
    assert "writes abc" in stderr


def test_sigterm_ends_the_job_soon_and_leaves_checkpoints_and_no_goodbye(base):
    give(base, behaviour="hang")
    (base / "input/data/stage/pipes-context.json").write_text('{"asset_keys": null, "extras": {}}')
    with container(base) as process:
        begun = base / "checkpoints/checkpoints/begun"
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        stdout, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert begun.exists()
    assert not list((base / "model").iterdir())
    assert [json.loads(line)["method"] for line in stdout.splitlines()] == ["opened", "log"]


def test_arguments_are_refused(base):
    with container(base, "--fast") as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "takes no arguments" in stderr
