"""Describes the layers for multi-token prediction (MTP) in the files of base models.

transformers does not load MTP layers with a causal LM. In a model with N decoder layers, the tensor names of
MTP layer d (from 0) begin with `model.layers.<N + d>.` (DeepSeek-V3, GLM-4.5), `mtp.` (Qwen3-Next, Qwen3.5),
`model.mtp_layers.<d>.` (MiMo), or a similar prefix.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import evolve, frozen
from torch import nn

from weighted_mtp_core.model.families import text_config
from weighted_mtp_core.recipe.schema import MtpServer

Shared = Literal["embedding", "unembedding"]
"""A matrix of the model that all heads share."""


@frozen(kw_only=True)
class Layout:
    """How some model families store MTP layers, and what these layers compute.

    In names, `{depth}` is the index of an MTP layer among the MTP layers, from 0, and `{layer}` is `{depth}`
    plus the number of the model's decoder layers.

    Attributes:
        families: `model_type` of the text models.
        block: Common prefix of the tensor names of an MTP layer's decoder layer.
        names: The tensor name of each parameter of `SequentialModule` outside its decoder layer.
        copies: Names of tensors that may exist as copies of the model's embedding or unembedding.
        serve: The `model.heads.serve` with which `sequential` heads compute the same states as MTP layers.
        repeats: Whether a server that applies one MTP layer several times always continues with the layer's
            state after the final norm.
    """

    families: tuple[str, ...]
    block: str
    names: Mapping[str, str]
    copies: Mapping[str, Shared]
    serve: MtpServer
    repeats: bool


_DEEPSEEK = Layout(
    families=("deepseek_v3",),
    block="model.layers.{layer}.",
    names={
        "token_norm.weight": "model.layers.{layer}.enorm.weight",
        "hidden_norm.weight": "model.layers.{layer}.hnorm.weight",
        "projection.weight": "model.layers.{layer}.eh_proj.weight",
        "final_norm.weight": "model.layers.{layer}.shared_head.norm.weight",
    },
    copies={
        "model.layers.{layer}.embed_tokens.weight": "embedding",
        "model.layers.{layer}.shared_head.head.weight": "unembedding",
    },
    serve="transformers",
    repeats=True,
)
_GLM = evolve(_DEEPSEEK, families=("glm4_moe", "glm4_moe_lite"), repeats=False)
_QWEN = Layout(
    families=("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "mellum"),
    block="mtp.layers.{depth}.",
    names={
        "token_norm.weight": "mtp.pre_fc_norm_embedding.weight",
        "hidden_norm.weight": "mtp.pre_fc_norm_hidden.weight",
        "projection.weight": "mtp.fc.weight",
        "final_norm.weight": "mtp.norm.weight",
    },
    copies={},
    serve="transformers",
    repeats=True,
)
MIMO = Layout(
    families=("qwen2",),
    block="model.mtp_layers.{depth}.",
    names={
        "token_norm.weight": "model.mtp_layers.{depth}.token_layernorm.weight",
        "hidden_norm.weight": "model.mtp_layers.{depth}.hidden_layernorm.weight",
        "projection.weight": "model.mtp_layers.{depth}.input_proj.weight",
        "final_norm.weight": "model.mtp_layers.{depth}.final_layernorm.weight",
    },
    copies={},
    serve="vllm",
    repeats=True,
)
LAYOUTS = (_DEEPSEEK, _GLM, _QWEN, MIMO)
"""All layouts, taken from the code of transformers 5.23.0 (`MtpLayer`) and vLLM 0.32.0 (`deepseek_mtp`,
`glm4_moe_mtp`, `qwen3_next_mtp`, `qwen3_5_mtp`, `mimo_mtp`)."""

_NAMED_MTP = r"(^|\.)mtp(_\w+)?\."
_NUMBERED = re.compile(r"^(?P<layer>(?P<start>(?:.*?\.)?layers\.)(?P<number>\d+)\.)(?P<rest>.+)")
_PROMISE = re.compile(r"(^|_)mtp(_|$)|nextn_predict")


def tensor_files(source: Path | str) -> dict[str, Path]:
    """Return the file of each tensor of a model; empty if no safetensors files are found.

    Args:
        source: A transformers directory or a hub id. For a hub id with several files of weights, only the
            list of tensors is downloaded; the result is also empty if there is no local copy and the hub
            cannot be reached.
    """
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    names = "model.safetensors", "model.safetensors.index.json"
    if isinstance(source, str):
        quiet = dict.fromkeys(("missing_entries", "connection_errors"), False)
        options: dict[str, Any] = {f"_raise_exceptions_for_{each}": value for each, value in quiet.items()}
        stored = filter(None, (cached_file(source, name, **options) for name in names))
        return next((tensor_files(Path(file).parent) for file in stored), {})
    single, index = (source / name for name in names)
    if single.is_file():
        with safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: source / file for name, file in names.items()}
    return {}


def names_of_shipped_layers(source: Path | str) -> re.Pattern[str]:
    """Return a pattern for the tensor names of MTP layers, before and after transformers renames them.

    Args:
        source: See `tensor_files`.
    """
    matches = filter(None, map(_NUMBERED.match, tensor_files(source)))
    layers = {match["layer"] for match in matches if match["rest"] == "eh_proj.weight"}
    return re.compile("|".join([_NAMED_MTP, *(f"^{re.escape(layer)}" for layer in sorted(layers))]))


def shipped_layers(source: Path | str, model: nn.Module) -> tuple[str, ...]:
    """Return, sorted, the names of MTP layers' tensors that are in the files of a model but not in the model.

    Args:
        source: See `tensor_files`.
        model: The model that transformers loaded from `source`.
    """
    pattern, own = names_of_shipped_layers(source), model.state_dict()
    return tuple(sorted(name for name in tensor_files(source) if pattern.search(name) and name not in own))


def later_layers(source: Path | str, model: nn.Module) -> tuple[str, ...]:
    """Return, sorted, the tensor names of decoder layers with higher numbers than the model's last layer.

    The tensor names of MTP layers are left out. transformers usually reports tensors of additional layers as
    unexpected. For some families, however, transformers ignores layers that have the numbers of MTP layers in
    published models.
    """
    pattern = names_of_shipped_layers(source)
    own = filter(None, map(_NUMBERED.match, model.state_dict()))
    last = dict(sorted((match["start"], int(match["number"])) for match in own))
    found = filter(None, map(_NUMBERED.match, tensor_files(source)))
    later = (match[0] for match in found if int(match["number"]) > last.get(match["start"], 1 << 30))
    return tuple(sorted(name for name in later if not pattern.search(name)))


def promise_no_layers(config: Any) -> None:
    """Remove from a config, in place, each key that describes MTP layers.

    For a missing key, transformers would use the default of the config's class. Therefore a key that has a
    default is not removed but set: to 0 if the default is an int, otherwise to the default.
    """
    for part in {id(each): each for each in (config, text_config(config))}.values():
        kind = type(part)
        names = {real: name for name, real in (kind.attribute_map or {}).items()}
        defaults = {each.name: each.default for each in dataclasses.fields(kind)}
        for name in [each for each in vars(part) if _PROMISE.search(each)]:
            default = defaults.get(names.get(name, name), dataclasses.MISSING)
            if default is dataclasses.MISSING:
                delattr(part, name)
            else:
                setattr(part, name, 0 if type(default) is int else default)
