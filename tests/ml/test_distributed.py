"""Several processes share a training: it ends as that of one, and all of them end together."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ml import ranks
from ml.artifacts import read_manifest
from ml.errors import InputError
from ml.learning import training
from ml.learning.labelling import read_teacher_labels
from ml.progress import Progress
from ml.ranks import RankEnded, _Followers, leading
from ml.runner import StageSpec, run_stage
from ml.world import World, world_from_environment
from tests.ml.tiny_models import TINY_TEACHER, make, stage_spec, tiny_encoder, tiny_inputs

LEADER_THAT_IS_STUCK = """
import sys, time
from pathlib import Path
from ml import ranks
from ml.progress import Progress
from ml.world import World

ranks._SECONDS_TO_NOTICE = 0.1
with ranks._Followers(
    [sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]), World(size=2, local_size=2), Progress("x")
):
    time.sleep(600)
"""
FOLLOWER = """
import time
from ml.ranks import end_with_leader

end_with_leader()
time.sleep(600)
"""
FOLLOWER_WITH_WRONG_INPUT = "import sys; open(sys.argv[2], 'w').write('row 3 is wrong'); sys.exit(2)"
STARTED = re.compile(r"processes.* share the work \(started here: (\d+)\)")


class Killed(BaseException):
    pass


@dataclass
class Training:
    """A tiny teacher without dropout, in full precision: its weights do not depend on who computes what."""

    inputs: dict[str, Path]
    parameters: dict[str, Any]
    whole: Path
    """Trained by one process, without interruption."""

    def spec(self, folder: Path, **parameters: Any) -> StageSpec:
        return stage_spec("teacher_checkpoint", self.inputs, self.parameters | parameters, folder / "teacher")


@pytest.fixture(scope="module")
def whole_training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("training")
    encoder = tiny_encoder(folder / "encoder", layers=2)
    config = msgspec.json.decode((encoder / "config.json").read_bytes())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (encoder / "config.json").write_bytes(msgspec.json.encode(config))
    # 46 offers in batches of 5: shares are uneven, and one process goes without in the last batch
    inputs = tiny_inputs(folder, train=46)
    parameters = TINY_TEACHER | {
        "encoder": str(encoder),
        "batch_size": 5,
        "checkpoint_seconds": 1e-9,
        "token_dropout": 0.0,
        "precision": "float32",
    }
    whole, _ = make("teacher_checkpoint", inputs, parameters | {"devices": 1}, folder / "whole")
    return Training(inputs, parameters, whole)


@pytest.fixture
def after_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Has something happen once, in this process, when the checkpoint of a step is written."""

    def after_checkpoint(step: int, happen: Callable[[], None]) -> None:
        def save_and_more(folder: Path, model: Any, optimiser: Any, state: training.TrainingState) -> None:
            save(folder, model, optimiser, state)
            if state.step == step:
                monkeypatch.setattr(training, "save_checkpoint", save)
                happen()

        save = training.save_checkpoint
        monkeypatch.setattr(training, "save_checkpoint", save_and_more)

    return after_checkpoint


def die() -> None:
    raise Killed


