"""Bulk classification that is killed: what it goes on from, and that no offer is lost, doubled or moved."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml import __main__ as command_line
from ml.errors import InputError
from ml.feed.reading import read_batches
from ml.progress import Progress
from ml.serving import classify as classify_module
from ml.serving import parts as parts_module
from ml.serving.classify import classify
from ml.serving.parts import work_folder
from ml.serving.predictor import Prediction, problem_of
from tests.ml.compiled_models import TITLES, seal


class Killed(BaseException):
    """Stands for a signal that no code can answer."""


class Pool:
    """In place of the predictor processes: answers with the title, dies where it is told to."""

    asked: list[str]
    dies_after: int

    def __init__(self, folder, workers=None):
        self.left = Pool.dies_after

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def predict(self, batches):
        for batch in batches:
            if self.left <= 0:
                raise Killed
            self.left -= 1
            Pool.asked += [offer["offer_id"] for offer in batch]
            yield [_answer(offer) for offer in batch]


def _answer(offer):
    problem = problem_of(offer)
    return Prediction(
        offer_id=offer["offer_id"],
        category_id=None if problem else offer["title"],
        category_path=None,
        confidence=None,
        model_version="m",
        taxonomy_version="t",
        problem=problem,
    )


def _shrink(patch: pytest.MonkeyPatch) -> None:
    """Small batches, parts and row groups, and answers without a model."""
    patch.setattr(classify_module, "_BATCH_OFFERS", 4)
    patch.setattr(classify_module, "_PART_OFFERS", 10)
    patch.setattr(parts_module, "_ROW_GROUP_OFFERS", 25)
    patch.setattr(classify_module, "PredictorPool", Pool)
    patch.setattr(classify_module, "cores_for_workers", lambda *_: [None])
    Pool.asked, Pool.dies_after = [], 10**9


@pytest.fixture
def small(monkeypatch):
    _shrink(monkeypatch)


@pytest.fixture
def model(tmp_path):
    return _model(tmp_path / "model", b"1")


def _model(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_bytes(content)
    return seal(folder, "compiled_student")


def _write(path: Path, ids: list[str]) -> None:
    rows = {"offer_id": ids, "shop_id": ["s"] * len(ids), "title": [f"title of {name}" for name in ids]}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(rows, schema=_SCHEMA), path, row_group_size=6)
    elif path.suffix == ".csv":
        lines = [",".join(values) for values in zip(*rows.values(), strict=True)]
        path.write_text("\n".join([",".join(rows), *lines]) + "\n")
    else:
        lines = [
            json.dumps(dict(zip(rows, values, strict=True))) for values in zip(*rows.values(), strict=True)
        ]
        path.write_text("\n".join(lines) + "\n")


_SCHEMA = pa.schema({"offer_id": pa.string(), "shop_id": pa.string(), "title": pa.string()})


def _feed(folder: Path, files: list[tuple[str, int]]) -> list[str]:
    """Write files of so many offers each; returns the ids in the order of the feed."""
    folder.mkdir()
    every = []
    for number, (kind, count) in enumerate(files):
        ids = [f"{number}-{row}" for row in range(count)]
        _write(folder / f"{number}.{kind}", ids)
        every += ids
    return every


def _ids(output: Path) -> list[str]:
    table = pq.read_table(output)
    assert table["category_id"].to_pylist() == [f"title of {name}" for name in table["offer_id"].to_pylist()]
    return table["offer_id"].to_pylist()


def _classify_until(dies_after: int, model: Path, feed: Path, output: Path) -> bool:
    """Whether it came to its end before it died."""
    Pool.dies_after = dies_after
    try:
        classify(model, str(feed), output, workers=1)
    except Killed:
        return False
    return True


def _parts(output: Path) -> list[Path]:
    return sorted(work_folder(output).glob("part-*.parquet"))


def _offers_in_parts(output: Path) -> int:
    return sum(pq.read_metadata(part).num_rows for part in _parts(output))


_FILES = st.lists(
    st.tuples(st.sampled_from(["csv", "parquet", "jsonl"]), st.integers(1, 40)), min_size=1, max_size=4
)


@settings(max_examples=50, deadline=None)
@given(files=_FILES, deaths=st.lists(st.integers(0, 12), max_size=6))
def test_whatever_ends_it_every_offer_is_there_once_and_in_order(files, deaths):
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as name:
        _shrink(patch)
        folder = Path(name)
        every = _feed(folder / "feed", files)
        model, output = _model(folder / "model", b"1"), folder / "out.parquet"
        for dies_after in [*deaths, 10**9]:
            Pool.asked, finished = [], _offers_in_parts(output)
            ended = _classify_until(dies_after, model, folder / "feed", output)
            # No offer of a finished part is asked again, and none is left out.
            assert Pool.asked == every[finished : finished + len(Pool.asked)]
            if ended:
                break
        assert _ids(output) == every
        assert not work_folder(output).exists()


@settings(max_examples=40, deadline=None)
@given(files=_FILES, skip=st.integers(0, 50))
def test_rows_that_are_skipped_are_those_at_the_beginning(files, skip):
    with TemporaryDirectory() as name:
        _feed(Path(name) / "feed", files)
        for path in (Path(name) / "feed").iterdir():
            every = [row for batch in read_batches(str(path)) for row in batch.to_pylist()]
            rest = [row for batch in read_batches(str(path), skip=skip) for row in batch.to_pylist()]
            assert rest == every[skip:]


@pytest.mark.parametrize("tables", range(3))
def test_killed_while_parts_are_joined_it_joins_them_again(tables, small, model, tmp_path, monkeypatch):
    every = _feed(tmp_path / "feed", [("csv", 70)])
    output = tmp_path / "out.parquet"
    output.write_text("the earlier result")
    counted = []

    def dies(table):
        if len(counted) == tables:
            raise Killed
        counted.append(table)
        return problems_in(table)

    problems_in = parts_module.problems_in
    with monkeypatch.context() as patch:
        patch.setattr(parts_module, "problems_in", dies)
        finished = _classify_until(10**9, model, tmp_path / "feed", output)
    assert finished == (tables == 2)  # 70 offers are two row groups of at least 25
    assert finished or output.read_text() == "the earlier result"
    Pool.asked = []
    counts = classify(model, str(tmp_path / "feed"), output)
    assert Pool.asked == []
    assert _ids(output) == every
    assert counts == {None: 70}


def test_killed_while_it_tidies_up_it_only_does_that(small, model, tmp_path, monkeypatch):
    every = _feed(tmp_path / "feed", [("csv", 30)])
    output = tmp_path / "out.parquet"

    def dies(folder):
        next(iter(sorted(folder.glob("part-*")))).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(parts_module.shutil, "rmtree", dies)
        assert not _classify_until(10**9, model, tmp_path / "feed", output)
    assert work_folder(output).exists()
    Pool.asked = []
    assert classify(model, str(tmp_path / "feed"), output) == {None: 30}
    assert Pool.asked == []
    assert _ids(output) == every
    assert not work_folder(output).exists()


def test_a_complete_output_is_left_alone_until_something_changes(small, model, tmp_path, capsys):
    every = _feed(tmp_path / "feed", [("csv", 30)])
    output = tmp_path / "out.parquet"
    classify(model, str(tmp_path / "feed"), output)
    written = output.stat().st_mtime_ns
    said = _Listener()
    classify(model, str(tmp_path / "feed"), output, progress=said.progress)
    assert output.stat().st_mtime_ns == written
    assert "is complete already" in said.lines[0]
    plan = ["classify", "--plan", "--model", str(model), str(tmp_path / "feed"), str(output)]
    assert command_line.main(plan) == 0
    assert "is complete already" in capsys.readouterr().err.splitlines()[-1]
    Pool.asked = []
    classify(_model(tmp_path / "model", b"2"), str(tmp_path / "feed"), output)
    assert Pool.asked == every


@pytest.mark.parametrize(
    ("change", "kept", "said"),
    [
        ("nothing", 72, "^going on after 72 offers"),
        ("last file", 60, "files of the feed changed: going on after 60 offers, 1 later parts"),
        ("first file", 0, "files of the feed changed since .* starting anew, 6 parts are dropped"),
        ("another file behind", 72, "^going on after 72 offers"),
        ("another file before", 0, "files of the feed changed since .* starting anew"),
        ("another model", 0, "model or this program is another since .* starting anew, 6 parts are dropped"),
        ("a part was cut off", 24, "a part is damaged or gone: going on after 24 offers, 4 later parts"),
        ("a part is gone", 24, "a part is damaged or gone: going on after 24 offers, 3 later parts"),
        ("the job is damaged", 0, "another since .* starting anew"),
    ],
)
def test_what_changed_meanwhile_is_made_anew(change, kept, said, small, model, tmp_path):
    feed, output = tmp_path / "feed", tmp_path / "out.parquet"
    every = _feed(feed, [("csv", 40), ("parquet", 20), ("jsonl", 20)])
    assert not _classify_until(19, model, feed, output)
    assert [pq.read_metadata(part).num_rows for part in _parts(output)] == [12] * 6
    third = _parts(output)[2]
    match change:
        case "last file":
            every[60:] = ["new-1", "new-2"]
            _write(feed / "2.jsonl", every[60:])
        case "first file":
            every[:40] = ["new-1", "new-2"]
            _write(feed / "0.csv", every[:2])
        case "another file behind":
            every.append("new-1")
            _write(feed / "3.csv", ["new-1"])
        case "another file before":
            every.insert(0, "new-1")
            _write(feed / "-.csv", ["new-1"])
        case "another model":
            model = _model(tmp_path / "model", b"2")
        case "a part was cut off":
            third.write_bytes(third.read_bytes()[:-9])
        case "a part is gone":
            third.unlink()
        case "the job is damaged":
            (work_folder(output) / "job.json").write_text("{")
    Pool.asked, Pool.dies_after = [], 10**9
    listener = _Listener()
    classify(model, str(feed), output, progress=listener.progress)
    assert re.search(said, listener.lines[0])
    assert Pool.asked == every[kept:]
    assert _ids(output) == every


def test_a_file_that_changes_while_it_is_read_is_an_error(small, model, tmp_path, monkeypatch):
    _feed(tmp_path / "feed", [("csv", 40)])
    stamps = iter(["before", "after"])
    monkeypatch.setattr(classify_module, "fingerprint", lambda _: next(stamps))
    with pytest.raises(InputError, match=r"0\.csv changed while it was read; run again"):
        classify(model, str(tmp_path / "feed"), tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_one_output_is_made_by_one_process_at_a_time(small, model, tmp_path, monkeypatch):
    feed, output = tmp_path / "feed", tmp_path / "out.parquet"
    _feed(feed, [("csv", 40)])
    predict = Pool.predict

    def meets_another(self, batches):
        with pytest.raises(InputError, match=r"out\.parquet is being made by another process"):
            classify(model, str(feed), output)
        yield from predict(self, batches)

    monkeypatch.setattr(Pool, "predict", meets_another)
    assert classify(model, str(feed), output) == {None: 40}


def test_a_plan_says_what_there_is_to_do_and_does_none_of_it(small, model, tmp_path, capsys):
    feed, output = tmp_path / "feed", tmp_path / "out.parquet"
    _feed(feed, [("parquet", 40), ("parquet", 25)])
    command = ["classify", "--plan", "--model", str(model), str(feed), str(output)]
    assert command_line.main(command) == 0
    assert "65 offers in 2 files, 7 parts of 10, 1 workers\n" in capsys.readouterr().err
    assert not work_folder(output).exists()
    _classify_until(9, model, feed, output)
    Pool.asked = []
    assert command_line.main(command) == 0
    assert "1 workers, 36 offers in 3 parts are done" in capsys.readouterr().err
    assert Pool.asked == []
    assert _offers_in_parts(output) == 36
    _model(tmp_path / "model", b"2")
    assert command_line.main(command) == 0
    assert "starting anew, 3 parts are dropped" in capsys.readouterr().err
    _model(tmp_path / "model", b"1")
    assert not _classify_until(0, model, feed, output)
    assert _offers_in_parts(output) == 36  # to look at another model has cost nothing


class _Listener:
    def __init__(self):
        self.lines = []
        self.progress = Progress("classify", self.lines.append)


class _Command:
    """``python -m ml classify`` with small parts, in a process of its own."""

    def __init__(self, model: Path, feed: Path, output: Path, part_offers: int = 30):
        program = _SMALL_PARTS.format(part=part_offers)
        arguments = ["classify", "--model", str(model), "--workers", "2", str(feed), str(output)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with suppress(FileNotFoundError):
            return [int(number) for number in path.read_text().split()]
        return []

    def wait_for(self, what: Callable[[], bool]) -> bool:
        """False if it ended before."""
        while self.process.poll() is None:
            if what():
                return True
            time.sleep(0.001)
        return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


_SMALL_PARTS = """
import sys
from ml.serving import classify, parts
classify._BATCH_OFFERS, classify._PART_OFFERS, parts._ROW_GROUP_OFFERS = 7, {part}, 70
from ml.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def _titled_feed(folder: Path, offers: int) -> list[str]:
    """Offers that a real model answers, half of the file in either format."""
    folder.mkdir()
    ids = [f"o{number}" for number in range(offers)]
    titles = [f"{TITLES[number % len(TITLES)]} {number // 40}" for number in range(offers)]
    half = offers // 2
    rows = pa.table({"offer_id": ids, "shop_id": ["s"] * offers, "title": titles})
    pq.write_table(rows.slice(0, half), folder / "0.parquet", row_group_size=100)
    lines = [f"{name},s,{title}" for name, title in zip(ids[half:], titles[half:], strict=True)]
    (folder / "1.csv").write_text("\n".join(["offer_id,shop_id,title", *lines]) + "\n")
    return ids


