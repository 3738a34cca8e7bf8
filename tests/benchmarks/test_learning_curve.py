"""The line through a model's errors, and what it says of a goal."""

from __future__ import annotations

import pytest

from benchmarks.learning_curve import curve_rows, draw_learning_curves, learning_curves


def figures(*trials: tuple[int, dict[str, float | None]]):
    """As ``benchmarks.quality`` writes them: the first trial, then further ones."""
    parts = [
        {
            "training_offers": offers,
            "models": [
                {"model": name, "not_run": "needs a package"}
                if mean is None
                else {"model": name, "mean": mean}
                for name, mean in models.items()
            ],
        }
        for offers, models in trials
    ]
    return {**parts[0], "further": parts[1:]}


def test_an_error_that_falls_by_a_power_is_followed_to_the_goal():
    """0.4 * (offers / 1,000) ** -0.5: 0.1 takes 16,000 offers, 0.05 four times as many."""
    trials = [(offers, {"teacher": 1 - 0.4 * (offers / 1_000) ** -0.5}) for offers in (8_000, 2_000, 4_000)]
    (found,) = learning_curves(figures(*trials), [0.9, 0.95])
    assert [offers for offers, _ in found.points] == [2_000, 4_000, 8_000]
    assert found.exponent == pytest.approx(0.5)
    assert found.offers_for["0.9"] == pytest.approx(16_000, rel=1e-3)
    assert found.offers_for["0.95"] == pytest.approx(64_000, rel=1e-3)


def test_a_model_that_more_offers_do_not_help_reaches_no_goal():
    (found,) = learning_curves(figures((4_000, {"fast": 0.8}), (2_000, {"fast": 0.8})), [0.9])
    assert found.offers_for == {"0.9": None}


def test_one_that_did_not_run_or_ran_once_has_no_curve(tmp_path):
    measured = figures(
        (4_000, {"a": 0.8, "b": None, "c": 0.7}),
        (2_000, {"a": 0.7, "b": None, "c": None}),
    )
    found = learning_curves(measured, [0.9])
    assert [curve.model for curve in found] == ["a"]
    (row,) = curve_rows(found)
    assert (row["2,000 offers"], row["4,000 offers"]) == (0.7, 0.8)
    assert row["offers for 0.9"] > 4_000
    draw_learning_curves(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
