"""What is asked of the corrections of each day's categories, and from where on an answer is WARN or ERROR."""

from __future__ import annotations

import msgspec

from ml.drift.answers import Question

AGREEMENT = "corrections_agree_with_predictions"
SHARES = "category_shares_match_corrections"

QUESTIONS: tuple[Question, ...] = (
    Question(name=AGREEMENT, title="share of offers whose category people confirm, against the days before"),
    Question(name=SHARES, title="shares of categories as predicted and as decided by people"),
)
"""Also the names of the checks of ``live_quality``."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """From where on something is said.

    What is usual comes from the older days; these are what it takes beyond chance to matter to anybody.
    """

    warn_p: float = 0.01
    error_p: float = 0.001
    """Chance of a false WARN or ERROR per family of tests, corrected for all tests in it."""
    warn_loss: float = 0.02
    error_loss: float = 0.05
    """Fall of the share of right categories, absolute: half of what a release may lose is noticed, and twice
    what separates the student from its teacher is an error."""
    warn_share: float = 0.01
    error_share: float = 0.05
    """Difference between predicted and actual share of a category, of all offers."""
    warn_ratio: float = 0.25
    error_ratio: float = 0.5
    """The same, as a share of the actual: both must be exceeded."""
    least_recent_labels: int = 50
    least_older_labels: int = 100
    least_older_days: int = 2
    """With fewer it is too little to tell."""
    least_group_labels: int = 30
    """A country or department with fewer recent labels is not tested, nor a category with fewer decisions."""
    least_completeness: float = 0.2
    """A day of which fewer of its labels have come is too young: only the easiest are there."""
    least_confirmed: float = 0.05
    """Where people confirm less than this they report mistakes only, and agreement says nothing."""


LIMITS = Limits()
