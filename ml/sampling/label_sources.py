"""Where the label of a sampled offer is from: values of the column ``label_source``."""

from __future__ import annotations

HUMAN = "human"
"""People gave it, and it is a category of today's taxonomy."""
MIGRATED = "migrated"
"""People gave it under an earlier taxonomy; ``category_id`` is where it belongs today."""
WEAK = "weak"
"""A model guessed it, for a category that has hardly any other label."""
