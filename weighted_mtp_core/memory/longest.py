"""Finds the longest training documents of a plan's data without loading the base model."""

from __future__ import annotations

from pathlib import Path

from weighted_mtp_core.api import DataSource
from weighted_mtp_core.data.checks import checked_version
from weighted_mtp_core.data.texts import make_codec
from weighted_mtp_core.data.token_cache import TokenCache
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.memory.documents import Documents
from weighted_mtp_core.model.load import base_folder
from weighted_mtp_core.model.pretrained import load_tokenizer
from weighted_mtp_core.plan import Plan


def longest_documents(plan: Plan, *, tokenise: bool) -> Documents:
    """Return the documents of the training split, or a document of `data.max_tokens` tokens instead.

    Args:
        plan: The plan.
        tokenise: Whether to tokenise data that no run has tokenised yet, and store the tokens for the run.

    Returns:
        The documents from which the policy learns; or one document of `data.max_tokens` tokens if the data or
        the tokenizer cannot be read, if the data are not tokenised and `tokenise` is false, or if the base
        model is `micro` or a `.gguf` file, for which the run makes the tokenizer.
    """
    recipe, storage = plan.recipe, Path(plan.recipe.run.storage)
    if recipe.model.base == "micro" or recipe.model.base.endswith(".gguf"):
        return Documents.longest(recipe.data)
    try:
        codec = make_codec(load_tokenizer(base_folder(recipe.model.base, storage=storage)), recipe.data)
        source: DataSource = plan.data.build(plan.data_context)
        cache = TokenCache(
            storage,
            checked_version(source, plan.data),
            data=plan.data,
            codec=codec,
            max_tokens=recipe.data.max_tokens,
            train_on=recipe.data.train_on,
        )
        if not tokenise and not cache.has("policy", "train"):
            return Documents.longest(recipe.data)
        return Documents.of(cache.open("policy", "train", examples=lambda: source.policy_examples("train")))
    except WmtpError:  # the run itself reports what is wrong with the data
        return Documents.longest(recipe.data)
