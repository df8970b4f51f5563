"""`verifiable.value_head`: initial values, learning, refused states and options."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from weighted_mtp_core.api import Batch, BuildContext, ModelContext, WmtpError

from weighted_mtp_verifiable import ValueHeadOptions, build_value_head
from weighted_mtp_verifiable._reductions import document_cumsum, sums_so_far
from weighted_mtp_verifiable._transformer import AttentionContext, positions

LETTERS = 12
SMALL = {"layers": 2, "hidden_size": 32, "heads": 2}


def build(*, seed=0, **options):
    model = ModelContext(
        n_future=2,
        hidden_size=8,
        vocab_size=LETTERS,
        device=torch.device("cpu"),
        frozen_trunk=lambda: lambda batch: torch.zeros(*batch.ids_BT.shape, 8),
    )
    context = BuildContext(seed=seed, storage=Path("storage"), model=model)
    return build_value_head(ValueHeadOptions(**(SMALL | options)), context)


def copies(rows, *, seed):
    """Return prompts of four letters, with copies as responses; every second copy has a wrong letter."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, LETTERS, (rows, 4), generator=generator)
    response = prompt.clone()
    position = torch.randint(0, 4, (rows,), generator=generator)
    offset = torch.randint(1, LETTERS, (rows,), generator=generator)
    wrong = torch.arange(rows) % 2 == 1
    response[wrong, position[wrong]] = (response[wrong, position[wrong]] + offset[wrong]) % LETTERS
    response_BT = torch.tensor([False] * 4 + [True] * 4).expand(rows, 8)
    return Batch(
        ids_BT=torch.cat([prompt, response], dim=1),
        document_BT=torch.zeros(rows, 8, dtype=torch.long),
        response_BT=response_BT,
        reward_BT=(~wrong).float()[:, None] * response_BT,
        group_BT=torch.zeros(rows, 8, dtype=torch.long),
    )


def final_auc(critic, batch):
    value_B = critic.score(batch, None).value_BT[:, -1]
    return roc_auc_score(batch.reward_BT[:, -1] > 0.5, value_B)


def train(critic, *, steps):
    optimiser = torch.optim.AdamW(critic.parameters(), lr=3e-3)
    for step in range(steps):
        critic.loss(copies(32, seed=step), None).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("objective", ["monte_carlo", "lambda_return", "bradley_terry"])
def test_every_value_starts_at_one_half(objective):
    value_BT = build(objective=objective).score(copies(4, seed=0), None).value_BT

    assert torch.equal(value_BT, torch.full((4, 8), 0.5))


@pytest.mark.parametrize("objective", ["monte_carlo", "lambda_return", "bradley_terry"])
def test_learns_to_tell_correct_copies_from_wrong_ones(objective):
    critic = build(objective=objective)
    held_out = copies(256, seed=10_000)

    before = final_auc(critic, held_out)
    train(critic, steps=150)

    assert before == 0.5
    assert final_auc(critic, held_out) > 0.9


def test_a_wrong_letter_lowers_the_value_at_its_position():
    critic = build()
    train(critic, steps=150)
    held_out = copies(256, seed=10_000)
    value_BT = critic.score(held_out, None).value_BT
    wrong_BT = held_out.ids_BT[:, 4:] != held_out.ids_BT[:, :4]

    step_BT = (value_BT[:, 4:] - value_BT[:, 3:-1])[1::2]

    assert float(step_BT[wrong_BT[1::2]].mean()) < -0.3
    assert abs(float(step_BT[~wrong_BT[1::2]].mean())) < 0.1


def losses_by_step(steps, **options):
    """Return the loss of the same batch at each step.

    Training for three steps gives the critic distinct values; afterwards, only lambda changes.
    """
    critic, trained = build(objective="lambda_return", **options), build()
    train(trained, steps=3)
    critic.load_state_dict(trained.state_dict())
    found = []
    for step in range(steps):
        critic.begin_step(step, steps=steps)
        found.append(float(critic.loss(copies(8, seed=0), None).loss.detach()))
    return found


def test_lambda_moves_linearly_from_start_to_end():
    constant = {lam: losses_by_step(1, lam=lam)[0] for lam in (1.0, 0.75, 0.5)}

    found = losses_by_step(3, lam=0.5, lam_schedule="linear", lam_start=1.0)

    assert len(set(constant.values())) == 3
    assert found == [constant[1.0], constant[0.75], constant[0.5]]


def test_a_constant_lambda_does_not_change():
    assert len(set(losses_by_step(3, lam=0.5))) == 1


@pytest.mark.parametrize(
    ("body", "reads_policy", "batching"),
    [("own", False, "pointwise"), ("policy", True, "pointwise"), ("frozen", False, "pointwise")],
)
def test_only_the_body_policy_reads_the_policy(body, reads_policy, batching):
    critic = build(body=body)

    assert critic.reads_policy is reads_policy
    assert critic.batching == batching


def test_bradley_terry_uses_pairs():
    assert build(objective="bradley_terry").batching == "pairs"


def test_without_layers_and_language_model_only_the_head_is_left():
    critic = build(body="policy", layers=0, lm_loss_weight=0.0)

    names = {name.partition(".")[0] for name in critic.state_dict()}

    assert names == {"input", "norm", "value"}


