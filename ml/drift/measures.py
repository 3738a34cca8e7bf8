"""What is measured of single offers, and the segments by which offers are counted.

How far a day moved is hidden or made up by how it is cut: equal-width bins see nothing of a price, and
two hundred shops drown in the noise of rare ones. So numbers are cut at the deciles of the reference,
and names that hold few offers are joined.

What is *not in the reference* (a word, a shop) needs care: a day is looked up in all days of the
reference, a day of the reference only in the others. To be as likely on both sides, a name that one
of ``n`` days of the reference has counts as new for that day, and for one n-th on any other day: it
would be new if just that day were missing (a jackknife). Near-copies on one day then
do not make its own words look known.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd

from ml.taxonomy import PATH_SEPARATOR

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Objects = npt.NDArray[np.object_]
Mask = npt.NDArray[np.bool_]

MISSING, OTHER, NEW = "(missing)", "(other)", "(not in the reference)"

_POINT_MASS = 0.1
"""A single value held by this share of the reference is a bin of its own."""
_LEAST_GROUP = 20
"""Offers of the reference that a usual price is taken from."""
_LEAST_OF_GROUP = 5
"""Of them, offers of other days that it is taken from for a day of the reference."""

_LEADING = "ÂÃÄÅÎÏÐÑØÙ"
_TRAILING = "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(0x80, 0xC0))
_DAMAGE = {
    "with U+FFFD": re.compile("\ufffd"),
    # UTF-8 that was read as Windows-1252: "Ã¤" for "ä", "â€“" for a dash.
    "with mojibake": re.compile(f"[{_LEADING}][{re.escape(_TRAILING)}]|â[{re.escape(_TRAILING)}]{{2}}"),
    "with ? inside a word": re.compile(r"[^\W\d_]\?[^\W\d_]"),
    "with an HTML entity": re.compile(r"&(#\d+|#x[0-9a-fA-F]+|[A-Za-z]{2,8});"),
    # Control, zero-width and directional characters, soft hyphens, private use.
    "with invisible characters": re.compile(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u202a-\u202e\ufeff\ue000-\uf8ff]"
    ),
}
DAMAGES = tuple(_DAMAGE)
"""Signs that an encoding went wrong, as segments of titles."""

_CUT = re.compile(r"(\.\.\.|…)$")
_ACCENTED = re.compile(r"[^\W\d_a-zA-Z]")


def text_column(rows: pd.DataFrame, name: str) -> Objects:
    """Column ``name`` as Python strings, None where there is no value."""
    column = rows[name].astype(object)
    values: Objects = column.where(column.notna(), None).to_numpy(dtype=object)
    return values


def number_column(rows: pd.DataFrame, name: str) -> Floats:
    """Column ``name`` as numbers, NaN where there is no value."""
    return pd.to_numeric(rows[name]).to_numpy(dtype=np.float64, na_value=np.nan)


def top_category(category_path: str | None) -> str | None:
    """Name of the root of a category path."""
    return category_path.split(PATH_SEPARATOR)[0] if category_path else None


# Titles


def title_numbers(titles: Sequence[str]) -> dict[str, Floats]:
    """Length and signs of damage of each title, by name; a sign is 0 or 1."""
    numbers = {
        "characters": np.array([len(title) for title in titles], dtype=np.float64),
        "cut": _has(titles, _CUT),
        "accented": _has(titles, _ACCENTED),
        **{name: _has(titles, pattern) for name, pattern in _DAMAGE.items()},
    }
    numbers["damaged"] = np.max([numbers[name] for name in DAMAGES], axis=0) if titles else np.empty(0)
    return numbers


def titles_with_character(titles: Sequence[str]) -> Counter[str]:
    """How many of the titles have each character."""
    return Counter(character for title in titles for character in set(title))


def usual_characters(titles_with: Mapping[str, int], titles: int, least_share: float) -> str:
    """Characters that at least this share of so many titles have."""
    least = max(least_share * titles, 2)
    return "".join(sorted(character for character, count in titles_with.items() if count >= least))


def has_others(titles: Sequence[str], characters: str) -> Floats:
    """Whether a title has a character that is none of these."""
    return _has(titles, re.compile(f"[^{re.escape(characters)}]"))


def _has(titles: Sequence[str], pattern: re.Pattern[str]) -> Floats:
    return np.array([pattern.search(title) is not None for title in titles], dtype=np.float64)


# Segments


class Bins(msgspec.Struct, frozen=True):
    """Ranges of a number."""

    edges: list[float]
    labels: list[str]
    """One more than there are edges."""

    @classmethod
    def at_deciles(cls, values: Floats, unit: str) -> Bins:
        """The deciles of ``values``, with frequent single values apart."""
        known = values[~np.isnan(values)]
        if len(known) == 0:
            return cls([], ["any"])
        edges: Floats = np.unique(np.quantile(known, np.linspace(0.1, 0.9, 9)))
        if is_whole := bool(np.all(known == np.round(known))):
            edges = np.unique(np.ceil(edges))
        masses = [edge for edge in edges if np.mean(known == edge) >= _POINT_MASS]
        behind = [edge + 1 if is_whole else np.nextafter(edge, np.inf) for edge in masses]
        edges = np.unique(np.concatenate([edges, behind]))
        if is_whole:
            edges = edges[edges <= known.max()]
        labels = _whole_labels(edges) if is_whole else _labels(edges)
        return cls(edges.tolist(), [f"{label} {unit}".rstrip() for label in labels])

    def codes(self, values: Floats) -> Integers:
        """The bin of each value, -1 where it is NaN."""
        places = np.searchsorted(np.array(self.edges), values, side="right")
        return np.where(np.isnan(values), -1, places).astype(np.int64)


def _labels(edges: Floats) -> list[str]:
    texts = [f"below {edges[0]:.4g}"]
    bounds = [*edges.tolist(), np.inf]
    for place, (low, high) in enumerate(pairwise(bounds)):
        follows_mass = place > 0 and low == np.nextafter(bounds[place - 1], np.inf)
        start = f"above {bounds[place - 1]:.4g}" if follows_mass else f"{low:.4g}"
        if high == np.inf:
            texts.append(start if follows_mass else f"{start} and more")
        else:
            texts.append(start if high == np.nextafter(low, np.inf) else f"{start} to {high:.4g}")
    return texts


def _whole_labels(edges: Floats) -> list[str]:
    if len(edges) == 0:
        return ["any"]
    between = [
        f"{low:.0f}" if high == low + 1 else f"{low:.0f} to {high - 1:.0f}" for low, high in pairwise(edges)
    ]
    return [f"below {edges[0]:.0f}", *between, f"{edges[-1]:.0f} and more"]


class Names(msgspec.Struct, frozen=True):
    """The values of a column of names: the frequent ones, and how many folds have each of them."""

    named: list[str]
    folds_with: dict[str, int]
    folds: int

    @classmethod
    def of(cls, values: Objects, fold: Integers, least_share: float, most: int) -> Names:
        """Of the reference's values; the ``most`` frequent ones of at least ``least_share`` are named."""
        column = pd.Series(values, dtype=object)
        counts = column.value_counts()
        enough = counts[counts >= max(least_share * len(values), 2)]
        named = sorted(enough.index, key=lambda name: (-enough[name], name))[:most]
        folds_with = pd.Series(fold).groupby(column).nunique()
        return cls(
            named=[str(name) for name in named],
            folds_with={str(name): int(count) for name, count in sorted(folds_with.items())},
            folds=len(np.unique(fold)),
        )

    def novelty(self, values: Objects, *, of_reference: bool) -> Floats:
        """How much each value counts as not in the reference, 0 to 1 (see above)."""
        once = 1.0 if of_reference else 1.0 / self.folds
        weights = {0: 1.0, 1: once}
        return np.array(
            [0.0 if value is None else weights.get(self.folds_with.get(value, 0), 0.0) for value in values],
            dtype=np.float64,
        )


