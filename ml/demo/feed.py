"""An embedded demo feed: a believable price-comparison feed for those who have none at hand.

Deterministic: the same seed, size and day give the same bytes. A day is written chunk by chunk, so
memory does not grow with the number of offers. What is in a chunk is :mod:`ml.demo.offers`; the
shops are :mod:`ml.demo.shops`, the categories :mod:`ml.demo.catalog`.
"""

from __future__ import annotations

import argparse
import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from ml.demo import OFFERS_PER_DAY
from ml.demo.catalog import TAXONOMY_VERSIONS, check_version, mapping_csv, taxonomy_csv
from ml.demo.offers import CHUNK_OFFERS, OfferMaker
from ml.errors import InputError
from ml.progress import Progress

FIRST_DAY = datetime.date(2026, 11, 1)
DAYS = 3
TAXONOMY_FOLDER = "taxonomy"
"""Beside the days: a file per version of the category tree."""

_SETTINGS_KEY = b"demo_feed"
"""Under this key the settings of a feed are kept in its files, for the days that follow."""

_DRIFTED_KEY = b"demo_feed_drifted"
"""Only in the file of a day that drifted."""


class _Settings(msgspec.Struct, frozen=True):
    seed: int
    offers_per_day: int
    taxonomy_version: int


@dataclass(frozen=True)
class DemoFeed:
    """A feed of ``offers_per_day`` offers a day, labelled in one version of the taxonomy.

    Products, shops and their listings are shared by all days. Other seeds give other shops and
    products; the categories are always the same.

    Raises:
        InputError: a setting is out of range.
    """

    seed: int = 17
    offers_per_day: int = OFFERS_PER_DAY
    taxonomy_version: int = 1

    def __post_init__(self) -> None:
        if self.offers_per_day < 1:
            raise InputError(f"the demo feed needs at least 1 offer per day, not {self.offers_per_day}")
        check_version(self.taxonomy_version)

    def chunks(self, day: datetime.date, *, drifted: bool = False) -> Iterator[pa.Table]:
        """The offers of ``day``, a table of at most ``CHUNK_OFFERS`` at a time; every column is text."""
        for number in range(-(-self.offers_per_day // CHUNK_OFFERS)):
            yield self._maker.chunk(day, number, drifted=drifted)

    def true_categories(self, day: datetime.date, *, drifted: bool = False) -> pa.Table:
        """``offer_id`` and true ``category_id`` of the first ``CHUNK_OFFERS`` offers of ``day``."""
        chunk = self._maker.chunk(day, 0, drifted=drifted, truth=True)
        return chunk.select(["offer_id", "category_id"])

    def write_day(
        self, folder: Path, day: datetime.date, drifted: bool = False, progress: Progress | None = None
    ) -> Path:
        """Write ``offers-<day>.parquet`` to ``folder``; it appears when it is complete.

        Args:
            folder: Made if it does not exist.
            day: On which the offers were seen.
            drifted: New shops have more than a third of the offers, new words are in fashion, prices
                are a third higher, and one country is missing.
            progress: Told how far it is.

        Returns:
            The file. One of that name is replaced.
        """
        path = folder / _file_name(day)
        with (
            in_one_step(path) as partial,
            (progress or Progress("demo-feed")).bar(path.name, self.offers_per_day, "offers") as bar,
        ):
            writer: pq.ParquetWriter | None = None
            try:
                for chunk in self.chunks(day, drifted=drifted):
                    if writer is None:
                        settings = {_SETTINGS_KEY: msgspec.json.encode(self._settings)}
                        if drifted:
                            settings[_DRIFTED_KEY] = b"true"
                        writer = pq.ParquetWriter(
                            partial, chunk.schema.with_metadata(settings), compression="zstd"
                        )
                    writer.write_table(chunk)
                    bar.update(len(chunk))
            finally:
                if writer is not None:
                    writer.close()
        return path

    def write_taxonomy(self, folder: Path, version: int | None = None) -> Path:
        """Write the category tree to ``<folder>/v<version>.csv``; equal files are left alone.

        A later version comes with ``v<version>.mapping.csv``, which is there before the tree is.

        Args:
            folder: Made if it does not exist.
            version: Of the tree; the feed's own if not given.

        Returns:
            The file of the tree.
        """
        version = self.taxonomy_version if version is None else version
        if mapping := mapping_csv(version):
            _write_once(folder / f"v{version}.mapping.csv", mapping)
        tree = folder / f"v{version}.csv"
        _write_once(tree, taxonomy_csv(version))
        return tree

    @cached_property
    def _maker(self) -> OfferMaker:
        return OfferMaker(self.seed, self.offers_per_day, self.taxonomy_version)

    @property
    def _settings(self) -> _Settings:
        return _Settings(self.seed, self.offers_per_day, self.taxonomy_version)


def days_in(folder: Path) -> list[datetime.date]:
    """Days whose file lies in ``folder``, in order."""
    found = (path.stem.removeprefix("offers-") for path in folder.glob("offers-????-??-??.parquet"))
    return sorted(datetime.date.fromisoformat(text) for text in found)


def has_drifted(folder: Path, day: datetime.date) -> bool:
    """Whether the day whose file lies in ``folder`` was written as one that drifted."""
    return _DRIFTED_KEY in (pq.read_schema(folder / _file_name(day)).metadata or {})


def taxonomy_versions_in(folder: Path) -> list[int]:
    """Versions whose tree lies in ``folder``, in order."""
    return [version for version in TAXONOMY_VERSIONS if (folder / f"v{version}.csv").exists()]


def feed_in(folder: Path) -> DemoFeed:
    """The feed that wrote the newest day in ``folder``.

    Raises:
        InputError: there is no day, or it was written by something else.
    """
    days = days_in(folder)
    if not days:
        raise InputError(f"{folder} holds no day of the demo feed yet; write some without --next-day first")
    newest = folder / _file_name(days[-1])
    try:
        metadata = pq.read_schema(newest).metadata or {}
    except pa.ArrowInvalid:
        raise InputError(f"{newest} is not a Parquet file; delete it and write the day again") from None
    if _SETTINGS_KEY not in metadata:
        raise InputError(f"{newest} was not written by the demo feed; choose another folder")
    settings = msgspec.json.decode(metadata[_SETTINGS_KEY], type=_Settings)
    return DemoFeed(**msgspec.structs.asdict(settings))


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m ml demo-feed``: the taxonomy, and some days of offers.

    Raises:
        InputError: an option is out of range, or there is no feed to continue.
    """
    options = _parser().parse_args(arguments)
    folder: Path = options.output
    given = {
        name: getattr(options, name)
        for name in ("seed", "offers_per_day", "taxonomy_version")
        if getattr(options, name) is not None
    }
    if options.next_day:
        feed = replace(feed_in(folder), **given)
        days = [days_in(folder)[-1] + datetime.timedelta(days=1)]
    else:
        if options.days < 1:
            raise InputError(f"--days {options.days}: at least 1 day is needed")
        feed = DemoFeed(**given)
        days = [options.first_day + datetime.timedelta(days=number) for number in range(options.days)]

    progress = Progress("demo-feed")
    feed.write_taxonomy(folder / TAXONOMY_FOLDER)
    for day in days:
        path = folder / _file_name(day)
        if path.exists():
            progress.say(f"{path} kept")
            continue
        drifted = options.drifted and day == days[-1]
        feed.write_day(folder, day, drifted, progress)
        progress.say(f"{path} written, {feed.offers_per_day:,} offers{', drifted' if drifted else ''}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ml demo-feed",
        description="Write days of the embedded demo feed (offers-<day>.parquet) and its category tree "
        f"({TAXONOMY_FOLDER}/v<version>.csv; give the folder {TAXONOMY_FOLDER} as CATALOG_TAXONOMY). "
        "Days that exist are kept.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--days", type=int, default=DAYS, help="days to write (default: %(default)s)")
    parser.add_argument(
        "--first-day",
        type=_day,
        default=FIRST_DAY,
        metavar="DATE",
        help="first of the days, ISO format (default: %(default)s)",
    )
    parser.add_argument(
        "--offers-per-day",
        type=int,
        metavar="N",
        help=f"offers of a day, 10^8 and more if you like (default: {DemoFeed.offers_per_day}, or as before)",
    )
    parser.add_argument(
        "--seed", type=int, help=f"another seed, another feed (default: {DemoFeed.seed}, or as before)"
    )
    parser.add_argument(
        "--next-day", action="store_true", help="write only the day after the newest one in DIR"
    )
    parser.add_argument(
        "--drifted",
        action="store_true",
        help="let the last of the days be one that drifted: new shops, new wording, higher prices, "
        "a country missing",
    )
    parser.add_argument(
        "--taxonomy-version",
        type=int,
        metavar="VERSION",
        help=f"version of the category tree and of the labels, {TAXONOMY_VERSIONS[0]} to "
        f"{TAXONOMY_VERSIONS[-1]} (default: {DemoFeed.taxonomy_version}, or as before)",
    )
    return parser


def _day(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date such as {FIRST_DAY}") from None


def _file_name(day: datetime.date) -> str:
    return f"offers-{day.isoformat()}.parquet"


def _write_once(path: Path, text: str) -> None:
    """Write ``text`` in one step, unless it is there already."""
    content = text.encode()
    if not path.exists() or path.read_bytes() != content:
        with in_one_step(path) as partial:
            partial.write_bytes(content)


@contextmanager
def in_one_step(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when all went well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
