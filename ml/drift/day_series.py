"""The series of one day, a number each, as rows of ``SERIES_SCHEMA``: what is followed of its offers.

Which numbers and signs are followed, by country or not, and how counts, shares and means of them are
written. What to think of the series is :mod:`ml.drift.series`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from ml.drift.answers import SERIES_SCHEMA, Kind
from ml.drift.fixed import LEAST_COUNTRY_SHARE, LEAST_SHOP_SHARE, Fixed
from ml.drift.measured_offers import FAR_PRICE, Measured
from ml.drift.measures import DAMAGES, MISSING, NEW, OTHER, Floats, Integers, Mask, Objects
from ml.drift.questions import (
    AGREEMENT,
    BEYOND_A_TO_Z,
    COMPLETENESS,
    CONTENT_DISTANCE,
    LANGUAGES,
    PREDICTED_CATEGORIES,
    PRICE_OVER_USUAL,
    PRICED,
    PRICES,
    RARITY,
    SHOP_MIX,
    SHOPS,
    SURENESS,
    TAXONOMY_IN_FORCE,
    TITLES_WITH_WORD,
    UNDAMAGED,
    UNKNOWN_UNTIL_THE_DAY_IS_OVER,
    VOLUME,
    WORDING,
)
from ml.drift.totals import OPTIONAL_COLUMNS, DayTotals
from ml.drift.words import telling_apart
from ml.offers import REASONS

COUNTRY = "country "
"""How the group of a country begins, before the country."""

LEAST_TITLES_TOLD_APART = 100
"""With fewer on a side, how well they can be told apart says nothing."""


@dataclass(frozen=True)
class Number:
    """A number of which the mean is followed, and the shares of its deciles."""

    question: str
    measure: str
    column: str
    unit: str = ""


@dataclass(frozen=True)
class Sign:
    """Something that an offer shows, or some of its words do, of which the share is followed."""

    question: str
    measure: str
    segment: str
    column: str
    per_country: bool = True


NUMBERS = (
    Number(WORDING, "title length", "characters", "characters"),
    Number(WORDING, "title words", "words", "words"),
    Number(PRICES, PRICE_OVER_USUAL, "price"),
    Number(SURENESS, "confidence", "confidence"),
)
"""All numbers that are followed."""

SIGNS = (
    Sign(WORDING, "words of titles", "that the reference does not have", "unknown"),
    Sign(WORDING, "titles", "whose last word the reference does not have", "unknown_last"),
    Sign(WORDING, "titles", "with unusual characters", "unusual"),
    Sign(UNDAMAGED, "titles", "with signs of damaged encoding", "damaged"),
    *(Sign(UNDAMAGED, "titles", name, name, per_country=False) for name in DAMAGES),
    Sign(UNDAMAGED, "titles", "cut off with dots", "cut", per_country=False),
    Sign(UNDAMAGED, "titles", BEYOND_A_TO_Z, "accented"),
    Sign(LANGUAGES, "titles", "that fit another language better than the declared one", "another"),
    Sign(PRICES, "prices", f"above {FAR_PRICE:.0f} times the usual", "far_above"),
    Sign(PRICES, "prices", f"below 1/{FAR_PRICE:.0f} of the usual", "far_below"),
    Sign(PRICES, "prices", "of 0", "free", per_country=False),
    Sign(PRICES, PRICED, "in a category and currency without a usual one", "no_usual_price"),
    Sign(SURENESS, "offers", "to the student", "to_student"),
    Sign(SURENESS, "offers", "to review", "to_review"),
    Sign(AGREEMENT, "fast model and student", "agree", "agrees"),
)
"""All signs that are followed."""


class DaySeries:
    """Collects the series of one day."""

    def __init__(self, day: str) -> None:
        self._day = day
        self._columns: dict[str, list[Any]] = {name: [] for name in SERIES_SCHEMA.names}

    def table(self) -> pa.Table:
        """What was collected, as ``SERIES_SCHEMA``."""
        return pa.table(self._columns, schema=SERIES_SCHEMA)

    def table_of_part(self) -> pa.Table:
        """The same, of a day that is not over: without what is not asked of it."""
        table = self.table()
        is_left_out = pc.or_(
            pc.is_in(table["question"], pa.array(UNKNOWN_UNTIL_THE_DAY_IS_OVER, pa.string())),
            pc.equal(table["segment"], pa.scalar(BEYOND_A_TO_Z)),
        )
        return table.filter(pc.invert(is_left_out))

    def add_totals(self, fixed: Fixed, totals: DayTotals) -> None:
        """What is counted over all offers: volume, missing values, quarantined rows, shares of shops."""
        self._count(VOLUME, "", totals.offers)
        self._add(VOLUME, SHOPS, "", "", "count", float(totals.shops), totals.shops, None)
        known = {country: totals.by_country.get(country, 0) for country in fixed.countries}
        for country, offers in known.items():
            self._count(VOLUME, f"{COUNTRY}{country}", offers)
        self._count(VOLUME, f"{COUNTRY}{OTHER}", totals.offers - sum(known.values()))
        for shop in fixed.large_shops:
            self._count(VOLUME, f"shop {shop}", totals.by_shop.get(shop, 0))
        named = sum(totals.by_shop.get(shop, 0) for shop in fixed.large_shops)
        self._count(VOLUME, f"shop {OTHER}", totals.offers - named)
        self.add_countries(
            [
                country
                for country, offers in totals.by_country.items()
                if offers >= LEAST_COUNTRY_SHARE * totals.offers and country not in (*known, MISSING)
            ],
            totals,
        )
        for column in OPTIONAL_COLUMNS:
            missing = totals.missing.get(column, {})
            self._share(COMPLETENESS, column, "", "missing", sum(missing.values()), totals.offers)
            for country in fixed.countries if column != "country" else ():
                offers = totals.by_country.get(country, 0)
                self._share(
                    COMPLETENESS, column, f"{COUNTRY}{country}", "missing", missing.get(country, 0), offers
                )
        quarantined = totals.delivered - totals.offers
        self._share(COMPLETENESS, "delivered rows", "", "quarantined", quarantined, totals.delivered)
        for reason in REASONS:
            self._share(
                COMPLETENESS,
                "delivered rows",
                "",
                f"quarantined for {reason}",
                totals.quarantined.get(reason, 0),
                totals.delivered,
            )
        large = [
            shop
            for shop, offers in totals.by_shop.items()
            if offers >= LEAST_SHOP_SHARE * totals.offers and shop not in (*fixed.large_shops, OTHER)
        ]
        self.add_shops([*fixed.large_shops, *large], totals)

    def add_countries(self, countries: Collection[str], totals: DayTotals) -> None:
        """Offers of countries."""
        for country in countries:
            self._count(VOLUME, f"{COUNTRY}{country}", totals.by_country.get(country, 0))

    def add_shops(self, shops: Collection[str], totals: DayTotals) -> None:
        """Shares of shops."""
        for shop in shops:
            self._share(SHOP_MIX, "shop", "", shop, totals.by_shop.get(shop, 0), totals.offers)

    def add_offers(self, fixed: Fixed, measured: Measured) -> None:
        """What is measured of offers one by one."""
        numbers = {str(name): column.to_numpy() for name, column in measured.numbers.items()}
        names = {str(name): column.to_numpy(dtype=object) for name, column in measured.names.items()}
        everywhere = np.ones(len(measured.numbers), dtype=bool)
        countries = {f"{COUNTRY}{country}": names["country"] == country for country in fixed.countries}
        groups = {"": everywhere, **countries}
        for number in NUMBERS:
            values = numbers[number.column]
            for group, mask in groups.items():
                self._mean(number.question, number.measure, group, values[mask])
            bins = fixed.bins[number.column]
            codes = bins.codes(measured.to_bin(number.column))
            self._shares(number.question, number.measure, "", bins.labels, codes)
        for sign in SIGNS:
            for group, mask in groups.items() if sign.per_country else [("", everywhere)]:
                shown = numbers[sign.column][mask]
                shown = shown[~np.isnan(shown)]
                self._share(sign.question, sign.measure, group, sign.segment, shown.sum(), len(shown))
        whole = np.flatnonzero(measured.is_whole())
        self._add_common_words(fixed, measured.common[whole], names["language"][whole])
        self._add_names(LANGUAGES, "language", fixed.languages, names["language"], groups)
        self._add_names(PRICES, "currency", fixed.currencies, names["currency"], groups)
        self._add_names(SHOP_MIX, "shop category", fixed.shop_categories.named, names["shop_category"])
        for measure, column in (("shop", "new_shop"), ("shop category", "new_shop_category")):
            self._share(SHOP_MIX, measure, "", NEW, numbers[column].sum(), len(everywhere))
        self._add_names(PREDICTED_CATEGORIES, "top-level category", fixed.tops, names["top"])
        for country, tops in fixed.tops_of_country.items():
            group = f"{COUNTRY}{country}"
            self._add_names(
                PREDICTED_CATEGORIES, "top-level category", tops, names["top"], {group: countries[group]}
            )
        self._mean(PREDICTED_CATEGORIES, RARITY, "", numbers["rarity"])
        for leaf, path in fixed.leaves.items():
            self._share(
                PREDICTED_CATEGORIES,
                "category",
                "",
                path,
                int((names["leaf"] == leaf).sum()),
                len(everywhere),
            )
        outside = numbers["outside_taxonomy"]
        self._share(TAXONOMY_IN_FORCE, "category", "", "not in the taxonomy", outside.sum(), len(outside))

    def add_distance(self, ours: Sequence[str], theirs: Sequence[str], seed: int) -> None:
        """How well the day's titles can be told from those of the reference; not of too few."""
        offers = min(len(ours), len(theirs))
        if offers < LEAST_TITLES_TOLD_APART:
            return
        area = telling_apart(ours[:offers], theirs[:offers], seed)
        self._add(WORDING, CONTENT_DISTANCE, "", "", "number", area, offers, None)

    def _add_common_words(self, fixed: Fixed, common: sparse.csr_matrix, languages: Objects) -> None:
        for language in dict.fromkeys(word.language for word in fixed.common_words):
            rows = np.flatnonzero(languages == language) if language else np.arange(len(languages))
            places = [place for place, word in enumerate(fixed.common_words) if word.language == language]
            titles_with = np.asarray(common[rows][:, places].sum(axis=0)).ravel()
            for place, titles in zip(places, titles_with, strict=True):
                word = fixed.common_words[place].word
                group = f"language {language}" if language else ""
                self._share(WORDING, TITLES_WITH_WORD, group, word, float(titles), len(rows))

    def _add_names(
        self,
        question: str,
        measure: str,
        named: Sequence[str],
        values: Objects,
        groups: Mapping[str, Mask] | None = None,
    ) -> None:
        segments = [*named, OTHER, MISSING]
        place = {name: index for index, name in enumerate(named)}
        codes = np.array(
            [len(named) + 1 if value is None else place.get(value, len(named)) for value in values],
            dtype=np.int64,
        )
        for group, mask in (groups or {"": np.ones(len(values), dtype=bool)}).items():
            self._shares(question, measure, group, segments, codes[mask])

    def _shares(
        self, question: str, measure: str, group: str, segments: Sequence[str], codes: Integers
    ) -> None:
        counts = np.bincount(codes[codes >= 0], minlength=len(segments))
        offers = int(counts.sum())
        for segment, count in zip(segments, counts, strict=True):
            self._share(question, measure, group, segment, int(count), offers)

    def _share(
        self, question: str, measure: str, group: str, segment: str, count: float, offers: int
    ) -> None:
        if offers:
            self._add(question, measure, group, segment, "share", float(count) / offers, offers, None)

    def _count(self, question: str, group: str, offers: int) -> None:
        self._add(question, "offers", group, "", "count", float(offers), offers, None)

    def _mean(self, question: str, measure: str, group: str, values: Floats) -> None:
        known = values[~np.isnan(values)]
        if len(known):
            deviation = float(known.std(ddof=1)) if len(known) > 1 else None
            self._add(question, measure, group, "", "number", float(known.mean()), len(known), deviation)

    def _add(
        self,
        question: str,
        measure: str,
        group: str,
        segment: str,
        kind: Kind,
        value: float,
        offers: int,
        deviation: float | None,
    ) -> None:
        row = (self._day, question, measure, group, segment, kind, value, float(offers), deviation)
        for column, entry in zip(self._columns.values(), row, strict=True):
            column.append(entry)
