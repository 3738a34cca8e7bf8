from __future__ import annotations

import numpy as np
import pytest

from ml.learning.calibration import fit_temperature, log_softmax
from ml.learning.ensemble import fit_weights


def mean_loss(logits: np.ndarray, targets: np.ndarray) -> float:
    return float(-log_softmax(logits)[np.arange(len(targets)), targets].mean())


@pytest.fixture
def parts() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two judges that see the truth through noise of their own, in units of their own."""
    rng = np.random.default_rng(5)
    targets = rng.integers(4, size=600)
    truth = np.eye(4)[targets]
    first = 3.0 * (truth * 2 + rng.normal(size=(600, 4)))
    second = 0.2 * (truth * 2 + rng.normal(size=(600, 4)))
    return first, second, targets


def test_two_judges_together_are_surer_and_more_often_right(parts) -> None:
    first, second, targets = parts
    weights = fit_weights(first, second, targets)
    together = weights.encoder * first + weights.linear * second
    for alone in (first, second):
        assert mean_loss(together, targets) < mean_loss(alone / fit_temperature(alone, targets), targets)
        assert (together.argmax(axis=1) == targets).mean() > (alone.argmax(axis=1) == targets).mean()


def test_units_do_not_matter(parts) -> None:
    first, second, targets = parts
    weights, scaled = fit_weights(first, second, targets), fit_weights(first * 2, second, targets)
    assert scaled.encoder * 2 == pytest.approx(weights.encoder, rel=0.02)
    assert scaled.linear == pytest.approx(weights.linear, rel=0.02)


def test_a_judge_who_guesses_counts_next_to_nothing(parts) -> None:
    first, _, targets = parts
    noise = np.random.default_rng(6).normal(size=first.shape)
    weights = fit_weights(first, noise, targets)
    assert weights.linear / fit_temperature(first, targets) < 0.2 * weights.encoder


def test_alone_the_weight_is_that_of_the_temperature(parts) -> None:
    first, _, targets = parts
    weights = fit_weights(first, None, targets)
    assert weights.encoder == pytest.approx(1 / fit_temperature(first, targets))
    assert weights.linear == 0


def test_without_known_classes_both_count_as_they_are(parts) -> None:
    first, second, targets = parts
    weights = fit_weights(first, second, np.full_like(targets, -1))
    assert (weights.encoder, weights.linear) == (1.0, 1.0)


def test_where_all_is_clear_the_weights_stay_finite() -> None:
    targets = np.arange(4)
    weights = fit_weights(np.eye(4), np.eye(4), targets)
    assert 0 < weights.encoder + weights.linear <= 40.0001
