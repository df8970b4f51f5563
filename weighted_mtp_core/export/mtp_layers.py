"""Write `sequential` heads as layers for multi-token prediction (MTP) into the files of an exported model.

| server | layers | names |
|---|---|---|
| transformers 5.23 | one for each of heads 2..K | `mtp.layers.<d>.` |
| vLLM 0.32 | one, which drafts all tokens | `model.mtp_layers.0.`, the layout of MiMo, a Qwen2 model |

Shape letters: B rows, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import reason
from weighted_mtp_core.model.families import text_config
from weighted_mtp_core.model.heads.sequential import SequentialHeads
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.pretrained import without_report
from weighted_mtp_core.model.probe import probe_ids
from weighted_mtp_core.model.shipped_layers import MIMO
from weighted_mtp_core.recipe.schema import MtpServer
from weighted_mtp_core.runtime.device import evaluation_mode

TRANSFORMERS_PATTERN = r"^mtp\."
"""Pattern for the names of MTP tensors, which some model classes of transformers report as unexpected."""

_TRANSFORMERS_NAMES = {
    "token_norm": "enorm",
    "hidden_norm": "hnorm",
    "projection": "eh_proj",
    "final_norm": "post_norm",
}
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # relative to the largest logit


def mtp_tensors(policy: Policy, server: MtpServer) -> dict[str, Tensor]:
    """Return the tensors of heads 2..K with the names that a server reads.

    For vLLM, heads 2..K share one module, and its tensors are returned once.
    """
    heads, found = policy.heads, {}
    assert isinstance(heads, SequentialHeads)
    for depth in range(policy.n_future - 1 if server == "transformers" else 1):
        module, layer = heads.module(depth + 2), heads.layer(depth + 2).state_dict()
        if server == "transformers":
            start = f"mtp.layers.{depth}."
            for own, name in _TRANSFORMERS_NAMES.items():
                for part, tensor in module.get_submodule(own).state_dict().items():
                    found[f"{start}{name}.{part}"] = tensor
            block = f"{start}mtp_block."
        else:
            found |= {name.format(depth=depth): module.get_parameter(own) for own, name in MIMO.names.items()}
            block = MIMO.block.format(depth=depth)
        found |= {f"{block}{name}": tensor for name, tensor in layer.items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def mtp_config(policy: Policy, server: MtpServer) -> dict[str, Any]:
    """Return the keys of `config.json` from which a server reads the number and kind of MTP layers."""
    if server == "vllm":
        return {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    count, config = policy.n_future - 1, text_config(policy.config)
    kinds = {name: getattr(config, name, None) for name in ("layer_types", "mlp_layer_types")}
    return {
        "num_mtp_layers": count,
        **{f"mtp_{name}": [value[-1]] * count for name, value in kinds.items() if value},
    }


@torch.no_grad()
def compare_with_transformers(policy: Policy, folder: Path) -> None:
    """Check that transformers computes the policy's logits of heads 2..K from the exported model's files.

    Small differences are allowed.

    Raises:
        WmtpError: transformers cannot run the MTP layers, or computes other logits.
    """
    kind = policy.config.model_type
    mend = 'set `model.heads.kind = "medusa"` and serve with vLLM, or export without `--serve`'
    try:
        with without_report():
            gap = _gap(policy, folder)
    except Exception as error:  # an unknown model can raise any exception
        raise WmtpError(
            f"transformers cannot draft with the heads of a `{kind}` model ({reason(error)})", hint=mend
        ) from error
    if not gap <= _TOLERANCES.get(policy.unembedding.weight.dtype, 0.05):  # also refuses NaN
        raise WmtpError(
            f"transformers computes the heads of a `{kind}` model differently (logits differ by {gap:.2g})",
            hint=mend,
        )


def _gap(policy: Policy, folder: Path) -> float:
    """Return the largest difference between the logits of transformers and of the policy.

    The difference of each head is relative to the head's largest logit.
    """
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    model._keys_to_ignore_on_load_unexpected = [TRANSFORMERS_PATTERN]  # noqa: SLF001 - there is no other way
    layers: Any = MtpModel.from_pretrained(model).eval()
    ids_BT = probe_ids(policy.config, rows=1)
    states_BTH = model(input_ids=ids_BT, output_hidden_states=True).hidden_states[-1]
    drafts = policy.n_future - 1
    count = ids_BT.shape[1] - drafts
    states_BTH, cache, gaps = states_BTH[:, :count], MtpCache(config=model.config.get_mtp_config()), []
    with evaluation_mode(policy):
        hidden_BTH = policy.trunk_states(ids_BT)
        _, *expected = policy.each_head_states(hidden_BTH, ids_BT=ids_BT, position_BT=None)
    for depth, expected_BTH in enumerate(expected):
        place_T = torch.arange(depth + 1, depth + 1 + count)
        states_BTH = layers.forward_layer(
            depth, states_BTH, place_T[None], cache, input_ids=ids_BT[:, place_T]
        )
        own_BTV = policy.unembedding(expected_BTH[:, :count]).float()
        its_BTV = layers._project_to_logits(states_BTH).float()  # noqa: SLF001 - as in its own loop
        gaps.append((own_BTV - its_BTV).abs().max() / own_BTV.abs().max().clamp(min=1e-9))
    return float(torch.stack(gaps).max())  # unlike `max`, this is NaN if one of them is


def transformers_program(path: Path) -> str:
    """Return a Python program that drafts with an exported model in transformers."""
    return "; ".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"model = AutoModelForCausalLM.from_pretrained({str(path)!r})",
            f"model._keys_to_ignore_on_load_unexpected = [{TRANSFORMERS_PATTERN!r}]",
            f"tokenizer = AutoTokenizer.from_pretrained({str(path)!r})",
            "prompt = tokenizer('PROMPT', return_tensors='pt')",
            "text = model.generate(**prompt, max_new_tokens=128, use_mtp=True)",
            "print(tokenizer.decode(text[0]))",
        ]
    )
