"""What is measured of each offer that is looked at one by one, held against what the reference fixes.

One number, sign or name per offer; how a single one is found is :mod:`ml.drift.measures` and
:mod:`ml.drift.words`. What is then followed from day to day is :mod:`ml.drift.day_series`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from ml.drift.fixed import Fixed
from ml.drift.measures import (
    Floats,
    Integers,
    Mask,
    Objects,
    has_others,
    number_column,
    text_column,
    title_numbers,
    top_category,
)
from ml.drift.words import Tokens, Vocabulary
from ml.serving.cascade import STUDENT

FAR_PRICE = 20.0
"""A price is far from the usual one above this many times it, or below this part of it."""

_LEAST_OF_CATEGORY = 5


@dataclass(frozen=True)
class Measured:
    """Offers, by what is measured of each."""

    numbers: pd.DataFrame
    """Numbers, and signs as 0 to 1; NaN where the offer is left out."""
    names: pd.DataFrame
    """``country``, ``currency``, ``language``, ``shop``, ``shop_category``, ``top``, ``leaf``, ``brand``."""
    common: sparse.csr_matrix
    """(offers, common words): whether the title has the word."""

    @classmethod
    def joined(cls, parts: Sequence[Measured], order: Integers) -> Measured:
        """All offers of ``parts``, in another order."""
        return cls(
            pd.concat([part.numbers for part in parts], ignore_index=True).iloc[order].reset_index(drop=True),
            pd.concat([part.names for part in parts], ignore_index=True).iloc[order].reset_index(drop=True),
            sparse.vstack([part.common for part in parts], format="csr")[order],
        )

    def where(self, mask: Mask) -> Measured:
        """Some of the offers."""
        return Measured(self.numbers[mask], self.names[mask], self.common[np.flatnonzero(mask)])

    def is_whole(self) -> Mask:
        """Which titles show no damage and are not cut."""
        return ((self.numbers["damaged"] == 0) & (self.numbers["cut"] == 0)).to_numpy(dtype=bool)

    def to_bin(self, column: str) -> Floats:
        """A number as it is cut into bins: of a price its ratio to the usual one, not the logarithm."""
        values: Floats = self.numbers[column].to_numpy()
        return np.exp(values) if column == "price" else values


def measure(
    fixed: Fixed, vocabulary: Vocabulary, rows: pd.DataFrame, *, of_reference: bool = False
) -> Measured:
    """Measure offers; those of the reference (of one fold) by what is usual without that fold."""
    titles = [title or "" for title in text_column(rows, "title")]
    languages = text_column(rows, "language")
    tokens = Tokens.of(titles, vocabulary.numbers)
    of_titles = title_numbers(titles)
    unknown, unknown_last = vocabulary.unknown(tokens, of_reference=of_reference)
    shops, shop_categories = text_column(rows, "shop_id"), text_column(rows, "shop_category")
    log_price, price = fixed.usual_prices.log_ratio(rows), number_column(rows, "price")
    untrained = ~rows["trained"].to_numpy(dtype=bool)
    confidence = number_column(rows, "confidence")
    by_student = np.array(text_column(rows, "tier") == STUDENT, dtype=bool)
    for_review = rows["needs_review"].fillna(False).to_numpy(dtype=bool)
    category = text_column(rows, "category_id")
    fast, student = text_column(rows, "fast_category_id"), text_column(rows, "student_category_id")
    numbers = {
        **of_titles,
        "words": tokens.counts,
        "distinct_words": np.bincount(tokens.rows, minlength=len(rows)),
        "unknown": unknown,
        "unknown_last": unknown_last,
        "unusual": has_others(titles, fixed.usual_characters),
        "another": vocabulary.speaks_another(tokens, languages),
        "new_shop": fixed.shops.novelty(shops, of_reference=of_reference),
        "new_shop_category": fixed.shop_categories.novelty(shop_categories, of_reference=of_reference),
        "price": log_price,
        "far_above": _sign(log_price > np.log(FAR_PRICE), ~np.isnan(log_price)),
        "far_below": _sign(log_price < -np.log(FAR_PRICE), ~np.isnan(log_price)),
        "free": _sign(price == 0, ~np.isnan(price)),
        "no_usual_price": _sign(np.isnan(log_price), price > 0),
        "rarity": _rarity(fixed, category),
        "confidence": np.where(untrained, confidence, np.nan),
        "to_student": _sign(by_student, untrained & ~np.isnan(confidence)),
        "to_review": _sign(for_review, untrained & ~np.isnan(confidence)),
        "agrees": _sign(fast == student, untrained),
        "outside_taxonomy": _sign(
            ~rows["taxonomy_known"].to_numpy(dtype=bool), np.ones(len(rows), dtype=bool)
        ),
    }
    # What damage does to words is not the wording of shops: a training must not be started by it.
    for name in ("characters", "words", "unknown", "unknown_last", "unusual", "another"):
        numbers[name] = np.where(of_titles["damaged"] + of_titles["cut"] == 0, numbers[name], np.nan)
    common = [vocabulary.numbers[common.word] for common in fixed.common_words]
    return Measured(
        pd.DataFrame(numbers, dtype=np.float64),
        pd.DataFrame(
            {
                "country": text_column(rows, "country"),
                "currency": text_column(rows, "currency"),
                "language": languages,
                "shop": shops,
                "shop_category": shop_categories,
                "top": top_categories(rows),
                "leaf": category,
                "brand": text_column(rows, "brand"),
            },
            dtype=object,
        ),
        tokens.presence(len(vocabulary.numbers))[:, common],
    )


def top_categories(rows: pd.DataFrame) -> Objects:
    """Top-level category that is predicted for each offer, or None."""
    return np.array([top_category(path) for path in text_column(rows, "category_path")], dtype=object)


def _rarity(fixed: Fixed, categories: Objects) -> Floats:
    """See :data:`ml.drift.questions.RARITY`; NaN without a category.

    All that the reference has a few times or not at all are equally rare, so that its own days, which are
    counted in it, compare with others.
    """
    known, least = fixed.offers_of_category, _LEAST_OF_CATEGORY / max(fixed.offers, 1)
    rarity = {name: -np.log10(max(count / max(fixed.offers, 1), least)) for name, count in known.items()}
    return np.array(
        [np.nan if name is None else rarity.get(name, -np.log10(least)) for name in categories],
        dtype=np.float64,
    )


def _sign(shown: Mask, looked_at: Mask) -> Floats:
    return np.where(looked_at, shown.astype(np.float64), np.nan)
