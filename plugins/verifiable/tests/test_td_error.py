"""`verifiable.td_error`: weights worked out by hand, whitening, moving statistics, metrics."""

import math
import re
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from weighted_mtp_core.api import BuildContext, ModelContext, StepView, WmtpError

from weighted_mtp_verifiable import TdErrorOptions, build_td_error


def build(**options):
    model = ModelContext(
        n_future=2, hidden_size=8, vocab_size=8, device=torch.device("cpu"), frozen_trunk=lambda: None
    )
    context = BuildContext(seed=0, storage=Path("storage"), model=model)
    return build_td_error(TdErrorOptions(**options), context)


def view(value, *, reward=1.0, training=True):
    """Return a view of one row: a prompt token, then the response; `value` holds V of every token."""
    value_BT = torch.tensor([value])
    response_BT = torch.ones_like(value_BT, dtype=torch.bool)
    response_BT[:, 0] = False
    return StepView(
        ids_BT=torch.zeros_like(value_BT, dtype=torch.long),
        document_BT=torch.zeros_like(value_BT, dtype=torch.long),
        response_BT=response_BT,
        target_BTK=torch.zeros(*value_BT.shape, 2, dtype=torch.bool),
        n_future=2,
        step=0,
        training=training,
        reward_BT=reward * response_BT,
        value_BT=value_BT,
    )


def packed(lengths, *, seed):
    """Return one row of documents, each with two prompt tokens; every second response is correct."""
    generator = torch.Generator().manual_seed(seed)
    document = [number for number, length in enumerate(lengths) for _ in range(2 + length)]
    answers = [position >= 2 for length in lengths for position in range(2 + length)]
    document_BT, response_BT = torch.tensor([[*document, -1]]), torch.tensor([[*answers, False]])
    return attrs.evolve(
        view([0.0] * document_BT.shape[1]),
        document_BT=document_BT,
        response_BT=response_BT,
        reward_BT=(document_BT % 2 == 0) * response_BT.float(),
        value_BT=torch.rand(document_BT.shape, generator=generator),
    )


# V before each of four actions is .2, .5, .4, .9 and R = 1, so TD errors are .3, -.1, .5, .1 (mean .2).
BY_HAND = [0.2, 0.5, 0.4, 0.9, 0.7]


def test_unwhitened_weights_are_exponentials_of_td_errors():
    weights = build(estimator="td", whiten="none", beta=0.5, clip=(0.0, 100.0)).weigh(view(BY_HAND))

    expected = [0.0, *(math.exp(delta / 0.5) for delta in (0.3, -0.1, 0.5, 0.1))]
    torch.testing.assert_close(weights.weight, torch.tensor([expected]))


def test_gae_weights_by_hand():
    weights = build(lam=0.5, whiten="none", clip=(0.0, 100.0)).weigh(view(BY_HAND))

    expected = [0.0, *(math.exp(advantage) for advantage in (0.3875, 0.175, 0.55, 0.1))]
    torch.testing.assert_close(weights.weight, torch.tensor([expected]))


def test_batch_whitening_by_hand():
    weights = build(estimator="td", clip=(0.0, 100.0)).weigh(view(BY_HAND))

    # Deviations from .2 are .1, -.3, .3, -.1: variance (.01 + .09 + .09 + .01) / 4 = .05.
    expected = [0.0, *(math.exp(deviation / math.sqrt(0.05)) for deviation in (0.1, -0.3, 0.3, -0.1))]
    torch.testing.assert_close(weights.weight, torch.tensor([expected]))


def test_weights_are_clipped_and_the_clipped_are_counted():
    weights = build(estimator="td", clip=(0.5, 1.6)).weigh(view(BY_HAND))

    # exp(.1/s), exp(-.3/s), exp(.3/s), exp(-.1/s) with s = sqrt(.05): 1.564, .261, 3.825, .639.
    torch.testing.assert_close(
        weights.weight[0, 1:], torch.tensor([1.5640, 0.5, 1.6, 0.6394]), rtol=1e-4, atol=0
    )
    assert float(weights.metrics["clipped_fraction"]) == 0.5


def test_positives_only_keeps_the_weights_of_correct_responses():
    right = view(BY_HAND)

    torch.testing.assert_close(
        build(positives_only=True).weigh(right).weight, build().weigh(right).weight, rtol=0, atol=0
    )


def test_positives_only_gives_incorrect_responses_weight_zero():
    assert not build(positives_only=True).weigh(view(BY_HAND, reward=0.0)).weight.any()


def test_sign_reward_keeps_correct_responses_at_or_above_one_and_incorrect_ones_at_or_below():
    options = {"estimator": "td", "whiten": "none", "sign": "reward", "clip": (0.0, 100.0)}
    right = build(**options).weigh(view(BY_HAND)).weight
    wrong = build(**options).weigh(view(BY_HAND, reward=0.0)).weight

    # The TD errors are .3, -.1, .5, .1; at the end of the wrong response, -.9 replaces .1.
    torch.testing.assert_close(right, torch.tensor([[0.0, *(math.exp(a) for a in (0.3, 0.0, 0.5, 0.1))]]))
    torch.testing.assert_close(wrong, torch.tensor([[0.0, *(math.exp(a) for a in (0.0, -0.1, 0.0, -0.9))]]))


