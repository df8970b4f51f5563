"""Micro policies with `model.train = "adapters"`: their batches, training, logits and digests.

Shape letters: B rows, T positions, H hidden, K heads, V vocabulary.
"""

import copy
import functools
import hashlib

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from weighted_mtp_core.api import Batch, Signal, WeightingStrategy, Weights
from weighted_mtp_core.model.adapters import adapt
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.recipe.schema import AdaptersTable, LossTable, ModelTable
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

V, K, T = 31, 3, 12
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1)),
    "tied": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "opt": lambda: OPTForCausalLM(  # the only model type here that can compute everything in float64
        OPTConfig(
            vocab_size=V,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            dropout=0,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
}
HEADS = ("parallel", "medusa", "sequential")
PLAIN = AdaptersTable(rank=2)
OPTIONS = {
    "plain": PLAIN,
    "rslora": AdaptersTable(rank=3, alpha=5.0, rslora=True),
    "dora": AdaptersTable(rank=2, dora=True),
    "few": AdaptersTable(rank=2, targets=("q_proj", "up_proj")),
    "adapted": AdaptersTable(rank=2, heads="adapted"),
}


@functools.cache
def base(name):
    torch.manual_seed(0)
    made = BASES[name]()
    for parameter in made.parameters():  # far from the initial scale, where gradients are all alike
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def new_policy(name="llama", *, head="parallel", n_future=K):
    return make_policy(copy.deepcopy(base(name)), n_future=n_future, head_kind=head)


def adapted(name="llama", *, head="parallel", options=PLAIN, n_future=K, base_dtype="float32", moved=False):
    """Return a policy with adapters; if `moved`, the adapters no longer have their initial values."""
    policy = new_policy(name, head=head, n_future=n_future)
    torch.manual_seed(1)
    adapt(policy, ModelTable(train="adapters", adapters=options, base_dtype=base_dtype))
    if moved:
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    return policy


def batch_of(step):
    ids_BT = torch.randint(2, V, (4, T), generator=torch.Generator().manual_seed(step))
    zero_BT = torch.zeros_like(ids_BT)
    return Batch(
        ids_BT=ids_BT,
        document_BT=zero_BT,
        response_BT=(torch.arange(T) >= 3).expand(4, -1),
        reward_BT=zero_BT.float(),
        group_BT=zero_BT,
    )


class Uneven(WeightingStrategy):
    def weigh(self, view):
        return Weights(weight=(0.1 + view.ids_BT % 5).where(view.response_BT, 0.0))


def learner(policy, *, weighting=None, loss=None, best=None, steps=10):
    needs = frozenset({Signal.TOKEN_LOSS}) if weighting else frozenset()
    return PolicyLearner(
        policy=policy,
        weighting=Weighting(strategy=weighting or Uneven(), needs=needs, critic=None, label="uneven"),
        loss=loss or LossTable(),
        steps=steps,
        pairs_per_step=(36.0,) * policy.n_future,
        accumulation=1,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        validation=lambda: [batch_of(100)],
        best=best,
    )


def all_logits(policy, ids_BT):
    """Return the logits of all heads, `[K, B, T, V]`."""
    policy.eval()
    with torch.no_grad():
        hidden_BTH = policy.trunk_states(ids_BT)
        return torch.stack(
            [policy.logits(k, hidden_BTH, ids_BT=ids_BT) for k in range(1, policy.n_future + 1)]
        )


def sha256(tensor):
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


def digests(policy):
    return {name: sha256(tensor) for name, tensor in policy.state_dict().items()}