def assert_same_model(made: Path, expected: Path) -> None:
    for name in ("head.safetensors", "encoder/model.safetensors"):
        ours, theirs = load_file(made / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        for tensor in ours:
            torch.testing.assert_close(ours[tensor], theirs[tensor], atol=1e-5, rtol=1e-4)
    figures, expected_figures = read_manifest(made).metrics, read_manifest(expected).metrics
    for name in ("steps", "rows", "validation_accuracy"):
        assert figures[name] == expected_figures[name]
    assert figures["training_loss"] == pytest.approx(expected_figures["training_loss"], rel=1e-4)


def test_when_one_of_two_processes_is_killed_all_end_and_one_alone_can_go_on(
    whole_training: Training, tmp_path: Path, after_checkpoint: Callable[[int, Callable[[], None]], None]
) -> None:
    lines: list[str] = []

    def kill_the_other() -> None:
        os.kill(int(next(filter(None, map(STARTED.search, lines)))[1]), signal.SIGKILL)

    after_checkpoint(21, kill_the_other)
    with pytest.raises(
        RankEnded, match="process 2 of 2 was ended by SIGKILL, and the others with it; run the"
    ):
        run_stage(whole_training.spec(tmp_path, devices=2), Progress("test", lines.append))
    assert "RANK" not in os.environ
    made = run_stage(whole_training.spec(tmp_path, devices=1), Progress("test", lines.append))
    assert made is not None
    # the other may have done its part of the next step before it was killed
    assert {f"resumed from the checkpoint at step {step}" for step in (21, 22)} & set(lines)
    assert_same_model(Path(made.uri), whole_training.whole)
    assert read_manifest(Path(made.uri)).key == read_manifest(whole_training.whole).key


def test_what_one_process_began_two_machines_end_and_only_the_first_publishes(
    whole_training: Training,
    tmp_path: Path,
    after_checkpoint: Callable[[int, Callable[[], None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after_checkpoint(4, die)
    with pytest.raises(Killed):
        run_stage(whole_training.spec(tmp_path / "first", devices=1))
    for name, value in {
        "NNODES": "2",
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": next(name for _, name in socket.if_nameindex() if name.startswith("lo")),
    }.items():
        monkeypatch.setenv(name, value)
    with started(whole_training.spec(tmp_path / "second", devices=1), NODE_RANK="1") as second:
        lines: list[str] = []
        made = run_stage(whole_training.spec(tmp_path / "first", devices=1), Progress("test", lines.append))
        output, said = second.communicate(timeout=60)
    assert (second.returncode, output) == (0, "")
    assert "epoch" not in said
    assert list((tmp_path / "second").glob("teacher*")) == [tmp_path / "second" / "teacher.work.lock"]
    assert "2 processes on 2 machines share the work" in lines
    assert "resumed from the checkpoint at step 4" in lines
    assert made is not None
    assert_same_model(Path(made.uri), whole_training.whole)


def test_two_processes_label_like_one(whole_training: Training, tmp_path: Path) -> None:
    inputs = {
        "teacher_checkpoint": whole_training.whole,
        "training_sample": whole_training.inputs["training_sample"],
    }
    # the last shard holds less than one batch: a process goes without
    parameters = {"top_k": 2, "shard_offers": 31, "batch_size": 8}
    alone, _ = make("teacher_labels", inputs, parameters | {"devices": 1}, tmp_path / "alone")
    together, _ = make("teacher_labels", inputs, parameters | {"devices": 2}, tmp_path / "together")
    for source in ("labelled", "unlabelled"):
        ours, theirs = read_teacher_labels(together, source), read_teacher_labels(alone, source)
        assert ours.offer_ids == theirs.offer_ids
        assert np.array_equal(ours.top_indices, theirs.top_indices)
        np.testing.assert_allclose(ours.top_logits, theirs.top_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_however_the_leader_ends_its_followers_end_too(tmp_path: Path, how: signal.Signals) -> None:
    with stuck_leader(FOLLOWER, tmp_path) as leader:
        assert leader.stderr is not None
        assert STARTED.search(leader.stderr.readline())
        leader.send_signal(how)
        leader.communicate(timeout=20)  # ends when nobody holds stderr any more
    assert leader.returncode == -how


def test_a_leader_that_waits_for_a_dead_follower_ends_and_says_why(tmp_path: Path) -> None:
    with stuck_leader("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", tmp_path) as leader:
        _, said = leader.communicate(timeout=20)
    assert leader.returncode == 1
    assert "process 2 of 2 was ended by SIGKILL, and the others with it" in said


def test_of_several_that_failed_the_one_that_was_killed_is_named(tmp_path: Path) -> None:
    command = """
import os, signal, sys
if os.environ["RANK"] == "2":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(1)  # as one does whose connection broke
"""
    with followers(command, tmp_path, size=3) as others:
        wait_until(lambda: all(process.poll() for process in others._processes.values()))
        failure = others.failure()
    assert isinstance(failure, RankEnded)
    assert "process 3 of 3 was ended by SIGKILL" in str(failure)


def test_an_input_error_of_a_follower_is_the_stages(tmp_path: Path) -> None:
    with followers(FOLLOWER_WITH_WRONG_INPUT, tmp_path) as others:
        failure = others.failure(within=20)
    assert isinstance(failure, InputError)
    assert str(failure) == "row 3 is wrong"


def test_a_follower_that_is_well_is_no_failure(tmp_path: Path) -> None:
    with followers(FOLLOWER, tmp_path) as others:
        assert others.failure(within=0.1) is None
        follower = others._processes[1]
    assert follower.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "2"}, "MASTER_ADDR, MASTER_PORT, NODE_RANK not set"),
        (
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "NODE_RANK=2: expected a number from 0 to 1",
        ),
    ],
)
def test_variables_of_machines_that_contradict_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(InputError, match=message),
        leading(b"{}", tmp_path, tmp_path / "ranks", 1, Progress("test")),
    ):
        pytest.fail("nothing to lead")


def test_more_processes_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks._world_to_lead(0) == World(size=2, local_size=2)
    with pytest.raises(InputError, match="devices 3: this machine has 2 GPUs"):
        ranks._world_to_lead(3)


@given(nodes=st.integers(1, 4), local=st.integers(1, 8), rows=st.integers(1, 40), data=st.data())
def test_shares_of_a_batch_hold_each_row_once_and_their_weighted_mean_is_the_batchs(
    nodes: int, local: int, rows: int, data: st.DataObject
) -> None:
    losses = np.array(data.draw(st.lists(st.floats(0, 100), min_size=rows, max_size=rows)))
    firsts = [World(rank=node * local, size=nodes * local, local_size=local) for node in range(nodes)]
    worlds = [first.at(number) for first in firsts for number in range(local)]
    assert [world.rank for world in worlds] == list(range(nodes * local))
    shares = [world.share_of(np.arange(rows)) for world in worlds]
    assert sorted(row for own, weight in shares if weight for row in own) == list(range(rows))
    assert max(len(own) for own, _ in shares) <= -(-rows // len(worlds))
    mean = sum(weight * losses[own].mean() for own, weight in shares) / len(worlds)
    assert mean == pytest.approx(losses.mean())


def test_a_process_reads_its_place_in_the_world_from_variables_meant_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "3")  # somebody else's
    assert world_from_environment() == World()
    world = World(rank=4, size=8, local_size=4).at(2)
    for name, value in world.variables().items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == world
    assert (world.rank, world.node, world.nodes, world.is_first) == (6, 1, 2, False)


def test_dropout_differs_between_processes_and_is_the_same_again() -> None:
    seeds = [training._step_seed(5, step, rank) for step in range(50) for rank in range(8)]
    assert len(set(seeds)) == 400
    assert seeds == [training._step_seed(5, step, rank) for step in range(50) for rank in range(8)]
    torch.manual_seed(max(seeds))  # torch takes them


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started(spec: StageSpec, **variables: str) -> subprocess.Popen[str]:
    """The stage as a program."""
    folder = Path(spec.output).parent
    folder.mkdir(exist_ok=True)
    place = folder.with_name(folder.name + ".json")
    place.write_bytes(msgspec.json.encode(spec))
    return program([sys.executable, "-m", "ml", spec.stage, "--spec", str(place)], **variables)


def stuck_leader(follower: str, folder: Path) -> subprocess.Popen[str]:
    return program([sys.executable, "-c", LEADER_THAT_IS_STUCK, follower, str(folder)])


def program(command: list[str], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def followers(code: str, folder: Path, size: int = 2) -> _Followers:
    world = World(size=size, local_size=size)
    return _Followers([sys.executable, "-c", code], folder, world, Progress("test"))
