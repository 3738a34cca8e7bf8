"""The door to the offer feed: which files there are, and which days they hold offers of.

A file is looked at once. What is found then is kept for ever under ``<home>/feed``, with the date
of that first look: the day of its offers that have no date themselves.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import dagster as dg
import msgspec
from typing_extensions import override

from ml.errors import InputError
from ml.stages import FeedFile
from resources.atomic_files import create_once, only_one
from resources.failures import input_errors_fail_plainly
from resources.redaction import without_secrets

_UNREADABLE = ".unreadable"
_SECONDS_UNTIL_SECOND_LOOK = 600.0
"""An unreadable file that did not change is left alone for so long: a sensor's tick has 60 s in all."""


class SeenFile(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in a file of the feed at the first look."""

    uri: str
    fingerprint: str
    loaded_on: str
    days: dict[str, int] = {}
    """Offers by ISO date of their ``offered_at``."""
    undated: int = 0
    """Offers without a date: they are of the day ``loaded_on``."""
    problem: str | None = None
    """Why the file cannot be read; None if it can."""

    def all_days(self) -> set[str]:
        """The days that need this file; an empty or unreadable one is missed on the day it was loaded."""
        return {*self.days, *([self.loaded_on] if self.undated or not self.days else [])}

    def as_feed_file(self) -> FeedFile:
        """The file as the stage ``raw_offers`` takes it."""
        return FeedFile(uri=self.uri, fingerprint=self.fingerprint, loaded_on=self.loaded_on)


class OfferFeed(dg.ConfigurableResource["OfferFeed"]):
    """Offers in files."""

    feed: str
    """File, glob or URI."""
    first_day: str
    """ISO date of the first daily partition."""
    home: str

    def days(self) -> list[str]:
        """Days (ISO dates) that the feed has offers of, from the first partition to today, in order.

        Raises:
            InputFailure: the feed leads to no file, or to none with an offer of these days.
        """
        return list(self.files_by_day())

    def files_of(self, day: str) -> list[FeedFile]:
        """Files that hold offers of ``day`` (ISO date), by URI.

        Raises:
            InputFailure: as for :meth:`days`.
        """
        return self.files_by_day().get(day, [])

    @input_errors_fail_plainly()
    def files_by_day(self, files: Sequence[SeenFile] | None = None) -> dict[str, list[FeedFile]]:
        """Files that hold offers of each day, by day in order, from one look at the whole feed.

        A file that is empty or cannot be read is among those of the day it was first seen: making
        that day's raw offers says what is wrong with it, and no other day is stopped by it. Offers
        from before the first partition or from the future have no partition to be in (yet): see
        :meth:`left_out`.

        Args:
            files: What :meth:`files` gave just now, if the caller has it.

        Raises:
            InputFailure: as for :meth:`days`.
        """
        by_day: dict[str, list[FeedFile]] = {}
        for file in self.files() if files is None else files:
            for day in file.all_days():
                by_day.setdefault(day, []).append(file.as_feed_file())
        today = _today()
        wanted = {day: by_day[day] for day in sorted(by_day) if self.first_day <= day <= today}
        if not wanted:
            raise InputError(
                f"OFFER_FEED={without_secrets(self.feed)} has offers from {min(by_day)} to {max(by_day)}, "
                f"none from OFFER_ASSETS_FIRST_DAY={self.first_day} to today ({today}): "
                "set an earlier first day"
            )
        return wanted

    def left_out(self, files: Sequence[SeenFile] | None = None) -> dict[str, int]:
        """Offers that have no partition: ``before <first day>`` and ``after today``, where there are any.

        Args:
            files: What :meth:`files` gave just now, if the caller has it.

        Raises:
            InputFailure: as for :meth:`files`.
        """
        counts = {f"before {self.first_day}": 0, "after today": 0}
        today = _today()
        for file in self.files() if files is None else files:
            for day, offers in (*file.days.items(), (file.loaded_on, file.undated)):
                if day < self.first_day:
                    counts[f"before {self.first_day}"] += offers
                elif day > today:
                    counts["after today"] += offers
        return {name: offers for name, offers in counts.items() if offers}

    def left_out_line(self, files: Sequence[SeenFile] | None = None) -> str:
        """:meth:`left_out` as one line for people; empty where no offer is left out."""
        left_out = self.left_out(files)
        if not left_out:
            return ""
        counts = ", ".join(f"{offers:,} {name}" for name, offers in left_out.items())
        return f"offers without a day to be processed on: {counts} (OFFER_ASSETS_FIRST_DAY={self.first_day})"

    @input_errors_fail_plainly()
    def files(self) -> list[SeenFile]:
        """What every file of the feed holds, by URI.

        Raises:
            InputFailure: the feed leads to no file at all.
        """
        from ml.feed.reading import discover_files

        self.prepare()
        return [self._seen(uri) for uri in discover_files(self.feed)]

    def prepare(self) -> None:
        """Make sure that the feed exists; nothing to do where somebody else delivers it."""

    def loading_day(self, uri: str) -> str:
        """The day (ISO date) that a file counts as loaded on which is looked at now."""
        return _today()

    def _seen(self, uri: str) -> SeenFile:
        from ml.feed.reading import fingerprint

        try:
            seen = fingerprint(uri)
        except InputError as error:
            # Without a fingerprint the file is known by its name alone, until it can be read again.
            return self._unreadable(uri, "", str(error))
        if known := self._kept(uri, seen):
            return known
        if broken := self._unreadable_until_now(uri, seen):
            return broken
        return self._first_look(uri, seen)

    def _first_look(self, uri: str, fingerprint: str) -> SeenFile:
        from ml.feed.reading import profile_file

        try:
            found = profile_file(uri)
        except InputError as error:
            return self._unreadable(uri, fingerprint, str(error))
        unreadable_before = self._kept(uri, fingerprint, _UNREADABLE)
        return self._keep(
            SeenFile(
                uri=uri,
                fingerprint=fingerprint,
                loaded_on=unreadable_before.loaded_on if unreadable_before else self.loading_day(uri),
                days=dict(found.days),
                undated=found.undated,
            )
        )

    def _unreadable(self, uri: str, fingerprint: str, problem: str) -> SeenFile:
        """Kept apart, so that the file is looked at again: the cause may have been the network."""
        profile = SeenFile(uri=uri, fingerprint=fingerprint, loaded_on=self.loading_day(uri), problem=problem)
        kept = self._keep(profile, _UNREADABLE)
        os.utime(self._file(uri, fingerprint, _UNREADABLE))
        return kept

    def _unreadable_until_now(self, uri: str, fingerprint: str) -> SeenFile | None:
        """The record of an unreadable file, while it is too early to look at the file again."""
        kept = self._kept(uri, fingerprint, _UNREADABLE)
        if kept is None:
            return None
        looked_at = self._file(uri, fingerprint, _UNREADABLE).stat().st_mtime
        return kept if time.time() - looked_at < _SECONDS_UNTIL_SECOND_LOOK else None

    def _keep(self, profile: SeenFile, suffix: str = "") -> SeenFile:
        """Keep the profile, unless another process was first: then its profile holds."""
        file = self._file(profile.uri, profile.fingerprint, suffix)
        file.parent.mkdir(parents=True, exist_ok=True)
        if create_once(file, msgspec.json.format(msgspec.json.encode(profile))):
            return profile
        return msgspec.json.decode(file.read_bytes(), type=SeenFile)

    def _kept(self, uri: str, fingerprint: str, suffix: str = "") -> SeenFile | None:
        try:
            content = self._file(uri, fingerprint, suffix).read_bytes()
        except FileNotFoundError:
            return None
        return msgspec.json.decode(content, type=SeenFile)

    def _file(self, uri: str, fingerprint: str, suffix: str) -> Path:
        name = hashlib.sha256(f"{uri}\n{fingerprint}".encode()).hexdigest()[:32]
        return Path(self.home).absolute() / "feed" / f"{name}{suffix}.json"


class DemoOfferFeed(OfferFeed):
    """The embedded demo feed, written to ``<home>/demo_feed`` when it is first asked for.

    The taxonomy that its labels are from lies beside it, in a folder of versions. Days and versions that
    were added since stay. With other settings it would be another feed, and needs another home.
    """

    days_at_first: int
    offers_per_day: int
    seed: int

    @classmethod
    def in_home(
        cls, home: Path, *, first_day: datetime.date, days: int, offers_per_day: int, seed: int
    ) -> DemoOfferFeed:
        """The demo feed of this home."""
        return cls(
            feed=str(home / "demo_feed" / "offers-*.parquet"),
            first_day=first_day.isoformat(),
            home=str(home),
            days_at_first=days,
            offers_per_day=offers_per_day,
            seed=seed,
        )

    @override
    def prepare(self) -> None:
        from ml.demo.feed import DemoFeed, days_in, feed_in, taxonomy_versions_in

        wanted = DemoFeed(seed=self.seed, offers_per_day=self.offers_per_day)
        with self._lock():
            written = days_in(self._folder)
            if written:
                there = feed_in(self._folder)
                if (there.seed, there.offers_per_day) != (wanted.seed, wanted.offers_per_day):
                    raise InputError(
                        f"{self._folder} holds the demo feed of seed={there.seed} "
                        f"offers_per_day={there.offers_per_day}; set OFFER_ASSETS_HOME to another folder for "
                        f"seed={wanted.seed} offers_per_day={wanted.offers_per_day} (or delete it)"
                    )
                wanted = there
            if wanted.taxonomy_version not in taxonomy_versions_in(self.taxonomy_folder):
                wanted.write_taxonomy(self.taxonomy_folder)
            first = datetime.date.fromisoformat(self.first_day)
            for number in range(self.days_at_first):
                day = first + datetime.timedelta(days=number)
                if day not in written:
                    wanted.write_day(self._folder, day)
            self._write_corrections()

    @override
    def loading_day(self, uri: str) -> str:
        """A day of the demo feed was delivered on that day, whenever its file was written."""
        return Path(uri).stem.removeprefix("offers-")

    @input_errors_fail_plainly()
    def add_drifted_day(self) -> str:
        """Write the day after the newest, with shops, wording and prices that drifted; returns the day.

        Raises:
            InputFailure: that day would be in the future.
        """
        from ml.demo.feed import days_in, feed_in

        self.prepare()
        with self._lock():
            day = days_in(self._folder)[-1] + datetime.timedelta(days=1)
            if day.isoformat() > _today():
                raise InputError(
                    f"the next day of the demo feed would be {day}, in the future; "
                    f"delete newer days from {self._folder}"
                )
            feed_in(self._folder).write_day(self._folder, day, drifted=True)
            self._write_corrections()
        return day.isoformat()

    @input_errors_fail_plainly()
    def add_taxonomy_version(self) -> str:
        """Write the taxonomy's next version, with its mapping; returns the file of the tree.

        Days that are written later keep the labels of the version before: labels come late.

        Raises:
            InputFailure: there is no further version.
        """
        from ml.demo.catalog import TAXONOMY_VERSIONS
        from ml.demo.feed import feed_in, taxonomy_versions_in

        self.prepare()
        with self._lock():
            newest = taxonomy_versions_in(self.taxonomy_folder)[-1]
            if newest == TAXONOMY_VERSIONS[-1]:
                raise InputError(
                    f"the demo feed has no taxonomy after version {newest}, which lies in "
                    f"{self.taxonomy_folder}; delete it to see the change again"
                )
            return str(feed_in(self._folder).write_taxonomy(self.taxonomy_folder, newest + 1))

    @property
    def taxonomy_folder(self) -> Path:
        """Where the versions of its taxonomy lie (CATALOG_TAXONOMY of the demo)."""
        from ml.demo.feed import TAXONOMY_FOLDER

        return self._folder / TAXONOMY_FOLDER

    @property
    def corrections_folder(self) -> Path:
        """Where what people decided later lies (CORRECTIONS_FEED of the demo)."""
        from ml.demo.corrections import CORRECTIONS_FOLDER

        return self._folder / CORRECTIONS_FOLDER

    def _write_corrections(self) -> None:
        from ml.demo.corrections import write_missing_corrections

        write_missing_corrections(self._folder)

    @property
    def _folder(self) -> Path:
        return Path(self.feed).parent

    def _lock(self) -> AbstractContextManager[None]:
        return only_one(Path(self.home) / "demo_feed.lock")


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
