"""The demo feed's shops: where each sells, what it carries, and how it words its offers.

Everything about a shop is an array over shops, or a table shop by kind of product, so that the feed
can be written by the column.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ml.demo.catalog import Kind, categories
from ml.demo.columns import Booleans, Floats, Integers, Texts
from ml.demo.words import (
    COUNTRIES,
    COUNTRY_SIZES,
    LANGUAGES,
    MARKETING,
    NEW_MARKETING,
    NOISE_CATEGORY_TEXTS,
    SHOP_NAMES,
    SHOPS_PER_COUNTRY,
    TOP_LEVEL_DOMAINS,
)

NEW_SHOPS = 12
"""Shops that appear on a drifted day, two per country."""
NEW_SHOPS_SHARE = 0.35
"""Part of a drifted day's offers that comes from them."""
MISSING_COUNTRY = "IT"
"""Country that delivers nothing on a drifted day."""

TITLE_STYLES = (
    ("BSNATC", " "),
    ("NBSATC", " "),
    ("BNSAC", ", "),
    ("BSFA", " "),
    ("NSBFAC", " - "),
    ("MBSNFAX", " "),
    ("BSNFTC", " | "),
    ("NACBSFM", " "),
    ("CNABSM", " • "),
    ("MNBSX", " // "),
)
"""Order and separator of a title's parts: Brand, Series and model, Noun, Attribute, anoTher
attribute, Colour, what it is For, Marketing, eXtra name of the shop. The last two styles are new
on a drifted day."""
_NEW_STYLES = (8, 9)

MARKETING_PER_SHOP = 4
_SPECIALISTS = 0.6
_CATEGORY_TEXTS = (
    ("none", 14),
    ("leaf", 26),
    ("path", 20),
    ("slug", 12),
    ("family", 15),
    ("segment", 6),
    ("noise", 7),
)


@dataclass(frozen=True)
class Shops:
    """All shops; arrays have one entry per shop, the new shops of drifted days last."""

    ids: Texts
    domains: Texts
    names: Texts
    countries: Integers
    languages: Integers
    styles: Integers
    noun_rates: Floats
    noun_variants: Integers
    marketing_rates: Floats
    description_rates: Floats
    gtin_rates: Floats
    title_limits: Integers
    """Titles are cut to this many characters; 0: they are not."""
    shouts: Booleans
    price_factors: Floats
    price_endings: Integers
    """Cents that prices end with; -1: any."""
    tells_language: Booleans
    marketing: Texts
    """``MARKETING_PER_SHOP`` phrases per shop, one after the other."""
    category_texts: Texts
    """Shop by kind: what the shop calls the category, null where it says nothing."""
    cumulative: Floats
    """Segment by shop, flat: ``segment + share of the segment's offers up to this shop``."""
    cumulative_drifted: Floats

    def __len__(self) -> int:
        return len(self.countries)


