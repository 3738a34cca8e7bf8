import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from ml.learning.cold_categories import NamedLayer, bias_of_cold, cold_among, without_cold
from ml.learning.encoder import INITIAL_SCALE

COLD = np.array([False, True, False, False, True])
HIDDEN = 6


def layer_of(seed=0):
    """A layer with whole rows, and these and the names that it was made of."""
    torch.manual_seed(seed)
    layer = NamedLayer(HIDDEN, COLD, torch.device("cpu"))
    names = functional.normalize(torch.randn(len(COLD), HIDDEN)).numpy()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    layer.start(names)
    return layer, weight, bias, torch.from_numpy(names)


def test_known_categories_start_from_their_rows_and_cold_ones_from_their_names():
    layer, weight, bias, names = layer_of()
    vectors = torch.randn(3, HIDDEN)
    logits = layer.eval()(vectors)
    known = ~torch.from_numpy(COLD)
    torch.testing.assert_close(logits[:, known], functional.linear(vectors, weight, bias)[:, known])
    torch.testing.assert_close(logits[:, COLD], INITIAL_SCALE * vectors @ names[COLD].T)


def test_a_step_has_each_category_whole_or_by_its_name_alone_and_learns_from_both():
    layer, weight, bias, names = layer_of()
    vectors = torch.randn(4, HIDDEN)
    whole = functional.linear(vectors, weight, bias)
    by_name = INITIAL_SCALE * vectors @ names.T
    seen = np.zeros((2, len(COLD)), dtype=bool)
    for _ in range(40):
        logits = layer.train()(vectors)
        for form, expected in enumerate((whole, by_name)):
            seen[form] |= torch.isclose(logits, expected, atol=1e-4).all(dim=0).numpy()
        assert (torch.isclose(logits, whole, atol=1e-4) | torch.isclose(logits, by_name, atol=1e-4)).all()
    assert seen[0].tolist() == (~COLD).tolist()
    assert seen[1].all()
    functional.cross_entropy(layer(vectors), torch.tensor([0, 2, 3, 0])).backward()
    assert layer.row_of_name.grad.abs().sum() > 0
    assert not layer.weight.grad[COLD].any()


def test_it_becomes_a_plain_layer_and_goes_through_a_checkpoint():
    layer, *_ = layer_of()
    vectors = torch.randn(3, HIDDEN)
    with torch.no_grad():
        layer.row_of_name += torch.randn(HIDDEN, HIDDEN)
        layer.bias_by_name += 0.7
    torch.testing.assert_close(layer.merged()(vectors), layer.eval()(vectors))
    other = NamedLayer(HIDDEN, COLD, torch.device("cpu"))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(vectors), layer(vectors))


def test_an_offer_says_nothing_about_cold_categories_and_a_name_does():
    logits = torch.randn(2, len(COLD), requires_grad=True)
    seen = without_cold(logits, torch.tensor([True, False]), torch.from_numpy(COLD))
    assert torch.equal(seen[1], logits[1])
    known = ~torch.from_numpy(COLD)
    among_known = functional.log_softmax(logits[0, known], dim=0)
    torch.testing.assert_close(functional.log_softmax(seen[0], dim=0)[known], among_known)
    functional.cross_entropy(seen, torch.tensor([0, 1])).backward()
    assert not logits.grad[0, COLD].any()
    assert logits.grad[1].all()


def test_cold_is_what_no_offer_has():
    assert cold_among(["a", "b", "c"], ["c", "a", "c"]).tolist() == [False, True, False]
    assert cold_among(["a"], []).tolist() == [True]


@settings(derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    offers=st.integers(0, 40),
    most_lost=st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]),
)
def test_the_bias_costs_no_more_than_stated_and_more_would(seed, offers, most_lost):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(offers, len(COLD))).astype(np.float32)
    targets = random.integers(-1, len(COLD), offers)
    bias = bias_of_cold(logits, targets, COLD, most_lost)
    asked = (targets >= 0) & ~COLD[targets]

    def right(added):
        return int(((logits + np.where(COLD, added, 0.0)).argmax(axis=1) == targets)[asked].sum())

    before = int((np.where(COLD, -np.inf, logits).argmax(axis=1) == targets)[asked].sum())
    assert before - right(bias) <= most_lost * asked.sum()
    if before:
        lost_with_more = before - right(bias + 1e-5)
        assert lost_with_more > most_lost * asked.sum() or lost_with_more == before
    else:
        assert bias == 0.0
