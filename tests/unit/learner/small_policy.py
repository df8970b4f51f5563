"""A small policy of each family, weightings, and one step of a learner with them."""

import copy
import functools

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from weighted_mtp_core.api import Signal, WeightingStrategy, Weights
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.targets import align_labels, target_mask
from weighted_mtp_core.recipe.schema import LossTable
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

V, B, T = 31, 4, 12
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
}
LABEL = "weighting `failing.late` of plugin `failing` (wmtp-failing 0.3.0)"
HEADS = ("parallel", "medusa", "sequential")


@functools.cache
def base(name):
    torch.manual_seed(0)
    made = BASES[name]()
    for parameter in made.parameters():  # far from the initial scale, where gradients are all alike
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def policy(name="llama", *, n_future=3, head="parallel"):
    """Return a policy whose heads differ from each other."""
    made = make_policy(copy.deepcopy(base(name)), n_future=n_future, head_kind=head)
    torch.manual_seed(1)
    for parameter in made.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


class Uniform(WeightingStrategy):
    """Gives every target the weight 1."""

    def weigh(self, view):
        return Weights(weight=view.response_BT.float())


class Fixed(WeightingStrategy):
    """Uneven weights that depend on the token alone."""

    def weigh(self, view):
        return Weights(weight=(0.1 + view.ids_BT % 5).where(view.response_BT, 0.0))


class ByLoss(WeightingStrategy):
    """More weight where the policy's loss is above the mean of the whole batch."""

    def weigh(self, view):
        loss_BTK = view.token_loss_BTK
        mean = loss_BTK[view.target_BTK].mean()
        return Weights(weight=torch.sigmoid(loss_BTK - mean).where(view.target_BTK, 0.0))


def learner(model, weighting, **changes):
    arguments = {
        "policy": model,
        "weighting": Weighting(
            strategy=weighting,
            needs=frozenset({Signal.TOKEN_LOSS} if isinstance(weighting, ByLoss) else ()),
            critic=None,
            label=LABEL,
        ),
        "loss": LossTable(),
        "steps": 100,
        "pairs_per_step": (1.0,) * model.n_future,
        "accumulation": 1,
        "autocast": lambda: torch.autocast("cpu", enabled=False),
        "validation": list,
        "best": None,
    }
    return PolicyLearner(**arguments | changes)


def learnt(model, batch, weighting, **changes):
    """Return the loss of one step on a data set of this batch alone, and every gradient."""
    model.zero_grad()
    pairs = pairs_of(model, batch)
    result = learner(model, weighting, pairs_per_step=pairs, **changes).learn(batch, step=0)
    return float(result.loss), {name: p.grad for name, p in model.named_parameters()}


def labels_of(model, batch):
    return align_labels(
        batch.ids_BT, document_BT=batch.document_BT, response_BT=batch.response_BT, n_future=model.n_future
    )


def pairs_of(model, batch):
    return target_mask(labels_of(model, batch)).sum(dim=(0, 1)).tolist()


def close(one, other, *, rtol=1e-5, atol=1e-6):
    assert one[0] == pytest.approx(other[0], rel=rtol)
    torch.testing.assert_close(one[1], other[1], rtol=rtol, atol=atol)
