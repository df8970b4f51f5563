"""Write only the adapter of a policy's base model, in the format of peft.

`PeftModel.from_pretrained(base, folder)` loads the folder onto the base model; the result computes the logits
of head 1. Heads 2..K are not part of the folder.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.export.transformers import language_model
from weighted_mtp_core.model.adapters import adapted_layers
from weighted_mtp_core.model.exported_model import RECIPE
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.recipe.schema import ModelTable
from weighted_mtp_core.storage.manifest import atomic_folder


def refuse_without_adapter(table: ModelTable) -> None:
    """Refuse a run that trained no adapters.

    Raises:
        WmtpError: `model.train` is not `"adapters"`.
    """
    if table.train != "adapters":
        raise WmtpError(
            f'the run has no adapter to export: its `model.train` is "{table.train}"',
            hint="export without `--adapter`",
        )


def write_adapter(policy: Policy, path: Path, *, dtype: torch.dtype, recipe: bytes) -> None:
    """Write the folder of an adapter, whole or not at all; an existing folder is replaced.

    Args:
        policy: A policy with adapters.
        path: The folder.
        dtype: The dtype of the adapter's tensors.
        recipe: Contents of the run's `recipe.toml`.

    Raises:
        WmtpError: peft would load the folder as another adapter.
        RunFailedError: The folder cannot be written, for example because the disk is full.
    """
    from peft import get_peft_model_state_dict

    base = language_model(policy)
    config: Any = copy.deepcopy(vars(policy)["peft_config"]["default"])
    config.target_modules = _targets(base)
    config.fan_in_fan_out = any(layer.fan_in_fan_out for _, layer in adapted_layers(base))
    config.base_model_name_or_path = policy.config.name_or_path or None
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    base.peft_config = {"default": config}
    state = get_peft_model_state_dict(base, save_embedding_layers=False)
    tensors = {
        f"base_model.model.{name}": tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in state.items()
    }
    try:
        with atomic_folder(path, replace=True) as folder:
            config.save_pretrained(str(folder))
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            (folder / RECIPE).write_bytes(recipe)
            _read_back(base, folder, names=set(tensors))
    except (OSError, SafetensorError) as error:
        raise RunFailedError(f"cannot write the exported adapter `{path}`: {error}") from error


def _read_back(base: Any, folder: Path, *, names: set[str]) -> None:
    """Refuse an adapter if peft would load it as tensors with other names than the file contains.

    In configs of mixtures of experts, peft replaces names of layers from earlier releases of transformers.
    """
    from peft import PeftModel, get_peft_model_state_dict

    with torch.device("meta"):
        twin = type(base)(base.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tensors that are missing or not used
        loaded = PeftModel.from_pretrained(twin, folder, low_cpu_mem_usage=True, torch_device="cpu")
    if set(get_peft_model_state_dict(loaded, save_embedding_layers=False)) != names:
        raise WmtpError(
            f"peft would load the adapter of this `{base.config.model_type}` model as another one",
            hint="export without `--adapter`, which merges the adapter",
        )


def _targets(base: nn.Module) -> list[str]:
    """Return the names of the adapted layers, cut to their last parts if no other module shares them."""
    full = [name for name, _ in adapted_layers(base)]
    short = {name.rpartition(".")[2] for name in full}
    others = {name.rpartition(".")[2] for name, _ in base.named_modules() if name not in full}
    return sorted(full if short & others else short)
