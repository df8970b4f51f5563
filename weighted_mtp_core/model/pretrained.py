"""Read a model and its tokenizer, and refuse files from which transformers would load a different model.

transformers creates random weights for missing tensors, drops tensors that the config does not describe, and
applies an adapter in the same folder. If the files were not checked, a run could therefore train a different
model than the one that its recipe names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import quoted, reason
from weighted_mtp_core.model.exported_model import ADAPTER_CONFIG
from weighted_mtp_core.model.sharded_loading import finish_loading, sharded_class
from weighted_mtp_core.model.shipped_heads import ShippedHeads
from weighted_mtp_core.model.shipped_layers import later_layers, names_of_shipped_layers
from weighted_mtp_core.runtime.sharding import all_processes_agree, local

_OF_A_LAYER = re.compile(r"(^|\.)(layers?|h|blocks?)\.\d+\.")
_NOT_LEARNED = re.compile(r"inv_freq$|rotary_emb|masked_bias$|attn\.bias$|rope")
_UNUSED = re.compile(r"(^|\.)pooler\.")
_COMPILED = "_orig_mod."
_SHOWN = 4


def load_pretrained(
    source: Path | str,
    model_class: Any,
    *,
    kind: str,
    shipped: ShippedHeads | None = None,
    mesh: DeviceMesh | None = None,
) -> tuple[Any, Any]:
    """Load a tokenizer and a model, in float32.

    Args:
        source: A transformers directory or a hub id.
        model_class: One of transformers' `Auto...` classes.
        kind: A name for this kind of model in error messages.
        shipped: MTP layers to load as additional decoder layers of the model; None loads no MTP layers.
        mesh: The processes over which the matrices of layers, embedding and unembedding are sharded: each
            process reads only its rows from the files. If `mesh` is None, the whole model is loaded on the
            CPU.

    Raises:
        WmtpError: The model or the tokenizer cannot be loaded; the directory contains an adapter; the weights
            are quantised, incomplete or damaged, or do not match the config; or the model has no embedding
            for some tokens of the tokenizer.
    """
    from transformers import AutoConfig

    read_config(source, kind=kind)
    tokenizer = load_tokenizer(source)
    try:
        with without_report():
            own = _class_of(AutoConfig.from_pretrained(source), model_class)
            model, info = (own if mesh is None else sharded_class(own, source, mesh)).from_pretrained(
                source,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **({} if shipped is None else shipped.options()),
            )
    except Exception as error:  # an unknown model can raise any exception
        raise _unreadable(source, kind, error) from error
    if mesh is not None:
        finish_loading(model, info, mesh)
    refuse_bad_weights(source, model, info, shipped=shipped)
    _refuse_other_ids(source, model, tokenizer)
    return tokenizer, model


def load_tokenizer(source: Path | str) -> Any:
    """Return the tokenizer of a transformers directory or of a hub id.

    Raises:
        WmtpError: The tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # an unknown tokenizer can raise any exception
        raise WmtpError(
            f"the tokenizer of `{source}` cannot be loaded: {_first_line(error)}",
            hint="put the model's `tokenizer.json` and `tokenizer_config.json` in the folder of its weights",
        ) from error


@contextmanager
def without_report() -> Iterator[None]:
    """Suppress transformers' table of missing and unexpected tensors inside this context."""
    logger = logging.getLogger("transformers.modeling_utils")
    # Not by a higher level of the logger, which would also suppress transformers' other warnings.
    logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def empty_model(config: Any, model_class: Any) -> Any:
    """Return a model with this config and new float32 parameters; no weights are read from files.

    Args:
        config: A transformers config.
        model_class: One of transformers' `Auto...` classes.

    Raises:
        WmtpError: transformers cannot make the model.
    """
    made = _class_of(config, model_class)
    try:
        return made.from_config(config, dtype=torch.float32) if made is model_class else made(config)
    except Exception as error:  # an unknown model can raise any exception
        raise WmtpError(f"a `{config.model_type}` model cannot be made: {_first_line(error)}") from error


