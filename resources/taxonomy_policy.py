"""When a new release of the taxonomy is followed, and which one is refused."""

from __future__ import annotations

import dagster as dg
from pydantic import Field

from ml.taxonomy_change.limits import TaxonomyLimits


class TaxonomyPolicy(dg.ConfigurableResource["TaxonomyPolicy"]):
    """What is asked of a release before anything is started for it."""

    settle_seconds: float = Field(ge=0, description="A new release must be unchanged for so long.")
    max_removed_share: float = Field(
        ge=0, le=1, description="At most this share of the categories may go without a successor."
    )

    def limits(self) -> TaxonomyLimits:
        """The limits that a release is held against."""
        return TaxonomyLimits(max_removed_share=self.max_removed_share)