# Prices


class UsualPrices(msgspec.Struct, frozen=True):
    """The median price per category and currency, where few offers tell it per top-level category."""

    by_group: dict[str, float]
    """NaN where the group is the right one and nothing is known of it."""

    @classmethod
    def of(cls, rows: pd.DataFrame, groups: Collection[str] | None = None) -> UsualPrices:
        """Those of these offers.

        Args:
            rows: Offers of the reference.
            groups: Groups that have a usual price; None: those of enough offers. Some days of the
                reference are not to fall back to wider groups than all of it.
        """
        prices = number_column(rows, "price")
        usual = {} if groups is None else dict.fromkeys(groups, float("nan"))
        for keys in _price_groups(rows):
            grouped = pd.Series(prices).where(prices > 0).groupby(pd.Series(keys, dtype=object))
            figures = grouped.agg(["count", "median"])
            least = _LEAST_GROUP if groups is None else _LEAST_OF_GROUP
            enough = figures["median"][figures["count"] >= least]
            usual |= {
                str(key): float(median) for key, median in enough.items() if groups is None or key in usual
            }
        return cls(usual)

    def log_ratio(self, rows: pd.DataFrame) -> Floats:
        """Natural logarithm of price over usual price; NaN without a price, or where none is usual."""
        prices = number_column(rows, "price")
        usual = np.full(len(rows), np.nan)
        is_found = np.zeros(len(rows), dtype=bool)
        for keys in _price_groups(rows):
            found = np.array([self.by_group.get(key, np.nan) for key in keys], dtype=np.float64)
            usual = np.where(is_found, usual, found)
            is_found |= np.array([key in self.by_group for key in keys], dtype=bool)
        ratio = np.full(len(rows), np.nan)
        known = (prices > 0) & (usual > 0)
        ratio[known] = np.log(prices[known] / usual[known])
        return ratio


def _price_groups(rows: pd.DataFrame) -> list[list[str]]:
    """The groups of each offer, the narrowest first."""
    currencies = [value or "" for value in text_column(rows, "currency")]
    categories = [value or "" for value in text_column(rows, "category_id")]
    tops = [top_category(path) or "" for path in text_column(rows, "category_path")]
    return [
        [f"{c}\tcategory\t{name}" for c, name in zip(currencies, categories, strict=True)],
        [f"{c}\ttop\t{name}" for c, name in zip(currencies, tops, strict=True)],
        [f"{c}\tall" for c in currencies],
    ]
