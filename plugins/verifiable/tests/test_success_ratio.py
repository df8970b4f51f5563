"""`verifiable.success_ratio`: weights by hand, by a loop, and from the exact values of a Markov chain."""

import itertools
import math
import re
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from weighted_mtp_core.api import BuildContext, ModelContext, StepView
from weighted_mtp_core.cli import main

from weighted_mtp_verifiable import SuccessRatioOptions, build_success_ratio

TEXTS = ("", "a", " b", "\n", "c:\n    ", "d")  # by token id: ids 3 and 4 end a line


def build(**options):
    model = ModelContext(
        n_future=3,
        hidden_size=8,
        vocab_size=len(TEXTS),
        device=torch.device("cpu"),
        frozen_trunk=lambda: None,
        decode=lambda ids: "".join(TEXTS[each] for each in ids),
    )
    context = BuildContext(seed=0, storage=Path("storage"), model=model)
    return build_success_ratio(SuccessRatioOptions(**options), context)


def batch(document_BT, response_BT, value_BT, reward_BT, *, n_future=3, ids_BT=None):
    """Return a view; a pair counts if its target is a response token of the document of its source."""
    target_BTK = torch.zeros(*document_BT.shape, n_future, dtype=torch.bool)
    for k in range(1, min(n_future, document_BT.shape[1] - 1) + 1):
        same = document_BT[:, k:] == document_BT[:, :-k]
        target_BTK[:, :-k, k - 1] = response_BT[:, k:] & same & (document_BT[:, k:] >= 0)
    return StepView(
        ids_BT=torch.zeros_like(document_BT) if ids_BT is None else ids_BT,
        document_BT=document_BT,
        response_BT=response_BT,
        target_BTK=target_BTK,
        n_future=n_future,
        step=0,
        training=True,
        reward_BT=reward_BT * response_BT,
        value_BT=value_BT,
        log_value_BT=value_BT.log(),
    )


def one_row(value, *, reward=0.0, prompt=1, ids=None):
    value_BT = torch.tensor([value])
    zeros_BT = torch.zeros_like(value_BT, dtype=torch.long)
    response_BT = torch.arange(len(value))[None] >= prompt
    ids_BT = zeros_BT if ids is None else torch.tensor([ids])
    return batch(zeros_BT, response_BT, value_BT, torch.full_like(value_BT, reward), ids_BT=ids_BT)


# V is .5 after the prompt, then .8, .2, .2, .1.
BY_HAND = [0.5, 0.8, 0.2, 0.2, 0.1]


def test_the_weight_of_a_token_is_the_value_after_it_divided_by_the_value_before_it():
    weights = build().weigh(one_row(BY_HAND))

    torch.testing.assert_close(weights.weight, torch.tensor([[0.0, 1.6, 0.25, 1.0, 0.5]]))


def test_ratios_are_capped_before_the_power():
    weights = build(cap=1.5, power=2.0).weigh(one_row(BY_HAND))

    torch.testing.assert_close(weights.weight, torch.tensor([[0.0, 2.25, 0.0625, 1.0, 0.25]]))
    assert float(weights.metrics["capped_fraction"]) == 0.25
    assert float(weights.metrics["success_ratio_mean"]) == pytest.approx((1.5 + 0.25 + 1 + 0.5) / 4)


def test_only_incorrect_responses_are_weighed_with_where_wrong():
    strategy = build(where="wrong")

    torch.testing.assert_close(
        strategy.weigh(one_row(BY_HAND, reward=0.0)).weight, torch.tensor([[0.0, 1.6, 0.25, 1.0, 0.5]])
    )
    assert strategy.weigh(one_row(BY_HAND, reward=1.0)).weight.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0]]


def test_all_tokens_of_a_line_have_the_ratio_of_the_line():
    ids = [1, 2, 3, 5, 4, 1]  # a prompt token, then the lines " b\n", "dc:\n    " and "a"
    weights = build(span="line").weigh(one_row([0.5, 0.9, 0.4, 0.6, 0.1, 0.3], ids=ids))

    expected = [0.0, 0.4 / 0.5, 0.4 / 0.5, 0.1 / 0.4, 0.1 / 0.4, 0.3 / 0.1]
    torch.testing.assert_close(weights.weight, torch.tensor([expected]))


