"""The embedded demo feed: a deterministic generator of a believable price-comparison feed."""