@given(seed=st.integers(0, 2**16), lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_per_response_weights_are_those_of_a_loop_over_responses(seed, lengths):
    seen = packed(lengths, seed=seed)
    plain = build(positives_only=True).weigh(seen).weight
    expected = plain.clone()
    for number, _ in enumerate(lengths):
        mine = seen.response_BT & (seen.document_BT == number)
        if plain[mine].any():
            expected[mine] = plain[mine] * int(mine.sum()) / plain[mine].sum()

    found = build(positives_only=True, per_response=True).weigh(seen).weight

    torch.testing.assert_close(found, expected)


def test_metrics_by_hand():
    metrics = build(estimator="td").weigh(view(BY_HAND)).metrics

    assert float(metrics["td_error_mean"]) == pytest.approx(0.2)
    assert float(metrics["td_error_abs_mean"]) == pytest.approx(0.25)
    assert float(metrics["advantage_mean"]) == pytest.approx(0.2)
    assert float(metrics["advantage_std"]) == pytest.approx(math.sqrt(0.05))
    assert float(metrics["value_mean"]) == pytest.approx((0.5 + 0.4 + 0.9 + 0.7) / 4)


def test_td_is_gae_with_lambda_zero():
    td = build(estimator="td").weigh(view(BY_HAND))
    gae = build(estimator="gae", lam=0.0).weigh(view(BY_HAND))

    assert torch.equal(td.weight, gae.weight)


def test_equal_advantages_give_equal_weights():
    weights = build(estimator="td").weigh(view([0.2, 0.4, 0.6, 0.8, 0.5]))

    # Every TD error is .2, so all tokens have the same weight.
    torch.testing.assert_close(weights.weight[0, 1:], torch.ones(4))


def test_exponentials_that_overflow_are_clipped():
    weights = build(estimator="td", whiten="none", beta=1e-3).weigh(view(BY_HAND))

    assert weights.weight.tolist() == [[0.0, 3.0, pytest.approx(0.1), 3.0, 3.0]]


def test_the_first_moving_statistics_are_those_of_the_batch():
    moving = build(whiten="ema", ema_decay=0.9).weigh(view(BY_HAND))
    batch = build(whiten="batch").weigh(view(BY_HAND))

    torch.testing.assert_close(moving.weight, batch.weight, rtol=1e-4, atol=0)


def test_moving_statistics_by_hand():
    strategy = build(estimator="td", whiten="ema", ema_decay=0.5, clip=(0.0, 100.0))
    strategy.weigh(view([0.0, 0.0, 0.0], reward=1.0))  # TD errors 0, 1: mean 1/2, mean square 1/2
    weights = strategy.weigh(view([0.0, 1.0, 1.0], reward=1.0))  # TD errors 1, 0: the same moments

    # Shares .25 and .5 of a total of .75: mean .5, variance .5 - .25.
    torch.testing.assert_close(
        weights.weight, torch.tensor([[0.0, math.exp(0.5 / 0.5), math.exp(-0.5 / 0.5)]])
    )


def test_moving_statistics_before_any_training_change_nothing():
    weights = build(estimator="td", whiten="ema", clip=(0.0, 100.0)).weigh(view(BY_HAND, training=False))

    expected = [0.0, *(math.exp(delta) for delta in (0.3, -0.1, 0.5, 0.1))]
    torch.testing.assert_close(weights.weight, torch.tensor([expected]))


def test_only_moving_statistics_are_state():
    assert build(whiten="batch").state_dict() == {}
    assert set(build(whiten="ema").state_dict()) == {"moments"}


def test_state_of_moving_statistics_is_refused_without_them():
    with pytest.raises(WmtpError, match=r"`TdError` has no state, but the checkpoint contains `moments`"):
        build(whiten="batch").load_state_dict(build(whiten="ema").state_dict())


@pytest.mark.parametrize("whiten", ["batch", "ema", "none"])
def test_weighing_never_waits_for_the_device(whiten):
    class NothingIsRead(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "local_scalar" not in str(function), "a tensor was turned into a number"
            assert "nonzero" not in str(function), "a shape depends on values"
            return function(*args, **(kwargs or {}))

    strategy, seen = build(whiten=whiten), view(BY_HAND)

    with NothingIsRead():
        strategy.weigh(seen)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clip": (3.0, 0.1)}, "must be [low, high] with 0 <= low <= high and high > 0: [3.0, 0.1]"),
        ({"beta": 0.0}, "must be > 0: 0.0"),
        ({"lam": 1.5}, "must be <= 1: 1.5"),
        ({"estimator": "td", "lam": 0.5}, 'has no effect with `estimator = "td"`; leave it out: 0.5'),
        ({"ema_decay": 0.9}, 'has no effect with `whiten = "batch"`; leave it out: 0.9'),
    ],
)
def test_options_that_make_no_sense_are_refused(options, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        TdErrorOptions(**options)
