"""The demo feed's offers, made by the column, one chunk of a day at a time.

Nothing is remembered between offers: what an offer, its product and its listing are like follows
from hashes of their numbers. So any chunk of any day can be made on its own, 10^8 offers need no
more memory than one chunk, and the same products come back day after day.

A *listing* is a shop's offer of a product as it stays over the days. A day delivers one listing in
six; every listing is replaced by another about once in ninety days.
"""

from __future__ import annotations

import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ml.demo.catalog import kinds
from ml.demo.columns import (
    Booleans,
    Integers,
    Texts,
    as_text,
    by_group,
    chosen_indices,
    either,
    flat,
    join,
    only,
    same,
    words,
)
from ml.demo.dirt import add_dirt, repeated_rows
from ml.demo.products import NOUN_VARIANTS, KindTables
from ml.demo.random import Draws
from ml.demo.shops import MARKETING_PER_SHOP, TITLE_STYLES, make_shops
from ml.demo.words import (
    COLOURS,
    COUNTRIES,
    COUNTRY_PRICE_FACTORS,
    CURRENCIES,
    DESCRIPTION_ENDS,
    DESCRIPTION_STARTS,
    FOR,
    LANGUAGES,
    NEW_MARKETING,
    THIS_PRODUCT,
    WITH_FREE,
)
from ml.offers import FEED_COLUMNS

CHUNK_OFFERS = 50_000

LISTINGS_PER_OFFER = 6
"""A day delivers one listing in this many."""
LISTING_DAYS = 90
PRODUCTS_PER_OFFER = 0.9
"""Products, as a multiple of a day's offers."""
WRONG_LABELS = 0.015
DRIFTED_PRICE_FACTOR = 1.35


