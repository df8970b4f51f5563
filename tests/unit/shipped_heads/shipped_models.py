"""Base models that ship MTP layers: their families, how they are loaded and exported, and ids for them."""

import torch
from weighted_mtp_core.export.transformers import cast_parameters, write_export
from weighted_mtp_core.model.exported_model import ExportFacts
from weighted_mtp_core.model.load import load_policy
from weighted_mtp_core.recipe.schema import HeadsTable, ModelTable

T = 14
KNOWN_TO_TRANSFORMERS = ("deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_text", "mellum")
RELATED = ("glm4_moe_lite", "qwen3_5_moe_text")
FAMILIES = (*KNOWN_TO_TRANSFORMERS, "qwen2")


def load(path, *, n_future=2, shared=False):
    heads = HeadsTable(kind="sequential", init="base", shared=shared)
    table = ModelTable(base=str(path), n_future=n_future, heads=heads)
    return load_policy(table, storage=path.parent, texts=tuple, seed=1)


def exported(loaded, path, *, dtype=torch.float32, shared=False):
    facts = ExportFacts(
        n_future=loaded.policy.n_future,
        heads="sequential",
        init="base",
        shared=shared,
        serve="transformers",
        run="r",
        recipe_sha256="0" * 64,
        base=loaded.base_name,
        data_sha256=None,
    )
    cast_parameters(loaded.policy, dtype)
    write_export(loaded.policy, loaded.tokenizer, path, facts=facts, recipe=b"")
    return path


def ids(rows=2):
    return torch.randint(3, 90, (rows, T), generator=torch.Generator().manual_seed(0))
