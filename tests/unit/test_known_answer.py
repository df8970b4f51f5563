"""Training on a Markov chain, whose exact predictions are known: no target counts more than it should.

Documents begin with one of eight symbols. With probability 1/64, EOS follows a symbol s. Otherwise, the
symbol s + 1 (modulo 8) follows with probability 0.7, and a random one of the eight symbols with probability
0.3. So head k should predict the k-th power of the transition matrix, and EOS with probability 1/64: pairs
with a target after EOS do not exist. `sequential` heads also read the symbols between source and target, so
each of them should predict the matrix itself.

Shape letters: S symbols, K heads, N pairs, C classes (S symbols and EOS).
"""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import WeightingStrategy, Weights
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.data.batches import StepBatches, collate
from weighted_mtp_core.data.samplers import in_order
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.recipe.schema import CheckpointTable, DataTable, LossTable, TrainTable
from weighted_mtp_core.training.loop import train
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

S, K, STEPS, SEED = 8, 4, 500, 0
EOS, P_EOS = S, 1 / 64
NEXT_SS = 0.7 * np.roll(np.eye(S), 1, axis=1) + 0.3 / S
EXACT_KSC = np.stack(
    [
        np.hstack([(1 - P_EOS) * np.linalg.matrix_power(NEXT_SS, k), np.full((S, 1), P_EOS)])
        for k in range(1, K + 1)
    ]
)
CPU = torch.device("cpu")


def documents(count, *, seed):
    generator = np.random.default_rng(seed)
    length_D = 1 + generator.geometric(P_EOS, size=count)
    start_D1 = np.concatenate([[0], np.cumsum(length_D)])
    index_N = np.arange(start_D1[-1])
    anew_N = generator.random(len(index_N)) >= 0.7
    anew_N[start_D1[:-1]] = True
    last_N = np.maximum.accumulate(np.where(anew_N, index_N, 0))  # where the symbol was last drawn anew
    ids_N = (generator.integers(S, size=len(index_N))[last_N] + index_N - last_N) % S
    ids_N[start_D1[1:] - 1] = EOS
    return TokenSet(
        ids_N=ids_N.astype(np.uint16),
        start_D1=start_D1,
        prompt_D=np.ones(count, dtype=np.int32),
        reward_D=np.ones(count, dtype=np.float32),
        problem_D=np.arange(count),
        example_ids=[str(d) for d in range(count)],
    )


HELD_OUT = documents(1000, seed=1000)


def held_out():
    return [
        collate(HELD_OUT, rows, device=CPU) for rows in in_order(HELD_OUT, np.arange(1000), batch_size=64)
    ]


class ByToken(WeightingStrategy):
    """A weight for symbol 0, and 1 for the others."""

    def __init__(self, weight):
        self.weight = weight

    def weigh(self, view):
        return Weights(weight=torch.where(view.ids_BT == 0, self.weight, 1.0).where(view.response_BT, 0.0))


class Silence:
    def metrics(self, stage, step, values):
        pass

    timings = metrics

    def progress(self, step, values):
        pass


MEDUSA = {"head_kind": "medusa"}


