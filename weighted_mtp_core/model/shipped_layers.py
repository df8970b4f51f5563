"""Find the multi-token prediction (MTP) layers in the files of a base model, and remove them from its config.

transformers does not load these tensors with a causal LM. Their names begin with `model.layers.<N + d>.` if
the model has N decoder layers (DeepSeek-V3, GLM-4.5), with `mtp.` (Qwen3-Next, Qwen3.5), with
`model.mtp_layers.<d>.` (MiMo), or similarly.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from weighted_mtp_core.model.families import text_config

_NAMED_MTP = r"(^|\.)mtp(_\w+)?\."
_NUMBERED = re.compile(r"^(?P<layer>(?P<start>(?:.*?\.)?layers\.)(?P<number>\d+)\.)(?P<rest>.+)")
_PROMISE = re.compile(r"(^|_)mtp(_|$)|nextn_predict")


def tensor_files(source: Path | str) -> dict[str, Path]:
    """Return the file of each tensor of a model in safetensors files; empty for files of other kinds.

    Args:
        source: A transformers directory, or a hub id whose files have been downloaded.
    """
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    if isinstance(source, str):
        config = cached_file(source, "config.json", local_files_only=True)
        return {} if config is None else tensor_files(Path(config).parent)
    index, single = source / "model.safetensors.index.json", source / "model.safetensors"
    if single.is_file():
        with safe_open(single, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: source / file for name, file in names.items()}
    return {}


def names_of_shipped_layers(source: Path | str) -> re.Pattern[str]:
    """Return a pattern that is found in the names of the tensors of MTP layers, before and after renaming.

    Args:
        source: See `tensor_files`.
    """
    matches = filter(None, map(_NUMBERED.match, tensor_files(source)))
    layers = {match["layer"] for match in matches if match["rest"] == "eh_proj.weight"}
    return re.compile("|".join([_NAMED_MTP, *(f"^{re.escape(layer)}" for layer in sorted(layers))]))


def shipped_layers(source: Path | str, model: nn.Module) -> tuple[str, ...]:
    """Return the names of the tensors of MTP layers in the files of a model, sorted.

    Args:
        source: See `tensor_files`.
        model: The model that transformers loaded from `source`.
    """
    pattern, own = names_of_shipped_layers(source), model.state_dict()
    return tuple(sorted(name for name in tensor_files(source) if pattern.search(name) and name not in own))


def later_layers(source: Path | str, model: nn.Module) -> tuple[str, ...]:
    """Return the names of tensors of decoder layers after the last layer of a model, sorted.

    transformers reports them as unexpected, but in some families it ignores the numbers that the MTP layers
    of published models have.
    """
    pattern = names_of_shipped_layers(source)
    own = filter(None, map(_NUMBERED.match, model.state_dict()))
    last = dict(sorted((match["start"], int(match["number"])) for match in own))
    found = filter(None, map(_NUMBERED.match, tensor_files(source)))
    later = (match[0] for match in found if int(match["number"]) > last.get(match["start"], 1 << 30))
    return tuple(sorted(name for name in later if not pattern.search(name)))


def promise_no_layers(config: Any) -> None:
    """Remove from a config, in place, each key that describes MTP layers.

    A number becomes 0 if the class of the config has a default for it, because transformers would read the
    default if the key were missing.
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
