"""What training reads of a training sample. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq

from ml.errors import InputError


class LabelledTexts(msgspec.Struct, frozen=True):
    """Texts of labelled offers with their category ids."""

    texts: list[str]
    categories: list[str]


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
    table = pq.read_table(path, columns=["text", "category_id"], filters=[("split", "==", split)])
    if not table.num_rows:
        raise InputError(
            f"{path} has no offers in split {split!r}, at least one is needed; bring more labelled offers "
            "or change validation_share"
        )
    return LabelledTexts(strings(table["text"]), strings(table["category_id"]))


def read_unlabelled(sample: Path) -> UnlabelledTexts:
    """The unlabelled offers of a training sample; there may be none."""
    table = pq.read_table(sample / "unlabelled.parquet", columns=["offer_id", "text"])
    return UnlabelledTexts(strings(table["offer_id"]), strings(table["text"]))


def strings(column: Any) -> list[str]:
    """A string column without nulls as a list."""
    values: list[str] = column.to_pylist()
    return values