def trained(folder, *, heads=MEDUSA, packing="none", batch_size=16, weight=1.0, seed=SEED, steps=STEPS):
    """Train on 8,000 documents; return the policy and the metrics of its best validation."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=S + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        initializer_range=0.25,
        eos_token_id=EOS,
    )
    policy = make_policy(LlamaForCausalLM(config), n_future=K, **heads)
    data = DataTable(use="chain", packing=packing, pack_tokens=1024)
    batches = StepBatches(documents(8000, seed=seed + 1), data, batch_size=batch_size, seed=seed, device=CPU)
    learner = PolicyLearner(
        policy=policy,
        weighting=Weighting(strategy=ByToken(weight), needs=frozenset(), critic=None, label="by token"),
        loss=LossTable(),
        steps=steps,
        pairs_per_step=batches.pairs_per_step(K),
        accumulation=1,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=held_out,
        best=folder / "best.pt",
    )
    table = TrainTable(steps=steps, learning_rate=0.02, final_learning_rate=0.0, validate_every=steps)
    with Checkpoints(folder=folder, table=CheckpointTable(every=0), log=print) as checkpoints:
        found = train(learner, table, batch_of=batches, reporter=Silence(), checkpoints=checkpoints)
    return policy, found.best.metrics


@torch.no_grad()
def predictions(policy, k):
    """Return the source and the target of head k's held-out pairs, `[N]`, and its probabilities `[N, C]`."""
    found = []
    for batch in held_out():
        ids_BT, counts_BT = batch.ids_BT.numpy(), batch.response_BT.numpy()[:, k:]
        hidden_BTH = policy.trunk_states(batch.ids_BT)
        p_BTC = policy.logits(k, hidden_BTH, ids_BT=batch.ids_BT).softmax(dim=-1).numpy()
        found.append((ids_BT[:, :-k][counts_BT], ids_BT[:, k:][counts_BT], p_BTC[:, :-k][counts_BT]))
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize(("packing", "batch_size"), [("none", 16), ("documents", 1)])
def test_each_head_reaches_the_exact_cross_entropy_and_the_exact_rate_of_eos(tmp_path, packing, batch_size):
    policy, metrics = trained(tmp_path, packing=packing, batch_size=batch_size)

    for k in range(1, K + 1):
        source_N, target_N, p_NC = predictions(policy, k)
        exact = -np.log(EXACT_KSC[k - 1, source_N, target_N]).mean()

        assert metrics[f"validation_ce_head_{k}"] == pytest.approx(exact, abs=0.004)
        assert p_NC[:, EOS].mean() == pytest.approx(P_EOS, rel=0.1)


@pytest.mark.parametrize(
    "options", [{}, {"shared": True, "serve": "vllm"}], ids=["a module each", "one module for vllm"]
)
def test_each_sequential_head_reaches_the_exact_cross_entropy_of_one_step(tmp_path, options):
    policy, metrics = trained(tmp_path, heads={"head_kind": "sequential", **options}, steps=250)

    for k in range(1, K + 1):
        exact = []
        for batch in held_out():
            ids_BT, counts_BT = batch.ids_BT.numpy(), batch.response_BT.numpy()[:, k:]
            steps_T = np.ones(counts_BT.shape[1], dtype=int)
            if options and k == 2:
                steps_T[0] = 2  # in vLLM's form, head 2 does not read token 1
            before_BT = np.where(steps_T == 1, ids_BT[:, k - 1 : -1], ids_BT[:, :-k])
            steps_BT = np.broadcast_to(steps_T, counts_BT.shape)
            pairs = (each_BT[counts_BT] for each_BT in (steps_BT - 1, before_BT, ids_BT[:, k:]))
            exact.append(-np.log(EXACT_KSC[tuple(pairs)]))
        exact_N = np.concatenate(exact)

        assert metrics[f"validation_ce_head_{k}"] == pytest.approx(exact_N.mean(), abs=0.004)
    assert predictions(policy, K)[2][:, EOS].mean() == pytest.approx(P_EOS, rel=0.1)


def test_weight_3_on_a_symbol_triples_its_odds(tmp_path):
    policy, _ = trained(tmp_path, weight=3.0)

    for k in range(1, K + 1):
        source_N, _, p_NC = predictions(policy, k)
        before = -k % S  # the symbol that is followed by 0 after k steps
        for its_N in (source_N == before, source_N != before):
            p = EXACT_KSC[k - 1, source_N[its_N], 0].mean()

            assert p_NC[its_N, 0].mean() == pytest.approx(3 * p / (3 * p + 1 - p), rel=0.05)


def test_the_chain_is_the_one_that_the_exact_numbers_describe():
    tokens = documents(4000, seed=2)
    ids_N, is_first_N = tokens.ids_N, np.zeros(tokens.start_D1[-1], dtype=bool)
    is_first_N[tokens.start_D1[:-1]] = True
    from_N, to_N = ids_N[:-1][~is_first_N[1:]], ids_N[1:][~is_first_N[1:]]
    count_SC = np.histogram2d(from_N, to_N, bins=[np.arange(S + 1), np.arange(S + 2)])[0]
    share_SC = count_SC / count_SC.sum(axis=1, keepdims=True)

    assert np.abs(share_SC - EXACT_KSC[0]).max() < 4 * math.sqrt(0.25 / count_SC.sum(axis=1).min())