def make_shops(seed: int, kinds: Sequence[Kind]) -> Shops:
    """The shops of this seed: 200, and those that come with a drifted day."""
    chance = random.Random(f"shops {seed}")
    countries = [country for country, count in enumerate(SHOPS_PER_COUNTRY) for _ in range(count)]
    regular = len(countries)
    countries += [country for country in range(len(COUNTRIES)) for _ in range(NEW_SHOPS // len(COUNTRIES))]
    is_new = [shop >= regular for shop in range(len(countries))]
    names = _names(chance, countries)
    languages = [0 if chance.random() < 0.04 else country for country in countries]
    domains = [f"{name}.{TOP_LEVEL_DOMAINS[country]}" for name, country in zip(names, countries, strict=True)]
    styles = [chance.choice(_NEW_STYLES) if new else chance.randrange(min(_NEW_STYLES)) for new in is_new]
    shops = len(countries)
    return Shops(
        ids=pa.array([domain.replace(".", "-") for domain in domains]),
        domains=pa.array(domains),
        names=pa.array([name.capitalize() for name in names]),
        countries=np.array(countries),
        languages=np.array(languages),
        styles=np.array(styles),
        noun_rates=np.array([chance.choice((0.98, 0.98, 0.95, 0.95, 0.9, 0.6)) for _ in range(shops)]),
        noun_variants=np.array([chance.choice((0, 0, 0, 1, 1, 2)) for _ in range(shops)]),
        marketing_rates=np.array([chance.choice((0.0, 0.1, 0.3, 0.8)) for _ in range(shops)]),
        description_rates=np.array([chance.choice((0.0, 0.0, 0.3, 0.9)) for _ in range(shops)]),
        gtin_rates=np.array([chance.choice((0.2, 0.7, 0.95)) for _ in range(shops)]),
        title_limits=np.array([chance.choice((0, 0, 0, 0, 60, 40)) for _ in range(shops)]),
        shouts=np.array([chance.random() < 0.08 for _ in range(shops)]),
        price_factors=np.array([chance.uniform(0.88, 1.15) for _ in range(shops)]),
        price_endings=np.array([chance.choice((99, 99, 90, 95, 0, -1)) for _ in range(shops)]),
        tells_language=np.array([chance.random() < 0.85 for _ in range(shops)]),
        marketing=pa.array(_marketing(chance, languages, is_new)),
        category_texts=_category_texts(chance, languages, kinds),
        **_cumulative_shares(chance, countries, is_new, kinds),
    )


def _names(chance: random.Random, countries: Sequence[int]) -> list[str]:
    left = {
        country: [first + last for first in firsts for last in lasts]
        for country, (firsts, lasts) in enumerate(SHOP_NAMES)
    }
    for candidates in left.values():
        chance.shuffle(candidates)
    return [left[country].pop() for country in countries]


def _marketing(chance: random.Random, languages: Sequence[int], is_new: Sequence[bool]) -> list[str]:
    return [
        phrase
        for language, new in zip(languages, is_new, strict=True)
        for phrase in chance.sample((NEW_MARKETING if new else MARKETING)[language], MARKETING_PER_SHOP)
    ]


def _category_texts(chance: random.Random, languages: Sequence[int], kinds: Sequence[Kind]) -> Texts:
    """Each shop has one manner, and its own names for some of the kinds."""
    nodes = {node.category_id: node.names for node in categories(1)}
    manners, weights = zip(*_CATEGORY_TEXTS, strict=True)
    texts: list[str | None] = []
    for language in languages:
        manner = chance.choices(manners, weights)[0]
        separator = chance.choice((" > ", "/", " » ", " | "))
        start = chance.choice(("", "", "Shop", "Home", LANGUAGES[language].upper()))
        noise = NOISE_CATEGORY_TEXTS[language]
        for kind in kinds:
            leaf = chance.choice(kind.names[language])
            family, segment = nodes[kind.family][language], nodes[kind.segment][language]
            if chance.random() < 0.06:  # no shop is tidy everywhere
                leaf = family
            texts.append(
                {
                    "none": None,
                    "leaf": leaf,
                    "path": separator.join(filter(None, (start, segment, family, leaf))),
                    "slug": f"{family}-{leaf}".lower().replace(" & ", "-").replace(" ", "-"),
                    "family": family,
                    "segment": separator.join(filter(None, (start, segment))),
                    "noise": chance.choice(noise),
                }[manner]
            )
    return pa.array(texts, pa.string())


def _cumulative_shares(
    chance: random.Random, countries: Sequence[int], is_new: Sequence[bool], kinds: Sequence[Kind]
) -> dict[str, Floats]:
    """Shop sizes follow a power law; most shops carry a few segments only."""
    segments = sorted({kind.segment for kind in kinds})
    rank = np.array([1.0 / (4 + place) ** 0.8 for place in range(len(countries))])
    chance.shuffle(sizes := rank.tolist())
    weights = np.zeros((len(segments), len(countries)))
    for shop, size in enumerate(sizes):
        carried = (
            chance.sample(range(len(segments)), chance.randint(1, 3))
            if chance.random() < _SPECIALISTS and not is_new[shop]
            else range(len(segments))
        )
        weights[list(carried), shop] = size * COUNTRY_SIZES[countries[shop]]
    new = np.array(is_new)
    regular_weights = np.where(new, 0.0, weights)
    gone = np.array([COUNTRIES[country] == MISSING_COUNTRY for country in countries])
    stayed = _shares(np.where(gone, 0.0, regular_weights)) * (1 - NEW_SHOPS_SHARE)
    came = _shares(np.where(new & ~gone, 1.0, 0.0) * np.ones_like(weights)) * NEW_SHOPS_SHARE
    return {
        "cumulative": _cumulative(_shares(regular_weights)),
        "cumulative_drifted": _cumulative(stayed + came),
    }


def _shares(weights: Floats) -> Floats:
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _cumulative(shares: Floats) -> Floats:
    running = np.cumsum(shares, axis=1)
    running /= running[:, -1:]
    return np.asarray((running + np.arange(len(shares))[:, None]).ravel())
