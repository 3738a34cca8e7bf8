"""The frame through which a day of offers is looked at: what the reference fixes, so that days compare.

It is fitted once on the days of the reference (which shops and categories are named, at which deciles
numbers are cut, which words and prices are usual) and turns any day into the same series, a number
each, by :meth:`Frame.series`. What to think of them is :mod:`ml.drift.series`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import sparse

from ml.drift.answers import SERIES_SCHEMA, Kind
from ml.drift.measures import (
    DAMAGES,
    MISSING,
    NEW,
    OTHER,
    Bins,
    Floats,
    Integers,
    Names,
    Objects,
    UsualPrices,
    has_others,
    number_column,
    text_column,
    title_numbers,
    titles_with_character,
    top_category,
    usual_characters,
)
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
from ml.drift.words import CommonWord, Tokens, Vocabulary, common_words, telling_apart
from ml.errors import InputError
from ml.offers import CLEAN_FILE, FEED_COLUMNS, QUARANTINE_FILE, REASONS
from ml.stages import DriftReferenceParameters

FRAME_FILE = "frame.json"
WORDS_FILE = "words.parquet"
TITLES_FILE = "titles.parquet"
ROWS_FILE = "rows.parquet"
SERIES_FILE = "series.parquet"
OFFERS_FILE = "offers.parquet"

_LOOKED_AT = pa.schema(
    dict[str, pa.DataType](
        title=pa.string(),
        language=pa.string(),
        country=pa.string(),
        shop_id=pa.string(),
        shop_category=pa.string(),
        brand=pa.string(),
        price=pa.float64(),
        currency=pa.string(),
        category_id=pa.string(),
        category_path=pa.string(),
        confidence=pa.float64(),
        fast_category_id=pa.string(),
        fast_confidence=pa.float64(),
        taxonomy_known=pa.bool_(),
        trained=pa.bool_(),
    )
)
"""What a frame is fitted on."""

_LEAST_COUNTRY_SHARE, _MOST_COUNTRIES = 0.01, 30
_LEAST_LANGUAGE_SHARE, _MOST_LANGUAGES = 0.01, 20
_LEAST_SHOP_SHARE, _MOST_SHOPS = 0.01, 40
_LEAST_TOP_SHARE, _MOST_TOPS = 0.005, 60
_LEAST_TOP_SHARE_OF_COUNTRY = 0.02
_LEAST_LEAF_SHARE, _MOST_LEAVES = 0.005, 100
_LEAST_OF_CATEGORY = 5
_COMMON_WORDS = 200
_USUAL_CHARACTER_SHARE = 0.001
_FAR_PRICE = 20.0
_MANY_UNKNOWN = 4
_MOST_TITLES_TOLD_APART = 1_500
LEAST_TITLES_TOLD_APART = 100
"""With fewer on a side, how well they can be told apart says nothing."""

_KEPT_SHOP_SHARE, _KEPT_SHOPS = 0.001, 200
_OPTIONAL_COLUMNS = tuple(
    column.name for column in FEED_COLUMNS if not column.needed and column.name != "category_id"
)
"""Columns that may be missing; whether people labelled an offer is not a property of the feed."""

_COUNTRY = "country "

Mask = npt.NDArray[np.bool_]
_Days = Mapping[str, tuple[pd.DataFrame, "DayTotals"]]


class DayTotals(msgspec.Struct, frozen=True, kw_only=True):
    """What is counted over all offers of a day, exactly."""

    day: str
    complete: bool
    """Whether the day is over; else its volume says nothing."""
    offers: int
    """Clean offers."""
    by_country: dict[str, int]
    """Offers per country, ``(missing)`` for none."""
    by_shop: dict[str, int]
    """Offers of the large shops (and of those asked for), all others as ``(other)``."""
    missing: dict[str, dict[str, int]]
    """Column → country → offers without a value; countries where every offer has one may be absent."""
    quarantined: dict[str, int]
    """Rows per reason; a row may have several."""
    delivered: int
    """Rows of the feed: clean and quarantined ones."""
    shops: int
    """Shops with an offer."""


def totals_of(offers_folder: Path, day: str, complete: bool, shops: Collection[str] = ()) -> DayTotals:
    """Count the offers of an ``offers`` artifact, out of core.

    Args:
        offers_folder: Folder of the artifact.
        day: ISO date.
        complete: Whether the day is over.
        shops: Shops to count however small they are on this day.
    """
    offers, quarantine = str(offers_folder / CLEAN_FILE), str(offers_folder / QUARANTINE_FILE)
    missing = ", ".join(f"count(*) - count({name})" for name in _OPTIONAL_COLUMNS)
    with duckdb.connect() as database:
        by_country = database.execute(
            f"SELECT coalesce(country, '{MISSING}') AS name, count(*), {missing} FROM read_parquet(?) "
            "GROUP BY name ORDER BY name",
            [offers],
        ).fetchall()
        by_shop = database.execute(
            "SELECT shop_id, count(*) AS offers FROM read_parquet(?) GROUP BY shop_id "
            "QUALIFY row_number() OVER (ORDER BY offers DESC, shop_id) <= ? "
            "OR offers >= ? * sum(offers) OVER () OR shop_id IN (SELECT unnest(?::VARCHAR[])) "
            "ORDER BY offers DESC, shop_id",
            [offers, _KEPT_SHOPS, _KEPT_SHOP_SHARE, list(shops)],
        ).fetchall()
        by_reason = database.execute(
            "SELECT reason, count(*) FROM (SELECT unnest(string_split(reason, ',')) AS reason "
            "FROM read_parquet(?)) GROUP BY reason ORDER BY reason",
            [quarantine],
        ).fetchall()
        ((number_of_shops,),) = database.execute(
            "SELECT count(DISTINCT shop_id) FROM read_parquet(?)", [offers]
        ).fetchall()
        ((quarantined,),) = database.execute("SELECT count(*) FROM read_parquet(?)", [quarantine]).fetchall()
    total = sum(row[1] for row in by_country)
    of_shops = {str(shop): int(offers) for shop, offers in by_shop}
    if rest := total - sum(of_shops.values()):
        of_shops[OTHER] = rest
    return DayTotals(
        day=day,
        complete=complete,
        offers=total,
        by_country={row[0]: row[1] for row in by_country},
        by_shop=of_shops,
        missing={
            name: {row[0]: row[2 + place] for row in by_country if row[2 + place]}
            for place, name in enumerate(_OPTIONAL_COLUMNS)
        },
        quarantined=dict(by_reason),
        delivered=total + quarantined,
        shops=number_of_shops,
    )


class _Fixed(msgspec.Struct, frozen=True, kw_only=True):
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
    escalate_below: float
    review_below: float
    seed: int


@dataclass(frozen=True)
class _Number:
    """A number of which the mean is followed, and the shares of its deciles."""

    question: str
    measure: str
    column: str
    unit: str = ""


@dataclass(frozen=True)
class _Sign:
    """Something that an offer shows, or some of its words do, of which the share is followed."""

    question: str
    measure: str
    segment: str
    column: str
    per_country: bool = True


_NUMBERS = (
    _Number(WORDING, "title length", "characters", "characters"),
    _Number(WORDING, "title words", "words", "words"),
    _Number(PRICES, PRICE_OVER_USUAL, "price"),
    _Number(SURENESS, "confidence", "confidence"),
)
_SIGNS = (
    _Sign(WORDING, "words of titles", "that the reference does not have", "unknown"),
    _Sign(WORDING, "titles", "whose last word the reference does not have", "unknown_last"),
    _Sign(WORDING, "titles", "with unusual characters", "unusual"),
    _Sign(UNDAMAGED, "titles", "with signs of damaged encoding", "damaged"),
    *(_Sign(UNDAMAGED, "titles", name, name, per_country=False) for name in DAMAGES),
    _Sign(UNDAMAGED, "titles", "cut off with dots", "cut", per_country=False),
    _Sign(UNDAMAGED, "titles", BEYOND_A_TO_Z, "accented"),
    _Sign(LANGUAGES, "titles", "that fit another language better than the declared one", "another"),
    _Sign(PRICES, "prices", f"above {_FAR_PRICE:.0f} times the usual", "far_above"),
    _Sign(PRICES, "prices", f"below 1/{_FAR_PRICE:.0f} of the usual", "far_below"),
    _Sign(PRICES, "prices", "of 0", "free", per_country=False),
    _Sign(PRICES, PRICED, "in a category and currency without a usual one", "no_usual_price"),
    _Sign(SURENESS, "offers", "to the student", "to_student"),
    _Sign(SURENESS, "offers", "to review", "to_review"),
    _Sign(AGREEMENT, "fast model and student", "agree", "agrees"),
)


class Frame:
    """What is fixed by the reference; turns days of offers into series."""

    def __init__(
        self,
        fixed: _Fixed,
        vocabulary: Vocabulary,
        titles: Sequence[str],
        columns: pa.Table,
        reference: pa.Table,
        days: Callable[[], _Days],
    ) -> None:
        """Put a frame together; see :meth:`fit` and :meth:`load`.

        Args:
            fixed: Content of ``frame.json``.
            vocabulary: The words of the reference.
            titles: Titles of the reference that a day's titles are told apart from.
            columns: Segments of the offers of the reference; see :meth:`columns`.
            reference: Series of the days of the reference.
            days: Gives what the frame was fitted on.
        """
        self._fixed = fixed
        self._vocabulary = vocabulary
        self._titles = list(titles)
        self._columns = columns
        self._reference = reference
        self._days = days

    @classmethod
    def fit(
        cls,
        days: _Days,
        parameters: DriftReferenceParameters | None = None,
    ) -> Frame:
        """Fit a frame on days of offers.

        Args:
            days: Of each day the offers that are looked at one by one, in random order, and its totals.
                The offers have the columns of ``CLEAN_SCHEMA``, what was predicted for them (``category_id``,
                ``category_path``, ``confidence``, ``fast_category_id``, ``fast_confidence``; null where
                there is none), ``taxonomy_known`` and ``trained``.
            parameters: Of ``drift_reference``.

        Raises:
            InputError: there is no offer to fit on.
        """
        parameters = parameters or DriftReferenceParameters()
        names = sorted(days)
        frames = [days[name][0] for name in names]
        rows = pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)
        if rows.empty:
            raise InputError(
                f"none of the {len(days)} days of the reference has an offer; choose days that have"
            )
        day = np.repeat(np.arange(len(names)), [len(frame) for frame in frames])
        fold = _folds(day)
        return _Fit(rows, day, fold, [days[name][1] for name in names], parameters).frame(lambda: days)

    def without(self, day: str) -> Frame | None:
        """The frame of the other days: what a day of the reference is looked at through.

        Looked up in all days it would be looked up in itself, and hold nothing new. Nothing of it may be
        left, so the frame is fitted once more.

        Returns:
            None where no other day has an offer.
        """
        days = self._days()
        others = {name: of_day for name, of_day in days.items() if name != day}
        if not any(len(rows) for rows, _ in others.values()):
            return None
        fixed = self._fixed
        parameters = DriftReferenceParameters(
            escalate_below=fixed.escalate_below, review_below=fixed.review_below, seed=fixed.seed
        )
        return Frame.fit(others, parameters)

    @property
    def reference_days(self) -> list[str]:
        """ISO dates of the days of the reference."""
        return [totals.day for totals in self._fixed.totals]

    @property
    def reference_offers(self) -> int:
        """Offers of the reference that were looked at one by one."""
        return self._fixed.offers

    @property
    def large_shops(self) -> list[str]:
        """Shops that :func:`totals_of` should count however small they are on a day."""
        return self._fixed.large_shops

    def reference_series(self, today: pa.Table | None = None) -> pa.Table:
        """The series of the days that the frame was fitted on.

        Args:
            today: Series of the day that they are for. A shop or country that is large on that day alone has
                its share of the reference's days too.
        """
        if today is None:
            return self._reference
        fixed, known = self._fixed, {*self.large_shops, NEW}
        shares = today.filter((pc.field("question") == SHOP_MIX) & (pc.field("measure") == "shop"))
        shops = {str(shop) for shop in shares["segment"].to_pylist()} - known
        counts = today.filter(pc.field("question") == VOLUME)
        countries = {
            group.removeprefix(_COUNTRY)
            for group in map(str, counts["group"].to_pylist())
            if group.startswith(_COUNTRY)
        } - {*fixed.countries, OTHER}
        tables = [self._reference]
        for totals in fixed.totals:
            series = _DaySeries(totals.day)
            series.add_shops(sorted(shops), totals)
            series.add_countries(sorted(countries), totals)
            tables.append(series.table())
        return pa.concat_tables(tables)

    def series(self, day: str, rows: pd.DataFrame, totals: DayTotals) -> pa.Table:
        """The series of a day that is not of the reference; for one that is, see :meth:`without`.

        Args:
            day: ISO date.
            rows: Offers that are looked at one by one, as for :meth:`fit`; may be none.
            totals: Of the same day.

        Returns:
            Rows of ``SERIES_SCHEMA``. A share or mean of no offers at all has none, and of a day that is not
            over there are none that need all of it.
        """
        rows = rows.reset_index(drop=True)
        measured = _measure(self._fixed, self._vocabulary, rows)
        titles = text_column(rows, "title")[_is_whole(measured)]
        ours = [str(title or "") for title in titles[: len(self._titles)]]
        series = _DaySeries(day)
        series.add_totals(self._fixed, totals)
        series.add_offers(self._fixed, measured)
        series.add_distance(ours, self._titles, self._fixed.seed)
        return series.table() if totals.complete else series.table_of_part()

    def reference_columns(self) -> pa.Table:
        """As :meth:`columns`, of the offers that the frame was fitted on; with their ``day``."""
        return self._columns

    def columns(self, rows: pd.DataFrame) -> pa.Table:
        """The segment of each offer in the main columns, for a comparison of whole columns.

        Returns:
            One text column per title ("shop category"); null where an offer is left out of it.
        """
        rows = rows.reset_index(drop=True)
        measured = _measure(self._fixed, self._vocabulary, rows)
        return _columns(self._fixed, measured)

    def save(self, folder: Path) -> None:
        """Write the frame into ``folder``: JSON and Parquet."""
        (folder / FRAME_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(self._fixed), indent=1))
        vocabulary = self._vocabulary
        columns: dict[str, Any] = {
            "word": pa.array(list(vocabulary.numbers), pa.string()),
            "folds": pa.array(vocabulary.folds_with, pa.int64()),
            **{
                f"titles_{place}": pa.array(vocabulary.counts[:, place], pa.float64())
                for place in range(len(vocabulary.languages))
            },
        }
        pq.write_table(pa.table(columns), folder / WORDS_FILE, compression="zstd")
        pq.write_table(
            pa.table({"title": pa.array(self._titles, pa.string())}), folder / TITLES_FILE, compression="zstd"
        )
        pq.write_table(self._columns, folder / ROWS_FILE, compression="zstd")
        pq.write_table(self._reference, folder / SERIES_FILE, compression="zstd")
        _write_offers(self._days(), folder / OFFERS_FILE)

    @classmethod
    def load(cls, folder: Path) -> Frame:
        """Read the frame that :meth:`save` wrote.

        Raises:
            InputError: a file is missing or damaged.
        """
        try:
            fixed = msgspec.json.decode((folder / FRAME_FILE).read_bytes(), type=_Fixed)
            words = pq.read_table(folder / WORDS_FILE)
            titles = [str(title) for title in pq.read_table(folder / TITLES_FILE)["title"].to_pylist()]
            columns = pq.read_table(folder / ROWS_FILE)
            reference = pq.read_table(folder / SERIES_FILE, schema=SERIES_SCHEMA)
            pq.read_schema(folder / OFFERS_FILE)
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} is no drift reference: {error.filename or error} is missing; make it anew"
            ) from None
        except (msgspec.DecodeError, pa.ArrowInvalid) as error:
            raise InputError(f"{folder} is damaged: {error}; delete the folder and make it again") from None
        counts = [words[f"titles_{place}"].to_numpy() for place in range(len(fixed.vocabulary_languages))]
        vocabulary = Vocabulary(
            {str(word): number for number, word in enumerate(words["word"].to_pylist())},
            words["folds"].to_numpy(),
            fixed.folds,
            fixed.vocabulary_languages,
            np.stack(counts, axis=1) if counts else np.zeros((len(words), 0)),
        )
        days = partial(_read_days, folder / OFFERS_FILE, fixed.totals)
        return cls(fixed, vocabulary, titles, columns, reference, days)


def _write_offers(days: _Days, path: Path) -> None:
    with pq.ParquetWriter(path, _LOOKED_AT.append(pa.field("day", pa.string())), compression="zstd") as file:
        for day, (rows, _) in days.items():
            table = pa.Table.from_pandas(rows[_LOOKED_AT.names], _LOOKED_AT, preserve_index=False)
            file.write_table(table.append_column("day", pa.array([day] * len(rows), pa.string())))


def _read_days(path: Path, totals: Sequence[DayTotals]) -> _Days:
    """What :func:`_write_offers` wrote; read when it is asked for, since few days need it."""
    rows = pq.read_table(path).to_pandas()
    return {of_day.day: (rows[rows["day"] == of_day.day], of_day) for of_day in totals}


# Fitting


def _folds(day: Integers) -> Integers:
    """What is left out together: a day; of a single day every other offer."""
    return day if len(np.unique(day)) > 1 else (np.arange(len(day)) % 2).astype(np.int64)


class _Fit:
    """One fitting of a frame."""

    def __init__(
        self,
        rows: pd.DataFrame,
        day: Integers,
        fold: Integers,
        totals: Sequence[DayTotals],
        parameters: DriftReferenceParameters,
    ) -> None:
        self._rows = rows
        self._day = day
        self._fold = fold
        self._totals = totals
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
                number.column: Bins.at_deciles(self._bin_values(number), number.unit) for number in _NUMBERS
            },
        )

    def frame(self, days: Callable[[], _Days]) -> Frame:
        """The fitted frame, with the series of its days."""
        pairs = self._titles_to_tell_apart()
        tables = []
        for place, totals in enumerate(self._totals):
            series = _DaySeries(totals.day)
            series.add_totals(self._fixed, totals)
            series.add_offers(self._fixed, self._measured.where(self._day == place))
            fold = place if len(self._totals) > 1 else 0
            if fold in pairs:
                series.add_distance(*pairs[fold], self._seed)
            tables.append(series.table())
        on = pa.array([self._totals[place].day for place in self._day], pa.string())
        columns = _columns(self._fixed, self._measured).append_column("day", on)
        vocabulary, reference = self._vocabularies[self._left_out], pa.concat_tables(tables)
        return Frame(self._fixed, vocabulary, self._pool(), columns, reference, days)

    def _fix(self, parameters: DriftReferenceParameters, tokens: Tokens) -> _Fixed:
        rows, fold = self._rows, self._fold
        countries, tops = text_column(rows, "country"), _tops(rows)
        named_countries = _frequent(
            _added(totals.by_country for totals in self._totals), _LEAST_COUNTRY_SHARE, _MOST_COUNTRIES
        )
        leaves = Names.of(text_column(rows, "category_id"), fold, _LEAST_LEAF_SHARE, _MOST_LEAVES).named
        paths = dict(zip(text_column(rows, "category_id"), text_column(rows, "category_path"), strict=True))
        vocabulary = self._vocabularies[self._left_out]
        words = list(vocabulary.numbers)
        return _Fixed(
            totals=list(self._totals),
            offers=len(rows),
            countries=named_countries,
            large_shops=_frequent(
                _added(totals.by_shop for totals in self._totals), _LEAST_SHOP_SHARE, _MOST_SHOPS
            ),
            currencies=Names.of(
                text_column(rows, "currency"), fold, _LEAST_LANGUAGE_SHARE, _MOST_LANGUAGES
            ).named,
            languages=Names.of(self._languages, fold, _LEAST_LANGUAGE_SHARE, _MOST_LANGUAGES).named,
            shops=Names.of(text_column(rows, "shop_id"), fold, _LEAST_SHOP_SHARE, _MOST_SHOPS),
            shop_categories=Names.of(
                text_column(rows, "shop_category"), fold, _LEAST_SHOP_SHARE, _MOST_SHOPS
            ),
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
            vocabulary_languages=vocabulary.languages,
            folds=len(np.unique(fold)),
            escalate_below=parameters.escalate_below,
            review_below=parameters.review_below,
            seed=parameters.seed,
        )

    def _looks(self) -> dict[int, _Fixed]:
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

    def _measure(self, looks: Mapping[int, _Fixed]) -> _Measured:
        """All offers of the reference, each by what the other folds say."""
        parts, order = [], []
        for fold, fixed in looks.items():
            inside = np.flatnonzero(self._fold == fold)
            rows = self._rows.iloc[inside].reset_index(drop=True)
            parts.append(_measure(fixed, self._vocabularies[fold], rows, of_reference=True))
            order.append(inside)
        return _Measured.joined(parts, np.argsort(np.concatenate(order), kind="stable"))

    def _bin_values(self, number: _Number) -> Floats:
        values = self._measured.numbers[number.column].to_numpy()
        return np.exp(values) if number.column == "price" else values

    def _titles_to_tell_apart(self) -> dict[int, tuple[list[str], list[str]]]:
        """Of each fold, its titles and as many of the others; a single day is one fold against the other."""
        pairs, is_told = {}, _is_whole(self._measured)
        for fold in np.unique(self._fold):
            ours = np.flatnonzero((self._fold == fold) & is_told)[: self._pool_size()]
            theirs = _draw(np.flatnonzero((self._fold != fold) & is_told), len(ours), self._seed, int(fold))
            pairs[int(fold)] = [self._titles[row] for row in ours], [self._titles[row] for row in theirs]
        return pairs

    def _pool(self) -> list[str]:
        """Titles that those of another day are told apart from: of all folds but one, as for each fold."""
        is_told = (self._fold != self._left_out) & _is_whole(self._measured)
        rows = _draw(np.flatnonzero(is_told), self._pool_size(), self._seed, -1)
        return [self._titles[row] for row in rows]

    def _pool_size(self) -> int:
        """The same on every day: the more titles, the better they are told apart."""
        _, sizes = np.unique(self._fold, return_counts=True)
        return min(_MOST_TITLES_TOLD_APART, int(np.median(sizes)))


def _draw(rows: Integers, number: int, *seeds: int) -> Integers:
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return np.sort(generator.permutation(rows)[:number])


def _added(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for of_day in counts:
        for name, count in of_day.items():
            total[name] = total.get(name, 0) + count
    return total


def _frequent(counts: Mapping[str, int], least_share: float, most: int) -> list[str]:
    least = max(least_share * sum(counts.values()), 1)
    names = [name for name, count in counts.items() if count >= least and name not in (OTHER, MISSING)]
    return sorted(names, key=lambda name: (-counts[name], name))[:most]


def _tops(rows: pd.DataFrame) -> Objects:
    return np.array([top_category(path) for path in text_column(rows, "category_path")], dtype=object)


# Offers


@dataclass(frozen=True)
class _Measured:
    """Offers, by what is measured of each."""

    numbers: pd.DataFrame
    """Numbers, and signs as 0 to 1; NaN where the offer is left out."""
    names: pd.DataFrame
    """``country``, ``currency``, ``language``, ``shop``, ``shop_category``, ``top``, ``leaf``, ``brand``."""
    common: sparse.csr_matrix
    """(offers, common words): whether the title has the word."""

    @classmethod
    def joined(cls, parts: Sequence[_Measured], order: Integers) -> _Measured:
        """All offers of ``parts``, in another order."""
        return cls(
            pd.concat([part.numbers for part in parts], ignore_index=True).iloc[order].reset_index(drop=True),
            pd.concat([part.names for part in parts], ignore_index=True).iloc[order].reset_index(drop=True),
            sparse.vstack([part.common for part in parts], format="csr")[order],
        )

    def where(self, mask: Mask) -> _Measured:
        """Some of the offers."""
        return _Measured(self.numbers[mask], self.names[mask], self.common[np.flatnonzero(mask)])


def _measure(
    fixed: _Fixed, vocabulary: Vocabulary, rows: pd.DataFrame, *, of_reference: bool = False
) -> _Measured:
    """Measure offers; those of the reference (of one fold) by what is usual without that fold."""
    titles = [title or "" for title in text_column(rows, "title")]
    languages = text_column(rows, "language")
    tokens = Tokens.of(titles, vocabulary.numbers)
    of_titles = title_numbers(titles)
    unknown, unknown_last = vocabulary.unknown(tokens, of_reference=of_reference)
    shops, shop_categories = text_column(rows, "shop_id"), text_column(rows, "shop_category")
    log_price, price = fixed.usual_prices.log_ratio(rows), number_column(rows, "price")
    untrained = ~rows["trained"].to_numpy(dtype=bool)
    confidence, fast_confidence = number_column(rows, "confidence"), number_column(rows, "fast_confidence")
    category, fast_category = text_column(rows, "category_id"), text_column(rows, "fast_category_id")
    answered = np.array(
        [a is not None and b is not None for a, b in zip(category, fast_category, strict=True)], dtype=bool
    )
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
        "far_above": _sign(log_price > np.log(_FAR_PRICE), ~np.isnan(log_price)),
        "far_below": _sign(log_price < -np.log(_FAR_PRICE), ~np.isnan(log_price)),
        "free": _sign(price == 0, ~np.isnan(price)),
        "no_usual_price": _sign(np.isnan(log_price), price > 0),
        "rarity": _rarity(fixed, category),
        "confidence": np.where(untrained, confidence, np.nan),
        "to_student": _sign(fast_confidence < fixed.escalate_below, untrained & ~np.isnan(fast_confidence)),
        "to_review": _sign(confidence < fixed.review_below, untrained & ~np.isnan(confidence)),
        "agrees": _sign(category == fast_category, untrained & answered),
        "outside_taxonomy": _sign(
            ~rows["taxonomy_known"].to_numpy(dtype=bool), np.ones(len(rows), dtype=bool)
        ),
    }
    # What damage does to words is not the wording of shops: a training must not be started by it.
    for name in ("characters", "words", "unknown", "unknown_last", "unusual", "another"):
        numbers[name] = np.where(of_titles["damaged"] + of_titles["cut"] == 0, numbers[name], np.nan)
    common = [vocabulary.numbers[common.word] for common in fixed.common_words]
    return _Measured(
        pd.DataFrame(numbers, dtype=np.float64),
        pd.DataFrame(
            {
                "country": text_column(rows, "country"),
                "currency": text_column(rows, "currency"),
                "language": languages,
                "shop": shops,
                "shop_category": shop_categories,
                "top": _tops(rows),
                "leaf": category,
                "brand": text_column(rows, "brand"),
            },
            dtype=object,
        ),
        tokens.presence(len(vocabulary.numbers))[:, common],
    )


def _rarity(fixed: _Fixed, categories: Objects) -> Floats:
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


def _is_whole(measured: _Measured) -> Mask:
    """Which titles show no damage and are not cut."""
    numbers = measured.numbers
    return ((numbers["damaged"] == 0) & (numbers["cut"] == 0)).to_numpy(dtype=bool)


def _sign(shown: Mask, looked_at: Mask) -> Floats:
    return np.where(looked_at, shown.astype(np.float64), np.nan)


def _columns(fixed: _Fixed, measured: _Measured) -> pa.Table:
    """See :meth:`Frame.columns`."""
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
        values = np.exp(numbers[column]) if column == "price" else numbers[column]
        # Numbered, so that they sort by size.
        labels = [f"{place:02d}: {label}" for place, label in enumerate(bins.labels)]
        return [missing if code < 0 else labels[code] for code in bins.codes(values)]

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


# Series


class _DaySeries:
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

    def add_totals(self, fixed: _Fixed, totals: DayTotals) -> None:
        """What is counted over all offers: volume, missing values, quarantined rows, shares of shops."""
        self._count(VOLUME, "", totals.offers)
        self._add(VOLUME, SHOPS, "", "", "count", float(totals.shops), totals.shops, None)
        known = {country: totals.by_country.get(country, 0) for country in fixed.countries}
        for country, offers in known.items():
            self._count(VOLUME, f"country {country}", offers)
        self._count(VOLUME, f"country {OTHER}", totals.offers - sum(known.values()))
        for shop in fixed.large_shops:
            self._count(VOLUME, f"shop {shop}", totals.by_shop.get(shop, 0))
        named = sum(totals.by_shop.get(shop, 0) for shop in fixed.large_shops)
        self._count(VOLUME, f"shop {OTHER}", totals.offers - named)
        self.add_countries(
            [
                country
                for country, offers in totals.by_country.items()
                if offers >= _LEAST_COUNTRY_SHARE * totals.offers and country not in (*known, MISSING)
            ],
            totals,
        )
        for column in _OPTIONAL_COLUMNS:
            missing = totals.missing.get(column, {})
            self._share(COMPLETENESS, column, "", "missing", sum(missing.values()), totals.offers)
            for country in fixed.countries if column != "country" else ():
                offers = totals.by_country.get(country, 0)
                self._share(
                    COMPLETENESS, column, f"country {country}", "missing", missing.get(country, 0), offers
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
            if offers >= _LEAST_SHOP_SHARE * totals.offers and shop not in (*fixed.large_shops, OTHER)
        ]
        self.add_shops([*fixed.large_shops, *large], totals)

    def add_countries(self, countries: Collection[str], totals: DayTotals) -> None:
        """Offers of countries."""
        for country in countries:
            self._count(VOLUME, f"country {country}", totals.by_country.get(country, 0))

    def add_shops(self, shops: Collection[str], totals: DayTotals) -> None:
        """Shares of shops."""
        for shop in shops:
            self._share(SHOP_MIX, "shop", "", shop, totals.by_shop.get(shop, 0), totals.offers)

    def add_offers(self, fixed: _Fixed, measured: _Measured) -> None:
        """What is measured of offers one by one."""
        numbers = {str(name): column.to_numpy() for name, column in measured.numbers.items()}
        names = {str(name): column.to_numpy(dtype=object) for name, column in measured.names.items()}
        everywhere = np.ones(len(measured.numbers), dtype=bool)
        countries = {f"country {country}": names["country"] == country for country in fixed.countries}
        groups = {"": everywhere, **countries}
        for number in _NUMBERS:
            values = numbers[number.column]
            for group, mask in groups.items():
                self._mean(number.question, number.measure, group, values[mask])
            bins = fixed.bins[number.column]
            codes = bins.codes(np.exp(values) if number.column == "price" else values)
            self._shares(number.question, number.measure, "", bins.labels, codes)
        for sign in _SIGNS:
            for group, mask in groups.items() if sign.per_country else [("", everywhere)]:
                shown = numbers[sign.column][mask]
                shown = shown[~np.isnan(shown)]
                self._share(sign.question, sign.measure, group, sign.segment, shown.sum(), len(shown))
        whole = np.flatnonzero(_is_whole(measured))
        self._add_common_words(fixed, measured.common[whole], names["language"][whole])
        self._add_names(LANGUAGES, "language", fixed.languages, names["language"], groups)
        self._add_names(PRICES, "currency", fixed.currencies, names["currency"], groups)
        self._add_names(SHOP_MIX, "shop category", fixed.shop_categories.named, names["shop_category"])
        for measure, column in (("shop", "new_shop"), ("shop category", "new_shop_category")):
            self._share(SHOP_MIX, measure, "", NEW, numbers[column].sum(), len(everywhere))
        self._add_names(PREDICTED_CATEGORIES, "top-level category", fixed.tops, names["top"])
        for country, tops in fixed.tops_of_country.items():
            group = f"country {country}"
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

    def _add_common_words(self, fixed: _Fixed, common: sparse.csr_matrix, languages: Objects) -> None:
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
