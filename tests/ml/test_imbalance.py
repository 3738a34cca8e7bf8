from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from ml.learning.imbalance import STRENGTHS, choose_strength, log_shares


def test_shares_count_one_row_more_of_each_class() -> None:
    shares = np.exp(log_shares(np.array([0, 0, 0, 1]), 3))
    assert np.allclose(shares, np.array([4, 2, 1]) / 7)


def test_a_model_that_leans_to_the_frequent_class_is_righted() -> None:
    """Logits that are the truth's, plus the classes' shares: undoing those is best."""
    rng = np.random.default_rng(3)
    targets = rng.choice(3, size=2_000, p=[0.9, 0.08, 0.02])
    shares = log_shares(targets, 3)
    logits = np.eye(3)[targets] * 2.0 + rng.normal(size=(2_000, 3)) * 0.1 + shares
    strength = choose_strength(logits, targets, shares)
    right = (logits - strength * shares).argmax(axis=1) == targets
    assert strength > 0
    assert right.mean() > (logits.argmax(axis=1) == targets).mean()
    assert right[targets == 2].mean() > 0.9


def test_where_rare_classes_gain_nothing_all_stays() -> None:
    targets = np.array([0] * 50 + [1] * 5)
    logits = np.eye(2)[targets] * 10.0
    assert choose_strength(logits, targets, log_shares(targets, 2)) == 0.0


def test_a_few_rare_offers_are_no_reason_to_adjust() -> None:
    """Adjusted, two rare offers more are right; which other three might be is not known."""
    shares = log_shares(np.array([0] * 90 + [1] * 10), 2)
    targets = np.array([0] * 95 + [1] * 5)
    logits = np.array([[3.0, 0.0]] * 95 + [[0.5, 0.0]] * 2 + [[3.0, 0.0]] * 3)
    adjusted = (logits - 0.5 * shares).argmax(axis=1)
    assert (adjusted == targets).sum() == (logits.argmax(axis=1) == targets).sum() + 2
    assert choose_strength(logits, targets, shares) == 0.0
    assert choose_strength(np.tile(logits, (20, 1)), np.tile(targets, 20), shares) > 0


def test_what_costs_the_frequent_classes_much_is_not_bought() -> None:
    """Weighted F1 with an adjustment is held against that without one, not against the best of all."""
    targets = np.array([0] * 900 + [1] * 60)
    logits = np.array([[0.4, 0.0]] * 300 + [[4.0, 0.0]] * 600 + [[0.5, 0.0]] * 60)
    assert choose_strength(logits, targets, log_shares(targets, 2)) == 0.0


def test_without_validation_offers_nothing_is_chosen() -> None:
    assert choose_strength(np.empty((0, 2)), np.empty(0, dtype=np.int64), log_shares(np.array([0]), 2)) == 0.0


@given(st.integers(0, 2**16), st.integers(2, 6))
def test_the_choice_is_one_of_the_candidates_and_costs_next_to_no_weighted_f1(
    seed: int, classes: int
) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.integers(classes, size=80)
    logits = rng.normal(size=(80, classes)) + np.eye(classes)[targets]
    strength = choose_strength(logits, targets, log_shares(targets, classes))
    assert strength in STRENGTHS
    adjusted = (logits - strength * log_shares(targets, classes)).argmax(axis=1)
    plain = f1_score(targets, logits.argmax(axis=1), average="weighted", zero_division=0)
    assert f1_score(targets, adjusted, average="weighted", zero_division=0) >= plain - 0.002
