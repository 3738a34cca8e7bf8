"""The frame through which a day of offers is looked at: what the reference fixes, so that days compare.

It is fitted once on the days of the reference (which shops and categories are named, at which deciles
numbers are cut, which words and prices are usual) and turns any day into the same series, a number
each, by :meth:`Frame.series`. What to think of them is :mod:`ml.drift.series`.

Here is only what callers see, and the files of a saved frame. What is fixed is :mod:`ml.drift.fixed`,
how it is found :mod:`ml.drift.fitting`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ml.drift.answers import SERIES_SCHEMA
from ml.drift.day_series import COUNTRY, DaySeries
from ml.drift.fitting import Days, Fit
from ml.drift.fixed import Fixed
from ml.drift.measured_offers import measure
from ml.drift.measures import NEW, OTHER, text_column
from ml.drift.questions import SHOP_MIX, VOLUME
from ml.drift.segments import segments_of
from ml.drift.totals import DayTotals
from ml.drift.words import Vocabulary
from ml.errors import InputError
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
        tier=pa.string(),
        needs_review=pa.bool_(),
        fast_category_id=pa.string(),
        student_category_id=pa.string(),
        taxonomy_known=pa.bool_(),
        trained=pa.bool_(),
    )
)
"""What a frame is fitted on."""


class Frame:
    """What is fixed by the reference; turns days of offers into series."""

    def __init__(
        self,
        fixed: Fixed,
        vocabulary: Vocabulary,
        titles: Sequence[str],
        columns: pa.Table,
        reference: pa.Table,
        days: Callable[[], Days],
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
        days: Days,
        parameters: DriftReferenceParameters | None = None,
    ) -> Frame:
        """Fit a frame on days of offers.

        Args:
            days: Of each day the offers that are looked at one by one, in random order, and its totals.
                The offers have the columns of ``CLEAN_SCHEMA``, what was predicted for them (``category_id``,
                ``category_path``, ``confidence``, ``tier``, ``needs_review``; null where there is none), what
                either model alone says (``fast_category_id``, ``student_category_id``), ``taxonomy_known``
                and ``trained``.
            parameters: Of ``drift_reference``.

        Raises:
            InputError: there is no offer to fit on.
        """
        fit = Fit(days, parameters or DriftReferenceParameters())
        return cls(fit.fixed, fit.vocabulary, fit.titles(), fit.segments(), fit.series(), lambda: days)

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
        return Frame.fit(others, DriftReferenceParameters(seed=self._fixed.seed))

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
        """Shops that :func:`ml.drift.totals.totals_of` should count however small they are on a day."""
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
            group.removeprefix(COUNTRY)
            for group in map(str, counts["group"].to_pylist())
            if group.startswith(COUNTRY)
        } - {*fixed.countries, OTHER}
        tables = [self._reference]
        for totals in fixed.totals:
            series = DaySeries(totals.day)
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
        measured = measure(self._fixed, self._vocabulary, rows)
        titles = text_column(rows, "title")[measured.is_whole()]
        ours = [str(title or "") for title in titles[: len(self._titles)]]
        series = DaySeries(day)
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
        measured = measure(self._fixed, self._vocabulary, rows)
        return segments_of(self._fixed, measured)

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
            fixed = msgspec.json.decode((folder / FRAME_FILE).read_bytes(), type=Fixed)
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


def _write_offers(days: Days, path: Path) -> None:
    with pq.ParquetWriter(path, _LOOKED_AT.append(pa.field("day", pa.string())), compression="zstd") as file:
        for day, (rows, _) in days.items():
            table = pa.Table.from_pandas(rows[_LOOKED_AT.names], _LOOKED_AT, preserve_index=False)
            file.write_table(table.append_column("day", pa.array([day] * len(rows), pa.string())))


def _read_days(path: Path, totals: Sequence[DayTotals]) -> Days:
    """What :func:`_write_offers` wrote; read when it is asked for, since few days need it."""
    rows = pq.read_table(path).to_pandas()
    return {of_day.day: (rows[rows["day"] == of_day.day], of_day) for of_day in totals}
