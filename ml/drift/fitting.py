"""Fitting: how days of the reference fix what further days are held against.

Which names are large enough, at which deciles numbers are cut, which words, characters and prices are
usual; and the series of these days themselves, each held against the others alone. The outcome is what
a :class:`ml.drift.frame.Frame` is made of.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa

from ml.drift.day_series import NUMBERS, DaySeries
from ml.drift.fixed import LEAST_COUNTRY_SHARE, LEAST_SHOP_SHARE, Fixed
from ml.drift.measured_offers import Measured, measure, top_categories
from ml.drift.measures import (
    MISSING,
    OTHER,
    Bins,
    Integers,
    Names,
    UsualPrices,
    text_column,
    titles_with_character,
    usual_characters,
)
from ml.drift.segments import segments_of
from ml.drift.totals import DayTotals
from ml.drift.words import Tokens, Vocabulary, common_words
from ml.errors import InputError
from ml.stages import DriftReferenceParameters

Days = Mapping[str, tuple[pd.DataFrame, DayTotals]]
"""What a frame is fitted on: ISO date → the offers that are looked at one by one, and the totals."""

_MOST_COUNTRIES, _MOST_SHOPS = 30, 40
_LEAST_LANGUAGE_SHARE, _MOST_LANGUAGES = 0.01, 20
_LEAST_TOP_SHARE, _MOST_TOPS = 0.005, 60
_LEAST_TOP_SHARE_OF_COUNTRY = 0.02
_LEAST_LEAF_SHARE, _MOST_LEAVES = 0.005, 100
_COMMON_WORDS = 200
_USUAL_CHARACTER_SHARE = 0.001
_MOST_TITLES_TOLD_APART = 1_500


class Fit:
    """One fitting, done when it is made."""

    def __init__(self, days: Days, parameters: DriftReferenceParameters) -> None:
        """Fit; see :meth:`ml.drift.frame.Frame.fit`.

        Raises:
            InputError: there is no offer to fit on.
        """
        names = sorted(days)
        frames = [days[name][0] for name in names]
        rows = pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)
        if rows.empty:
            raise InputError(
                f"none of the {len(days)} days of the reference has an offer; choose days that have"
            )
        day = np.repeat(np.arange(len(names)), [len(frame) for frame in frames])
        fold = _folds(day)
        self._rows = rows
        self._day = day
        self._fold = fold
        self._totals = [days[name][1] for name in names]
        self._seed = parameters.seed
        self._titles = [title or "" for title in text_column(rows, "title")]
        self._languages = text_column(rows, "language")
        self._left_out = int(np.unique(fold)[parameters.seed % len(np.unique(fold))])
        self._vocabularies, tokens = Vocabulary.of(self._titles, self._languages, fold)
        self._fixed = self._fix(parameters, tokens)
        looks = self._looks()
        self._measured = self._measure(looks)
        self._fixed = msgspec.structs.replace(
            self._fixed,
            usual_characters=looks[self._left_out].usual_characters,
            bins={
                number.column: Bins.at_deciles(self._measured.to_bin(number.column), number.unit)
                for number in NUMBERS
            },
        )

    @property
    def fixed(self) -> Fixed:
        """What the reference fixes."""
        return self._fixed

    @property
    def vocabulary(self) -> Vocabulary:
        """Words that the reference knows: of all folds but one, as for each fold."""
        return self._vocabularies[self._left_out]

    def titles(self) -> list[str]:
        """Titles that those of another day are told apart from: of all folds but one, as for each fold."""
        is_told = (self._fold != self._left_out) & self._measured.is_whole()
        rows = _draw(np.flatnonzero(is_told), self._pool_size(), self._seed, -1)
        return [self._titles[row] for row in rows]

    def segments(self) -> pa.Table:
        """Segments of all offers of the reference, with their ``day``."""
        on = pa.array([self._totals[place].day for place in self._day], pa.string())
        return segments_of(self._fixed, self._measured).append_column("day", on)

    def series(self) -> pa.Table:
        """The series of the days of the reference."""
        pairs = self._titles_to_tell_apart()
        tables = []
        for place, totals in enumerate(self._totals):
            series = DaySeries(totals.day)
            series.add_totals(self._fixed, totals)
            series.add_offers(self._fixed, self._measured.where(self._day == place))
            fold = place if len(self._totals) > 1 else 0
            if fold in pairs:
                series.add_distance(*pairs[fold], self._seed)
            tables.append(series.table())
        return pa.concat_tables(tables)

    def _fix(self, parameters: DriftReferenceParameters, tokens: Tokens) -> Fixed:
        rows, fold = self._rows, self._fold
        countries, tops = text_column(rows, "country"), top_categories(rows)
        named_countries = _frequent(
            _added(totals.by_country for totals in self._totals), LEAST_COUNTRY_SHARE, _MOST_COUNTRIES
        )
        leaves = Names.of(text_column(rows, "category_id"), fold, _LEAST_LEAF_SHARE, _MOST_LEAVES).named
        paths = dict(zip(text_column(rows, "category_id"), text_column(rows, "category_path"), strict=True))
        words = list(self.vocabulary.numbers)
        return Fixed(
            totals=list(self._totals),
            offers=len(rows),
            countries=named_countries,
            large_shops=_frequent(
                _added(totals.by_shop for totals in self._totals), LEAST_SHOP_SHARE, _MOST_SHOPS
            ),
            currencies=Names.of(
                text_column(rows, "currency"), fold, _LEAST_LANGUAGE_SHARE, _MOST_LANGUAGES
            ).named,
            languages=Names.of(self._languages, fold, _LEAST_LANGUAGE_SHARE, _MOST_LANGUAGES).named,
            shops=Names.of(text_column(rows, "shop_id"), fold, LEAST_SHOP_SHARE, _MOST_SHOPS),
            shop_categories=Names.of(text_column(rows, "shop_category"), fold, LEAST_SHOP_SHARE, _MOST_SHOPS),
            tops=Names.of(tops, fold, _LEAST_TOP_SHARE, _MOST_TOPS).named,
            tops_of_country={
                country: Names.of(
                    tops[countries == country],
                    fold[countries == country],
                    _LEAST_TOP_SHARE_OF_COUNTRY,
                    _MOST_TOPS,
                ).named
                for country in named_countries
            },
            leaves={leaf: paths[leaf] or leaf for leaf in leaves},
            offers_of_category=dict(
                sorted(Counter(str(c) for c in text_column(rows, "category_id") if c is not None).items())
            ),
            bins={},
            common_words=common_words(tokens.presence(len(words)), words, self._languages, _COMMON_WORDS),
            usual_characters="",
            usual_prices=UsualPrices.of(rows),
            vocabulary_languages=self.vocabulary.languages,
            folds=len(np.unique(fold)),
            seed=parameters.seed,
        )

    def _looks(self) -> dict[int, Fixed]:
        """What is usual by all folds but one, for each of them: prices and characters.

        Another day is held against the characters of all folds but one too: the fewer the titles, the
        more characters are unusual. Its prices are held against those of all folds: a median of fewer
        offers is as right, and one fold less would shift the prices of all further days alike.
        """
        titles_with = {
            fold: titles_with_character([self._titles[row] for row in np.flatnonzero(self._fold == fold)])
            for fold in self._vocabularies
        }
        total, groups = sum(titles_with.values(), Counter()), self._fixed.usual_prices.by_group
        looks = {}
        for fold, of_fold in titles_with.items():
            others = np.flatnonzero(self._fold != fold)
            looks[fold] = msgspec.structs.replace(
                self._fixed,
                usual_characters=usual_characters(total - of_fold, len(others), _USUAL_CHARACTER_SHARE),
                usual_prices=UsualPrices.of(self._rows.iloc[others].reset_index(drop=True), groups),
            )
        return looks

    def _measure(self, looks: Mapping[int, Fixed]) -> Measured:
        """All offers of the reference, each by what the other folds say."""
        parts, order = [], []
        for fold, fixed in looks.items():
            inside = np.flatnonzero(self._fold == fold)
            rows = self._rows.iloc[inside].reset_index(drop=True)
            parts.append(measure(fixed, self._vocabularies[fold], rows, of_reference=True))
            order.append(inside)
        return Measured.joined(parts, np.argsort(np.concatenate(order), kind="stable"))

    def _titles_to_tell_apart(self) -> dict[int, tuple[list[str], list[str]]]:
        """Of each fold, its titles and as many of the others; a single day is one fold against the other."""
        pairs, is_told = {}, self._measured.is_whole()
        for fold in np.unique(self._fold):
            ours = np.flatnonzero((self._fold == fold) & is_told)[: self._pool_size()]
            theirs = _draw(np.flatnonzero((self._fold != fold) & is_told), len(ours), self._seed, int(fold))
            pairs[int(fold)] = [self._titles[row] for row in ours], [self._titles[row] for row in theirs]
        return pairs

    def _pool_size(self) -> int:
        """The same on every day: the more titles, the better they are told apart."""
        _, sizes = np.unique(self._fold, return_counts=True)
        return min(_MOST_TITLES_TOLD_APART, int(np.median(sizes)))


def _folds(day: Integers) -> Integers:
    """What is left out together: a day; of a single day every other offer."""
    return day if len(np.unique(day)) > 1 else (np.arange(len(day)) % 2).astype(np.int64)


def _draw(rows: Integers, number: int, *seeds: int) -> Integers:
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return np.sort(generator.permutation(rows)[:number])


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for of_day in counts:
        for name, count in of_day.items():
            total[name] = total.get(name, 0) + count
    return total


def _frequent(counts: Mapping[str, int], least_share: float, most: int) -> list[str]:
    least = max(least_share * sum(counts.values()), 1)
    names = [name for name, count in counts.items() if count >= least and name not in (OTHER, MISSING)]
    return sorted(names, key=lambda name: (-counts[name], name))[:most]
