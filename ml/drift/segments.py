"""The segment of each offer in the main columns, in words: for a comparison of whole columns.

The series of a day are not made of these, but of the numbers: see :mod:`ml.drift.day_series`.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa

from ml.drift.fixed import Fixed
from ml.drift.measured_offers import Measured
from ml.drift.measures import MISSING, NEW, OTHER

_MANY_UNKNOWN = 4


def segments_of(fixed: Fixed, measured: Measured) -> pa.Table:
    """Segments of offers that were measured.

    Returns:
        One text column per title ("shop category"); null where an offer is left out of it.
    """
    numbers = {str(name): column.to_numpy() for name, column in measured.numbers.items()}
    names = {str(name): column.to_numpy(dtype=object) for name, column in measured.names.items()}

    def named(column: str, kept: Collection[str], novelty: str = "") -> list[str]:
        is_new = numbers[novelty] == 1 if novelty else np.zeros(len(measured.numbers), dtype=bool)
        return [
            MISSING if name is None else name if name in kept else NEW if new else OTHER
            for name, new in zip(names[column], is_new, strict=True)
        ]

    def binned(column: str, missing: str | None) -> list[str | None]:
        bins = fixed.bins[column]
        # Numbered, so that they sort by size.
        labels = [f"{place:02d}: {label}" for place, label in enumerate(bins.labels)]
        return [missing if code < 0 else labels[code] for code in bins.codes(measured.to_bin(column))]

    agrees = {1.0: "agree", 0.0: "differ"}
    columns: dict[str, list[str | None] | list[str]] = {
        "country": named("country", fixed.countries),
        "language": named("language", fixed.languages),
        "shop": named("shop", fixed.shops.named, "new_shop"),
        "shop category": named("shop_category", fixed.shop_categories.named, "new_shop_category"),
        "brand given": ["given" if brand is not None else MISSING for brand in names["brand"]],
        "predicted top-level category": named("top", fixed.tops),
        "predicted category": [
            MISSING if leaf is None else fixed.leaves.get(leaf, OTHER) for leaf in names["leaf"]
        ],
        "price over usual": binned("price", MISSING),
        "title length": binned("characters", MISSING),
        "title words": binned("words", MISSING),
        "words that the reference does not have": [
            f"{count:.0f}" if count < _MANY_UNKNOWN else f"{_MANY_UNKNOWN} and more"
            for count in np.round(np.nan_to_num(numbers["unknown"]) * numbers["distinct_words"])
        ],
        "confidence": binned("confidence", None),
        "fast model and student": [agrees.get(float(value)) for value in numbers["agrees"]],
    }
    return pa.table(
        {title: pa.array(values, pa.string()).dictionary_encode() for title, values in columns.items()}
    )