def test_kill_minus_nine_at_any_moment_loses_and_doubles_nothing(compiled_student, tmp_path):
    feed, output = tmp_path / "feed", tmp_path / "out.parquet"
    every = _titled_feed(feed, 3000)
    classify(compiled_student, str(feed), tmp_path / "uninterrupted.parquet", workers=2)
    chance = random.Random(5)
    for _ in range(3):
        command = _Command(compiled_student, feed, output)
        parts = len(_parts(output)) + chance.randint(2, 9)
        command.wait_for(lambda parts=parts: len(_parts(output)) >= parts)
        time.sleep(chance.random() * 0.02)
        os.kill(chance.choice(command.children()), signal.SIGKILL)  # a worker: another takes its place
        command.wait_for(lambda parts=parts: len(_parts(output)) >= parts + 2)
        workers = command.children()
        command.kill()
        assert not output.exists()
        _wait_until_gone(workers)
    command = _Command(compiled_student, feed, output)
    _, said = command.process.communicate()
    assert "going on after" in said
    assert pq.read_table(output)["offer_id"].to_pylist() == every
    assert pq.read_table(output).equals(pq.read_table(tmp_path / "uninterrupted.parquet"))
    assert not work_folder(output).exists()


def test_kill_minus_nine_in_the_last_moments_loses_and_doubles_nothing(compiled_student, tmp_path):
    """While parts are joined, and just before or after the result gets its name."""
    feed, output = tmp_path / "feed", tmp_path / "out.parquet"
    every = _titled_feed(feed, 1500)
    joined = work_folder(output) / "joined.partial"
    for seconds in (0.0, 0.05, 0.2):
        command = _Command(compiled_student, feed, output, part_offers=3)
        command.wait_for(lambda: joined.exists() or output.exists())
        time.sleep(seconds)
        command.kill()
        assert not output.exists() or pq.read_table(output)["offer_id"].to_pylist() == every
    command = _Command(compiled_student, feed, output, part_offers=3)
    command.process.communicate()
    assert pq.read_table(output)["offer_id"].to_pylist() == every
    assert not work_folder(output).exists()


def _wait_until_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(_is_alive, processes)):
        assert time.monotonic() < deadline, "workers outlive the process that they work for"
        time.sleep(0.05)


def _is_alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
