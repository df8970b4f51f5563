"""Write and read the weights of a run: `best_model.pt` for the policy, safetensors for the critic."""

from __future__ import annotations

import io
import json
import pickle  # only for the name of its error: nothing is unpickled here
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from weighted_mtp_core.api import Stateful
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed, full, laid_out
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.storage.manifest import verify_manifest, write_manifest

_TENSORS, _VALUES = "state.safetensors", "state.json"


def save_model(model: nn.Module, path: Path, *, distributed: Distributed = SINGLE_PROCESS) -> None:
    """Write the model's tensors as a plain dict that `torch.load(path, weights_only=True)` reads.

    Of several processes all take part, and the first writes.
    """
    tensors = {name: full(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}
    if distributed.is_rank_zero:
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        atomic_write(path, buffer.getvalue())


def load_model(model: nn.Module, path: Path) -> None:
    """Load what `save_model` wrote.

    Raises:
        WmtpError: The file is missing, holds something else than tensors, or belongs to another model.
    """
    if not path.is_file():
        raise WmtpError(f"there is no checkpoint `{path}`")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WmtpError(
            f"`{path}` is not a checkpoint of tensors: {str(error).splitlines()[0]}",
            hint="it may be damaged: take another one, or begin the run anew",
        ) from error
    try:
        model.load_state_dict(laid_out(state, model.state_dict()))
    except RuntimeError as error:
        raise WmtpError(
            f"checkpoint `{path}` does not fit this model: {str(error).splitlines()[0]}",
            hint="use the `[model]` table of the run that wrote it (its `recipe.toml`)",
        ) from error


def save_component(component: Stateful, folder: Path, *, distributed: Distributed = SINGLE_PROCESS) -> None:
    """Write a component's state: tensors as safetensors, plain values as JSON, and a manifest.

    Of several processes all take part, and the first writes.
    """
    state = component.state_dict()
    tensors = {
        name: full(value.detach()).cpu().contiguous()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    values = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    if not distributed.is_rank_zero:
        return
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / _TENSORS, save_safetensors(tensors))
    atomic_write(folder / _VALUES, json.dumps(values, indent=1, sort_keys=True))
    write_manifest(folder)


def load_component(component: Stateful, folder: Path) -> None:
    """Restore what `save_component` wrote.

    Raises:
        WmtpError: There is no such checkpoint, a byte of it changed, or the component refuses it.
    """
    if not (folder / _TENSORS).is_file():
        raise WmtpError(
            f"there is no component checkpoint in `{folder}`",
            hint="name the folder that holds `state.safetensors`, e.g. `<run folder>/checkpoints/critic`",
        )
    verify_manifest(folder)
    values: Mapping[str, Any] = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
    state = {**load_safetensors((folder / _TENSORS).read_bytes()), **values}
    component.load_state_dict(laid_out(state, component.state_dict()))
