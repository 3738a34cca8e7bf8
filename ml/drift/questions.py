"""The questions that are asked of every day, and the limits that their answers are held against.

Every number that decides between OK, WARN and ERROR is here, with its reason. How a day is held against
them is :mod:`ml.drift.series`; what is measured is :mod:`ml.drift.measures`.
"""

from __future__ import annotations

import msgspec

from ml.drift.answers import Kind, Question

VOLUME = "volume_is_usual"
COMPLETENESS = "values_are_complete"
WORDING = "wording_is_usual"
LANGUAGES = "languages_are_usual"
PRICES = "prices_are_usual"
SHOP_MIX = "shop_mix_is_usual"
PREDICTED_CATEGORIES = "predicted_categories_are_usual"
SURENESS = "model_is_as_sure_as_before"
AGREEMENT = "fast_model_agrees"
TAXONOMY_IN_FORCE = "predictions_are_of_the_taxonomy_in_force"

QUESTIONS: tuple[Question, ...] = (
    Question(name=VOLUME, title="offers per country and shop"),
    Question(name=COMPLETENESS, title="missing and malformed values"),
    Question(name=WORDING, title="length and words of titles"),
    Question(name=LANGUAGES, title="languages"),
    Question(name=PRICES, title="price over the usual of its category"),
    Question(name=SHOP_MIX, title="shops and their categories"),
    Question(name=PREDICTED_CATEGORIES, title="predicted categories"),
    Question(name=SURENESS, title="confidence, and what goes to the student and to review"),
    Question(name=AGREEMENT, title="agreement of fast model and student"),
    Question(name=TAXONOMY_IN_FORCE, title="predictions that the taxonomy in force does not have"),
)

# Measures that are limited or written in a way of their own; all others go by their kind.
PRICE_OVER_USUAL = "price over usual"
"""Mean of the natural logarithm of price over the usual price; written as "1.33 times"."""
TITLES_WITH_WORD = "titles with the word"
CONTENT_DISTANCE = "content distance"
"""Area under the curve of telling titles of the day from those of the reference; no deviation."""
UNITS: dict[str, str] = {PRICE_OVER_USUAL: "times", "title length": "characters"}
"""Of the numbers whose unit their measure's name does not say."""


class LeastEffect(msgspec.Struct, frozen=True, kw_only=True):
    """What a change has to amount to before it matters, however surely it is there.

    A change is large if it is ``change`` or more, or ``part`` or more while the series is ``factor`` times
    what it was or less than one ``factor``-th of it. The second way finds a country of 3 % that is gone.
    """

    change: float
    """Of a share: difference of shares (0.03: three percentage points). Of a count: difference over all
    offers expected on the day. Of a number: difference over the standard deviation of one offer's number,
    or as it is where the series has no deviation."""
    factor: float = float("inf")
    """Of a share: ratio of odds. Of a count: ratio. Not used for numbers."""
    part: float = 0.0


class LeastEffects(msgspec.Struct, frozen=True, kw_only=True):
    """The least effects of the series of one kind, question or measure."""

    kind: Kind
    question: str = ""
    """Empty for every question."""
    measure: str = ""
    """Empty for every measure."""
    warn: LeastEffect
    error: LeastEffect


