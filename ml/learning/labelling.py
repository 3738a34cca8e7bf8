"""Stage ``teacher_labels``: what the teacher thinks of every labelled and unlabelled offer.

Per offer the largest logits are kept, and the rest as one number: the logarithm of the sum of their
exponentials. They are of the whole teacher and, in further rows, of its encoder alone; both are calibrated,
so their softmax is how sure each is.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ml.errors import InputError
from ml.learning.calibration import targets_of
from ml.learning.training_data import strings
from ml.runner import StageContext
from ml.stages import LabellingModel, TeacherLabelsParameters

LABELS_SCHEMA = pa.schema(
    [
        ("offer_id", pa.string()),
        ("source", pa.string()),
        ("model", pa.string()),
        ("top_indices", pa.list_(pa.int32())),
        ("top_logits", pa.list_(pa.float32())),
        ("tail_logsumexp", pa.float32()),
    ]
)
_SOURCES = ("labelled", "unlabelled")


class TeacherLabels(msgspec.Struct, frozen=True):
    """The teacher's labels of one source, in the order of the training sample's rows."""

    offer_ids: list[str]
    top_indices: NDArray[np.int64]
    """(offers, k): class numbers, most likely first."""
    top_logits: NDArray[np.float32]
    """(offers, k), descending."""
    tail_logsumexp: NDArray[np.float32]
    """(offers,); -inf where k classes are all there are."""

    def rows(self, rows: NDArray[np.int64]) -> TeacherLabels:
        """The labels of the offers with these row numbers."""
        return TeacherLabels(
            offer_ids=[self.offer_ids[row] for row in rows],
            top_indices=self.top_indices[rows],
            top_logits=self.top_logits[rows],
            tail_logsumexp=self.tail_logsumexp[rows],
        )

    @property
    def confidence(self) -> NDArray[np.float32]:
        """Probability of the most likely class, (offers,)."""
        result: NDArray[np.float32] = self.probabilities.max(axis=1, initial=0.0)  # there may be no offers
        return result

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """Probabilities of the classes in ``top_indices``, (offers, k)."""
        outcomes = np.concatenate([self.top_logits, self.tail_logsumexp[:, None]], axis=1)
        exponentials = np.exp(outcomes - outcomes[:, :1])
        result: NDArray[np.float32] = exponentials[:, :-1] / exponentials.sum(axis=1, keepdims=True)
        return result


def write_teacher_labels(context: StageContext, parameters: TeacherLabelsParameters) -> dict[str, Any]:
    """Label shard by shard; a finished shard survives a kill. Returns sanity figures.

    Of several processes that share the work, only the first writes.

    Raises:
        InputError: the teacher cannot be read.
    """
    from ml.learning.devices import best_device, training_autocast, use_available_cores
    from ml.learning.distributed import message_of_first
    from ml.learning.ensemble import Teacher

    use_available_cores()
    teacher_folder, sample = context.input("teacher_checkpoint"), context.input("training_sample")
    teacher = Teacher.load(teacher_folder)
    offers = {source: _row_count(sample, source) for source in _SOURCES}
    shards = list(_shards(offers, parameters.shard_offers))
    there = [(context.checkpoints / _shard_name(number)).exists() for number in range(len(shards))]
    there = msgspec.json.decode(message_of_first(msgspec.json.encode(there)), type=list[bool])
    with context.progress.bar("labelling", sum(offers.values()), "offers") as bar:
        for number, (source, start, count) in enumerate(shards):
            if not there[number]:
                rows = _sample_rows(sample, source, ["offer_id", "text"]).slice(start, count)
                with training_autocast(best_device(), parameters.precision):
                    logits = teacher.predict_logits_by_model(strings(rows["text"]), parameters.batch_size)
                tables = [
                    _label_table(strings(rows["offer_id"]), source, model, given, parameters.top_k)
                    for model, given in logits.items()
                ]
                if context.is_first:
                    _write_shard(context.checkpoints / _shard_name(number), pa.concat_tables(tables))
            bar.update(count)
    if not context.is_first:
        return {}
    for number in range(len(shards)):
        shutil.copyfile(context.checkpoints / _shard_name(number), context.output / _shard_name(number))
    shutil.copyfile(teacher_folder / "labels.json", context.output / "labels.json")
    return {
        **offers,
        "shards": len(shards),
        "top_k": min(parameters.top_k, len(teacher.labels)),
        **_sanity_figures(context.output, sample),
    }


def read_teacher_labels(folder: Path, source: str, model: LabellingModel = "teacher") -> TeacherLabels:
    """The labels of one source ('labelled' or 'unlabelled') of the artifact in ``folder``.

    Args:
        folder: Of the artifact.
        source: Which offers.
        model: Who gave them: the whole teacher or its encoder alone.
    """
    table = pq.read_table(
        sorted(folder.glob("labels-*.parquet")),
        schema=LABELS_SCHEMA,
        filters=[("source", "==", source), ("model", "==", model)],
    )
    return TeacherLabels(
        offer_ids=strings(table["offer_id"]),
        top_indices=_matrix(table["top_indices"]).astype(np.int64),
        top_logits=_matrix(table["top_logits"]),
        tail_logsumexp=table["tail_logsumexp"].to_numpy(),
    )


def check_same_offers(labels: TeacherLabels, offer_ids: list[str], sample: Path) -> None:
    """Teacher's labels and training sample are joined by position, so must be of the same offers.

    Raises:
        InputError: they are not.
    """
    if labels.offer_ids != offer_ids:
        raise InputError(
            f"teacher_labels ({len(labels.offer_ids):,} offers) were not made of the training_sample in "
            f"{sample} ({len(offer_ids):,} offers); make teacher_labels of it first"
        )


def _label_table(
    offer_ids: list[str], source: str, model: LabellingModel, logits: NDArray[np.float32], top_k: int
) -> pa.Table:
    rows, classes = logits.shape
    k = min(top_k, classes)
    order = np.argsort(-logits, axis=1, kind="stable")
    top, rest = order[:, :k], order[:, k:]
    top_logits = np.take_along_axis(logits, top, axis=1)
    # the largest kept logit bounds the exponents; an empty rest sums to nothing: -inf
    with np.errstate(divide="ignore"):
        highest = top_logits[:, 0]
        tail = (
            np.log(np.exp(np.take_along_axis(logits, rest, axis=1) - highest[:, None]).sum(axis=1)) + highest
        )
    columns = {
        "offer_id": pa.array(offer_ids, pa.string()),
        "source": pa.array([source] * rows, pa.string()),
        "model": pa.array([model] * rows, pa.string()),
        "top_indices": _list_array(top.astype(np.int32)),
        "top_logits": _list_array(top_logits.astype(np.float32)),
        "tail_logsumexp": pa.array(tail.astype(np.float32), pa.float32()),
    }
    return pa.table(columns, schema=LABELS_SCHEMA)


def _write_shard(path: Path, table: pa.Table) -> None:
    """The shard appears whole or not at all."""
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial)
    partial.rename(path)


def _sanity_figures(output: Path, sample: Path) -> dict[str, Any]:
    """Accuracy on validation offers, and how sure the teacher is of each source."""
    labels = msgspec.json.decode((output / "labels.json").read_bytes(), type=list[str])
    rows = _sample_rows(sample, "labelled", ["category_id", "split"])
    held_out = np.array(strings(rows["split"])) == "validation"
    targets = targets_of(labels, strings(rows["category_id"]))
    given = {source: read_teacher_labels(output, source) for source in _SOURCES}
    figures: dict[str, Any] = {}
    if held_out.any():
        right = given["labelled"].top_indices[:, 0] == targets
        figures["validation_accuracy"] = round(float(right[held_out].mean()), 6)
    for source, labels_of_source in given.items():
        if labels_of_source.offer_ids:
            figures[f"mean_confidence_{source}"] = round(float(labels_of_source.confidence.mean()), 6)
    return figures


def _shards(offers: dict[str, int], size: int) -> Iterator[tuple[str, int, int]]:
    for source, count in offers.items():
        for start in range(0, count, size):
            yield source, start, min(size, count - start)


def _shard_name(number: int) -> str:
    return f"labels-{number:05d}.parquet"


def _row_count(sample: Path, source: str) -> int:
    return int(pq.read_metadata(sample / f"{source}.parquet").num_rows)


def _sample_rows(sample: Path, source: str, columns: list[str]) -> pa.Table:
    return pq.read_table(sample / f"{source}.parquet", columns=columns)


def _list_array(matrix: NDArray[Any]) -> Any:
    """A matrix (rows, length) as a list column."""
    rows, length = matrix.shape
    offsets: Any = pa.array(np.arange(rows + 1, dtype=np.int32) * length)
    values: Any = pa.array(matrix.ravel())
    return pa.ListArray.from_arrays(offsets, values)


def _matrix(column: Any) -> NDArray[Any]:
    """A list column whose lists are all of one length, as (rows, length)."""
    lists = column.combine_chunks()
    values: NDArray[Any] = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(lists), -1 if len(lists) else 0)
