"""Who answers, how far down, and how that is chosen; on arrays."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from ml.errors import InputError
from ml.evaluation.cascade import cascade_answers, cascade_curves, cascade_figures
from ml.learning.cascade import TierOutput, ValidationOffers, choose_cascade
from ml.serving.cascade import (
    OTHER_COUNTRIES,
    Cascade,
    CascadeSettings,
    FastThreshold,
    ReviewThreshold,
    Temperatures,
    best_labels,
    softmax,
)
from ml.taxonomy import Category, Taxonomy

LABELS = ["kettles", "toasters", "novels", "atlases"]
TAXONOMY = Taxonomy(
    [
        Category("home", None, "Home"),
        Category("kitchen", "home", "Kitchen"),
        Category("kettles", "kitchen", "Kettles"),
        Category("toasters", "kitchen", "Toasters"),
        Category("books", None, "Books"),
        Category("novels", "books", "Novels"),
        Category("atlases", "books", "Atlases"),
    ]
)


def settings(
    *,
    fast_weight: float = 0.0,
    fast_from: dict[str, float | None] | None = None,
    review_below: float = 0.5,
    fast_temperatures: Temperatures | None = None,
    deep_temperatures: Temperatures | None = None,
) -> CascadeSettings:
    return CascadeSettings(
        max_loss=0.01,
        min_precision=0.9,
        stated_confidence=0.95,
        fast_weight=fast_weight,
        fast_temperatures=fast_temperatures or Temperatures(),
        deep_temperatures=deep_temperatures or Temperatures(),
        thresholds={
            country: FastThreshold(confidence=confidence, offers=9, answered=0.5, loss=0.0, p_value=0.01)
            for country, confidence in ({OTHER_COUNTRIES: 0.9} | (fast_from or {})).items()
        },
        review=ReviewThreshold(confidence=review_below, certified=True, offers=9, marked=0.1, precision=0.95),
    )


def cascade(**changes) -> Cascade:
    return Cascade(settings(**changes), LABELS, LABELS, TAXONOMY)


def rows(*values: list[float]) -> np.ndarray:
    return np.array(values, np.float32)


def test_the_fast_model_answers_from_the_threshold_of_its_country_on() -> None:
    made = cascade(fast_from={"DE": 0.6, "FR": None})
    probabilities = rows(*[[0.7, 0.1, 0.1, 0.1]] * 3, [0.91, 0.03, 0.03, 0.03])
    places = [made.country(value) for value in ("de ", "FR", None, "IT")]
    assert places == ["DE", "FR", "", ""]
    assert made.is_answered_fast(probabilities, places).tolist() == [True, False, False, True]


def test_the_fast_model_never_answers_what_would_be_marked() -> None:
    made = cascade(fast_from={OTHER_COUNTRIES: 0.4}, review_below=0.8)
    assert made.is_answered_fast(rows([0.7, 0.1, 0.1, 0.1], [0.8, 0.1, 0.1, 0]), ["", ""]).tolist() == [
        False,
        True,
    ]


def test_an_answer_that_is_not_sure_goes_up_to_the_deepest_category_that_is() -> None:
    made = cascade(review_below=0.6)
    assert made.sure_enough(rows([0.4, 0.3, 0.2, 0.1])[0]) == ("kitchen", pytest.approx(0.7))
    assert made.sure_enough(rows([0.1, 0.2, 0.35, 0.35])[0]) == ("books", pytest.approx(0.7))
    # the likeliest category lies elsewhere than the only root that is sure enough
    assert made.sure_enough(rows([0.2, 0.2, 0.6, 0.0])[0]) == ("novels", pytest.approx(0.6))


def test_without_a_root_that_is_sure_enough_it_is_the_likeliest_root() -> None:
    made = cascade(review_below=0.9)
    assert made.sure_enough(rows([0.3, 0.25, 0.45, 0.0])[0]) == ("home", pytest.approx(0.55))


def test_two_words_are_weighed_and_a_category_that_one_does_not_know_gets_nothing_from_it() -> None:
    half = Cascade(settings(fast_weight=0.5), ["novels", "atlases", "maps"], LABELS[:3], _with("maps"))
    assert half.labels == ["kettles", "toasters", "novels", "atlases", "maps"]
    deep = half.deep_probabilities(rows([0.5, 0.3, 0.2]), rows([0.5, 0.1, 0.4]), [""])
    assert deep.sum() == pytest.approx(1.0)
    assert half.labels[deep[0].argmax()] == "novels"
    alone = Cascade(settings(), ["maps"], LABELS, _with("maps"))
    student = rows([0.4, 0.3, 0.2, 0.1])
    assert alone.deep_probabilities(rows([1.0]), student, [""]) == pytest.approx(
        np.append(student, [[0]], axis=1), abs=1e-6
    )


def _with(category: str) -> Taxonomy:
    return Taxonomy([*(TAXONOMY.category(name) for name in TAXONOMY), Category(category, "books", category)])


def test_temperatures_of_a_country_hold_there_alone() -> None:
    hot = Temperatures(by_country={"DE": 4.0})
    made = cascade(fast_temperatures=hot, deep_temperatures=hot)
    same = rows(*[[0.7, 0.1, 0.1, 0.1]] * 2)
    fast = made.fast_probabilities(same, ["DE", ""])
    deep = made.deep_probabilities(same, same, ["DE", ""])
    for found in (fast, deep):
        assert found[1] == pytest.approx(same[1], abs=1e-6)
        assert found[0].max() < 0.5


@pytest.mark.parametrize("number", [1, 3, 9])
def test_the_best_labels_come_in_order_and_of_equals_the_first(number: int) -> None:
    probabilities = rows([0.1, 0.4, 0.4, 0.1], [0.0, 0.0, 0.0, 1.0])
    expected = np.argsort(-probabilities, axis=1, kind="stable")[:, :number]
    assert best_labels(probabilities, number).tolist() == expected.tolist()


def test_settings_survive_the_file_and_a_damaged_one_is_named(tmp_path) -> None:
    stored = settings(fast_from={"DE": None})
    stored.write(tmp_path)
    assert CascadeSettings.read(tmp_path) == stored
    (tmp_path / "cascade.json").write_text("{}")
    with pytest.raises(InputError, match=r"cascade\.json is damaged"):
        CascadeSettings.read(tmp_path)
    (tmp_path / "cascade.json").unlink()
    with pytest.raises(InputError, match=r"cascade\.json is missing"):
        CascadeSettings.read(tmp_path)


class Drawn:
    """Validation offers of two models: each sees the truth through noise of its own."""

    def __init__(
        self, number: int, seed: int = 0, *, countries: tuple[str, ...] = ("",), hot: float = 1.0
    ) -> None:
        random = np.random.default_rng(seed)
        truth = random.integers(len(LABELS), size=number)
        places = random.integers(len(countries), size=number)
        self.offers = ValidationOffers(
            texts=[str(row) for row in range(number)],
            category_ids=[LABELS[place] for place in truth],
            countries=[countries[place] for place in places],
        )
        signal = np.eye(len(LABELS))[truth]
        # Log-likelihood ratios of a Gaussian signal: calibrated by construction.
        scale = np.where(places == 0, hot, 1.0)[:, None]
        self.fast = self._output(random, signal, 3.2, scale)
        self.student = self._output(random, signal, 4.0, scale)

    @staticmethod
    def _output(
        random: np.random.Generator, signal: np.ndarray, strength: float, scale: np.ndarray
    ) -> TierOutput:
        seen = signal * strength + random.normal(size=signal.shape)
        return TierOutput(labels=LABELS, probabilities=softmax((seen * strength * scale).astype(np.float32)))

    def choose(self, **changes) -> CascadeSettings:
        stated = {"max_loss": 0.01, "min_precision": 0.9, "country_offers": 1_000} | changes
        return choose_cascade(self.offers, self.fast, self.student, **stated)


def test_models_that_err_apart_are_weighed_and_stay_calibrated() -> None:
    drawn = Drawn(3_000)
    chosen = drawn.choose()
    assert chosen.fast_weight == 0.5
    assert chosen.thresholds[OTHER_COUNTRIES].answered > 0.5
    assert chosen.review.certified
    fresh = Drawn(5_000, 1)
    made = Cascade(chosen, LABELS, LABELS, TAXONOMY)
    answers = cascade_answers(
        made,
        LABELS,
        fresh.fast.probabilities,
        fresh.student.probabilities,
        fresh.offers.category_ids,
        fresh.offers.countries,
    )
    figures = cascade_figures(answers, TAXONOMY, chosen)
    assert (
        figures["student_accuracy"] > np.mean(fresh.student.probabilities.argmax(1) == _truth(fresh)) + 0.005
    )
    assert figures["student_ece"] < 0.02
    assert figures["ece"] < 0.02
    assert figures["loss"] <= 0.01
    assert figures["loss_p_value"] > 0.05
    assert figures["precision_unmarked"] >= 0.9
    assert figures["share_fast"] > 0.5


def _truth(drawn: Drawn) -> np.ndarray:
    return np.array([LABELS.index(category) for category in drawn.offers.category_ids])


def test_a_country_with_enough_offers_has_its_own_threshold_and_temperature() -> None:
    drawn = Drawn(4_000, countries=("DE", "FR"), hot=3.0)
    chosen = drawn.choose(country_offers=1_500)
    assert set(chosen.thresholds) == {OTHER_COUNTRIES, "DE", "FR"}
    assert chosen.thresholds[OTHER_COUNTRIES].confidence is None  # no offers, nothing certified
    temperatures = chosen.fast_temperatures.by_country
    assert temperatures["DE"] == pytest.approx(3.0, rel=0.2)
    assert temperatures["FR"] == pytest.approx(1.0, rel=0.2)
    few = drawn.choose(country_offers=3_000)
    assert set(few.thresholds) == {OTHER_COUNTRIES}
    assert few.thresholds[OTHER_COUNTRIES].offers == 4_000


def test_without_offers_the_student_answers_all_and_the_strictest_mark_holds() -> None:
    chosen = Drawn(0).choose()
    assert chosen.fast_from("DE") == float("inf")
    assert (chosen.fast_weight, chosen.review.certified, chosen.review.confidence) == (0.5, False, 0.9)
    msgspec.json.encode(chosen)


def test_marked_answers_count_as_right_if_the_truth_lies_below_them() -> None:
    made = cascade(review_below=0.6)
    student = rows([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1], [0.9, 0.1, 0, 0])
    answers = cascade_answers(
        made, LABELS, rows(*[[0.25] * 4] * 3), student, ["toasters", "novels", "kettles"], [""] * 3
    )
    assert answers.given.tolist() == ["kitchen", "kitchen", "kettles"]
    figures = cascade_figures(answers, TAXONOMY, made.settings)
    assert figures["share_review"] == pytest.approx(2 / 3, abs=1e-6)
    assert (figures["marked_right"], figures["precision_unmarked"]) == (0.5, 1.0)
    curves = cascade_curves(answers)
    assert (curves.shares[-1], curves.precisions[-1]) == (1.0, pytest.approx(1 / 3))
