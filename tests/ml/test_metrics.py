import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from ml.evaluation.metrics import (
    LEAST_CLUSTERS,
    calibration,
    class_scores,
    paired_bootstrap,
    paired_segments,
    scores,
    scores_by_level,
    scores_by_segment,
    scores_by_size,
)

ids = st.sampled_from(["a", "b", "c", "only here"])
pairs = st.lists(st.tuples(ids, ids), min_size=1, max_size=60)


@settings(deadline=None)
@given(pairs)
def test_scores_are_those_of_scikit_learn(rows):
    truth, predicted = np.array(rows).T
    found = scores(truth, predicted)
    assert found.offers == len(rows)
    assert found.accuracy == pytest.approx(oracle.accuracy_score(truth, predicted))
    for name in ("weighted", "macro"):
        expected = oracle.f1_score(truth, predicted, average=name, zero_division=0)
        assert getattr(found, f"{name}_f1") == pytest.approx(expected)


@settings(deadline=None)
@given(pairs, st.data())
def test_class_scores_are_those_of_scikit_learn_with_and_without_weights(rows, data):
    truth, predicted = np.array(rows).T
    drawn = st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)).filter(any)
    weights = np.array(data.draw(drawn), float)
    for given_weights in (None, weights):
        found = class_scores(truth, predicted, given_weights)
        precision, recall, f1, support = oracle.precision_recall_fscore_support(
            truth, predicted, labels=found.classes, sample_weight=given_weights, zero_division=0
        )
        np.testing.assert_allclose(found.precision, precision)
        np.testing.assert_allclose(found.recall, recall)
        np.testing.assert_allclose(found.f1, f1)
        np.testing.assert_allclose(found.support, support)


def test_no_offers_score_zero():
    nothing = np.array([], dtype=str)
    assert scores(nothing, nothing).weighted_f1 == 0.0
    assert calibration(np.array([]), np.array([], dtype=bool)).expected_calibration_error == 0.0


def test_a_level_counts_ancestors_and_a_short_branch_counts_as_itself():
    ancestors = {"a1": ["a", "a1"], "a2": ["a", "a2"], "b": ["b"]}

    def ancestor_at(category, level):
        line = ancestors[category]
        return line[min(level, len(line)) - 1]

    truth, predicted = np.array(["a1", "a1", "a2", "b"]), np.array(["a2", "a1", "b", "b"])
    first, second = scores_by_level(truth, predicted, ancestor_at, 2)
    assert first == scores(np.array(["a", "a", "a", "b"]), np.array(["a", "a", "b", "b"]))
    assert second == scores(truth, predicted)


def test_size_bands_hold_each_category_once_and_count_false_positives_from_everywhere():
    truth = np.array(["rare"] * 2 + ["some"] * 3 + ["many"] * 5 + ["new"])
    predicted = np.array(["rare", "many", "some", "some", "rare"] + ["many"] * 5 + ["many"])
    bands = {
        band.band: band for band in scores_by_size(truth, predicted, {"rare": 9, "some": 10, "many": 100})
    }
    assert list(bands) == ["0", "1-9", "10-99", "100+"]
    assert [band.offers for band in bands.values()] == [1, 2, 3, 5]
    assert bands["1-9"].macro_f1 == pytest.approx(0.5)  # one right, one missed, one false
    assert bands["1-9"].accuracy == pytest.approx(0.5)
    assert bands["10-99"].accuracy == pytest.approx(2 / 3)
    assert bands["0"].macro_f1 == 0.0
    per_class = oracle.f1_score(truth, predicted, average=None, labels=["some"])
    assert bands["10-99"].weighted_f1 == pytest.approx(per_class[0])


def test_segments_come_largest_first_with_scores_of_their_own():
    truth, predicted = np.array(["a", "b", "a"]), np.array(["a", "b", "b"])
    found = scores_by_segment(truth, predicted, np.array(["AT", "DE", "DE"]))
    assert list(found) == ["DE", "AT"]
    assert found["AT"].accuracy == 1.0
    assert found["DE"] == scores(truth[1:], predicted[1:])


def test_confidence_that_is_right_as_often_as_it_says_has_no_calibration_error():
    confidence = np.array([0.75] * 4 + [1.0] * 2)
    found = calibration(confidence, np.array([True, True, True, False, True, True]), bins=4)
    assert found.expected_calibration_error == pytest.approx(0.0)
    assert sum(b.offers for b in found.bins) == 6
    assert found.bins[3].offers == 6


def test_calibration_error_is_the_mean_gap_weighted_by_offers():
    confidence = np.array([0.9, 0.9, 0.9, 0.2])
    found = calibration(confidence, np.array([True, False, False, False]), bins=10)
    assert found.expected_calibration_error == pytest.approx(3 / 4 * (0.9 - 1 / 3) + 1 / 4 * 0.2)
    assert found.mean_confidence == pytest.approx(0.725)


def random_models(offers, *accuracies, seed=0):
    random = np.random.default_rng(seed)
    truth = random.integers(0, 5, offers)
    models = [
        np.where(random.random(offers) < share, truth, random.integers(0, 5, offers)) for share in accuracies
    ]
    return truth, *models


