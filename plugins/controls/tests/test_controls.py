"""The controls keep the statistics that they promise; the combinators compute their formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weighted_mtp_core.api import StepView, WeightingChoice, WeightingStrategy, Weights, WmtpError

from weighted_mtp_controls import AnnealOptions, ClipOptions
from weighted_mtp_controls._combinators import Anneal, Clip, Product
from weighted_mtp_controls._random_matched import RandomMatched
from weighted_mtp_controls._random_numbers import random_integers, uniform, with_float64
from weighted_mtp_controls._shuffled import Shuffled

K = 2


class Fixed(WeightingStrategy):
    """Returns the weights that it is given."""

    def __init__(self, weight, **state):
        self.weight = weight
        self.state = state

    def weigh(self, view):
        return Weights(weight=self.weight, metrics={"known": 1.0})

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = dict(state)


def make_view(documents, *, step=0, seed=0):
    """Make a view with one row per list of (prompt, response) lengths, and random ids."""
    width = max(sum(map(sum, row)) for row in documents)
    document_BT = torch.full((len(documents), width), -1)
    response_BT = torch.zeros(len(documents), width, dtype=torch.bool)
    for b, row in enumerate(documents):
        start = 0
        for number, (prompt, response) in enumerate(row):
            document_BT[b, start : start + prompt + response] = number
            response_BT[b, start + prompt : start + prompt + response] = True
            start += prompt + response
    target_BTK = torch.zeros(len(documents), width, K, dtype=torch.bool)
    for k in range(1, K + 1):
        if width > k:
            same_BT = document_BT[:, k:] == document_BT[:, :-k]
            target_BTK[:, :-k, k - 1] = same_BT & response_BT[:, k:]
    generator = torch.Generator().manual_seed(seed)
    return StepView(
        ids_BT=torch.randint(0, 50, (len(documents), width), generator=generator),
        document_BT=document_BT,
        response_BT=response_BT,
        target_BTK=target_BTK,
        n_future=K,
        step=step,
        training=True,
    )


def random_weights(view, *, seed=0):
    """Return clipped log-normal weights, one per token."""
    generator = torch.Generator().manual_seed(seed)
    weight_BT = torch.randn(view.ids_BT.shape, generator=generator).exp().clamp(0.1, 3.0)
    return weight_BT * view.response_BT


PACKED = make_view([[(3, 5), (2, 4)], [(4, 6)]])
LARGE = make_view([[(5, 40)] for _ in range(32)])
documents = st.tuples(st.integers(0, 3), st.integers(0, 6)).filter(any)  # prompt and response tokens
layouts = st.lists(st.lists(documents, min_size=1, max_size=3), min_size=1, max_size=3)


@settings(deadline=None)
@given(layouts, st.integers(0, 50))
def test_shuffling_keeps_the_weights_of_each_response(rows, seed):
    view = make_view(rows, step=seed, seed=seed)
    weight_BT = random_weights(view, seed=seed)

    shuffled_BT = Shuffled(Fixed(weight_BT), seed=seed).weigh(view).weight

    for b, row in enumerate(rows):
        for number in range(len(row)):
            tokens = view.response_BT[b] & (view.document_BT[b] == number)
            assert sorted(shuffled_BT[b, tokens].tolist()) == sorted(weight_BT[b, tokens].tolist())
    assert not shuffled_BT[~view.response_BT].any()


def test_shuffling_pairs_keeps_the_weights_of_each_head():
    weight_BTK = torch.rand(PACKED.target_BTK.shape) * PACKED.target_BTK

    shuffled_BTK = Shuffled(Fixed(weight_BTK), seed=0).weigh(PACKED).weight

    for k in range(K):
        for b, document in ((0, 0), (0, 1), (1, 0)):
            pairs = PACKED.target_BTK[b, :, k] & (PACKED.document_BT[b] == document)
            assert sorted(shuffled_BTK[b, pairs, k].tolist()) == sorted(weight_BTK[b, pairs, k].tolist())
    assert not shuffled_BTK[~PACKED.target_BTK].any()
    assert not torch.equal(shuffled_BTK, weight_BTK)


def test_every_position_is_equally_likely():
    # One of three weights is 1. Each of the three tokens has this weight in about a third of the steps.
    view = make_view([[(1, 3)]])
    weight_BT = torch.tensor([[0.0, 1.0, 0.0, 0.0]])

    positions = [
        int(Shuffled(Fixed(weight_BT), seed=0).weigh(make_view([[(1, 3)]], step=step)).weight.argmax())
        for step in range(900)
    ]

    assert all(
        abs(positions.count(position) - 300) < 60 for position in (1, 2, 3)
    )  # more than four standard deviations of 14
    assert view.response_BT[0, 1:].all()


@pytest.mark.parametrize("control", [Shuffled, RandomMatched])
def test_another_step_or_seed_gives_other_weights(control):
    weight_BT = random_weights(LARGE)
    later = make_view([[(5, 40)] for _ in range(32)], step=1)

    first = control(Fixed(weight_BT), seed=0).weigh(LARGE).weight

    assert torch.equal(control(Fixed(weight_BT), seed=0).weigh(LARGE).weight, first)
    assert not torch.equal(control(Fixed(weight_BT), seed=1).weigh(LARGE).weight, first)
    assert not torch.equal(control(Fixed(weight_BT), seed=0).weigh(later).weight, first)


@pytest.mark.parametrize("seed", range(3))
def test_random_weights_have_the_wrapped_moments_after_clipping(seed):
    weight_BT = random_weights(LARGE, seed=seed)

    drawn_BT = RandomMatched(Fixed(weight_BT), seed=seed).weigh(LARGE).weight

    wrapped, drawn = weight_BT[LARGE.response_BT], drawn_BT[LARGE.response_BT]
    torch.testing.assert_close(drawn.mean(), wrapped.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(drawn.std(), wrapped.std(), rtol=1e-4, atol=0)
    assert float(drawn.min()) >= float(wrapped.min())
    assert float(drawn.max()) <= float(wrapped.max())
    assert not drawn_BT[~LARGE.response_BT].any()


def test_random_weights_do_not_correlate_with_the_wrapped_ones():
    weight_BT = random_weights(LARGE)
    drawn_BT = RandomMatched(Fixed(weight_BT), seed=0).weigh(LARGE).weight

    both = torch.stack([weight_BT[LARGE.response_BT], drawn_BT[LARGE.response_BT]])

    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.1  # 1,280 tokens: 0.028 is one standard deviation


def test_equal_weights_are_matched_by_equal_weights():
    drawn_BT = RandomMatched(Fixed(2.0 * PACKED.response_BT), seed=0).weigh(PACKED).weight

    torch.testing.assert_close(drawn_BT, 2.0 * PACKED.response_BT)


def test_two_valued_weights_are_matched():
    # Each weight equals one of two bounds, which gives the largest possible standard deviation for the mean.
    weight_BT = (torch.rand(LARGE.ids_BT.shape, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    weight_BT = (0.1 + 2.9 * weight_BT) * LARGE.response_BT

    drawn_BT = RandomMatched(Fixed(weight_BT), seed=0).weigh(LARGE).weight

    wrapped, drawn = weight_BT[LARGE.response_BT], drawn_BT[LARGE.response_BT]
    torch.testing.assert_close(drawn.mean(), wrapped.mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(drawn.std(), wrapped.std(), rtol=1e-3, atol=0)


def test_random_numbers_of_different_seeds_share_nothing():
    """The numbers of a head differ from those of all heads with another seed or in another step."""
    drawn = [
        set(random_integers(make_view([[(5, 40)]], step=step), seed=seed, heads=6).flatten().tolist())
        for seed in range(8)
        for step in range(2)
    ]

    assert {len(each) for each in drawn} == {45 * 6}
    assert len(set.union(*drawn)) == len(drawn) * 45 * 6


def test_random_numbers_are_uniform_and_uncorrelated():
    numbers = uniform(LARGE, seed=3, heads=4)

    assert numbers.shape == (32, 45, 4)
    assert 0 < float(numbers.min()) < 1e-2
    assert 0.99 < float(numbers.max()) < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.015  # 5,760 numbers: 0.0038 is one standard deviation
    assert len(numbers.unique()) == numbers.numel()
    assert abs(float(torch.corrcoef(numbers.view(-1, 4).T)[0, 1])) < 0.1


def test_random_integers_have_the_order_of_the_uniform_numbers():
    numbers = random_integers(LARGE, seed=3, heads=4).flatten()
    fractions = uniform(LARGE, seed=3, heads=4).flatten()

    assert numbers.dtype == torch.int64
    assert torch.equal(numbers.argsort(stable=True), fractions.argsort(stable=True))


@pytest.mark.parametrize(("device", "computes"), [("cpu", "cpu"), ("cuda", "cuda"), ("mps", "cpu")])
def test_float64_is_computed_on_the_cpu_if_the_device_lacks_it(device, computes):
    assert with_float64(torch.device(device)).type == computes


def test_a_product_multiplies_token_by_token():
    two = Product([Fixed(2.0 * PACKED.response_BT), Fixed(3.0 * PACKED.response_BT)]).weigh(PACKED)

    assert torch.equal(two.weight, 6.0 * PACKED.response_BT)
    assert set(two.metrics) == {"known_1", "known_2"}


def test_a_product_of_tokens_and_pairs_expands_tokens_to_pairs():
    view = make_view([[(1, 2)]])
    by_token = torch.tensor([[0.0, 2.0, 3.0]])
    by_pair = torch.tensor([[[5.0, 7.0], [11.0, 0.0], [0.0, 0.0]]])

    weight_BTK = Product([Fixed(by_token), Fixed(by_pair)]).weigh(view).weight

    # Source 0 predicts token 1 (head 1) and token 2 (head 2); source 1 predicts token 2.
    assert weight_BTK.tolist() == [[[10.0, 21.0], [33.0, 0.0], [0.0, 0.0]]]


def test_clipping_by_hand():
    view = make_view([[(1, 3)]])

    weights = Clip(Fixed(torch.tensor([[0.0, 0.1, 1.0, 9.0]])), low=0.5, high=2.0).weigh(view)

    assert weights.weight.tolist() == [[0.0, 0.5, 1.0, 2.0]]
    assert float(weights.metrics["outside_clip_fraction"]) == pytest.approx(2 / 3)


def test_controls_keep_the_sign_of_negative_weights():
    view = make_view([[(1, 4)]])
    weight_BT = torch.tensor([[0.0, -1.0, 0.5, 2.0, -0.25]])
    of = Fixed(weight_BT)

    shuffled = Shuffled(of, seed=0).weigh(view).weight
    matched = RandomMatched(of, seed=0).weigh(view).weight[0, 1:]
    product = Product([of, Fixed(2.0 * view.response_BT)]).weigh(view).weight
    clipped = Clip(of, low=-0.5, high=1.0).weigh(view).weight

    assert sorted(shuffled[0].tolist()) == sorted(weight_BT[0].tolist())
    assert float(matched.mean()) == pytest.approx(float(weight_BT[0, 1:].mean()), abs=1e-4)
    assert float(matched.min()) >= -1
    assert torch.equal(product, 2 * weight_BT)
    assert clipped.tolist() == [[0.0, -0.5, 0.5, 1.0, -0.25]]


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (10, 1.0), (15, 2.0), (20, 3.0), (99, 3.0)])
def test_annealing_goes_from_one_to_the_wrapped_weights(step, expected):
    view = make_view([[(1, 3)]], step=step)

    weights = Anneal(Fixed(3.0 * view.response_BT), start=10, end=20).weigh(view)

    assert torch.equal(weights.weight, expected * view.response_BT)
    assert weights.metrics["anneal_share"] == (expected - 1) / 2


def test_the_states_of_wrapped_weightings_are_separate():
    first, second = Fixed(None, count=1), Fixed(None, count=2, note="x")
    kept = Product([first, second]).state_dict()

    restored = Product([Fixed(None), Fixed(None)])
    restored.load_state_dict(kept)

    assert kept == {"0.count": 1, "1.count": 2, "1.note": "x"}
    assert restored.state_dict() == kept


def test_state_of_no_wrapped_weighting_is_refused():
    with pytest.raises(WmtpError, match=r"`2\.count` is state of none of the 2 wrapped weightings"):
        Product([Fixed(None), Fixed(None)]).load_state_dict({"2.count": 1})


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda of: ClipOptions(of=of, low=2.0, high=1.0), "must be >= `low` = 2.0: 1.0"),
        (lambda of: ClipOptions(of=of, low=-torch.inf), "must be finite: -inf"),
        (lambda of: AnnealOptions(of=of, start=5, end=5), "must be > `start` = 5: 5"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, expected):
    with pytest.raises(ValueError, match=expected):
        make(WeightingChoice(use="any.thing"))
