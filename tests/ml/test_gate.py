import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.errors import InputError
from ml.evaluation import gate
from ml.evaluation.gate import GateLimits, judge, no_segment_is_worse_than_production
from ml.evaluation.metrics import paired_segments

EVALUATION = {
    "student_weighted_f1": 0.86,
    "teacher_weighted_f1": 0.9,
    "student_share_of_teacher": 0.9556,
    "student_minus_teacher_high": -0.03,
    "student_minus_production": -0.002,
    "student_minus_production_low": -0.01,
    "student_minus_production_high": 0.006,
    "segments_too_small": 0,
    "comparisons": [
        {
            "group": "overall",
            "segment": "all offers",
            "offers": 900,
            "difference": -0.002,
            "low": -0.012,
            "high": 0.008,
        },
        {"group": "country", "segment": "AT", "offers": 40, "difference": -0.05, "low": -0.2, "high": 0.1},
        {
            "group": "country",
            "segment": "DE",
            "offers": 860,
            "difference": 0.0002,
            "low": -0.01,
            "high": 0.01,
        },
    ],
}
COMPILED = {
    "same_category": 0.995,
    "weighted_f1_compiled": 0.859,
    "weighted_f1_original": 0.86,
    "offers": 900,
    "cascade_offers": 900,
    "cascade_share_fast": 0.6,
    "cascade_share_review": 0.1,
    "cascade_loss": 0.002,
    "cascade_max_loss": 0.01,
    "cascade_loss_p_value": 1.0,
}


def failed(verdict):
    return [proposition.name for proposition in verdict.propositions if not proposition.passed]


def test_a_good_student_may_be_released():
    verdict = judge(EVALUATION, COMPILED)
    assert verdict.passed
    assert [p.name for p in verdict.propositions] == [
        "student_is_close_to_teacher",
        "student_is_not_worse_than_production",
        "no_segment_is_worse_than_production",
        "compiled_matches_uncompiled",
        "cascade_keeps_the_student",
    ]


def test_every_proposition_is_the_function_of_its_name():
    for proposition in judge(EVALUATION, COMPILED).propositions:
        metrics = EVALUATION if "student_" in proposition.name or "segment" in proposition.name else COMPILED
        assert getattr(gate, proposition.name)(metrics, GateLimits()) == proposition


@pytest.mark.parametrize(
    ("share", "high", "passes"),
    [
        (0.95, -0.05, True),
        (0.9499, -0.044, True),  # under the limit, but as likely chance
        (0.9499, -0.046, False),
        (0.5, -0.3, False),
        (float("nan"), float("nan"), False),
    ],
)
def test_far_from_the_teacher_means_under_the_limit_and_not_by_chance(share, high, passes):
    metrics = EVALUATION | {"student_share_of_teacher": share, "student_minus_teacher_high": high}
    assert failed(judge(metrics, COMPILED)) == ([] if passes else ["student_is_close_to_teacher"])


def test_the_sentence_about_the_teacher_has_the_figures():
    sentence = judge(EVALUATION, COMPILED).propositions[0].sentence
    assert sentence.startswith(
        "Weighted F1 of the student is 0.8600, 95.6% of the teacher's 0.9000 (up to 96.7%"
    )


def test_a_teacher_that_is_never_right_teaches_nothing():
    metrics = EVALUATION | {
        "teacher_weighted_f1": 0.0,
        "student_share_of_teacher": 0.0,
        "student_minus_teacher_high": 0.5,
    }
    assert failed(judge(metrics, COMPILED)) == ["student_is_close_to_teacher"]


@pytest.mark.parametrize(
    ("difference", "low", "high", "passes"),
    [
        (0.02, 0.01, 0.03, True),
        (-0.009, -0.015, -0.003, True),  # surely worse, but within the limit
        (-0.03, -0.07, 0.01, True),  # beyond the limit, but as likely chance
        (-0.03, -0.04, -0.02, False),
        (-0.011, -0.02, -0.001, False),
    ],
)
def test_worse_than_production_means_beyond_the_limit_and_not_by_chance(difference, low, high, passes):
    metrics = EVALUATION | {
        "student_minus_production": difference,
        "student_minus_production_low": low,
        "student_minus_production_high": high,
    }
    assert judge(metrics, COMPILED).passed is passes


