import pytest

from ml.learning.choice_plots import are_apart, slice_plot


@pytest.mark.parametrize(
    ("values", "is_logarithmic", "apart"),
    [
        ([16, 32, 64], True, True),
        ([16, 32, 64, 70], True, False),
        ([1, 2, 3, 4], False, True),
        ([61_526, 71_661, 100_000, 264_574], True, False),
        ([7], True, True),
        ([], False, True),
    ],
)
def test_only_values_that_can_be_read_beside_each_other_have_ticks(values, is_logarithmic, apart):
    assert are_apart(values, is_logarithmic) is apart


def test_parameters_of_every_kind_are_drawn_and_none_at_all_too():
    trials = [
        {
            "number": number,
            "mean_weighted_f1": quality,
            "parameters": {"rate": 2e-5 * 30**number, "size": 16 * 2**number, "weight": number / 3},
        }
        for number, quality in enumerate((0.7, 0.8, None, 0.75))
    ]
    axes = {"rate": True, "size": True, "weight": False}
    assert slice_plot(trials, axes, best=1).startswith(b"\x89PNG")
    assert slice_plot(trials[2:3], axes).startswith(b"\x89PNG")
