"""The door to the corrections feed: which files there are, and since when.

As with the offer feed, the date of the first look at a file stays for ever (``<home>/corrections_feed``):
a decision that is dated long after it is not believed.
"""

import datetime
import hashlib
from pathlib import Path

import dagster as dg
from typing_extensions import override

from ml.errors import InputError
from ml.stages import FeedFile
from resources.atomic_files import create_once
from resources.failures import input_errors_fail_plainly
from resources.offer_feed import DemoOfferFeed

SETTING = "CORRECTIONS_FEED"


class CorrectionsFeed(dg.ConfigurableResource["CorrectionsFeed"]):
    """Decisions of people in files."""

    feed: str
    """File, folder, glob or URI; empty where nobody corrects anything."""
    home: str

    @property
    def is_there(self) -> bool:
        """Whether a feed is set at all."""
        return bool(self.feed)

    @input_errors_fail_plainly()
    def files(self) -> list[FeedFile]:
        """Every file of the feed as it is now, by URI; none where nothing was delivered yet.

        Raises:
            InputFailure: the feed points nowhere, or to files of no known format.
        """
        from ml.feed.reading import NoFilesError, discover_files

        if not self.is_there:
            return []
        self.prepare()
        try:
            uris = discover_files(self.feed, SETTING, "corrections")
        except NoFilesError:
            return []
        return [self._seen(uri) for uri in uris]

    def prepare(self) -> None:
        """Make sure that the feed exists; nothing to do where somebody else delivers it."""

    def loading_day(self, uri: str) -> str:
        """The day (ISO date) that a file counts as first seen on which is looked at now."""
        return _today()

    def _seen(self, uri: str) -> FeedFile:
        from ml.feed.reading import fingerprint

        try:
            seen = fingerprint(uri)
        except InputError:
            # Reading it will say what is wrong with it.
            return FeedFile(uri=uri, fingerprint="", loaded_on=self.loading_day(uri))
        return FeedFile(uri=uri, fingerprint=seen, loaded_on=self._first_seen(uri, seen))

    def _first_seen(self, uri: str, fingerprint: str) -> str:
        name = hashlib.sha256(f"{uri}\n{fingerprint}".encode()).hexdigest()[:32]
        file = Path(self.home).absolute() / "corrections_feed" / f"{name}.txt"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            create_once(file, self.loading_day(uri).encode())
        return file.read_text(encoding="utf-8")


class DemoCorrectionsFeed(CorrectionsFeed):
    """The corrections that the embedded demo feed has beside its days."""

    # Dagster reads this annotation as it stands: no postponed annotations in this module.
    offers: dg.ResourceDependency[DemoOfferFeed]

    @classmethod
    def of(cls, offers: DemoOfferFeed) -> "DemoCorrectionsFeed":
        """The corrections of this demo feed."""
        return cls(feed=str(offers.corrections_folder), home=offers.home, offers=offers)

    @override
    def prepare(self) -> None:
        self.offers.prepare()

    @override
    def loading_day(self, uri: str) -> str:
        """A file of the demo feed was delivered on its day, whenever it was written."""
        return Path(uri).stem.removeprefix("corrections-")


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
