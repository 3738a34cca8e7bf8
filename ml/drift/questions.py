"""The questions that are asked of every day, and the limits that their answers are held against.

Every number that decides between OK, WARN and ERROR is here, with its reason. How a day is held against
them is :mod:`ml.drift.series`; what is measured is :mod:`ml.drift.measures`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ml.drift.answers import Kind, Level, Question

VOLUME = "volume_is_usual"
COMPLETENESS = "values_are_complete"
WORDING = "wording_is_usual"
UNDAMAGED = "titles_are_undamaged"
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
    Question(name=UNDAMAGED, title="titles damaged on the way"),
    Question(name=LANGUAGES, title="languages"),
    Question(name=PRICES, title="price over the usual of its category"),
    Question(name=SHOP_MIX, title="shops and their categories"),
    Question(name=PREDICTED_CATEGORIES, title="predicted categories"),
    Question(name=SURENESS, title="confidence, and what goes to the student and to review"),
    Question(name=AGREEMENT, title="agreement of fast model and student"),
    Question(name=TAXONOMY_IN_FORCE, title="predictions that the taxonomy in force does not have"),
)

UNKNOWN_UNTIL_THE_DAY_IS_OVER = (
    VOLUME,
    WORDING,
    LANGUAGES,
    PRICES,
    SHOP_MIX,
    PREDICTED_CATEGORIES,
    SURENESS,
)
"""Questions that half of a day's shops answer otherwise than all of them, and so are not asked before the
day is over: each shop has its countries, languages, words, prices and categories, of which the model is more
or less sure. The others are asked at once, for no half of a sound feed fails them: values that are missing,
damaged titles, two models that contradict each other and predictions of another taxonomy."""

BEYOND_A_TO_Z = "with letters beyond a to z"
"""Titles; where a damaged encoding lost such letters there are fewer of them. Languages have more or less of
them, so of a day that is not over they say nothing."""

MEASURED_ON_SOME = (WORDING, SURENESS, AGREEMENT)
"""Questions about a part of the offers: whose titles are whole, that were not trained on. That a day has none
of them is no news of what the question is about; of all others it is a finding."""

# Measures that are limited or written in a way of their own; all others go by their kind.
PRICE_OVER_USUAL = "price over usual"
"""Mean of the natural logarithm of price over the usual price; written as "1.33 times"."""
TITLES_WITH_WORD = "titles with the word"
PRICED = "offers with a price"
CONTENT_DISTANCE = "content distance"
"""Area under the curve of telling titles of the day from those of the reference; no deviation."""
SHOPS = "shops that deliver"
"""How many there are; counted over all offers."""
RARITY = "rarity of the predicted category"
"""Mean of minus the decimal logarithm of the category's share in the reference. It falls when a model that
knew thousands of categories answers with a few hundred, each too small for a series of its own."""
UNITS: dict[str, str] = {PRICE_OVER_USUAL: "times", "title length": "characters", "title words": "words"}
"""Of the numbers whose unit their measure's name does not say."""
SPANS: dict[str, tuple[float, float]] = {
    "title length": (0.0, float("inf")),
    "title words": (0.0, float("inf")),
    "confidence": (0.0, 1.0),
    CONTENT_DISTANCE: (0.0, 1.0),
}
"""Least and greatest value of the numbers that have one; no range goes beyond."""
NAMES: dict[str, str] = {
    "title length": "mean title length",
    "title words": "mean number of words of a title",
    "confidence": "mean confidence of the student",
    CONTENT_DISTANCE: "how well titles can be told from those of the reference (0.5: not at all, 1: always)",
}
"""Of numbers, as they are called in a sentence that has to be understood alone."""


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
    segments: tuple[str, ...] = ()
    """Empty for every segment."""
    of_all_offers: bool = False
    """Whether only for the series of all offers, not for those of a country or language."""
    warn: LeastEffect
    error: LeastEffect


DAMAGED_TITLES = (
    "with signs of damaged encoding",
    "with U+FFFD",
    "with mojibake",
    "with ? inside a word",
    "with an HTML entity",
    "with invisible characters",
)

