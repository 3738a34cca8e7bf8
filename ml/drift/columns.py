"""The columns by which two sets of offers are compared, each cut into segments.

A drift distance over raw values depends on how they are cut: equal-width bins see nothing of a
price, and two hundred shops drown in the noise of rare ones. So numbers are cut at the deciles of the
reference, names that hold few offers are joined, and values unknown to the reference have a
segment of their own. What is said about an offer of the reference leaves that offer itself out,
so that "unknown" is as likely there as in a day on which nothing changed.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ml.taxonomy import PATH_SEPARATOR

Floats = npt.NDArray[np.float64]

MISSING, OTHER, NEW = "(missing)", "(other)", "(not in the reference)"

_LEAST_SHARE = 0.01
_LEAST_OFFERS = 10
"""A segment is named if it holds this share and this many offers of one side; the rest is joined."""
_LEAST_NEW_SHARE = 0.005
_MOST_SEGMENTS = 30
_POINT_MASS = 0.1
"""A single value held by this share of the reference is a bin of its own."""
_LEAST_GROUP = 20
"""Reference offers that a typical price is taken from."""
_WORD = re.compile(r"\w+")

Rows = Sequence[dict[str, Any]]
"""Offers with ``top_category``, ``category_path`` and ``confidence``."""


class Column(msgspec.Struct, kw_only=True):
    """One compared column: the segment of each offer on both sides, None where it is left out."""

    name: str
    title: str
    reference: list[str | None]
    current: list[str | None]
    reference_values: Floats | None = None
    """The numbers behind the segments, NaN where missing; None for names."""
    current_values: Floats | None = None
    unit: str = ""


def compared_columns(reference: Rows, current: Rows, trained: set[str]) -> list[Column]:
    """All columns of the drift report.

    Args:
        reference: Offers of the reference.
        current: Offers of the day.
        trained: Ids of offers that the model learned from. It is surer of them than it will ever be
            of others, so their confidence is left out on both sides.
    """
    is_trained = tuple([row["offer_id"] in trained for row in rows] for rows in (reference, current))
    return [
        _names("country", "country", reference, current),
        _names("language", "language", reference, current),
        _names("shop", "shop", reference, current, "shop_id"),
        _names("top_category", "predicted top-level category", reference, current),
        _presence("shop_category", reference, current),
        _presence("description", reference, current),
        _presence("brand", reference, current),
        _presence("price_given", reference, current, "price"),
        _numbers(
            "price",
            "price in relation to its category",
            _relative_prices(reference, current),
            "times the usual",
        ),
        _numbers("title_characters", "title length", _lengths(reference, current), "characters"),
        _numbers("title_words", "words in the title", _word_counts(reference, current), "words"),
        _numbers(
            "unknown_words",
            "share of title words that the reference does not have",
            _unknown_words(reference, current),
        ),
        _without_trained(_numbers("confidence", "confidence", _confidences(reference, current)), *is_trained),
    ]


def top_category(category_path: str | None) -> str | None:
    """Name of the root of a category path."""
    return category_path.split(PATH_SEPARATOR)[0] if category_path else None


# Names


def name_segments(
    reference: Sequence[str | None],
    current: Sequence[str | None],
    is_repeated: Sequence[bool] | None = None,
) -> tuple[list[str], list[str]]:
    """Segments of names: the frequent ones by name, the rest joined, unknown ones apart.

    A name is unknown if no *other* offer of the reference has it (a Good-Turing estimate: single
    names of the reference tell how many unknown ones any sample brings).

    Args:
        reference: Names of the reference, None where missing.
        current: Names of the day, None where missing.
        is_repeated: Whether an offer of the day is, with this name, in the reference too.
    """
    counts, today = Counter(reference), Counter(current)
    shares = {
        name: max(counts[name] / max(len(reference), 1), today[name] / max(len(current), 1))
        for name in {*counts, *today} - {None}
        if max(counts[name], today[name]) >= _LEAST_OFFERS
    }
    frequent = sorted((n for n in shares if shares[n] >= _LEAST_SHARE), key=lambda n: (-shares[n], str(n)))
    named = set(frequent[:_MOST_SEGMENTS])

    def segment(name: str | None, others: int) -> str:
        if name is None:
            return MISSING
        if name in named:
            return name
        return OTHER if others > 0 else NEW

    repeated = is_repeated or [False] * len(current)
    before = [segment(name, counts[name] - 1) for name in reference]
    after = [segment(name, counts[name] - again) for name, again in zip(current, repeated, strict=True)]
    if all(side.count(NEW) < _LEAST_NEW_SHARE * len(side) for side in (before, after)):
        before, after = ([OTHER if name == NEW else name for name in side] for side in (before, after))
    return before, after


def _names(name: str, title: str, reference: Rows, current: Rows, field: str | None = None) -> Column:
    field = field or name
    known = {row["offer_id"]: row.get(field) for row in reference}
    repeated = [row["offer_id"] in known and known[row["offer_id"]] == row.get(field) for row in current]
    before, after = name_segments(
        [row.get(field) for row in reference], [row.get(field) for row in current], repeated
    )
    return Column(name=name, title=title, reference=list(before), current=list(after))


def _presence(name: str, reference: Rows, current: Rows, field: str | None = None) -> Column:
    def segments(rows: Rows) -> list[str | None]:
        return ["given" if row.get(field or name) not in (None, "") else MISSING for row in rows]

    title = f"{(field or name).replace('_', ' ')} given"
    return Column(name=name, title=title, reference=segments(reference), current=segments(current))


# Numbers


def number_segments(reference: Floats, current: Floats) -> tuple[list[str], list[str]]:
    """Segments of numbers: the deciles of the reference, with frequent single values apart."""
    known = reference[~np.isnan(reference)]
    edges: Floats = np.unique(np.quantile(known, np.linspace(0.1, 0.9, 9))) if len(known) else np.empty(0)
    masses = [edge for edge in edges if np.mean(known == edge) >= _POINT_MASS]
    edges = np.unique(np.concatenate([edges, np.nextafter(masses, np.inf)]))
    labels = _bin_labels(edges)

    def segments(values: Floats) -> list[str]:
        places = np.searchsorted(edges, values, side="right")
        return [
            MISSING if np.isnan(value) else labels[place] for value, place in zip(values, places, strict=True)
        ]

    return segments(reference), segments(current)


def _bin_labels(edges: Floats) -> list[str]:
    """Names of the bins between ``edges``; numbered, so that they sort by size."""
    if len(edges) == 0:
        return ["any"]
    texts = [f"below {edges[0]:.4g}"]
    bounds = [*edges.tolist(), np.inf]
    for place, (low, high) in enumerate(pairwise(bounds)):
        follows_mass = place > 0 and low == np.nextafter(bounds[place - 1], np.inf)
        start = f"above {bounds[place - 1]:.4g}" if follows_mass else f"{low:.4g}"
        if high == np.inf:
            texts.append(start if follows_mass else f"{start} and more")
        else:
            texts.append(start if high == np.nextafter(low, np.inf) else f"{start} to {high:.4g}")
    return [f"{place:02d}: {text}" for place, text in enumerate(texts)]


def _numbers(name: str, title: str, sides: tuple[Floats, Floats], unit: str = "") -> Column:
    reference, current = sides
    before, after = number_segments(reference, current)
    return Column(
        name=name,
        title=title,
        reference=list(before),
        current=list(after),
        reference_values=reference,
        current_values=current,
        unit=unit,
    )


def _without_trained(column: Column, reference: list[bool], current: list[bool]) -> Column:
    column.reference = [None if t else s for s, t in zip(column.reference, reference, strict=True)]
    column.current = [None if t else s for s, t in zip(column.current, current, strict=True)]
    return column


def _lengths(*sides: Rows) -> tuple[Floats, Floats]:
    return _computed(sides, lambda row: len(row["title"] or ""))


def _word_counts(*sides: Rows) -> tuple[Floats, Floats]:
    return _computed(sides, lambda row: len((row["title"] or "").split()))


def _confidences(*sides: Rows) -> tuple[Floats, Floats]:
    return _computed(sides, lambda row: np.nan if row["confidence"] is None else row["confidence"])


def _computed(sides: tuple[Rows, ...], number: Callable[[dict[str, Any]], float]) -> tuple[Floats, Floats]:
    """``number`` of every offer of reference and day."""
    reference, current = (np.array([number(row) for row in rows], dtype=np.float64) for rows in sides)
    return reference, current


def _unknown_words(reference: Rows, current: Rows) -> tuple[Floats, Floats]:
    """Share of an offer's title words that no other offer of the reference has in its title."""
    words = {row["offer_id"]: _words(row) for row in reference}
    offers_with = Counter(word for of_offer in words.values() for word in of_offer)

    def share(row: dict[str, Any]) -> float:
        own = words.get(row["offer_id"], frozenset())
        of_offer = _words(row)
        unknown = sum(offers_with[word] - (word in own) <= 0 for word in of_offer)
        return unknown / len(of_offer) if of_offer else float("nan")

    return _computed((reference, current), share)


def _words(row: dict[str, Any]) -> frozenset[str]:
    return frozenset(_WORD.findall((row["title"] or "").lower()))


def _relative_prices(reference: Rows, current: Rows) -> tuple[Floats, Floats]:
    """Price over the reference's median for its category and currency.

    Prices span orders of magnitude, so a rise by a half is lost among all of them and plain to see
    among offers of one kind. Small categories fall back to their top-level category, then to the
    currency; NaN where there is no price or the reference says nothing about it.
    """

    def groups(row: dict[str, Any]) -> list[tuple[Any, ...]]:
        currency = row.get("currency")
        return [(currency, row["category_path"]), (currency, "top", row["top_category"]), (currency,)]

    prices: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in reference:
        if row.get("price"):
            for group in groups(row):
                prices[group].append(row["price"])
    usual = {group: float(np.median(p)) for group, p in prices.items() if len(p) >= _LEAST_GROUP}

    def relative(row: dict[str, Any]) -> float:
        median = next((usual[group] for group in groups(row) if group in usual), None)
        price: float | None = row.get("price")
        return price / median if price and median else float("nan")

    return _computed((reference, current), relative)
