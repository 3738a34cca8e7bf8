"""Look-up tables over the demo feed's kinds of product: how often each is sold, and its vocabulary."""

from __future__ import annotations

import zlib
from functools import cached_property

import numpy as np
import pyarrow as pa

from ml.demo.catalog import Kind, kinds
from ml.demo.columns import Booleans, Floats, Integers, Ranges, Texts
from ml.demo.random import Draws
from ml.demo.words import (
    ATTRIBUTES,
    CODE_SUFFIXES,
    COUNTED_ATTRIBUTES,
    LANGUAGES,
    LINES,
    MODEL_SUFFIXES,
    SERIES,
)

LABELLED_SHARE = 0.29
NOUN_VARIANTS = 3

_SHARED_SERIES = 0.3
"""Part of the brands' series that cover a whole family of categories, and so do not tell them apart."""
_MANNERS = ("code", "word", "line")
_COLOURLESS = ("2101", "2102")
"""Families of which nobody names the colour: tyres and car parts."""


class KindTables:
    """Arrays with one entry per kind, and texts to pick from by kind."""

    def __init__(self) -> None:
        self._kinds = kinds()

    def sibling(self, kind: Integers, draws: Draws) -> Integers:
        """Another kind of the same family (or, where the draw says so, the same one), per row."""
        start, count = self._family_ranges
        place = start[kind] + (draws.uniform("sibling") * count[kind]).astype(np.int64)
        return self._by_family[place]

    @cached_property
    def weights(self) -> Floats:
        """Sales follow a power law over the kinds; a hash says which kind has which rank."""
        order = sorted(
            self._kinds, key=lambda kind: (not kind.is_head, zlib.crc32(f"rank {kind.names[0][0]}".encode()))
        )
        weights = np.zeros(len(order))
        for rank, kind in enumerate(order):
            weights[kind.number] = kind.weight / (rank + 5) ** 1.2
        return np.asarray(weights / weights.sum())

    @cached_property
    def cumulative(self) -> Floats:
        """Share of the products that are of this kind or one before."""
        cumulative: Floats = np.cumsum(self.weights)
        cumulative[-1] = 1.0
        return cumulative

    @cached_property
    def label_rates(self) -> Floats:
        """People label rare categories more eagerly than those of which they have seen enough."""
        eagerness = self.weights**-0.35
        return np.asarray(np.minimum(eagerness * LABELLED_SHARE / (self.weights * eagerness).sum(), 0.7))

    @cached_property
    def segments(self) -> Integers:
        """Segment of each kind, counted from 0 in the order of their ids."""
        names = sorted({kind.segment for kind in self._kinds})
        return np.array([names.index(kind.segment) for kind in self._kinds])

    @cached_property
    def _by_family(self) -> Integers:
        return np.array([kind.number for kind in sorted(self._kinds, key=lambda kind: kind.family)])

    @cached_property
    def _family_ranges(self) -> tuple[Integers, Integers]:
        families = [self._kinds[number].family for number in self._by_family]
        start = [families.index(kind.family) for kind in self._kinds]
        count = [families.count(kind.family) for kind in self._kinds]
        return np.array(start), np.array(count)

    @cached_property
    def nouns(self) -> Texts:
        """Names of the kinds, by kind, language and variant."""
        return pa.array(
            [
                names[variant % len(names)]
                for kind in self._kinds
                for names in kind.names
                for variant in range(NOUN_VARIANTS)
            ]
        )

    @cached_property
    def prices(self) -> Floats:
        """Median price of each kind in EUR."""
        return np.array([kind.price for kind in self._kinds])

    @cached_property
    def brands(self) -> Ranges:
        """Brands of each kind."""
        return Ranges([_brands_of(kind) for kind in self._kinds])

    @cached_property
    def series(self) -> Texts:
        """Names of series, one for each entry of ``brands``."""
        return pa.array([_series_name(kind, brand) for kind in self._kinds for brand in _brands_of(kind)])

    @cached_property
    def model_tokens(self) -> Ranges:
        """What follows the series' name, by the kind's manner of naming models (see ``_MANNERS``)."""
        codes = [f"{number}{suffix}" for number in range(110, 9990, 13) for suffix in CODE_SUFFIXES]
        numbers = ("", *(str(number) for number in range(10, 990, 10)))
        words = [f"{number}{suffix}".strip() or "1" for number in numbers for suffix in MODEL_SUFFIXES]
        lines = [f"{first} {second}" for first in LINES for second in LINES if first != second]
        return Ranges([codes, words, lines])

    @cached_property
    def manners(self) -> Integers:
        """How models of each kind are named, as a position in ``_MANNERS``."""
        return np.array([_MANNERS.index(kind.models) for kind in self._kinds])

    @cached_property
    def has_colours(self) -> Booleans:
        """Whether products of each kind come in colours."""
        return np.array([kind.models != "line" and kind.family not in _COLOURLESS for kind in self._kinds])

    @cached_property
    def hosts(self) -> Integers:
        """The kind that each kind is an accessory of; -1: none."""
        return np.array([-1 if kind.host is None else kind.host for kind in self._kinds])

    @cached_property
    def attributes(self) -> list[Ranges]:
        """Values of the kinds' first and second attribute, by kind and language."""
        return [
            Ranges(
                [
                    _attribute_values(kind.attributes[place], language)
                    for kind in self._kinds
                    for language in range(len(LANGUAGES))
                ]
            )
            for place in range(2)
        ]


def _brands_of(kind: Kind) -> list[str]:
    """Not every brand of a family makes everything: half of them, and always the best known one."""
    chosen = sorted(kind.brands[1:], key=lambda brand: zlib.crc32(f"{brand} {kind.number}".encode()))
    return [kind.brands[0], *chosen[: len(kind.brands) // 2 - 1]]


def _series_name(kind: Kind, brand: str) -> str:
    shared = zlib.crc32(f"{brand} {kind.number} shared".encode()) % 1000 < 1000 * _SHARED_SERIES
    code = zlib.crc32(f"{brand} {kind.family if shared else kind.number}".encode())
    if kind.models == "code":
        letters = "ABCDEFGHKLMNPRSTVWXZ"
        return "".join(letters[code // 20**position % 20] for position in range(2 + code % 2))
    return SERIES[code % len(SERIES)]


def _attribute_values(attribute: str, language: int) -> tuple[str, ...]:
    if attribute in ATTRIBUTES:
        return ATTRIBUTES[attribute]
    numbers, words = COUNTED_ATTRIBUTES[attribute]
    return tuple(f"{number} {words[language]}" for number in numbers)
