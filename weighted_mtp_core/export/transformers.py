"""Write a trained policy as a transformers directory.

Head 1 becomes an ordinary language model, which transformers loads without this package. Heads 2..K are
written to a folder of their own, unless they came with the base model as layers for multi-token prediction;
such layers keep their names in the model's own files. `model.exported_model` reads all heads back. If a
server will draft with heads 2..K, they are also written in the form that this server reads. `manifest.json`
contains the SHA-256 of every file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import weighted_mtp_core
from weighted_mtp_core.data.texts import differing_ids
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.export.mtp_layers import compare_with_transformers, mtp_config, mtp_tensors
from weighted_mtp_core.export.serving import Server, write_medusa
from weighted_mtp_core.model.exported_model import (
    EXTRA_HEADS,
    FACTS,
    FORMAT,
    RECIPE,
    ExportFacts,
    is_exported_adapter,
    is_exported_model,
)
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.shipped_layers import promise_no_layers
from weighted_mtp_core.storage.manifest import atomic_folder


def refuse_to_replace(path: Path, *, force: bool) -> None:
    """Refuse to overwrite files; with `force`, exported models, adapters and empty folders may be replaced.

    Raises:
        WmtpError: `path` exists and must not be replaced.
    """
    if not path.exists():
        return
    if not force:
        raise WmtpError(f"`{path}` already exists", hint="choose another `--to`, or replace it with --force")
    own = is_exported_model(path) or is_exported_adapter(path)
    if not path.is_dir() or not (own or not any(path.iterdir())):
        raise WmtpError(
            f"`{path}` is not an exported model, so `--force` does not replace it",
            hint="choose another `--to`",
        )


def write_export(
    policy: Policy,
    tokenizer: Any,
    path: Path,
    *,
    facts: ExportFacts,
    recipe: bytes,
    serve: Server | None = None,
) -> None:
    """Write an exported model, whole or not at all; an existing directory is replaced.

    Args:
        policy: The policy; its parameters are written in their own dtype.
        tokenizer: The tokenizer; its EOS token also ends texts that transformers generates.
        path: The directory.
        facts: The contents of `weighted_mtp.json`, to which the versions of format and core are added.
        recipe: Contents of the run's `recipe.toml`.
        serve: The server that will draft with heads 2..K, already checked with `refuse_unserved`; None writes
            the heads for this package only.

    Raises:
        WmtpError: transformers reads the tokenizer back with other ids, or the server cannot compute the
            heads or computes other logits.
        RunFailedError: The directory cannot be written, for example because the disk is full.
    """
    model = language_model(policy)
    tensors, config = _mtp_layers(policy, serve)
    model.generation_config = _generation_config(tokenizer)
    about = {"format": FORMAT, "core": weighted_mtp_core.__version__, **attrs.asdict(facts)}
    try:
        with atomic_folder(path, replace=True) as folder:
            model.save_pretrained(folder, state_dict={**model.state_dict(), **tensors} if tensors else None)
            if config:
                _change_config(folder, config)
            tokenizer.save_pretrained(folder)
            _read_back(tokenizer, folder)
            if policy.n_future > 1 and policy.shipped is None:
                (folder / EXTRA_HEADS).parent.mkdir()
                save_file(_extra_heads(policy), folder / EXTRA_HEADS)
            if serve == "transformers":
                compare_with_transformers(policy, folder)
            elif serve is not None and policy.head_kind == "medusa":
                write_medusa(policy, folder)
            (folder / FACTS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            (folder / RECIPE).write_bytes(recipe)
    except (OSError, SafetensorError) as error:
        raise RunFailedError(f"cannot write the exported model `{path}`: {error}") from error


def cast_parameters(policy: Policy, dtype: torch.dtype) -> None:
    """Convert a policy's parameters in place; buffers keep their dtype, as in transformers."""
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(dtype)


def _read_back(tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer that gives other ids after transformers has loaded it from the exported model.

    For some model types, `AutoTokenizer` replaces the pre-tokenizer in `tokenizer.json` with the model type's
    own pre-tokenizer, without a warning.
    """
    from transformers import AutoTokenizer

    difference = differing_ids(tokenizer, AutoTokenizer.from_pretrained(folder))
    if difference is not None:
        raise WmtpError(
            f"transformers reads the exported tokenizer back as another one: {difference}",
            hint="train on the tokenizer that `AutoTokenizer` loads for this type of model",
        )


def language_model(policy: Policy) -> Any:
    """Return trunk, head 1 and unembedding as the transformers model from which the policy was made.

    The model shares the policy's modules, so it needs no additional memory. The model is only for saving:
    with `parallel` heads, it cannot be run, because the layer of head 1 still has the layer index 0. The
    config describes MTP layers only if these layers are heads of the policy.
    """
    config = copy.deepcopy(policy.config)
    if policy.shipped is None:
        promise_no_layers(config)
    with torch.device("meta"):
        base = policy.base_class(config)
    policy.heads.rejoin(base, trunk=policy.trunk, norm=policy.norm)
    base.set_output_embeddings(policy.unembedding.as_linear())
    return base


def _mtp_layers(policy: Policy, serve: Server | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the keys of `config.json` with which the model's own files store heads 2..K.

    Both are empty if these files do not contain the heads.
    """
    if policy.shipped is not None:
        names = policy.config.architectures  # servers find the MTP layers by these names
        return policy.shipped.tensors(policy), {"architectures": names} if names else {}
    if policy.head_kind != "sequential" or serve is None or serve == "sglang":
        return {}, {}
    return mtp_tensors(policy, serve), mtp_config(policy, serve)


def _change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Set keys of `config.json` in an exported model."""
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _extra_heads(policy: Policy) -> dict[str, Tensor]:
    """Return the tensors of heads 2..K."""
    return {
        f"head_{k}.{name}": tensor.detach().cpu().contiguous()
        for k, head in enumerate(policy.heads[1:], start=2)
        for name, tensor in head.state_dict().items()
    }


def _generation_config(tokenizer: Any) -> Any:
    """Return a config for greedy decoding, with which transformers ends texts as this package does."""
    from transformers import GenerationConfig

    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=eos if pad is None else pad,
        do_sample=False,
    )
