"""Turn `[model]` into a policy and its tokenizer: `micro`, a directory, a `.gguf` file or a hub id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import frozen
from torch import nn

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.export.transformers import is_export, refuse_other_heads, restore_heads
from weighted_mtp_core.model.policy import Policy, make_policy
from weighted_mtp_core.recipe.schema import MicroTable, ModelTable
from weighted_mtp_core.storage.manifest import MANIFEST, atomic_folder, sha256_of, verify_manifest

PAD, EOS = "<pad>", "<eos>"
_MICRO_FORMAT = 2  # raise it when the same texts and shape would give other weights or tokens
_MAX_POSITIONS = 2048


@frozen(kw_only=True, eq=False)
class LoadedPolicy:
    """A policy, its tokenizer and what to call its base in tags (name and version)."""

    policy: Policy
    tokenizer: Any
    base_name: str


def load_policy(
    table: ModelTable, *, storage: Path, texts: Callable[[], Iterable[str]], seed: int
) -> LoadedPolicy:
    """Load or make the base model, and give it its heads.

    Args:
        table: The recipe's `[model]`.
        storage: The storage root; what is made or converted stays under its `models_v2/`.
        texts: The run's own texts, for the tokenizer of `micro`.
        seed: Of initial weights.

    Raises:
        WmtpError: There is no such model, a byte of it changed, or it cannot be a policy.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # it breaks lines of a log, and the display
    folder: Path | str
    if table.base == "micro":
        folder = _micro_folder(table.micro, storage / "models_v2", texts=texts, seed=seed)
        verify_manifest(folder)
    else:
        folder = find_base(table.base, storage=storage)
    exported = folder if isinstance(folder, Path) and is_export(folder) else None
    if exported is not None:
        refuse_other_heads(exported, n_future=table.n_future, head_kind=table.head)
    tokenizer, base = _from_transformers(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = make_policy(base, n_future=table.n_future, head_kind=table.head)
    if exported is not None:
        restore_heads(policy, exported)
    name = f"{folder.parent.name}/{folder.name}" if isinstance(folder, Path) else folder
    return LoadedPolicy(policy=policy, tokenizer=tokenizer, base_name=name)


def find_base(base: str, *, storage: Path) -> Path | str:
    """Return the verified directory of a transformers model, or the hub id that is left to transformers.

    Args:
        base: A folder under `models_v2/`, a directory, a `.gguf` file, which is converted once, or a hub id.
        storage: The storage root.

    Raises:
        WmtpError: There is no such model, or a byte of it changed.
    """
    models = storage / "models_v2"
    gguf = base.endswith(".gguf")
    folder = _gguf_folder(Path(base), models) if gguf else _transformers_folder(base, models)
    if isinstance(folder, Path) and (is_export(folder) or (folder / MANIFEST).is_file()):
        verify_manifest(folder)
    return folder


def _from_transformers(source: Path | str) -> tuple[Any, nn.Module]:
    """Load tokenizer and model, in fp32; the tokenizer has an EOS, and a padding token that is not it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise WmtpError(
            f"`{source}` cannot be loaded as a causal language model: {str(error).splitlines()[0]}",
            hint="`model.base` is `micro`, a transformers directory, a `.gguf` file or a reachable hub id",
        ) from error
    if tokenizer.eos_token_id is None:
        raise WmtpError(f"the tokenizer of `{source}` has no EOS token, so responses could not end")
    return tokenizer, base


def _transformers_folder(base: str, models: Path) -> Path | str:
    """Return the directory that `base` means, or `base` itself if it can only be a hub id."""
    stored = models / base
    for folder in (Path(base), stored):
        if (folder / "config.json").is_file():
            return folder
    versions = sorted(path.parent for path in stored.glob("*/config.json"))
    if len(versions) == 1:
        return versions[0]
    if versions:
        raise WmtpError(
            f"`{stored}` holds several versions: " + ", ".join(f"`{path.name}`" for path in versions),
            hint=f'name one, for example `model.base = "{base}/{versions[-1].name}"`',
        )
    if base.count("/") == 1 and not base.startswith((".", "/")) and not Path(base).parent.exists():
        return base
    raise WmtpError(
        f"there is no model `{base}`: neither a transformers directory nor a folder under `{models}`",
        hint="`model.base` is `micro`, a transformers directory, a `.gguf` file or a hub id `owner/name`",
    )


def _micro_folder(shape: MicroTable, models: Path, *, texts: Callable[[], Iterable[str]], seed: int) -> Path:
    """Return the folder of the small Llama of this shape, seed and text; make it if it is not there."""
    corpus = list(texts())
    digest = hashlib.sha256(
        json.dumps([_MICRO_FORMAT, attrs.asdict(shape), seed, corpus], sort_keys=True).encode()
    )
    folder = models / "micro" / digest.hexdigest()[:12]
    if not (folder / MANIFEST).is_file():
        with atomic_folder(folder) as temporary:
            tokenizer = _train_tokenizer(corpus, vocab_size=shape.vocab_size)
            tokenizer.save_pretrained(temporary)
            _new_llama(shape, tokenizer, seed=seed).save_pretrained(temporary)
    return folder


def _train_tokenizer(corpus: list[str], *, vocab_size: int) -> Any:
    """Train a byte-level BPE; digits stay single, so that numbers are spelt one way."""
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


def _new_llama(shape: MicroTable, tokenizer: Any, *, seed: int) -> Any:
    """Return a Llama with random weights that depend on shape and seed alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=4 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.attention_heads,
        max_position_embeddings=_MAX_POSITIONS,
        # 0.02, the default, is for widths of thousands: at 128 attention starts too flat to learn copying.
        initializer_range=shape.hidden_size**-0.5,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _gguf_folder(file: Path, models: Path) -> Path:
    """Return the folder with a GGUF file's weights as safetensors; dequantising takes a minute, so once."""
    if not file.is_file():
        raise WmtpError(
            f"there is no file `{file}`",
            hint="`model.base` with `.gguf` is a path from where you start the run",
        )
    folder = models / file.stem / sha256_of(file)[:12]
    if not (folder / MANIFEST).is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with atomic_folder(folder) as temporary:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            # transformers refuses to save what it believes quantised; the weights are plain fp32 now.
            if hasattr(base.config, "quantization_config"):
                del base.config.quantization_config
            base.hf_quantizer = None
            tokenizer.save_pretrained(temporary)
            base.save_pretrained(temporary)
    return folder
