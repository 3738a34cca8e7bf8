"""``python -m ml classify``: the category of every offer of a feed file, as Parquet.

The feed is read as the pipeline reads it, row by row and in its order, and every row of it is in the
result: one that cannot be classified has no category and says why in ``problem``.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from dotenv import dotenv_values

from ml.artifacts import ArtifactRef
from ml.errors import InputError
from ml.feed.reading import discover_files, read_batches
from ml.progress import Progress
from ml.serving.pool import PredictorPool, WorkerError
from ml.serving.predictor import PREDICTION_SCHEMA, TEXT_COLUMNS, prediction_table

OUTPUT_SCHEMA = PREDICTION_SCHEMA.append(pa.field("problem", pa.string()))

_BATCH_OFFERS = 512
_ROW_GROUP_OFFERS = 65_536
_FEED_COLUMNS = ("offer_id", *TEXT_COLUMNS, "country", "problem")
_PROBLEMS_SHOWN = 5


def main(arguments: Sequence[str]) -> None:
    """Classify a feed from the command line.

    Raises:
        InputError: model, input or output cannot be used.
    """
    options = _options(arguments)
    progress = Progress("classify")
    try:
        counts = classify(
            model_folder(options.model), options.input, options.output, options.workers, progress
        )
    except WorkerError as error:
        raise SystemExit(f"error: {error}") from None
    offers, problems = counts.total(), counts.total() - counts[None]
    progress.say(f"{offers:,} offers in {options.output}: {counts[None]:,} classified, {problems:,} not")
    for problem, count in counts.most_common(_PROBLEMS_SHOWN + 1):
        if problem is not None:
            progress.say(f"  {count:,}: {problem}")


def classify(
    model: Path, feed: str, output: Path, workers: int | None = None, progress: Progress | None = None
) -> Counter[str | None]:
    """Write the category of every offer of ``feed`` to ``output``, in constant memory.

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
        WorkerError: a predictor process died.
    """
    progress = progress or Progress("classify")
    files = _files_of(feed)
    counts: Counter[str | None] = Counter()
    with (
        _parquet_writer(output) as writer,
        PredictorPool(model, workers) as pool,
        progress.bar("classifying", total=_offers_in(files), unit="offers") as bar,
    ):
        for predictions in pool.predict(_batches(files)):
            table = prediction_table(predictions)
            problems = [prediction.problem for prediction in predictions]
            writer.write(table.append_column("problem", pa.array(problems, pa.string())))
            counts.update(problems)
            bar.update(len(predictions))
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
    settings = {**dotenv_values(".env"), **os.environ}
    home = Path(settings.get("OFFER_ASSETS_HOME") or ".offer_assets").expanduser()
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


def _files_of(feed: str) -> list[str]:
    try:
        return discover_files(feed)
    except InputError as error:
        raise InputError(str(error).replace("OFFER_FEED", "IN", 1)) from None


def _batches(files: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    for file in files:
        for batch in read_batches(file):
            columns = batch.select(list(_FEED_COLUMNS))
            for start in range(0, columns.num_rows, _BATCH_OFFERS):
                yield columns.slice(start, _BATCH_OFFERS).to_pylist()


def _offers_in(files: Sequence[str]) -> int | None:
    """Rows in all, where the files know it without being read."""
    if not all(file.endswith(".parquet") and Path(file).is_file() for file in files):
        return None
    try:
        return sum(pq.read_metadata(file).num_rows for file in files)
    except (pa.ArrowInvalid, OSError):
        return None  # reading the feed says what is wrong with it


@contextmanager
def _parquet_writer(output: Path) -> Iterator[_GroupedWriter]:
    """Writes beside ``output`` and moves it there if all went well; else nothing of it stays."""
    if output.is_dir():
        raise InputError(f"{output} is a folder; name the Parquet file to write")
    if not output.parent.is_dir():
        raise InputError(f"{output}: folder {output.parent} does not exist; create it or name another")
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        with pq.ParquetWriter(partial, OUTPUT_SCHEMA, compression="zstd") as writer:
            grouped = _GroupedWriter(writer)
            yield grouped
            grouped.flush()
        partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)


class _GroupedWriter:
    """Collects small tables into row groups worth reading."""

    def __init__(self, writer: pq.ParquetWriter) -> None:
        self._writer = writer
        self._tables: list[pa.Table] = []
        self._rows = 0

    def write(self, table: pa.Table) -> None:
        self._tables.append(table)
        self._rows += table.num_rows
        if self._rows >= _ROW_GROUP_OFFERS:
            self.flush()

    def flush(self) -> None:
        if self._tables:
            self._writer.write_table(pa.concat_tables(self._tables))
        self._tables, self._rows = [], 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ml classify",
        description="Assign a category to every offer of a feed and write "
        f"{', '.join(OUTPUT_SCHEMA.names)} as Parquet, in the order of the feed.",
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
    parser.add_argument("input", metavar="IN", help="offer feed: file, folder, glob or URI")
    parser.add_argument("output", metavar="OUT", type=Path, help="Parquet file to write")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers {options.workers}: expected at least 1")
    return options
