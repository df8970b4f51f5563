"""On a CPU, each step writes the unembedding's gradient to the same memory; the gradient is the same."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch, WeightingStrategy, Weights
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.recipe.schema import LossTable
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

V = 31


class Uniform(WeightingStrategy):
    def weigh(self, view):
        return Weights(weight=view.response_BT.float())


def learner(*, tied):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
    )
    return PolicyLearner(
        policy=make_policy(base, n_future=2, head_kind="parallel"),
        weighting=Weighting(strategy=Uniform(), needs=frozenset(), critic=None, label="weighting"),
        loss=LossTable(),
        steps=10,
        pairs_per_step=(10.0, 10.0),
        accumulation=1,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=list,
        best=None,
    )


def batch(seed):
    ids_BT = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(seed))
    return Batch(
        ids_BT=ids_BT,
        document_BT=torch.zeros_like(ids_BT),
        response_BT=torch.ones_like(ids_BT, dtype=torch.bool),
        reward_BT=torch.ones(ids_BT.shape),
        group_BT=torch.zeros_like(ids_BT),
    )


def gradient(training, *, seed):
    """Return the unembedding's gradient for one batch."""
    training.policy.zero_grad(set_to_none=True)
    training.learn(batch(seed), step=0)
    return training.policy.unembedding.weight.grad


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_has_the_gradient_of_a_first_step(tied):
    training = learner(tied=tied)

    addresses, found = zip(
        *((each.data_ptr(), each.clone()) for each in (gradient(training, seed=seed) for seed in (1, 2))),
        strict=True,
    )

    assert addresses[0] == addresses[1]
    assert torch.equal(found[0], gradient(learner(tied=tied), seed=1))
    assert torch.equal(found[1], gradient(learner(tied=tied), seed=2))


def test_on_a_cuda_device_a_gradient_has_memory_of_its_own(monkeypatch):
    monkeypatch.setattr("weighted_mtp_core.model.chunked_unembedding.memory_of", lambda _: 24 << 30)
    training = learner(tied=False)

    first, second = gradient(training, seed=1), gradient(training, seed=2)

    assert first.data_ptr() != second.data_ptr()
