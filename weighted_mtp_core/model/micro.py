"""The base model `micro`: a small Llama with random weights and a tokenizer trained on the run's texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs
import torch

from weighted_mtp_core.recipe.schema import MicroTable
from weighted_mtp_core.storage.manifest import MANIFEST, atomic_folder

PAD, EOS = "<pad>", "<eos>"
_FORMAT = 2  # increase it when a code change gives other weights or tokens for the same texts and shape
_MAX_POSITIONS = 2048


def micro_folder(shape: MicroTable, models: Path, *, texts: Callable[[], Iterable[str]], seed: int) -> Path:
    """Return the folder of the model `micro` for this shape, seed and texts; create it if necessary."""
    corpus = list(texts())
    digest = hashlib.sha256(json.dumps([_FORMAT, attrs.asdict(shape), seed, corpus], sort_keys=True).encode())
    folder = models / "micro" / digest.hexdigest()[:12]
    if not (folder / MANIFEST).is_file():
        with atomic_folder(folder) as temporary:
            tokenizer = _train_tokenizer(corpus, vocab_size=shape.vocab_size)
            tokenizer.save_pretrained(temporary)
            _new_llama(shape, tokenizer, seed=seed).save_pretrained(temporary)
    return folder


def _train_tokenizer(corpus: list[str], *, vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer. Each digit is a token, so every number has only one tokenisation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=_MAX_POSITIONS,
    )


def micro_config(shape: MicroTable, tokenizer: Any = None) -> Any:
    """Return the config for this shape; without a tokenizer, the config has no ids of special tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=4 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.attention_heads,
        max_position_embeddings=_MAX_POSITIONS,
        # The default of 0.02 suits widths of thousands; with 0.02 at width 128, attention weights are at
        # first too uniform to learn copying.
        initializer_range=shape.hidden_size**-0.5,
        tie_word_embeddings=True,
        pad_token_id=getattr(tokenizer, "pad_token_id", None),
        eos_token_id=getattr(tokenizer, "eos_token_id", None),
        bos_token_id=None,
    )


def _new_llama(shape: MicroTable, tokenizer: Any, *, seed: int) -> Any:
    """Return a Llama with random weights, which depend only on the shape and the seed."""
    from transformers import LlamaForCausalLM

    config = micro_config(shape, tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