def test_a_path_has_the_value_at_its_end_divided_by_the_value_at_its_source():
    weight_BTK = build(heads="path").weigh(one_row(BY_HAND)).weight

    torch.testing.assert_close(weight_BTK[0, 0], torch.tensor([0.8 / 0.5, 0.2 / 0.5, 0.2 / 0.5]))
    torch.testing.assert_close(weight_BTK[0, 1], torch.tensor([0.2 / 0.8, 0.2 / 0.8, 0.1 / 0.8]))
    torch.testing.assert_close(weight_BTK[0, 3], torch.tensor([0.1 / 0.2, 0.0, 0.0]))


def test_a_path_that_begins_inside_the_prompt_starts_at_the_end_of_the_prompt():
    weight_BTK = build(heads="path").weigh(one_row([0.9, 0.1, 0.5, 0.8], prompt=3)).weight

    torch.testing.assert_close(weight_BTK[0, 1], torch.tensor([0.0, 0.8 / 0.5, 0.0]))
    torch.testing.assert_close(weight_BTK[0, 0], torch.tensor([0.0, 0.0, 0.8 / 0.5]))


def test_tokens_after_a_prefix_without_hope_weigh_one():
    weights = build().weigh(one_row([0.5, 0.0, 0.0, 0.0]))

    assert weights.weight.tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_the_first_token_of_a_response_without_a_prompt_weighs_one():
    weights = build().weigh(one_row([0.5, 0.25], prompt=0))

    assert weights.weight.tolist() == [[1.0, 0.5]]