def _class_of(config: Any, model_class: Any) -> Any:
    """Return `model_class`, or the class that the config names if `model_class` does not list the config.

    For some text models, no `Auto...` class lists the config. If transformers does not have the named class,
    `model_class` is returned.
    """
    import transformers

    own = (config.architectures or [""])[0]
    is_listed = type(config) in model_class._model_mapping  # noqa: SLF001 - the only place that lists them
    return model_class if is_listed else getattr(transformers, own, model_class)


def refuse_bad_weights(
    source: Path | str, model: Any, info: Any, *, shipped: ShippedHeads | None = None
) -> None:
    """Refuse weights that do not match the config or are not finite.

    Args:
        source: A transformers directory, a file of weights or a hub id.
        model: The model that transformers loaded from `source`.
        info: transformers' report about the loading, which `output_loading_info` requests.
        shipped: The MTP layers that were loaded with the model; None if no MTP layers were loaded.

    Raises:
        WmtpError: Tensors are missing, have wrong shapes, belong to layers that the config does not describe,
            or contain NaN or infinity, or transformers has applied an adapter.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _with_adapter(source)
    known = names_of_shipped_layers(source) if shipped is None else shipped.beside
    _refuse_other_tensors(source, model, info, known)
    _refuse_damaged(source, model)


def read_config(source: Path | str, *, kind: str) -> Any:
    """Return a model's config.

    Raises:
        WmtpError: The config cannot be read, the directory contains an adapter, or the weights are quantised.
    """
    from transformers import AutoConfig

    if isinstance(source, Path) and (source / ADAPTER_CONFIG).is_file():
        raise _with_adapter(source)
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:  # an unknown config can raise any exception
        raise WmtpError(
            f"`{source}` cannot be loaded as a {kind}: {_first_line(error)}",
            hint="name a transformers directory, a `.gguf` file or a reachable hub id",
        ) from error
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise WmtpError(
            f"the weights of `{source}` are quantised ({method or 'by an unnamed method'}), "
            "so they cannot be trained",
            hint="name the model's unquantised weights, or write them once: load them with "
            "`dequantize=True` in transformers, where the method allows it, and save them",
        )
    return config


def _with_adapter(source: Path | str) -> WmtpError:
    """Return the error for a model with an adapter in the same folder, which transformers applies."""
    folder = source.parent if isinstance(source, Path) and source.is_file() else source
    return WmtpError(
        f"`{folder}` contains an adapter, `{ADAPTER_CONFIG}`, which would be applied to the model there",
        hint=f"merge it into the model (peft: `merge_and_unload`, then `save_pretrained`), or move "
        f"`{ADAPTER_CONFIG}` and its weights away",
    )


def _unreadable(source: Path | str, kind: str, error: Exception) -> WmtpError:
    """Return the error for weights that cannot be read; if a file is damaged, the error names this file."""
    for file in _weight_files(source):
        fault = _fault_of(file)
        if fault is not None:
            return WmtpError(
                f"`{file}` cannot be read: {fault}",
                hint="the file is truncated or damaged: copy or download it again",
            )
    return WmtpError(
        f"`{source}` cannot be loaded as a {kind}: {_first_line(error)}",
        hint="name a transformers directory, a `.gguf` file or a reachable hub id",
    )


def _fault_of(file: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        return _first_line(error)
    return None


def _refuse_other_tensors(source: Path | str, model: Any, info: Any, known: re.Pattern[str]) -> None:
    """Refuse files in which tensors are missing, have wrong shapes or belong to additional layers.

    Additional tensors are accepted if their names match `known`, or if they are not learned, such as rotary
    frequencies. Other unused tensors cause a warning.
    """
    where = _named_files(source)
    named = quoted(model.config.architectures or [type(model).__name__])
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        shapes = [
            f"`{name}` {list(own)} instead of {list(wanted)}" for name, own, wanted in mismatched[:_SHOWN]
        ]
        raise WmtpError(
            f"{where}: {len(mismatched)} tensors have other shapes than in the config: {', '.join(shapes)}"
            + _more(mismatched),
            hint="`config.json` and the weights are not of one model: restore both from the same place",
        )
    unexpected = sorted(info["unexpected_keys"])
    missing = sorted(name for name in info["missing_keys"] if not _UNUSED.search(name))
    if missing:
        raise WmtpError(
            f"{where}: {len(missing)} tensors of {named} are missing: {_some(missing)}",
            hint=_mend(missing, unexpected),
        )
    later = set(later_layers(source, model))
    left = [name for name in unexpected if not _NOT_LEARNED.search(name) and not known.search(name)]
    foreign = sorted(later.union(name for name in left if _OF_A_LAYER.search(name) and _is_of(name, model)))
    if foreign:
        raise WmtpError(
            f"{where}: {len(foreign)} tensors are not part of {named} as `config.json` describes it: "
            f"{_some(foreign)}",
            hint="`config.json` and the weights are not of one model: restore both from the same place",
        )
    if left:
        logging.getLogger(__name__).warning(
            "%s: %d tensors are not used by %s: %s", where, len(left), named, _some(left)
        )


def _is_of(name: str, model: Any) -> bool:
    """Return whether a tensor's name begins like the names of the model's layers."""
    own = {match.string[: match.start(2)] for match in map(_OF_A_LAYER.search, model.state_dict()) if match}
    match = _OF_A_LAYER.search(name)
    return match is not None and name[: match.start(2)] in own


def _mend(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    if any(name.startswith(_COMPILED) for name in unexpected):
        return (
            f"the tensors' names begin with `{_COMPILED}`: a compiled model was saved; "
            f"save it without that prefix (`model._orig_mod.save_pretrained(...)`)"
        )
    if unexpected:
        return (
            f"the files contain other tensors instead, {_some(unexpected)}: they are of another "
            "architecture, or of a model with a wrapper around it"
        )
    if all("lm_head" in name or "embed_out" in name for name in missing):
        return (
            "add the tensor, or set `tie_word_embeddings` to true in `config.json` if the model ties its "
            "unembedding to its embedding"
        )
    return "a file of the model is missing or was saved incompletely: copy or download the model again"


def _refuse_damaged(source: Path | str, model: nn.Module) -> None:
    """Refuse weights that are not finite."""
    named = dict(model.named_parameters())
    own = torch.tensor([_is_finite(local(tensor)) for tensor in named.values()])
    finite = all_processes_agree(model, own).tolist()
    bad = [name for name, ok in zip(named, finite, strict=True) if not ok]
    if bad:
        raise WmtpError(
            f"{_named_files(source)}: {len(bad)} tensors contain NaN or infinity: {_some(bad)}",
            hint="the run that wrote them diverged, or the file is damaged: use an earlier checkpoint",
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.numel() or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def _refuse_other_ids(source: Path | str, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer if the model has no embedding for its EOS token or for an ordinary token."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    # Tokenizer classes add special tokens that never occur in texts, for example for padding.
    special = set(tokenizer.all_special_ids)
    ids = {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and number not in special
    }
    eos = tokenizer.eos_token_id
    if eos is not None and eos >= rows:
        ids = {str(tokenizer.eos_token): eos, **ids}
    if ids:
        raise WmtpError(
            f"the tokenizer of `{source}` has {len(ids)} tokens beyond the model's embedding of {rows} rows: "
            + ", ".join(f"`{token}` is {number}" for token, number in list(ids.items())[:_SHOWN])
            + _more(list(ids)),
            hint="put the model's own tokenizer in its folder, or enlarge the model: "
            "`model.resize_token_embeddings(len(tokenizer))`",
        )


def _weight_files(source: Path | str) -> list[Path]:
    """Return the files with the weights of a model; empty for a hub id, or if no such files are found."""
    if not isinstance(source, Path):
        return []
    if source.is_file():
        return [source]
    return sorted(source.glob("model*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))


def _named_files(source: Path | str) -> str:
    return quoted(str(file) for file in _weight_files(source)) or f"`{source}`"


def _some(names: Sequence[str]) -> str:
    return quoted(names[:_SHOWN]) + _more(names)


def _more(names: Sequence[Any]) -> str:
    return f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""


def _first_line(error: Exception) -> str:
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), reason(error))