def test_the_state_of_another_shape_is_refused():
    with pytest.raises(WmtpError, match="the state is not that of this `value_head`") as caught:
        build(hidden_size=64).load_state_dict(build().state_dict())

    assert caught.value.hint == "use the `[critic.options]` and the base model of the run that wrote it"


def test_the_language_model_loss_is_that_of_correct_responses_only():
    critic, batch = build(), copies(8, seed=0)
    right = Batch(
        ids_BT=batch.ids_BT[::2],
        document_BT=batch.document_BT[::2],
        response_BT=batch.response_BT[::2],
        reward_BT=batch.reward_BT[::2],
        group_BT=batch.group_BT[::2],
    )

    all_of_them = critic.loss(batch, None).metrics["value_writing_loss"]

    # Half of the rows are correct; the losses of the other rows in the mean over rows are 0.
    torch.testing.assert_close(2 * all_of_them, critic.loss(right, None).metrics["value_writing_loss"])


def test_values_are_the_same_where_the_host_knows_the_targets():
    critic = build()
    train(critic, steps=2)
    document_BT = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1], [0, 0, 0, 0, 0, 0, 0, 0]])
    response_BT = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]).bool()

    class Known(Batch):
        def target_positions(self):
            return torch.tensor([0, 0, 0, 1]), torch.tensor([1, 2, 4, 7])

    asked, known = (
        kind(
            ids_BT=torch.arange(16).view(2, 8) % LETTERS,
            document_BT=document_BT,
            response_BT=response_BT,
            reward_BT=response_BT.float(),
            group_BT=document_BT,
        )
        for kind in (Batch, Known)
    )

    assert torch.equal(critic.score(known, None).value_BT, critic.score(asked, None).value_BT)
    assert torch.equal(critic.loss(known, None).loss, critic.loss(asked, None).loss)


def test_positions_restart_with_each_document():
    document_BT = torch.tensor([[0, 0, 0, 1, 1, -1]])

    assert positions(document_BT).tolist() == [[0, 1, 2, 0, 1, 0]]


def test_a_token_attends_to_itself_and_earlier_tokens_of_its_document():
    mask_TT = AttentionContext.of_documents(torch.tensor([[0, 0, 1, -1]]), head_size=4).mask_B1TT[0, 0]

    assert mask_TT.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_rotated_products_depend_on_the_distance_alone():
    x, y = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    context = AttentionContext.of_documents(torch.zeros(1, 6, dtype=torch.long), head_size=8)
    rotated_x, rotated_y = (context.apply_rotary(each.expand(1, 1, 6, 8))[0, 0] for each in (x, y))

    products_TT = rotated_x @ rotated_y.T

    torch.testing.assert_close(products_TT.diagonal(2), products_TT[0, 2].expand(4))


@given(st.lists(st.tuples(st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 100))
def test_document_cumsum_equals_a_loop(lengths, seed):
    document_T = torch.cat([torch.full((length,), n) for n, (length,) in enumerate(lengths)])
    x_T = torch.rand(len(document_T), generator=torch.Generator().manual_seed(seed))
    expected = [
        sum(float(x_T[s]) for s in range(t + 1) if document_T[s] == document_T[t])
        for t in range(len(document_T))
    ]

    torch.testing.assert_close(document_cumsum(x_T[None], document_T[None]), torch.tensor([expected]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"heads": 3}, "must divide `hidden_size` = 128 into parts of even size: 3"),
        ({"layers": 0}, 'must be >= 1 for `body = "own"`: 0'),
        ({"base": "other/model"}, 'is for `body = "trunk"`, not for `body = "own"`: other/model'),
        ({"body": "frozen", "lora_rank": 4}, 'is for `body = "trunk"`, not for `body = "frozen"`: 4'),
        ({"lm_loss_weight": -1.0}, "must be >= 0: -1.0"),
        ({"lam": 0.5}, 'has no effect with `objective = "monte_carlo"`; leave it out: 0.5'),
        ({"lam_schedule": "linear"}, 'has no effect with `objective = "monte_carlo"`; leave it out: linear'),
        (
            {"objective": "lambda_return", "lam_start": 0.5},
            'has no effect with `lam_schedule = "constant"`; leave it out: 0.5',
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        ValueHeadOptions(**options)


def test_values_in_bfloat16_are_as_fine_as_in_float32():
    critic, batch = build(), copies(32, seed=0)
    train(critic, steps=3)

    value_BT = critic.score(batch, None).value_BT
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded_BT = critic.score(batch, None).value_BT

    kinds = len(value_BT[batch.response_BT].unique())
    assert len(rounded_BT[batch.response_BT].unique()) == kinds > 100
    torch.testing.assert_close(rounded_BT, value_BT, rtol=0, atol=0.01)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_both_ways_to_sum_up_a_document_agree(lengths, seed):
    document_BT = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    x_BT = torch.randn(document_BT.shape, generator=torch.Generator().manual_seed(seed))

    torch.testing.assert_close(sums_so_far(x_BT, document_BT), document_cumsum(x_BT, document_BT))