@st.composite
def packed_rows(draw):
    """Draw two rows of 14 tokens: documents of a prompt and a response each, cut off or padded at the end."""
    length, rows = 14, []
    for _ in range(2):
        document, response, reward = [], [], []
        for number, (prompt, answer, right) in enumerate(
            draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=3))
        ):
            document += [number] * (prompt + answer)
            response += [False] * prompt + [True] * answer
            reward += [float(right)] * (prompt + answer)
        padding = length - len(document[:length])
        rows.append(
            (
                document[:length] + [-1] * padding,
                response[:length] + [False] * padding,
                reward[:length] + [0.0] * padding,
            )
        )
    document_BT, response_BT, reward_BT = (torch.tensor(each) for each in zip(*rows, strict=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    value_BT = torch.rand(document_BT.shape, generator=generator)
    value_BT = value_BT.where(torch.rand(document_BT.shape, generator=generator) > 0.2, 0.0)
    ids_BT = torch.randint(1, len(TEXTS), document_BT.shape, generator=generator)
    return batch(document_BT, response_BT, value_BT, reward_BT, ids_BT=ids_BT)


def line_of(view, b, t):
    """Return the positions of the line that contains a response token."""

    def joined(left):
        pair = view.response_BT[b, left : left + 2].all()
        same = view.document_BT[b, left] == view.document_BT[b, left + 1]
        return bool(pair and same) and "\n" not in TEXTS[int(view.ids_BT[b, left])]

    first = last = t
    while first > 0 and joined(first - 1):
        first -= 1
    while last + 1 < view.ids_BT.shape[1] and joined(last):
        last += 1
    return first, last


def ratio_between(view, b, start, end, *, cap):
    """Return V at `end` divided by V before the token `start`, capped."""
    known = start > 0 and view.document_BT[b, start - 1] == view.document_BT[b, start]
    before = float(view.value_BT[b, start - 1]) if known else 0.0
    return min(float(view.value_BT[b, end]) / before, cap) if before > 0 else min(1.0, cap)


@given(view=packed_rows(), span=st.sampled_from(["token", "line"]), where=st.sampled_from(["all", "wrong"]))
def test_weights_are_those_of_a_loop_over_tokens(view, span, where):
    expected_BT = torch.zeros(view.ids_BT.shape)
    for b, t in view.response_BT.nonzero().tolist():
        start, end = line_of(view, b, t) if span == "line" else (t, t)
        keeps = where == "wrong" and view.reward_BT[b, t] >= 0.5
        expected_BT[b, t] = 1.0 if keeps else ratio_between(view, b, start, end, cap=4.0) ** 1.5

    found_BT = build(span=span, where=where, cap=4.0, power=1.5).weigh(view).weight

    torch.testing.assert_close(found_BT, expected_BT)


@given(view=packed_rows(), span=st.sampled_from(["token", "line"]), where=st.sampled_from(["all", "wrong"]))
def test_path_weights_are_those_of_a_loop_over_pairs(view, span, where):
    expected_BTK = torch.zeros(view.target_BTK.shape)
    for b, t, head in view.target_BTK.nonzero().tolist():
        target = t + head + 1
        begin = next(i for i in range(t + 1, target + 1) if view.response_BT[b, i])
        start = line_of(view, b, begin)[0] if span == "line" else begin
        end = line_of(view, b, target)[1] if span == "line" else target
        keeps = where == "wrong" and view.reward_BT[b, target] >= 0.5
        expected_BTK[b, t, head] = 1.0 if keeps else ratio_between(view, b, start, end, cap=4.0)

    found_BTK = build(span=span, where=where, cap=4.0, heads="path").weigh(view).weight

    torch.testing.assert_close(found_BTK, expected_BTK)


@given(view=packed_rows())
def test_head_1_has_the_same_weight_by_path_and_by_target(view):
    by_target_BTK = view.to_pairs(build().weigh(view).weight)
    by_path_BTK = build(heads="path").weigh(view).weight

    assert torch.equal(by_path_BTK[..., 0], by_target_BTK[..., 0])


@pytest.mark.parametrize("span", ["token", "line"])
@given(view=packed_rows())
def test_power_zero_gives_the_weights_of_the_uniform_baseline_bit_for_bit(span, view):
    uniform_BT = view.response_BT.to(torch.float32)

    assert torch.equal(build(power=0.0, span=span).weigh(view).weight, uniform_BT)
    assert torch.equal(
        build(power=0.0, span=span, heads="path").weigh(view).weight, view.to_pairs(uniform_BT)
    )


# ------------------------------------------------------------------ a Markov chain with exact values

LETTERS, LENGTH = 3, 4
SEQUENCES = list(itertools.product(range(LETTERS), repeat=LENGTH))


def chain():
    """Return the probability of each sequence; after the first, each letter depends on the previous one."""
    generator = torch.Generator().manual_seed(3)
    next_p = torch.softmax(torch.randn(LETTERS, LETTERS, generator=generator, dtype=torch.double), dim=1)
    return [
        math.prod([1 / LETTERS, *(float(next_p[a, b]) for a, b in itertools.pairwise(sequence))])
        for sequence in SEQUENCES
    ]


def succeeds(sequence):
    """Return whether two neighbouring letters are equal and the sum of all letters is not 3."""
    return any(a == b for a, b in itertools.pairwise(sequence)) and sum(sequence) != 3


def probability(prefix, *, success, share):
    """Return the probability that a sequence begins with a prefix and, if `success`, also succeeds."""
    return sum(
        p
        for sequence, p in zip(SEQUENCES, share, strict=True)
        if sequence[: len(prefix)] == prefix and (succeeds(sequence) or not success)
    )


def value(prefix, share):
    return probability(prefix, success=True, share=share) / probability(prefix, success=False, share=share)


def all_responses(share):
    """Return one row for each sequence, after a prompt token, with the exact value of each prefix."""
    value_BT = torch.tensor([[value(s[:n], share) for n in range(LENGTH + 1)] for s in SEQUENCES])
    ids_BT = torch.tensor([[0, *s] for s in SEQUENCES])
    response_BT = (torch.arange(LENGTH + 1) > 0).expand_as(ids_BT)
    reward_BT = torch.tensor([[float(succeeds(s))] for s in SEQUENCES]).expand_as(value_BT)
    zeros_BT = torch.zeros_like(ids_BT)
    return batch(zeros_BT, response_BT, value_BT, reward_BT, n_future=2, ids_BT=ids_BT)


def test_with_exact_values_the_weight_is_the_ratio_of_probabilities_with_and_without_success():
    share = chain()
    weight_BT = build(cap=100.0).weigh(all_responses(share)).weight

    for sequence, weight_T in zip(SEQUENCES, weight_BT.tolist(), strict=True):
        for n in range(1, LENGTH + 1):
            prefix = sequence[: n - 1]
            if value(prefix, share) == 0:  # nothing can be conditioned on success
                continue
            given_success, given_nothing = (
                probability(sequence[:n], success=success, share=share)
                / probability(prefix, success=success, share=share)
                for success in (True, False)
            )
            assert weight_T[n] == pytest.approx(given_success / given_nothing, abs=1e-5)


@pytest.mark.parametrize("head", [1, 2])
def test_the_optimum_of_a_tabular_policy_is_the_distribution_given_success(head):
    share = chain()
    view = all_responses(share)
    weight_BTK = build(cap=100.0, heads="path").weigh(view).weight
    pairs = [(b, t) for b in range(len(SEQUENCES)) for t in range(LENGTH + 1 - head)]
    states = sorted({SEQUENCES[b][:t] for b, t in pairs})
    state_N = torch.tensor([states.index(SEQUENCES[b][:t]) for b, t in pairs])
    target_N = torch.tensor([SEQUENCES[b][t + head - 1] for b, t in pairs])
    weight_N = torch.tensor([share[b] * float(weight_BTK[b, t, head - 1]) for b, t in pairs]).double()
    logits = torch.zeros(len(states), LETTERS, requires_grad=True, dtype=torch.double)
    optimiser = torch.optim.LBFGS([logits], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15)

    def loss():
        optimiser.zero_grad()
        log_p_N = torch.log_softmax(logits, dim=1)[state_N, target_N]
        total = -(weight_N * log_p_N).sum()
        total.backward()
        return total

    optimiser.step(loss)
    learnt = torch.softmax(logits, dim=1).tolist()

    for state, found in zip(states, learnt, strict=True):
        succeeding = [
            sum(
                probability((*state, *way, letter), success=True, share=share)
                for way in itertools.product(range(LETTERS), repeat=head - 1)
            )
            for letter in range(LETTERS)
        ]
        if sum(succeeding) > 0:
            expected = [each / sum(succeeding) for each in succeeding]
            assert found == pytest.approx(expected, rel=0.02, abs=1e-3)


def test_if_every_response_succeeds_exact_values_give_weights_of_one():
    view = all_responses(chain())
    everything = attrs.evolve(
        view, log_value_BT=torch.zeros_like(view.log_value_BT), reward_BT=view.response_BT.float()
    )

    for heads in ("target", "path"):
        weight = build(heads=heads).weigh(everything).weight
        mask = view.response_BT if heads == "target" else view.target_BTK
        assert torch.equal(weight, mask.float())


@pytest.mark.parametrize("span", ["token", "line"])
@pytest.mark.parametrize("heads", ["target", "path"])
def test_weighing_never_waits_for_the_device(span, heads):
    class NothingIsRead(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "local_scalar" not in str(function), "a tensor was turned into a number"
            assert "nonzero" not in str(function), "a shape depends on values"
            return function(*args, **(kwargs or {}))

    strategy, seen = build(span=span, heads=heads), one_row(BY_HAND)

    with NothingIsRead():
        strategy.weigh(seen)


@pytest.mark.parametrize("heads", ["target", "path"])
def test_values_that_are_nan_do_not_become_weights_of_1(heads):
    """Core refuses weights that are NaN."""
    view = one_row([math.nan] * 4)

    weight = build(heads=heads).weigh(view).weight

    mask = view.target_BTK if heads == "path" else view.response_BT
    assert weight[mask].isnan().all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"cap": 0.0}, "'cap' must be > 0: 0.0"),
        ({"cap": math.inf}, "'cap' must be < inf: inf"),
        ({"power": -1.0}, "'power' must be >= 0: -1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        SuccessRatioOptions(**options)


@pytest.mark.parametrize("weighting", ["success_ratio", "td_error"])
@pytest.mark.parametrize("objective", ["monte_carlo", "lambda_return", "bradley_terry"])
def test_values_that_only_rank_are_refused_before_anything_is_loaded(tmp_path, capsys, weighting, objective):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'run.name = "x"\ntracker = []\ndata = {{ use = "core.jsonl", options.path = "x.jsonl" }}\n'
        f'weighting.use = "verifiable.{weighting}"\n'
        f'critic = {{ use = "verifiable.value_head", options.objective = "{objective}" }}\n'
    )
    refused = (weighting, objective) == ("success_ratio", "bradley_terry")

    assert main(["check", str(recipe)]) == (2 if refused else 0)
    assert (
        "line 5, critic.options: weighting `verifiable.success_ratio` needs prob" in capsys.readouterr().err
    ) == (refused)