LEAST_EFFECTS: tuple[LeastEffects, ...] = (
    # Assortments turn over, so single words and sections of a title's wording move by some points within a
    # season. A twentieth of all titles gaining or losing a word is worth a look; a sixth is another feed.
    LeastEffects(
        kind="share",
        question=WORDING,
        measure=TITLES_WITH_WORD,
        warn=LeastEffect(change=0.05, factor=3.0, part=0.02),
        error=LeastEffect(change=0.15, factor=4.0, part=0.08),
    ),
    # 0.5 is "cannot be told apart". At 0.6 an expert would need many titles to see a difference; at 0.7 one
    # title in three is of a kind the reference hardly has.
    LeastEffects(
        kind="number",
        question=WORDING,
        measure=CONTENT_DISTANCE,
        warn=LeastEffect(change=0.08),
        error=LeastEffect(change=0.18),
    ),
    # Offers that agree are the model's own quality signal: three points are what a model release may lose in
    # a segment (the gate's limit), eight are far beyond what any release was ever let through with.
    LeastEffects(
        kind="share",
        question=AGREEMENT,
        warn=LeastEffect(change=0.03),
        error=LeastEffect(change=0.08),
    ),
    # A share of offers moves by a few points when one large shop changes its assortment; from three points
    # on somebody should look. Ten points, or two that double or halve a segment, are no assortment.
    LeastEffects(
        kind="share",
        warn=LeastEffect(change=0.03, factor=1.5, part=0.005),
        error=LeastEffect(change=0.10, factor=2.0, part=0.02),
    ),
    # Measured by all offers of the day: a shop of 1 % that is gone is a warning, a country of 2 % or more
    # that is gone an error; of all offers together, a seventh missing warns and a third is an error.
    LeastEffects(
        kind="count",
        warn=LeastEffect(change=0.15, factor=1.5, part=0.005),
        error=LeastEffect(change=0.33, factor=2.0, part=0.02),
    ),
    # In deviations of one offer's number. Cohen (1988) calls 0.2 small and 0.5 medium; a mean over thousands
    # of offers that moves by half a deviation is a third of them counted otherwise than before.
    LeastEffects(
        kind="number",
        warn=LeastEffect(change=0.2),
        error=LeastEffect(change=0.5),
    ),
)
"""The first that fits a series holds for it."""


class BetweenDays(msgspec.Struct, frozen=True, kw_only=True):
    """How much days differ from each other, beyond what drawing offers explains.

    A standard deviation: of a share's log odds, of a count's logarithm, of a number's mean in deviations of
    one offer's number.
    """

    kind: Kind
    supposed: float
    """What is supposed until the reference tells otherwise, and never less while it is shorter than a week:
    it has not seen all weekdays."""
    least: float
    """No reference is taken as proof that days are more alike than this."""


BETWEEN_DAYS: tuple[BetweenDays, ...] = (
    # A shop sends all of its assortment or a part; single shops move by 5-20 % from day to day.
    BetweenDays(kind="share", supposed=0.15, least=0.02),
    # Week-ends hold 20-30 % fewer offers in many feeds.
    BetweenDays(kind="count", supposed=0.20, least=0.03),
    # A shop of a twentieth of the offers, one deviation away from the others, comes and goes.
    BetweenDays(kind="number", supposed=0.05, least=0.01),
)


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a day is not usual."""

    false_errors_per_day: float = 0.001
    """Chance that a usual day has any ERROR, over all questions: once in three years, so that an ERROR is
    always worth getting up for, with room for what the model of usual days leaves out."""
    false_warnings_per_day: float = 0.02
    """Chance that a usual day has any WARN: about once in two months."""
    window_days: int = 7
    """The day and six before it: one week holds each weekday once."""
    least_window_days: int = 3
    least_offers: int = 100
    """Offers of the day, and of the reference, below which a question is not answered."""
    least_segment_offers: int = 20
    """Offers of the day behind a share or mean, below which that series is not tested."""
    supposed_days: float = 8.0
    """How many days of reference the supposed difference between days counts as."""
    short_reference_days: float = 24.0
    """The same while the reference is shorter than a week. What is supposed is then a bound and not a guess,
    so it is more certain: with few degrees of freedom, titles of half the length would not be found."""
    autocorrelation: float = 0.3
    """Least correlation of neighbouring days that is allowed for: feeds repeat themselves."""
    least_effects: tuple[LeastEffects, ...] = LEAST_EFFECTS
    between_days: tuple[BetweenDays, ...] = BETWEEN_DAYS
    stale_predictions_for_error: float = 0.01
    """Share of predictions outside the taxonomy in force. None is expected, so one is a warning. Up to one in
    a hundred is a category that was just retired; more is a model of another taxonomy."""

    def least_effect(self, question: str, measure: str, kind: Kind) -> LeastEffects:
        """The least effects that hold for a series."""
        return next(
            least
            for least in self.least_effects
            if least.kind == kind and least.question in ("", question) and least.measure in ("", measure)
        )

    def differences(self, kind: Kind) -> BetweenDays:
        """What is known beforehand of the differences between days."""
        return next(between for between in self.between_days if between.kind == kind)


LIMITS = Limits()
