"""The answers of a bulk job, and those captured before, put together: one for each offer, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ml.artifacts import read_manifest, verify
from ml.errors import InputError
from ml.runner import StageContext
from ml.serving.predictor import Prediction, prediction_table
from ml.serving.sent import OUT_SUFFIX
from ml.serving.transform_input import CAPTURED_FILE, read_shards
from ml.stages import CataloguedOffersParameters

_OFFERS_FILE = "offers.parquet"
_ROWS_AT_ONCE = 10_000
_AGAIN = "delete the job's answers and run again"


def answered_tables(
    context: StageContext, parameters: CataloguedOffersParameters, version: str
) -> Iterator[pa.Table]:
    """Tables of ``PREDICTION_SCHEMA`` with a row for every offer, in order; memory does not grow with them.

    Args:
        context: With the input artifacts ``offers`` and ``compiled_student``.
        parameters: Name the folders of what was asked and what was answered.
        version: The model version that has to have answered.

    Raises:
        InputError: what was asked are other offers, or an answer is missing, doubled, damaged or by another
            version; the line names file and line.
    """
    prepared = Path(parameters.prepared)
    _check_is_of(prepared, context)
    asked = _answers(prepared, Path(parameters.answers))
    captured = _captured(prepared)
    merged = _merged(context.input("offers") / _OFFERS_FILE, captured, asked, version)
    with context.progress.bar(
        "putting answers together",
        pq.read_metadata(context.input("offers") / _OFFERS_FILE).num_rows,
        "offers",
    ) as bar:
        while predictions := list(islice(merged, _ROWS_AT_ONCE)):
            yield prediction_table(predictions)
            bar.update(len(predictions))


def _check_is_of(prepared: Path, context: StageContext) -> None:
    """What was prepared has to be sound, and of these offers and this model."""
    inputs = verify(prepared, kinds=["transform_input"]).inputs
    for name in ("offers", "compiled_student"):
        if inputs.get(name) != (expected := read_manifest(context.input(name)).digest):
            raise InputError(f"{prepared} was made of {name} {inputs.get(name)}, expected {expected}")


def _merged(
    offers: Path,
    captured: Iterator[tuple[int, Prediction]],
    asked: Iterator[tuple[str, Prediction]],
    version: str,
) -> Iterator[Prediction]:
    """For each offer its captured answer, or else the next one of the job.

    Raises:
        InputError: they do not fit the offers.
    """
    ready = next(captured, None)
    for row, offer_id in enumerate(_offer_ids(offers)):
        if ready is not None and ready[0] == row:
            place, prediction = f"{CAPTURED_FILE} row {row}", ready[1]
            ready = next(captured, None)
        else:
            following = next(asked, None)
            if following is None:
                raise InputError(f"offer {offer_id} has no answer: {_AGAIN}")
            place, prediction = following
        if prediction.offer_id != offer_id:
            raise InputError(
                f"{place} is about offer {prediction.offer_id}, expected {offer_id} (an answer is missing or "
                f"doubled): {_AGAIN}"
            )
        if prediction.model_version != version:
            raise InputError(
                f"{place} is by model version {prediction.model_version}, expected {version}: {_AGAIN}"
            )
        yield prediction
    surplus = next(asked, None)
    if surplus is not None:
        raise InputError(f"{surplus[0]} answers more than was asked: {_AGAIN}")


def _answers(prepared: Path, answers: Path) -> Iterator[tuple[str, Prediction]]:
    """The job's answers in the order of the offers, each with its place.

    Raises:
        InputError: a file is missing, damaged, or has not one answer for each of its offers.
    """
    for shard in read_shards(prepared):
        path = answers / f"{shard.file}{OUT_SUFFIX}"
        count = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue  # between two requests that the service puts together
                    place, count = f"{path} line {number}", count + 1
                    yield place, _prediction(line, place)
        except FileNotFoundError:
            raise InputError(f"{path} is missing ({shard.offers:,} answers): {_AGAIN}") from None
        if count != shard.offers:
            raise InputError(f"{path} has {count:,} answers for {shard.offers:,} offers: {_AGAIN}")


def _prediction(line: bytes, place: str) -> Prediction:
    try:
        return msgspec.json.decode(line, type=Prediction)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place} is not a prediction: {' '.join(str(error).split())[:200]}: {_AGAIN}"
        ) from None


def _captured(prepared: Path) -> Iterator[tuple[int, Prediction]]:
    with pq.ParquetFile(prepared / CAPTURED_FILE) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE):
            for answer in batch.to_pylist():
                yield answer.pop("row"), Prediction(**answer)


def _offer_ids(offers: Path) -> Iterator[str]:
    with pq.ParquetFile(offers) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["offer_id"]):
            yield from cast("list[str]", batch["offer_id"].to_pylist())
