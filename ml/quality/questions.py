"""What is asked of the corrections of each day's categories, and from where on an answer is WARN or ERROR."""

from __future__ import annotations

import msgspec

from ml.drift.answers import Question

AGREEMENT = "corrections_agree_with_predictions"
SHARES = "category_shares_match_corrections"
COMING = "corrections_keep_coming"
CATALOGUED = "corrections_are_about_catalogued_offers"

QUESTIONS: tuple[Question, ...] = (
    Question(name=AGREEMENT, title="share of offers whose category people confirm, against the days before"),
    Question(name=SHARES, title="shares of categories as predicted less as decided, against the days before"),
)
"""What corrections say of the model; also the names of checks of ``live_quality``."""

FEED_QUESTIONS: tuple[Question, ...] = (
    Question(name=COMING, title="days since the newest decision, against what is usual of the feed"),
    Question(name=CATALOGUED, title="share of decisions that are about catalogued offers"),
)
"""What must be true of the feed for the others to mean anything; checks of ``live_quality`` likewise."""


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
    """Change of the difference between predicted and actual share of a category, of all offers."""
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
    settling_days: int = 28
    """So long after its first label a feed may say too little; after that somebody should know."""
    silence_beyond_usual_days: int = 7
    """A feed is silent when it is so for a week longer than is usual: holidays and a late batch fit in."""
    usual_silence_unknown_days: int = 21
    """What counts as usual while a feed has decisions of too few days to have a rhythm."""
    least_decision_days: int = 5
    rhythm_days: int = 90
    """Days before the newest decision from which the rhythm is taken."""
    least_decisions: int = 20
    """With fewer, nothing is said of the offers that they are about."""
    recent_decision_days: int = 7
    days_to_settle: int = 7
    """Decisions soon after the first catalogued day are about days before it, which nobody can find."""
    most_unknown: float = 0.9
    """Share of decisions about offers that no catalogued day has: with more, the ids are others."""
    more_unknown: float = 0.2
    """The same, more than on the days before."""


LIMITS = Limits()
