"""The door to the taxonomy as people publish it: the newest release at CATALOG_TAXONOMY.

What a release is made of is decided in :mod:`ml.taxonomy_change.releases`; whether it may be adopted, by
those who ask here.
"""

import time

import dagster as dg
import msgspec
from typing_extensions import override

from ml.errors import InputError
from ml.stages import TaxonomyFile
from resources.failures import input_errors_fail_plainly
from resources.offer_feed import DemoOfferFeed
from resources.redaction import without_secrets

_SECONDS_TO_LOOK = 40.0
"""For all files together: a tick of a sensor has a minute, and has more to do than to look."""


class FoundRelease(msgspec.Struct, frozen=True, kw_only=True):
    """A release of the taxonomy, as it was when it was looked at."""

    name: str
    """Its version, as its file is named."""
    source: str
    """The place it was found at, as people may see it: without secrets."""
    files: list[TaxonomyFile]
    fingerprint: str
    """Changes when the content of any file changes."""


class TaxonomySource(dg.ConfigurableResource["TaxonomySource"]):
    """The place where releases of the taxonomy appear."""

    location: str
    """File, folder of versions, web address, or URI (an S3 prefix, say)."""

    @input_errors_fail_plainly()
    def newest(self) -> FoundRelease:
        """The newest release, by the natural order of the versions' names. Reads all of its files.

        Raises:
            InputFailure: there is none, or it cannot be read in 40 s; the line names CATALOG_TAXONOMY.
        """
        from ml.taxonomy_change.releases import fingerprint, list_releases

        self.prepare()
        try:
            give_up_at = time.monotonic() + _SECONDS_TO_LOOK
            release = list_releases(self.location, give_up_at)[-1]
            return FoundRelease(
                name=release.name,
                source=without_secrets(self.location),
                files=release.files,
                fingerprint=fingerprint(release, give_up_at),
            )
        except InputError as error:
            raise InputError(without_secrets(str(error))) from None

    def prepare(self) -> None:
        """Make sure that there is a release; nothing to do where somebody else publishes them."""


class DemoTaxonomySource(TaxonomySource):
    """The folder of versions beside the embedded demo feed."""

    # Dagster reads this annotation as it stands: no postponed annotations in this module.
    feed: dg.ResourceDependency[DemoOfferFeed]

    @classmethod
    def of(cls, feed: DemoOfferFeed) -> "DemoTaxonomySource":
        """The source of the taxonomy that the labels of ``feed`` are from."""
        return cls(location=str(feed.taxonomy_folder), feed=feed)

    @override
    def prepare(self) -> None:
        self.feed.prepare()

    def add_next_version(self) -> str:
        """Write the demo's next version of the taxonomy, with its mapping; returns the file of the tree.

        Raises:
            InputFailure: there is no further version.
        """
        return self.feed.add_taxonomy_version()
