"""Tiny base models with random weights that ship multi-token prediction (MTP) layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from zoo import LAYERS, tiny_model

FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("numbered", {"num_nextn_predict_layers": 1}),
    "glm4_moe": ("numbered", {"num_nextn_predict_layers": 1}),
    "glm4_moe_lite": ("numbered", {"num_nextn_predict_layers": 1}),
    "qwen3_5_moe_text": ("mtp", {"mtp_num_hidden_layers": 1}),
    "qwen3_next": ("mtp", {"num_nextn_predict_layers": 1}),
    "qwen3_5_text": ("mtp", {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}),
    "mellum": (
        "mtp",
        {
            "num_nextn_predict_layers": 1,
            "mtp_layer_types": ["full_attention"],
            "mtp_mlp_layer_types": ["sparse"],
        },
    ),
    "qwen2": ("mimo", {"num_nextn_predict_layers": 1, "architectures": ["MiMoForCausalLM"]}),
}
"""Each family's layout of the tensors, and the keys of its `config.json` that describe the MTP layers."""

# What the layouts call the norms of embedding and hidden state, their projection, and the final norm.
_NAMES = {
    "numbered": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "mtp": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
    "mimo": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
}
_BLOCKS = {
    "numbered": "model.layers.{layer}.",
    "mtp": "mtp.layers.{depth}.",
    "mimo": "model.mtp_layers.{depth}.",
}


def shipping_directory(family: str, path: Path, *, seed: int = 0, depth: int = 1) -> frozenset[str]:
    """Write a model of a family with `depth` MTP layers; return the names of their tensors."""
    model = tiny_model(family, seed=seed)
    model.save_pretrained(path)
    tokenizer(family).save_pretrained(path)
    layout, keys = FAMILIES[family]
    state = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    shipped = {}
    for number in range(depth):
        shipped |= _layer(state, layout, number)
    save_file({**state, **shipped}, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    keys = {name: depth if value == 1 else value for name, value in keys.items()}
    (path / "config.json").write_text(json.dumps({**config, **keys}))
    return frozenset(shipped)


def tokenizer(family: str) -> Any:
    """Return a tokenizer of characters for a model of this family, which transformers loads unchanged."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = {
        word: number for number, word in enumerate([*special.values(), *map(chr, range(33, 127)), "Ġ", "Ċ"])
    }
    if family.startswith("qwen"):
        return Qwen2Tokenizer(vocab=words, merges=[], **special)
    made = Tokenizer(models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def _layer(state: Mapping[str, Tensor], layout: str, depth: int) -> dict[str, Tensor]:
    """Return an MTP layer: a changed copy of the last layer, norms, and a projection of two states to one."""
    width = state["model.norm.weight"].shape[0]
    last = f"model.layers.{LAYERS - 1}."
    block = _BLOCKS[layout].format(layer=LAYERS + depth, depth=depth)
    made = {
        block + name.removeprefix(last): tensor + 0.02 * torch.randn_like(tensor)
        for name, tensor in state.items()
        if name.startswith(last)
    }
    around = "mtp." if layout == "mtp" else block
    embedding, hidden, projection, final = (f"{around}{each}.weight" for each in _NAMES[layout])
    for name in (embedding, hidden, final):
        made[name] = state["model.norm.weight"] + 0.1 * torch.randn(width)
    made[projection] = torch.randn(width, 2 * width) / width**0.5
    if layout == "numbered":  # such a layer has its own copies of shared tensors
        made[f"{block}embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
        made[f"{block}shared_head.head.weight"] = state["lm_head.weight"].clone()
    return made
