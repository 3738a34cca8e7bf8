"""Where the label of a sampled offer is from: values of the column ``label_source``."""

from __future__ import annotations

HUMAN = "human"
"""People gave it, and it is a category of today's taxonomy."""
MIGRATED = "migrated"
"""People gave it under an earlier taxonomy; ``category_id`` is where it belongs today."""
BY_EVIDENCE = "by_evidence"
"""People gave it under an earlier taxonomy, and of several places where it may belong the teacher chose."""
WEAK = "weak"
"""A model guessed it, for a category that has hardly any other label."""
GUESSED = (BY_EVIDENCE, WEAK)
"""What a model has a part in: at most learned from, by its confidence; never validated or measured on."""
