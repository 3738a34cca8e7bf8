"""The embedded demo feed: a deterministic generator of a believable price-comparison feed."""

OFFERS_PER_DAY = 8_000
"""Offers of a day unless somebody says otherwise: enough to learn from in minutes on two cores."""
