"""Trains or measures one model in a process of its own: ``python -m benchmarks.one_model TASK.json``.

A process to itself makes peak memory the model's own, and lets a peer that fails, or that is not installed,
be a row with its reason instead of the end of the run.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import msgspec
import pyarrow.parquet as pq

from benchmarks.our_models import ENDPOINT, MODELS, Answerer, OurModel, with_categories
from benchmarks.peers import PEERS, Lesson, Peer
from benchmarks.processes import NotHereError, Offers, environment, peak_memory_bytes
from ml.offers import CLEAN_SCHEMA, offer_text

PASSES = 3
WARM_UP_OFFERS = 16
_TRIED_OFFERS = 64
_GROWTH = 4
_STREAMED_AT_ONCE = 8_192

ALL: dict[str, OurModel | Peer] = {model.name: model for model in (*MODELS, *PEERS)}
"""Every row that a table can have, by name."""


MEASURABLE: dict[str, OurModel | Peer] = {**ALL, ENDPOINT.name: ENDPOINT}
"""The endpoint too, whose answers are those of the model that it serves."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What one process does."""

    kind: Literal["train", "answer", "measure", "stream"]
    model: str
    folder: str
    """Of the model: to write it into, or to read it from."""
    result: str
    """File for what comes out."""
    offers: str = ""
    """Parquet file: offers to learn from, or to answer."""
    parts: dict[str, str] = {}
    cores: int = 1
    seconds: float = 10.0
    """About how long a measurement takes; so many offers are asked about."""
    quick: bool = False
    stream_offers: int = 0
    """Length of a stream."""
    categories: int = 0
    """Of a synthetic output layer; 0: the model as it is."""


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of a model with one number of cores."""

    offers_per_second: float
    lowest: float
    highest: float
    offers: int
    """In each pass, no two with the same text, and none of an earlier pass."""
    peak_memory_bytes: int
    """Of all processes of the model, with the offers and the benchmark itself."""
    memory_before_bytes: int
    """Held before the model was loaded: what the benchmark itself takes."""
    load_seconds: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a process leaves behind."""

    not_run: str = ""
    """Why there is nothing, in words."""
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    answers: list[str] = []
    speed: Speed | None = None


def run(task: Task, packages: Path | None = None) -> Outcome:
    """Have a fresh process do the task; whatever goes wrong there is a reason in the outcome.

    Args:
        task: What to do.
        packages: Folder of packages that this model needs in place of the installed ones.
    """
    path = Path(task.result)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    written = path.with_suffix(".task.json")
    written.write_bytes(msgspec.json.encode(task))
    threads = task.cores if task.kind in ("measure", "stream") else None
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.one_model", str(written)],
        env=environment(threads, packages),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    written.unlink()
    if process.returncode == 0:
        return msgspec.json.decode(path.read_bytes(), type=Outcome)
    if process.returncode < 0:
        return Outcome(not_run=f"killed by signal {-process.returncode}")
    lines = process.stderr.strip().splitlines() or ["no message"]
    return Outcome(not_run=f"failed: {lines[-1][:300]}")


def open_model(name: str, folder: Path, cores: int) -> AbstractContextManager[Answerer]:
    """The model of this name in ``folder``."""
    return MEASURABLE[name].open(folder, cores)


def measured(answerer: Answerer, offers: Offers, seconds: float) -> tuple[list[float], int]:
    """Offers per second of each pass, and offers in a pass.

    Args:
        answerer: The model.
        offers: Offers, no two with the same text.
        seconds: About how long all passes may take together.
    """
    stream = numbered(offers)
    answerer.answer(list(itertools.islice(stream, WARM_UP_OFFERS)))
    # What a model learns of words only from the offers it meets makes the first ones slow: tries grow until
    # one takes as long as half a pass.
    count, took = _TRIED_OFFERS // _GROWTH, 0.0
    while took < seconds / PASSES / 2:
        count *= _GROWTH
        took = _seconds_for(answerer, list(itertools.islice(stream, count)))
    count = max(_TRIED_OFFERS, int(count / took * seconds / PASSES))
    rates = [count / _seconds_for(answerer, list(itertools.islice(stream, count))) for _ in range(PASSES)]
    return rates, count


def _seconds_for(answerer: Answerer, batch: Offers) -> float:
    started_at = time.perf_counter()
    answerer.answer(batch)
    return time.perf_counter() - started_at


def streamed(answerer: Answerer, offers: Offers, count: int) -> float:
    """Offers per second of a stream of ``count`` offers, made as needed, no two with the same text."""
    stream = numbered(offers)
    answerer.answer(list(itertools.islice(stream, WARM_UP_OFFERS)))
    started_at = time.perf_counter()
    for start in range(0, count, _STREAMED_AT_ONCE):
        answerer.answer(list(itertools.islice(stream, min(_STREAMED_AT_ONCE, count - start))))
    return count / (time.perf_counter() - started_at)


def numbered(offers: Offers) -> Iterator[dict[str, Any]]:
    """The offers over and over, each title with a number that no other has: no cache answers for a model."""
    for number, offer in enumerate(itertools.cycle(offers)):
        yield {**offer, "title": f"{offer['title']} {number}"}


def distinct(offers: Offers) -> list[dict[str, Any]]:
    """The first offer of each text."""
    first: dict[str, dict[str, Any]] = {}
    for offer in offers:
        first.setdefault(offer_text(offer), dict(offer))
    return list(first.values())


def _do(task: Task) -> Outcome:
    offers: Sequence[dict[str, Any]] = pq.read_table(task.offers).to_pylist()
    folder = Path(task.folder)
    if task.kind == "train":
        peer = ALL[task.model]
        assert isinstance(peer, Peer)
        lesson = Lesson(
            titles=[offer_text({"title": offer["title"]}) for offer in offers],
            texts=[offer_text(offer) for offer in offers],
            categories=[offer["category_id"] for offer in offers],
            parts={name: Path(part) for name, part in task.parts.items()},
            quick=task.quick,
        )
        started_at = time.perf_counter()
        peer.train(lesson, folder)
        return Outcome(seconds=time.perf_counter() - started_at, peak_memory_bytes=peak_memory_bytes())
    columns = [name for name in CLEAN_SCHEMA.names if name not in ("category_id", "offered_at")]
    asked = [{name: offer[name] for name in columns} for offer in offers]
    memory_before, started_at = peak_memory_bytes(), time.perf_counter()
    opened = (
        with_categories(task.model, folder, task.categories, asked)
        if task.categories
        else open_model(task.model, folder, task.cores)
    )
    with opened as answerer:
        load_seconds = time.perf_counter() - started_at
        if task.kind == "answer":
            return Outcome(answers=answerer.answer(asked), seconds=time.perf_counter() - started_at)
        if task.kind == "stream":
            rates, count = [streamed(answerer, distinct(asked), task.stream_offers)], task.stream_offers
        else:
            rates, count = measured(answerer, distinct(asked), task.seconds)
        return Outcome(
            speed=Speed(
                offers_per_second=statistics.median(rates),
                lowest=min(rates),
                highest=max(rates),
                offers=count,
                peak_memory_bytes=peak_memory_bytes(),
                memory_before_bytes=memory_before,
                load_seconds=load_seconds,
            )
        )


def main() -> None:
    """Do the task in the file given."""
    task = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Task)
    try:
        outcome = _do(task)
    except NotHereError as error:
        outcome = Outcome(not_run=str(error))
    Path(task.result).write_bytes(msgspec.json.encode(outcome))


if __name__ == "__main__":
    main()