class OfferMaker:
    """Makes the offers of one feed: one seed, one size, one version of the labels."""

    def __init__(self, seed: int, offers_per_day: int, taxonomy_version: int) -> None:
        self._seed = seed
        self._offers_per_day = offers_per_day
        self._products = max(1, int(offers_per_day * PRODUCTS_PER_OFFER))
        self._labels: Texts = pa.array([kind.labels[taxonomy_version - 1] for kind in kinds()], pa.string())
        self.shops = make_shops(seed, kinds())
        self.tables = KindTables()

    def chunk(self, day: datetime.date, number: int, *, drifted: bool, truth: bool = False) -> pa.Table:
        """Chunk ``number`` (from 0) of ``day``: up to ``CHUNK_OFFERS`` offers, every column as text.

        With ``truth`` every offer has its true category, instead of some a human label.
        """
        first = number * CHUNK_OFFERS
        rows = np.arange(first, min(first + CHUNK_OFFERS, self._offers_per_day), dtype=np.uint64)
        row_draws = Draws(f"{self._seed} {day} {drifted}", rows)
        slots = rows * np.uint64(LISTINGS_PER_OFFER) + row_draws.integers("slot", LISTINGS_PER_OFFER).astype(
            np.uint64
        )
        slots = slots[repeated_rows(row_draws)]
        days = np.uint64(day.toordinal())
        phase = Draws(f"{self._seed}", slots).integers("phase", LISTING_DAYS).astype(np.uint64)
        generation = (days + phase) // np.uint64(LISTING_DAYS)
        listing_keys = slots + generation * np.uint64(self._offers_per_day * LISTINGS_PER_OFFER)
        listing = Draws(f"{self._seed} listing", listing_keys)

        # A cubed draw makes few products popular; the offset keeps any one from taking over.
        popularity = (0.12 + 0.88 * listing.uniform("product")) ** 3
        # Each generation of listings draws from a window of products that has moved on by an eighth.
        product_keys = (popularity * self._products).astype(np.uint64) + generation * np.uint64(
            self._products // 8 + 1
        )
        product = Draws(f"{self._seed} product", product_keys)
        kind = np.searchsorted(self.tables.cumulative, product.uniform("kind"), side="right")
        shop = self._choose_shops(kind, listing, drifted=drifted)

        columns = _Chunk(self, day, drifted, row_draws, listing, product, kind, shop)
        table = pa.table(
            {
                "offer_id": join([self.shops.ids.take(shop), as_text(slots * 256 + generation % 256)], "-"),
                "shop_id": self.shops.ids.take(shop),
                **columns.texts(),
                **columns.facts(product_keys, slots),
                "category_id": self._labels.take(kind) if truth else self._human_labels(kind, listing),
            }
        )
        table = table.select([column.name for column in FEED_COLUMNS])
        return add_dirt(table, row_draws, huge_row=len(rows) // 3)

    def _choose_shops(self, kind: Integers, listing: Draws, *, drifted: bool) -> Integers:
        shares = self.shops.cumulative_drifted if drifted else self.shops.cumulative
        draw = listing.uniform("shop drifted" if drifted else "shop")
        return np.searchsorted(shares, self.tables.segments[kind] + draw, side="right") % len(self.shops)

    def _human_labels(self, kind: Integers, listing: Draws) -> Texts:
        labelled = listing.uniform("labelled") < self.tables.label_rates[kind]
        wrong = listing.uniform("wrong") < WRONG_LABELS
        return self._labels.take(
            chosen_indices(labelled, np.where(wrong, self.tables.sibling(kind, listing), kind))
        )


class _Chunk:
    """Columns of one chunk; every array has one entry per offer."""

    def __init__(
        self,
        maker: OfferMaker,
        day: datetime.date,
        drifted: bool,
        row: Draws,
        listing: Draws,
        product: Draws,
        kind: Integers,
        shop: Integers,
    ) -> None:
        self._shops, self._tables, self._day, self._drifted = maker.shops, maker.tables, day, drifted
        self._row, self._listing, self._product = row, listing, product
        self._kind, self._shop = kind, shop
        self._language = maker.shops.languages[shop]
        self._country = maker.shops.countries[shop]

    def texts(self) -> dict[str, Texts]:
        """Title, language, country, description, brand and the shop's category."""
        shops, listing = self._shops, self._listing
        noun = self._nouns(self._kind, shops.noun_variants[self._shop])
        brand, model = self._brand_and_model(self._kind, "own")
        told_brand = only(listing.uniform("brand told") < 0.75, brand)
        told_language = shops.tells_language[self._shop] & (listing.uniform("language told") < 0.98)
        return {
            "title": self._titles(noun, brand, model),
            "country": pa.array(COUNTRIES).take(
                chosen_indices(listing.uniform("country told") < 0.98, self._country)
            ),
            "language": pa.array(LANGUAGES).take(chosen_indices(told_language, self._language)),
            "description": self._descriptions(noun, brand, model),
            "brand": told_brand,
            "shop_category": shops.category_texts.take(self._shop * len(self._tables.prices) + self._kind),
        }

    def facts(self, product_keys: npt.NDArray[np.uint64], slots: npt.NDArray[np.uint64]) -> dict[str, Texts]:
        """Identifiers, price, currency, address and time."""
        shops, listing = self._shops, self._listing
        has_gtin = listing.uniform("gtin told") < shops.gtin_rates[self._shop]
        matched = listing.uniform("matched") < 0.95
        seconds = self._row.integers("second", len(_TIMES))
        addresses = join([shops.domains.take(self._shop), as_text(slots)], "/p/")
        return {
            "gtin": only(has_gtin, as_text(_gtins(product_keys))),
            "product_id": only(matched, join([same("P", len(slots)), as_text(product_keys)], "")),
            "price": self._prices(),
            "currency": pa.array(CURRENCIES).take(self._country),
            "url": join([same("https://www.", len(slots)), addresses], ""),
            "offered_at": join([same(self._day.isoformat(), len(slots)), _TIMES.take(seconds)], "T"),
        }

    def _nouns(self, kind: Integers, variant: Integers) -> Texts:
        return self._tables.nouns.take((kind * len(LANGUAGES) + self._language) * NOUN_VARIANTS + variant)

    def _brand_and_model(self, kind: Integers, purpose: str) -> tuple[Texts, Texts]:
        tables, product = self._tables, self._product
        uniform = product.uniform(f"{purpose} brand") ** 1.5  # the first brands sell most
        brand = tables.brands.places(kind, uniform)
        token = tables.model_tokens.places(tables.manners[kind], product.uniform(f"{purpose} model"))
        return tables.brands.texts.take(brand), join(
            [tables.series.take(brand), tables.model_tokens.texts.take(token)], " "
        )

    def _titles(self, noun: Texts, brand: Texts, model: Texts) -> Texts:
        tables, shops, listing, product = self._tables, self._shops, self._listing, self._product
        place = self._kind * len(LANGUAGES) + self._language
        attributes = tables.attributes
        parts = {
            "B": only(listing.uniform("brand in title") < 0.9, brand),
            "S": only((tables.hosts[self._kind] < 0) | (listing.uniform("accessory model") < 0.4), model),
            "N": only(self._says_noun(), noun),
            "A": attributes[0].texts.take(attributes[0].places(place, product.uniform("attribute 0"))),
            "T": only(
                listing.uniform("second attribute") < 0.5,
                attributes[1].texts.take(attributes[1].places(place, product.uniform("attribute 1"))),
            ),
            "C": only(
                tables.has_colours[self._kind] & (listing.uniform("colour told") < 0.6),
                flat(COLOURS).take(self._language * len(COLOURS[0]) + self._colour()),
            ),
            "F": self._companions(),
            "M": self._marketing(),
            "X": only(listing.uniform("shop in title") < 0.6, shops.names.take(self._shop)),
        }
        titles = by_group(
            shops.styles[self._shop],
            lambda style, rows: join(
                [parts[part].take(rows) for part in TITLE_STYLES[style][0]], TITLE_STYLES[style][1]
            ),
        )
        limits = shops.title_limits[self._shop]
        for limit in (40, 60):
            titles = either(limits == limit, pc.utf8_slice_codeunits(titles, 0, limit), titles)
        titles = either(shops.shouts[self._shop], pc.utf8_upper(titles), titles)
        slip = listing.uniform("slip of the pen") < 0.02
        slipped = join([pc.utf8_slice_codeunits(titles, 0, 9), pc.utf8_slice_codeunits(titles, 10)], "")
        return either(slip, slipped, titles)

    def _says_noun(self) -> Booleans:
        return self._listing.uniform("noun") < self._shops.noun_rates[self._shop]

    def _colour(self) -> Integers:
        of_listing = self._listing.integers("colour", len(COLOURS[0]))
        of_product = self._product.integers("colour", len(COLOURS[0]))
        return np.where(self._listing.uniform("own colour") < 0.3, of_listing, of_product)

    def _companions(self) -> Texts:
        """What an accessory is for (with the host's brand and model), or what is thrown in for free."""
        hosts = self._tables.hosts[self._kind]
        host_brand, host_model = self._brand_and_model(np.maximum(hosts, 0), "host")
        for_host = join([words(FOR).take(self._language), host_brand, host_model], " ")
        gift = self._nouns(self._tables.sibling(self._kind, self._listing), np.zeros_like(self._kind))
        with_gift = join([words(WITH_FREE).take(self._language), gift], " ")
        extra = only(self._listing.uniform("gift") < 0.05, with_gift)
        return either(hosts >= 0, for_host, extra)

    def _marketing(self) -> Texts:
        shops, listing = self._shops, self._listing
        said = listing.uniform("marketing") < shops.marketing_rates[self._shop]
        phrase = listing.integers("phrase", MARKETING_PER_SHOP)
        phrases = only(said, shops.marketing.take(self._shop * MARKETING_PER_SHOP + phrase))
        if not self._drifted:
            return phrases
        newest = listing.integers("new phrase", len(NEW_MARKETING[0]))
        new_phrases = flat(NEW_MARKETING).take(self._language * len(NEW_MARKETING[0]) + newest)
        return either(listing.uniform("new wording") < 0.5, new_phrases, phrases)

    def _descriptions(self, noun: Texts, brand: Texts, model: Texts) -> Texts:
        shops, listing = self._shops, self._listing
        plain = words(THIS_PRODUCT).take(self._language)
        subject = either(listing.uniform("noun described") < 0.6, noun, plain)
        starts = self._language * len(DESCRIPTION_STARTS[0]) + listing.integers(
            "start", len(DESCRIPTION_STARTS[0])
        )
        ends = self._language * len(DESCRIPTION_ENDS[0]) + listing.integers("end", len(DESCRIPTION_ENDS[0]))
        before, after = _DESCRIPTION_PARTS
        opening = join([before.take(starts), subject, after.take(starts)], "")
        texts = join([opening, brand, model, flat(DESCRIPTION_ENDS).take(ends)], " ")
        return only(listing.uniform("described") < shops.description_rates[self._shop], texts)

    def _prices(self) -> Texts:
        """Log-normal around the kind's median; the product's offers lie close together."""
        shops, listing, product = self._shops, self._listing, self._product
        price = self._tables.prices[self._kind] * np.exp(0.45 * product.normal("price"))
        price *= np.exp(0.06 * listing.normal("price") + 0.01 * self._row.normal("price"))
        price *= shops.price_factors[self._shop] * np.array(COUNTRY_PRICE_FACTORS)[self._country]
        if self._drifted:
            price *= DRIFTED_PRICE_FACTOR
        cents = np.maximum(np.round(price * 100).astype(np.int64), 49)
        ending = shops.price_endings[self._shop]
        cents = np.where((ending >= 0) & (cents >= 100), cents // 100 * 100 + ending, cents)
        text = join([as_text(cents // 100), _CENTS.take(cents % 100)], ".")
        return only(listing.uniform("price told") < 0.995, text)


def _gtins(product_keys: npt.NDArray[np.uint64]) -> Integers:
    """Valid 13-digit numbers from the range that GS1 leaves to in-store use (29…): nobody's product."""
    body = 290_000_000_000 + (product_keys.astype(np.int64) * 387_420_489) % 10_000_000_000
    total = sum(body // 10**place % 10 * (1 if place % 2 else 3) for place in range(12))
    return np.asarray(body * 10 + (10 - total % 10) % 10)


_CENTS = pa.array([f"{cents:02}" for cents in range(100)])
_TIMES = pa.array(
    [f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}" for second in range(24 * 3600)]
)
_DESCRIPTION_PARTS = tuple(
    pa.array([start.partition("{0}")[side] for starts in DESCRIPTION_STARTS for start in starts])
    for side in (0, 2)
)