def test_a_first_version_has_nothing_to_be_worse_than():
    first = {name: value for name, value in EVALUATION.items() if "production" not in name}
    verdict = judge(first, COMPILED)
    assert verdict.passed
    for proposition in verdict.propositions[1:3]:
        assert proposition.value is None
        assert proposition.sentence == "There is no version in production yet."


def test_the_version_in_production_is_not_said_to_be_the_first():
    first = {name: value for name, value in EVALUATION.items() if "production" not in name}
    for proposition in judge(first | {"student_is_production": True}, COMPILED).propositions[1:3]:
        assert proposition.passed
        assert proposition.sentence.startswith("This is the version in production")


def test_a_production_version_that_cannot_be_compared_fails_unless_that_is_accepted():
    metrics = {name: value for name, value in EVALUATION.items() if "production" not in name}
    metrics["production_not_comparable"] = "it reads offer text version 0, this version makes 1"
    assert failed(judge(metrics, COMPILED)) == [
        "student_is_not_worse_than_production",
        "no_segment_is_worse_than_production",
    ]
    assert judge(metrics, COMPILED, GateLimits(accept_incomparable_production=True)).passed


@pytest.mark.parametrize("change", [{"same_category": 0.95}, {"weighted_f1_compiled": 0.84}, {"offers": 0}])
def test_a_compiled_model_that_answers_differently_fails(change):
    assert failed(judge(EVALUATION, COMPILED | change)) == ["compiled_matches_uncompiled"]


@pytest.mark.parametrize(
    ("loss", "p_value", "passes"),
    [
        (-0.01, 1.0, True),
        (0.01, 0.01, True),
        (0.03, 0.2, True),
        (0.03, 0.049, False),
        (float("nan"), 0.0, False),
    ],
)
def test_a_cascade_fails_that_loses_more_than_stated_and_not_by_chance(loss, p_value, passes):
    change = {"cascade_loss": loss, "cascade_loss_p_value": p_value}
    assert failed(judge(EVALUATION, COMPILED | change)) == ([] if passes else ["cascade_keeps_the_student"])


def test_limits_are_taken_from_where_they_are_set():
    assert failed(judge(EVALUATION, COMPILED, GateLimits(min_share_of_teacher=0.98))) == [
        "student_is_close_to_teacher"
    ]
    assert failed(judge(EVALUATION, COMPILED, GateLimits(min_same_category_compiled=0.999))) == [
        "compiled_matches_uncompiled"
    ]


def test_not_a_number_never_passes():
    nan = float("nan")
    segment = {**EVALUATION["comparisons"][1], "difference": nan, "low": nan, "high": nan}
    spoilt = judge(
        dict.fromkeys(EVALUATION, nan) | {"comparisons": [segment]},
        COMPILED | {"same_category": nan, "weighted_f1_compiled": nan, "cascade_loss": nan},
    )
    assert not any(proposition.passed for proposition in spoilt.propositions)


def test_a_missing_metric_is_an_input_error_that_names_it():
    with pytest.raises(InputError, match="metric same_category is missing"):
        judge(EVALUATION, {"offers": 3})


def segment(name, difference, low, high, group="country"):
    return {
        "group": group,
        "segment": name,
        "offers": 1234,
        "difference": difference,
        "low": low,
        "high": high,
    }


def by_segment(*comparisons, too_small=0, **limits):
    metrics = EVALUATION | {"comparisons": list(comparisons), "segments_too_small": too_small}
    return no_segment_is_worse_than_production(metrics, GateLimits(**limits))


def test_a_segment_that_is_worse_beyond_limit_and_chance_fails_and_is_named():
    overall = segment("all offers", -0.5, -0.6, -0.4, "overall")  # for the other proposition to judge
    few = segment("AT", -0.08, -0.2, 0.01)
    small = segment("CH", -0.029, -0.05, -0.01)
    worse = segment("Garden", -0.0812, -0.12, -0.04, "top_level")
    assert by_segment(overall, few, small).passed
    verdict = by_segment(overall, few, small, worse)
    assert not verdict.passed
    assert verdict.value == -0.0812
    assert verdict.limit == -0.03
    assert (
        "worse in 1 of 3 segments: top level Garden -0.0812 (interval -0.1200 to -0.0400, 1,234 offers)"
        in (verdict.sentence)
    )
    assert by_segment(worse, max_segment_loss=0.1).passed


