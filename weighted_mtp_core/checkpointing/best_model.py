"""Saves and loads the best weights of a run: the policy's `best_model.pt`, and a component's safetensors."""

from __future__ import annotations

import io
import json
import pickle  # only for its exception class, which torch's restricted unpickler raises
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weighted_mtp_core.api import Stateful
from weighted_mtp_core.checkpointing.state import load_module_state, module_state
from weighted_mtp_core.checkpointing.whole_files import write_safetensors, write_torch
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.runtime.sharding import all_like
from weighted_mtp_core.runtime.state_digest import BASE_SHA256
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.storage.manifest import verify_manifest, write_manifest

_TENSORS, _VALUES = "state.safetensors", "state.json"


def save_model(model: nn.Module, path: Path, *, distributed: Distributed = SINGLE_PROCESS) -> None:
    """Write the model's tensors as a plain dict that `torch.load(path, weights_only=True)` reads.

    If the model has a digest of its frozen tensors (`BASE_SHA256`), the frozen tensors are left out, as in
    `module_state`. All processes must call `save_model`; the first process writes the file.
    """
    tensors = model.state_dict(keep_vars=True)
    if BASE_SHA256 in tensors:
        tensors = module_state(model)
    if _is_sharded(tensors):
        write_torch(tensors, path, distributed)
    elif distributed.is_rank_zero:
        buffer = io.BytesIO()
        torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, buffer)
        atomic_write(path, buffer.getvalue())


def load_model(model: nn.Module, path: Path) -> None:
    """Load into the model the tensors of a file that `save_model` has written.

    Raises:
        WmtpError: The file is missing or damaged, contains something other than tensors, or belongs to
            another model or, with adapters, to another base model.
    """
    if not path.is_file():
        raise WmtpError(f"there is no checkpoint `{path}`")
    try:
        # The file is mapped into memory, so that a process reads only its own shards of the tensors.
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WmtpError(
            f"`{path}` is not a checkpoint of tensors: {str(error).splitlines()[0]}",
            hint="it may be damaged: use another one, or start the run again",
        ) from error
    if not isinstance(state, dict):
        raise WmtpError(f"`{path}` is not a checkpoint of tensors: it contains a `{type(state).__name__}`")
    if BASE_SHA256 in model.state_dict():
        load_module_state(model, state)
        return
    try:
        model.load_state_dict(all_like(model.state_dict(), state))
    except RuntimeError as error:
        raise WmtpError(
            f"checkpoint `{path}` does not fit this model: {str(error).splitlines()[0]}",
            hint="use the `[model]` table of the run that wrote it (its `recipe.toml`)",
        ) from error


def save_component(component: Stateful, folder: Path, *, distributed: Distributed = SINGLE_PROCESS) -> None:
    """Write a component's state to a folder: tensors as safetensors, plain values as JSON, and a manifest.

    All processes must call `save_component`; the first process writes the files.
    """
    state = component.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    if _is_sharded(tensors):
        write_safetensors(tensors, folder / _TENSORS, distributed)
    if not distributed.is_rank_zero:
        return
    if not _is_sharded(tensors):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / _TENSORS, save_safetensors(_apart(tensors)))
    atomic_write(folder / _VALUES, json.dumps(values, indent=1, sort_keys=True))
    write_manifest(folder)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in main memory; tied tensors, which safetensors refuses, are copied."""
    found: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        found[name] = tensor.clone() if tensor.data_ptr() in stored else tensor
        stored.add(tensor.data_ptr())
    return found


def _is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def load_component(component: Stateful, folder: Path) -> None:
    """Restore the state of a component from a folder that `save_component` wrote.

    Raises:
        WmtpError: The folder contains no checkpoint or no manifest, a file was changed, removed or added, or
            the component refuses the state.
    """
    if not (folder / _TENSORS).is_file():
        raise WmtpError(
            f"there is no component checkpoint in `{folder}`",
            hint="name the folder that holds `state.safetensors`, e.g. `<run folder>/checkpoints/critic`",
        )
    verify_manifest(folder)
    tensors = load_safetensors((folder / _TENSORS).read_bytes())
    values = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
    component.load_state_dict(all_like(component.state_dict(), {**tensors, **values}))
