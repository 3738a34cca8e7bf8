"""``python -m ml classify``: the category of every offer of a feed file, as Parquet.

The feed is read as the pipeline reads it, row by row and in its order, and every row of it is in the
result: one that cannot be classified has no category and says why in ``problem``. What is finished lies
in ``OUT.parts/`` until all is (:mod:`ml.serving.parts`): the same command after a kill goes on from there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from dotenv import dotenv_values

from ml.artifacts import ArtifactRef, read_manifest
from ml.errors import InputError
from ml.feed.reading import discover_files, fingerprint, read_batches
from ml.offers import TEXT_VERSION
from ml.progress import Progress
from ml.serving.parts import Job, Parts, Place, Source, parts_of, problems_in
from ml.serving.pool import PredictorPool, WorkerError
from ml.serving.predictor import PREDICTION_SCHEMA, TEXT_COLUMNS, Prediction, prediction_table
from ml.serving.workers import cores_for_workers

OUTPUT_SCHEMA = PREDICTION_SCHEMA.append(pa.field("problem", pa.string()))

_BATCH_OFFERS = 512
_PART_OFFERS = 16_384
"""What a kill can cost, beside what was under way."""

_FEED_COLUMNS = ("offer_id", *TEXT_COLUMNS, "country", "problem")
_PROBLEMS_SHOWN = 5


def main(arguments: Sequence[str]) -> None:
    """Classify a feed from the command line.

    Raises:
        InputError: model, input or output cannot be used.
    """
    options = _options(arguments)
    progress = Progress("classify")
    model = model_folder(options.model)
    if options.plan:
        _say_plan(model, options, progress)
        return
    try:
        counts = classify(model, options.input, options.output, options.workers, progress)
    except WorkerError as error:
        raise SystemExit(f"error: {error}; the same command goes on from what is finished") from None
    offers, problems = counts.total(), counts.total() - counts[None]
    progress.say(f"{offers:,} offers in {options.output}: {counts[None]:,} classified, {problems:,} not")
    for problem, count in counts.most_common(_PROBLEMS_SHOWN + 1):
        if problem is not None:
            progress.say(f"  {count:,}: {problem}")


def classify(
    model: Path, feed: str, output: Path, workers: int | None = None, progress: Progress | None = None
) -> Counter[str | None]:
    """Write the category of every offer of ``feed`` to ``output``, in constant memory.

    Killed at any moment, the same call goes on where it stopped: no offer is lost, doubled or out of
    order. With another model it starts anew; where only files of the feed changed, with the first part
    that holds offers of one of them. An output that is complete already is left alone.

    Args:
        model: A ``compiled_student`` artifact.
        feed: File, folder, glob or URI of offers; several files are taken in the order of their names.
        output: Parquet file of :data:`OUTPUT_SCHEMA`; it appears, or is replaced, when it is complete.
        workers: Predictor processes; None: one per core.
        progress: Where to report.

    Returns:
        Number of offers by problem; None is the key of those that were classified.

    Raises:
        InputError: the model, a file of the feed or the place of the output cannot be used.
        WorkerError: predictor processes died.
    """
    progress = progress or Progress("classify")
    job = _job(model, feed)
    with parts_of(output, job) as parts:
        if parts.is_joined():
            progress.say(_complete(output))
            counts = _problems_of(output)
        else:
            if message := parts.take_over():
                progress.say(message)
            progress.say(_plan(model, job, parts, workers))
            _classify_rest(model, job, parts, workers, progress)
            counts = parts.join(OUTPUT_SCHEMA, progress)
        parts.clear()
    return counts


def _job(model: Path, feed: str) -> Job:
    sources = [Source(file, fingerprint(file)) for file in _files_of(feed)]
    return Job(
        model=read_manifest(model).digest,
        text_version=TEXT_VERSION,
        columns=[f"{field.name} {field.type}" for field in OUTPUT_SCHEMA],
        sources=sources,
    )


def _say_plan(model: Path, options: argparse.Namespace, progress: Progress) -> None:
    job = _job(model, options.input)
    with parts_of(options.output, job) as parts:
        if parts.is_joined():
            progress.say(_complete(options.output))
            return
        if message := parts.take_over(only_look=True):
            progress.say(message)
        progress.say(_plan(model, job, parts, options.workers))


def _complete(output: Path) -> str:
    return f"{output} is complete already; remove it to classify these offers once more"


def _plan(model: Path, job: Job, parts: Parts, workers: int | None) -> str:
    """What there is to do, in one line."""
    total = _offers_in(job)
    processes = len(cores_for_workers(model, workers))
    offers = "offers (how many is known when all are read)" if total is None else f"{total:,} offers"
    pieces = "parts" if total is None else f"{-(-total // _PART_OFFERS):,} parts"
    done = f", {parts.offers:,} offers in {parts.count:,} parts are done" if parts.count else ""
    return f"{offers} in {len(job.sources):,} files, {pieces} of {_PART_OFFERS:,}, {processes} workers{done}"


def _classify_rest(model: Path, job: Job, parts: Parts, workers: int | None, progress: Progress) -> None:
    """Add the parts that are missing."""
    total = _offers_in(job)
    if total is not None and parts.offers == total:
        return
    places: deque[Place] = deque()
    waiting: list[pa.Table] = []
    rows = 0
    with (
        PredictorPool(model, workers) as pool,
        progress.bar("classifying", total=total, unit="offers", done=parts.offers) as bar,
    ):
        done_before, started_at = parts.offers, time.monotonic()
        for predictions in pool.predict(_batches(job.sources, parts.place, places)):
            waiting.append(_table(predictions))
            rows += len(predictions)
            place = places.popleft()
            bar.update(len(predictions))
            if rows >= _PART_OFFERS:
                is_first = parts.offers == done_before
                parts.add(pa.concat_tables(waiting), place)
                waiting, rows = [], 0
                if is_first:
                    progress.say(_estimate(parts.offers - done_before, total, parts, started_at))
        if waiting:
            parts.add(pa.concat_tables(waiting), place)


def _table(predictions: Sequence[Prediction]) -> pa.Table:
    problems = pa.array([prediction.problem for prediction in predictions], pa.string())
    return prediction_table(predictions).append_column(OUTPUT_SCHEMA.field("problem"), problems)


def _estimate(offers: int, total: int | None, parts: Parts, started_at: float) -> str:
    """How long the rest will take, judged by the first part."""
    rate = offers / max(time.monotonic() - started_at, 1e-9)
    if total is None:
        return f"the first part went at {rate:,.0f} offers/s"
    minutes = (total - parts.offers) / rate / 60
    return f"the first part went at {rate:,.0f} offers/s; about {minutes:,.1f} min for the other offers"


def _problems_of(output: Path) -> Counter[str | None]:
    counts: Counter[str | None] = Counter()
    with pq.ParquetFile(output) as file:
        for batch in file.iter_batches(columns=["problem"]):
            counts.update(problems_in(pa.Table.from_batches([batch])))
    return counts


def model_folder(model: str) -> Path:
    """Folder of the model that ``--model`` names; ``current`` is the one that was deployed last.

    It is looked up in the home of the pipeline, ``OFFER_ASSETS_HOME`` in the environment or in
    ``.env``, whether the endpoint runs or not.

    Raises:
        InputError: no endpoint was deployed there.
    """
    if model != "current":
        return Path(model)
    home = pipeline_home()
    pointers = sorted(home.glob("pointers/*/offer_endpoint.json"), key=lambda file: file.stat().st_mtime)
    if not pointers:
        raise InputError(
            f"--model current: no endpoint was deployed from {home}; materialize offer_endpoint, "
            "set OFFER_ASSETS_HOME, or give a folder"
        )
    path = pointers[-1]
    try:
        deployed = msgspec.json.decode(path.read_bytes(), type=ArtifactRef)
    except msgspec.DecodeError as error:
        raise InputError(f"--model current: {path} cannot be read: {error}; give a folder instead") from None
    # by kind and key, not by the stored URI: the home may have been moved
    return home / "artifacts" / deployed.kind / deployed.key


def pipeline_home() -> Path:
    """``OFFER_ASSETS_HOME`` of the environment or of ``.env``, or its default."""
    settings = {**dotenv_values(".env"), **os.environ}
    return Path(settings.get("OFFER_ASSETS_HOME") or ".offer_assets").expanduser()


def _files_of(feed: str) -> list[str]:
    try:
        return discover_files(feed)
    except InputError as error:
        raise InputError(str(error).replace("OFFER_FEED", "IN", 1)) from None


def _batches(sources: Sequence[Source], place: Place, places: deque[Place]) -> Iterator[list[dict[str, Any]]]:
    """The offers from ``place`` on; for each batch, the place behind it is put into ``places``.

    Raises:
        InputError: a file cannot be read, or is another one than when it was looked at.
    """
    for number in range(place.file, len(sources)):
        source = sources[number]
        row = place.row if number == place.file else 0
        for batch in read_batches(source.uri, skip=row):
            columns = batch.select(list(_FEED_COLUMNS))
            for start in range(0, columns.num_rows, _BATCH_OFFERS):
                offers = columns.slice(start, _BATCH_OFFERS)
                row += offers.num_rows
                places.append(Place(number, row))
                yield offers.to_pylist()
        if fingerprint(source.uri) != source.fingerprint:
            raise InputError(f"{source.uri} changed while it was read; run again")


def _offers_in(job: Job) -> int | None:
    """Rows in all, where the files know it without being read."""
    files = [source.uri for source in job.sources]
    if not all(file.endswith(".parquet") and Path(file).is_file() for file in files):
        return None
    try:
        return sum(pq.read_metadata(file).num_rows for file in files)
    except (pa.ArrowInvalid, OSError):
        return None  # reading the feed says what is wrong with it


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ml classify",
        description="Assign a category to every offer of a feed and write "
        f"{', '.join(OUTPUT_SCHEMA.names)} as Parquet, in the order of the feed. After a kill, the same "
        "command goes on where it stopped (finished parts lie in OUT.parts).",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a compiled_student artifact, or 'current'"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes (one per core; on a Neuron host one per Neuron core)",
    )
    parser.add_argument("--plan", action="store_true", help="say what there is to do, and stop")
    parser.add_argument("input", metavar="IN", help="offer feed: file, folder, glob or URI")
    parser.add_argument("output", metavar="OUT", type=Path, help="Parquet file to write")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers {options.workers}: expected at least 1")
    return options