def test_the_interval_of_a_model_with_itself_is_zero():
    truth, model = random_models(200, 0.7)
    interval = paired_bootstrap(truth, model, model, resamples=50)
    assert (interval.difference, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_the_interval_excludes_zero_for_a_model_that_is_plainly_better_and_is_repeatable():
    truth, good, bad = random_models(500, 0.9, 0.5)
    interval = paired_bootstrap(truth, good, bad, resamples=200, seed=3)
    assert interval.difference == pytest.approx(
        scores(truth, good).weighted_f1 - scores(truth, bad).weighted_f1
    )
    assert 0 < interval.low < interval.difference < interval.high
    assert paired_bootstrap(truth, good, bad, resamples=200, seed=3) == interval


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        truth, one, other = random_models(150, 0.7, 0.7, seed=seed)
        interval = paired_bootstrap(truth, one, other, resamples=100, seed=seed)
        covered += interval.low <= 0 <= interval.high
    assert 88 <= covered <= 100


def test_near_copies_widen_the_interval_when_drawn_as_one():
    truth, good, bad = random_models(80, 0.9, 0.8)
    copies = [np.repeat(values, 10) for values in (truth, good, bad)]
    apart = paired_bootstrap(*copies, resamples=200)
    together = paired_bootstrap(*copies, clusters=np.repeat(np.arange(80), 10), resamples=200)
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_resampled_counts_give_the_figures_of_the_resampled_offers():
    """One resample by hand: the same draws, the offers repeated as often as their cluster was drawn."""
    truth, one, other = random_models(120, 0.8, 0.6)
    clusters = np.random.default_rng(1).integers(0, 40, 120)
    interval = paired_bootstrap(truth, one, other, clusters=clusters, resamples=1, seed=4)
    units = len(np.unique(clusters))
    drawn = np.random.default_rng(4).integers(units, size=(units, 1)).ravel()
    unit = np.unique(clusters, return_inverse=True)[1]
    rows = np.concatenate([np.flatnonzero(unit == number) for number in drawn])
    expected = scores(truth[rows], one[rows]).weighted_f1 - scores(truth[rows], other[rows]).weighted_f1
    assert interval.low == interval.high == pytest.approx(expected)


def test_the_memory_of_the_bootstrap_is_bounded_whatever_the_number_of_offers(monkeypatch):
    truth, one, other = random_models(300, 0.8, 0.7)
    whole = paired_bootstrap(truth, one, other, resamples=100)
    monkeypatch.setattr("ml.evaluation.metrics._WEIGHTS_AT_ONCE", 305 * 7)
    in_parts = paired_bootstrap(truth, one, other, resamples=100)
    assert in_parts.difference == whole.difference
    assert in_parts.low == pytest.approx(whole.low, abs=0.02)


def test_a_segment_is_compared_as_if_there_were_no_other_offers():
    truth, one, other = random_models(400, 0.9, 0.6)
    first = np.arange(400) < 150
    alone, whole = paired_segments(truth, one, other, [first, np.ones(400, bool)])
    assert alone.difference == pytest.approx(
        scores(truth[first], one[first]).weighted_f1 - scores(truth[first], other[first]).weighted_f1
    )
    assert 0 < alone.low < alone.difference < alone.high
    assert whole.high - whole.low < alone.high - alone.low


def test_more_segments_make_wider_intervals():
    truth, one, other = random_models(200, 0.8, 0.7)
    everything = np.ones(200, bool)
    (single,) = paired_segments(truth, one, other, [everything])
    many = paired_segments(truth, one, other, [everything] * 50)
    percentile = paired_bootstrap(truth, one, other)
    assert many[0].high - many[0].low > 1.4 * (single.high - single.low)
    assert single.high - single.low == pytest.approx(percentile.high - percentile.low, rel=0.15)


def test_equal_answers_leave_no_doubt_and_of_few_products_nothing_can_be_said():
    truth, one, other = random_models(90, 0.9, 0.3)
    everything = np.ones(90, bool)
    (same,) = paired_segments(truth, one, one, [everything])
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)
    (few,) = paired_segments(truth, one, other, [everything], clusters=np.arange(90) % 9)
    assert few is None


def test_segments_of_few_products_do_not_widen_the_intervals_of_the_others():
    truth, one, other = random_models(200, 0.8, 0.7)
    clusters = np.minimum(np.arange(200), 150)  # the last fifty offers are of one product
    large, small = np.arange(200) < 150, np.arange(200) >= 150
    alone = paired_segments(truth, one, other, [large], clusters=clusters)
    among_small = paired_segments(truth, one, other, [small, large, small, ~small], clusters=clusters)
    assert among_small[0] is among_small[2] is None
    (twice, _) = paired_segments(truth, one, other, [large, large], clusters=clusters)
    assert among_small[1] == twice != alone[0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(ids, ids, ids, st.integers(0, 30)), min_size=1, max_size=80), st.integers(0, 9))
def test_an_interval_holds_its_difference_and_stays_in_what_is_possible(rows, seed):
    truth, one, other = np.array([row[:3] for row in rows]).T
    clusters = np.array([row[3] for row in rows])
    (found,) = paired_segments(
        truth, one, other, [np.ones(len(rows), bool)], clusters=clusters, resamples=30, seed=seed
    )
    if len(set(clusters)) < LEAST_CLUSTERS:
        assert found is None
        return
    assert -1 <= found.low <= found.difference <= found.high <= 1
    (opposite,) = paired_segments(
        truth, other, one, [np.ones(len(rows), bool)], clusters=clusters, resamples=30, seed=seed
    )
    assert opposite.low == pytest.approx(-found.high)
