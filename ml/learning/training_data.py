"""What training reads of a training sample. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ml.errors import InputError
from ml.sampling.label_sources import GUESSED


class LabelledTexts(msgspec.Struct, frozen=True):
    """Texts of labelled offers with their category ids."""

    texts: list[str]
    categories: list[str]
    weights: NDArray[np.float64]
    """What each label counts in a loss, (offers,): 1 where people gave it, the confidence of a guess."""


class UnlabelledTexts(msgspec.Struct, frozen=True):
    """Ids and texts of offers without a human label."""

    offer_ids: list[str]
    texts: list[str]


def read_labelled(sample: Path, split: str) -> LabelledTexts:
    """The labelled offers of one split ('train' or 'validation') of a training sample.

    Raises:
        InputError: there are none.
    """
    path = sample / "labelled.parquet"
    columns = ["text", "category_id", "label_source", "label_confidence"]
    columns = [name for name in columns if name in pq.read_schema(path).names]
    table = pq.read_table(path, columns=columns, filters=[("split", "==", split)])
    if not table.num_rows:
        raise InputError(
            f"{path} has no offers in split {split!r}, at least one is needed; bring more labelled offers "
            "or change validation_share"
        )
    weights = np.ones(table.num_rows)
    if "label_source" in columns:
        is_guessed = np.isin(strings(table["label_source"]), GUESSED)
        weights[is_guessed] = table["label_confidence"].to_numpy()[is_guessed]
    return LabelledTexts(strings(table["text"]), strings(table["category_id"]), weights)


def read_unlabelled(sample: Path) -> UnlabelledTexts:
    """The unlabelled offers of a training sample; there may be none."""
    table = pq.read_table(sample / "unlabelled.parquet", columns=["offer_id", "text"])
    return UnlabelledTexts(strings(table["offer_id"]), strings(table["text"]))


def strings(column: Any) -> list[str]:
    """A string column without nulls as a list."""
    values: list[str] = column.to_pylist()
    return values