def test_of_many_worse_segments_the_worst_are_named():
    many = [segment(f"S{n}", -0.1 - n / 100, -0.3, -0.05) for n in range(8)]
    sentence = by_segment(*many).sentence
    assert "worse in 8 of 8 segments: country S7 -0.1700" in sentence
    assert "; and 3 more" in sentence
    assert "S2" not in sentence


def test_a_passing_comparison_tells_the_lowest_segment():
    found = by_segment(segment("AT", 0.01, -0.1, 0.1), segment("DE", -0.02, -0.1, 0.1))
    assert found.value == -0.02
    assert "not worse in any of 2 segments; the lowest is country DE -0.0200" in found.sentence
    assert found.sentence.endswith("is too much).")


def test_the_sentence_says_how_many_segments_were_too_small_to_judge():
    found = by_segment(segment("AT", 0.01, -0.1, 0.1), too_small=7)
    assert "not worse in any of 1 segments" in found.sentence
    assert found.sentence.endswith("; 7 more are too small to be judged.")
    nothing = by_segment(segment("all offers", 0.0, 0.0, 0.0, "overall"), too_small=7)
    assert nothing.passed
    assert nothing.value is None
    assert nothing.sentence == "None of 7 segments is large enough to be judged on its own."


def test_a_group_of_changed_categories_is_told_in_words():
    found = by_segment(segment("new", -0.02, -0.1, 0.1, "change"))
    assert "the lowest is new categories -0.0200" in found.sentence


figures = st.tuples(*[st.floats(-1, 1)] * 3).map(sorted)


@given(st.lists(figures, min_size=1, max_size=8), st.floats(0, 1))
def test_without_a_significant_loss_beyond_the_limit_the_gate_opens(drawn, limit):
    segments = [segment(f"S{n}", middle, low, high) for n, (low, middle, high) in enumerate(drawn)]
    found = by_segment(*segments, max_segment_loss=limit)
    assert found.passed == (not any(middle < -limit and high < 0 for _, middle, high in drawn))


def test_comparisons_that_are_missing_or_spoilt_are_an_input_error():
    without = {name: value for name, value in EVALUATION.items() if name != "comparisons"}
    with pytest.raises(InputError, match="metric comparisons is missing"):
        judge(without, COMPILED)
    with pytest.raises(InputError, match="metric comparisons cannot be read"):
        judge(EVALUATION | {"comparisons": [{"group": "country"}]}, COMPILED)


def verdicts(comparisons, loss=0.0, products=40, seed=0):
    """Verdicts on two equally good models, or on one that loses ``loss`` in the first of 25 segments."""
    random = np.random.default_rng(seed)
    segments = 25
    of_offer = np.repeat(np.arange(segments), products)
    inside = [of_offer == number for number in range(segments)]
    for number in range(comparisons):
        truth = random.integers(0, 6, len(of_offer))
        student, production = (
            np.where(random.random(len(truth)) < 0.85, truth, random.integers(0, 6, len(truth)))
            for _ in range(2)
        )
        worse = inside[0] & (random.random(len(truth)) < loss)
        student = np.where(worse, (truth + 1) % 6, student)
        intervals = paired_segments(truth, student, production, inside, resamples=100, seed=number)
        yield by_segment(
            *(
                segment(f"S{place}", interval.difference, interval.low, interval.high)
                for place, interval in enumerate(intervals)
            )
        ).passed


def test_equal_models_hardly_ever_fail_though_many_segments_are_looked_at():
    assert sum(not passed for passed in verdicts(200)) <= 10  # 2.5 % on the side of a loss, of 200: 5


def test_a_plain_loss_in_one_segment_of_many_is_found():
    assert sum(not passed for passed in verdicts(20, loss=0.7)) >= 19