LEAST_EFFECTS: tuple[LeastEffects, ...] = (
    # A price 20 times off, or of 0, is hardly ever right: sound feeds have next to none, so half a point of
    # all offers is no assortment but a unit or a column gone wrong. In one country a shop with placeholder
    # prices is enough for that, so countries go by the limits of shares in general.
    LeastEffects(
        kind="share",
        question=PRICES,
        measure="prices",
        of_all_offers=True,
        warn=LeastEffect(change=0.03, factor=2.0, part=0.002),
        error=LeastEffect(change=0.10, factor=3.0, part=0.005),
    ),
    # Damaged titles are rare as well, but some feeds always have a few, and a shop more or less of that kind
    # is a fraction of a point. Most titles have no letter that can be damaged: one point that shows it stands
    # for several that went the wrong way.
    LeastEffects(
        kind="share",
        question=UNDAMAGED,
        measure="titles",
        segments=DAMAGED_TITLES,
        of_all_offers=True,
        warn=LeastEffect(change=0.03, factor=2.0, part=0.003),
        error=LeastEffect(change=0.10, factor=3.0, part=0.01),
    ),
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
    # Of tens of thousands of shops none is large enough to be missed by its offers. One in twenty that is
    # silent is an export that failed for some; one in five is an outage of its own kind.
    LeastEffects(
        kind="count",
        measure=SHOPS,
        warn=LeastEffect(change=float("inf"), factor=1.05),
        error=LeastEffect(change=float("inf"), factor=1.25),
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


class Harmless(msgspec.Struct, frozen=True, kw_only=True):
    """A direction in which a series may move without anybody having to get up for it."""

    question: str
    kind: Kind = "share"
    measure: str = ""
    """Empty for every measure."""
    segments: tuple[str, ...] = ()
    """Empty for every segment."""
    direction: Literal["less", "more"]
    most: Level = "WARN"
    """The level of such a finding, at most."""


HARMLESS: tuple[Harmless, ...] = (
    # A feed that got more complete or less malformed. Still worth a look: gaps may have been filled with a
    # default, or a check at the source may have been switched off.
    Harmless(question=COMPLETENESS, direction="less"),
    # Fewer damaged or cut titles. Of letters beyond a to z fewer are what lost umlauts look like, and more
    # are another language.
    Harmless(
        question=UNDAMAGED,
        measure="titles",
        segments=(*DAMAGED_TITLES, "cut off with dots"),
        direction="less",
    ),
    Harmless(question=UNDAMAGED, measure="titles", segments=(BEYOND_A_TO_Z,), direction="more"),
    # Fewer odd titles and unknown words.
    Harmless(
        question=WORDING,
        measure="titles",
        segments=("with unusual characters", "whose last word the reference does not have"),
        direction="less",
    ),
    Harmless(question=WORDING, measure="words of titles", direction="less"),
    # Titles more like the reference than its own days are like each other.
    Harmless(question=WORDING, kind="number", measure=CONTENT_DISTANCE, direction="less"),
    # More titles in the language that is declared; the shares of languages themselves count both ways.
    Harmless(question=LANGUAGES, measure="titles", direction="less"),
    # Fewer prices of 0 or far off. The mean and the deciles count both ways: cents for euros and back.
    Harmless(question=PRICES, measure="prices", direction="less"),
    Harmless(question=PRICES, measure=PRICED, direction="less"),
    # No newcomers where some are usual.
    Harmless(question=SHOP_MIX, segments=("(not in the reference)",), direction="less"),
    # More shops, large and small.
    Harmless(question=VOLUME, kind="count", measure=SHOPS, direction="more"),
    # A surer model, and less work for the student and for people. Deciles of confidence count both ways: a
    # peak at any place may be a model that answers everything alike.
    Harmless(question=SURENESS, kind="number", measure="confidence", direction="more"),
    Harmless(question=SURENESS, measure="offers", direction="less"),
    # Two models that agree more often.
    Harmless(question=AGREEMENT, direction="more"),
)
"""All else counts both ways. More offers than usual may be duplicates, and a share of a country, shop,
language, word or category that falls is another one that rises."""


class BetweenDays(msgspec.Struct, frozen=True, kw_only=True):
    """How much days differ from each other, beyond what drawing offers explains.

    A standard deviation: of a share's log odds, of a count's logarithm, of a number's mean in deviations of
    one offer's number.
    """

    kind: Kind
    of_all_offers: bool = False
    """Whether only for the counts of all offers and shops, after a reference of a week or more."""
    supposed: float
    """What is supposed until the reference tells otherwise, and never less while it is shorter than a week:
    it has not seen all weekdays."""
    least: float
    """No reference is taken as proof that days are more alike than this."""


BETWEEN_DAYS: tuple[BetweenDays, ...] = (
    # A shop sends all of its assortment or a part; single shops move by 5-20 % from day to day.
    BetweenDays(kind="share", supposed=0.15, least=0.02),
    # In all offers the ups and downs of shops cancel out, and a week has shown its week-end.
    BetweenDays(kind="count", of_all_offers=True, supposed=0.10, least=0.03),
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
    bad_day_deviations: float = 5.0
    """Robust standard deviations from the median by which a day of the reference is far from the others, but
    no fewer of what days are supposed to differ by. An outage is ten and more, a usual day hardly ever is
    five."""
    bad_day_edge: float = 3.0
    """Deviations from the median that such a day counts as."""
    bad_times: int = 2
    """An outage may last for days. What comes about more often than twice in a reference is usual."""
    bad_days_share: float = 0.25
    """The same of what holds for more than a quarter of the days."""
    least_effects: tuple[LeastEffects, ...] = LEAST_EFFECTS
    harmless: tuple[Harmless, ...] = HARMLESS
    between_days: tuple[BetweenDays, ...] = BETWEEN_DAYS
    vanished_for_error: float = 0.10
    """Part of all offers on which a series cannot be measured any more: as of shares in general."""
    stale_predictions_for_error: float = 0.01
    """Share of predictions outside the taxonomy in force. None is expected, so one is a warning. Up to one in
    a hundred is a category that was just retired; more is a model of another taxonomy."""

    def least_effect(self, question: str, measure: str, group: str, segment: str, kind: Kind) -> LeastEffects:
        """The least effects that hold for a series."""
        return next(
            least
            for least in self.least_effects
            if least.kind == kind
            and least.question in ("", question)
            and least.measure in ("", measure)
            and (not least.segments or segment in least.segments)
            and not (least.of_all_offers and group)
        )

    def most(self, question: str, measure: str, segment: str, kind: Kind, change: float) -> Level:
        """The level that a change in this direction has at most."""
        direction = "less" if change < 0 else "more"
        for harmless in self.harmless:
            if (
                (harmless.question, harmless.kind, harmless.direction) == (question, kind, direction)
                and harmless.measure in ("", measure)
                and (not harmless.segments or segment in harmless.segments)
            ):
                return harmless.most
        return "ERROR"

    def differences(self, kind: Kind, *, of_all_offers: bool) -> BetweenDays:
        """What is known beforehand of the differences between days."""
        return next(
            between
            for between in self.between_days
            if between.kind == kind and (of_all_offers or not between.of_all_offers)
        )


LIMITS = Limits()
