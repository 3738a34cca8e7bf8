import pytest

from ml.errors import InputError
from ml.evaluation import gate
from ml.evaluation.gate import GateLimits, judge

EVALUATION = {
    "student_weighted_f1": 0.86,
    "teacher_weighted_f1": 0.9,
    "student_share_of_teacher": 0.9556,
    "student_minus_production": -0.002,
    "student_minus_production_low": -0.01,
    "student_minus_production_high": 0.006,
}
COMPILED = {
    "same_category": 0.995,
    "weighted_f1_compiled": 0.858,
    "weighted_f1_original": 0.86,
    "offers": 900,
}


def failed(verdict):
    return [proposition.name for proposition in verdict.propositions if not proposition.passed]


def test_a_good_student_may_be_released():
    verdict = judge(EVALUATION, COMPILED)
    assert verdict.passed
    assert [p.name for p in verdict.propositions] == [
        "student_is_close_to_teacher",
        "student_is_not_worse_than_production",
        "compiled_matches_uncompiled",
    ]


def test_every_proposition_is_the_function_of_its_name():
    for proposition in judge(EVALUATION, COMPILED).propositions:
        metrics = COMPILED if proposition.name.startswith("compiled") else EVALUATION
        assert getattr(gate, proposition.name)(metrics, GateLimits()) == proposition


def test_a_student_far_from_its_teacher_fails_and_the_sentence_has_the_figures():
    verdict = judge(EVALUATION | {"student_share_of_teacher": 0.9499}, COMPILED)
    assert failed(verdict) == ["student_is_close_to_teacher"]
    assert verdict.propositions[0].sentence.startswith("Weighted F1 of the student is 0.8600, 95.0%")


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
    assert verdict.propositions[1].value is None
    assert verdict.propositions[1].sentence == "There is no version in production yet."


def test_the_version_in_production_is_not_said_to_be_the_first():
    first = {name: value for name, value in EVALUATION.items() if "production" not in name}
    proposition = judge(first | {"student_is_production": True}, COMPILED).propositions[1]
    assert proposition.passed
    assert proposition.sentence.startswith("This is the version in production")


def test_a_production_version_that_cannot_be_compared_fails_unless_that_is_accepted():
    metrics = {name: value for name, value in EVALUATION.items() if "production" not in name}
    metrics["production_not_comparable"] = "it reads offer text version 0, this version makes 1"
    assert failed(judge(metrics, COMPILED)) == ["student_is_not_worse_than_production"]
    assert judge(metrics, COMPILED, GateLimits(accept_incomparable_production=True)).passed


@pytest.mark.parametrize("change", [{"same_category": 0.95}, {"weighted_f1_compiled": 0.84}, {"offers": 0}])
def test_a_compiled_model_that_answers_differently_fails(change):
    assert failed(judge(EVALUATION, COMPILED | change)) == ["compiled_matches_uncompiled"]


def test_limits_are_taken_from_where_they_are_set():
    assert failed(judge(EVALUATION, COMPILED, GateLimits(min_share_of_teacher=0.97))) == [
        "student_is_close_to_teacher"
    ]
    assert failed(judge(EVALUATION, COMPILED, GateLimits(min_same_category_compiled=0.999))) == [
        "compiled_matches_uncompiled"
    ]


def test_not_a_number_never_passes():
    nan = float("nan")
    spoilt = judge(
        dict.fromkeys(EVALUATION, nan), COMPILED | {"same_category": nan, "weighted_f1_compiled": nan}
    )
    assert not any(proposition.passed for proposition in spoilt.propositions)


def test_a_missing_metric_is_an_input_error_that_names_it():
    with pytest.raises(InputError, match="metric same_category is missing"):
        judge(EVALUATION, {"offers": 3})
