"""Makes the policy of a recipe from the config of its base model alone: no weights are read or computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.adapters import attach
from weighted_mtp_core.model.families import logit_forms
from weighted_mtp_core.model.load import base_folder
from weighted_mtp_core.model.micro import micro_config
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.pretrained import empty_model, read_config
from weighted_mtp_core.model.stored_base import store_base
from weighted_mtp_core.model.unembedding import Unembedding
from weighted_mtp_core.recipe.schema import ModelTable


def config_of(table: ModelTable, *, storage: Path) -> Any:
    """Return the config of a recipe's base model.

    Raises:
        WmtpError: There is no such model, its config cannot be read, or `base` names a `.gguf` file, which
            has no config before it is converted.
    """
    if table.base == "micro":
        return micro_config(table.micro)
    if table.base.endswith(".gguf"):
        raise WmtpError(
            f"`{table.base}` has no config that could be read before it is converted",
            hint="name the converted folder under `models_v2`, which the first run writes",
        )
    return read_config(base_folder(table.base, storage=storage), kind="causal language model")


def empty_policy(config: Any, table: ModelTable) -> Policy:
    """Return the policy of a base model with this config, ready for training.

    Call this function inside `without_values`. If a base model has layers for multi-token prediction, they
    have the shape of its decoder layers, so they are made like new `sequential` heads.

    Raises:
        WmtpError: The base model cannot become the policy that `table` describes, or a package is missing.
    """
    from transformers import AutoModelForCausalLM

    base = empty_model(config, AutoModelForCausalLM)
    scale, soft_cap = next(logit_forms(base.config))
    unembedding = Unembedding(base.get_output_embeddings(), scale=scale, soft_cap=soft_cap)
    policy = Policy(base, unembedding=unembedding, n_future=table.n_future, heads=table.heads)
    if table.train == "adapters":
        attach(policy, table)
        store_base(policy, table.base_dtype)
    if table.train == "heads":
        policy.freeze_base()
    if table.activation_checkpointing:
        policy.recompute_activations()
    return policy
