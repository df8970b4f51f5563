"""Loads a language model for a component, from an earlier run or from a transformers directory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from weighted_mtp_core.checkpointing.best_model import load_model
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.language_model import LanguageModel
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.pretrained import load_pretrained
from weighted_mtp_core.runtime.fsdp import copy_of
from weighted_mtp_core.runtime.sharding import mesh_of_parameters
from weighted_mtp_core.tracking.run_folder import read_run

VOCABULARY = "vocabulary_sha256"
"""The key in `run.json` for the hash of the tokenizer's vocabulary, see `vocabulary_sha256`."""


def load_reference(path: Path, policy: Policy, *, tokenizer: Any) -> LanguageModel:
    """Return the language model of a run or of a transformers directory.

    Args:
        path: A run folder, the `best_model.pt` of a run, or a transformers directory.
        policy: The policy; if `path` belongs to a run, that run must have the same `[model]` table.
        tokenizer: The policy's tokenizer; the model at `path` must have the same vocabulary.

    Raises:
        WmtpError: There is no such model, or it cannot be loaded; its tokenizer differs from the policy's; or
            the model is from a run and does not fit the policy.
    """
    if (path / "config.json").is_file():
        from transformers import AutoModelForCausalLM

        kind, mesh = "causal language model", mesh_of_parameters(policy)
        own_tokenizer, base = load_pretrained(path, AutoModelForCausalLM, kind=kind, mesh=mesh)
        if vocabulary_sha256(own_tokenizer) != vocabulary_sha256(tokenizer):
            raise _other_tokenizer(path)
        other = make_policy(base, n_future=1, head_kind="medusa")  # this kind works with one layer, too
        return LanguageModel(other.to(policy.unembedding.weight.device))
    file = path / "checkpoints" / "best_model.pt" if (path / "run.json").is_file() else path
    if read_run(file.parent.parent).get(VOCABULARY, own := vocabulary_sha256(tokenizer)) != own:
        raise _other_tokenizer(path)
    twin = copy_of(policy)
    load_model(twin, file)
    return LanguageModel(twin)


def vocabulary_sha256(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's vocabulary: its tokens and their ids."""
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def _other_tokenizer(path: Path) -> WmtpError:
    return WmtpError(
        f"the tokenizer of `{path}` differs from the policy's, so its losses are those of other tokens",
        hint="use a run on the same data, or a model of the policy's family",
    )
