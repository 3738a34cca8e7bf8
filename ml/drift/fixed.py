"""What the reference fixes, so that days compare: names, bins, words, and what is usual.

Only what is kept of it, in ``frame.json``. How it is found is :mod:`ml.drift.fitting`; the words that
the reference knows are a :class:`ml.drift.words.Vocabulary`.
"""

from __future__ import annotations

import msgspec

from ml.drift.measures import Bins, Names, UsualPrices
from ml.drift.totals import DayTotals
from ml.drift.words import CommonWord

LEAST_COUNTRY_SHARE, LEAST_SHOP_SHARE = 0.01, 0.01
"""From these shares of all offers on, a country and a shop are named: in the reference, and on a single day
those that are large on it alone."""


class Fixed(msgspec.Struct, frozen=True, kw_only=True):
    """``frame.json``: what the reference fixes, beside the vocabulary and the titles."""

    totals: list[DayTotals]
    offers: int
    """Offers of the reference that were looked at."""
    countries: list[str]
    large_shops: list[str]
    languages: list[str]
    currencies: list[str]
    shops: Names
    shop_categories: Names
    tops: list[str]
    tops_of_country: dict[str, list[str]]
    leaves: dict[str, str]
    """Path of each named category, by id."""
    offers_of_category: dict[str, int]
    """Offers that were looked at, of each category that has some."""
    bins: dict[str, Bins]
    common_words: list[CommonWord]
    usual_characters: str
    usual_prices: UsualPrices
    vocabulary_languages: list[str]
    folds: int
    seed: int
