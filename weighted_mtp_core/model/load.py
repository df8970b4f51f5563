"""Load the model that `model.base` names: `micro`, a directory, a stored model, a `.gguf` file, a hub id."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch.distributed.device_mesh import DeviceMesh

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import quoted, reason
from weighted_mtp_core.model.adapters import adapt
from weighted_mtp_core.model.exported_model import is_exported_model, load_extra_heads, refuse_other_heads
from weighted_mtp_core.model.micro import micro_folder
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.pretrained import load_pretrained, read_config, refuse_bad_weights
from weighted_mtp_core.model.probe import compare, observe
from weighted_mtp_core.model.shipped_heads import ShippedHeads, find_shipped_heads
from weighted_mtp_core.model.shipped_layers import MIMO, shipped_layers
from weighted_mtp_core.recipe.schema import HeadKind, HeadsTable, ModelTable, MtpServer
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.runtime.fsdp import view_of
from weighted_mtp_core.runtime.sharding import decoder_layers, mesh_of_parameters, shard_matrices
from weighted_mtp_core.storage.manifest import MANIFEST, atomic_folder, sha256_of, verify_manifest


@frozen(kw_only=True, eq=False)
class LoadedPolicy:
    """A policy with its tokenizer.

    Attributes:
        policy: The policy.
        tokenizer: The tokenizer of the base model.
        base_name: The base model, for the run's tags: a hub id, or the last two parts of the model's path,
            for example name and version of a model under `models_v2/`.
        unused: A message to the user about MTP layers in the files of the base model that the policy does not
            use; None if no such layers are found, or if the base model is an exported model.
    """

    policy: Policy
    tokenizer: Any
    base_name: str
    unused: str | None


def load_policy(
    table: ModelTable,
    *,
    storage: Path,
    texts: Callable[[], Iterable[str]],
    seed: int,
    distributed: Distributed = SINGLE_PROCESS,
    mesh: DeviceMesh | None = None,
) -> LoadedPolicy:
    """Load or create the base model and make a policy from it.

    Args:
        table: The table `[model]` of the recipe.
        storage: The storage root; created and converted models are stored in its folder `models_v2/`.
        texts: Function that returns the training texts, on which the tokenizer of `micro` is trained.
        seed: Seed of the initial weights.
        distributed: The processes of the run; only the first process creates and converts models.
        mesh: The processes over which the policy is sharded. A sharded policy must be passed to
            `fsdp.callable_` before it is called. If `mesh` is None, the whole policy is loaded on the CPU.

    Raises:
        WmtpError: The model does not exist or cannot be loaded, its files have been changed, its tokenizer
            has no EOS token, or the model cannot become the policy that `table` describes.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # progress bars break the lines of logs and of the display
    folder: Path | str
    with distributed.rank_zero_first():
        if table.base == "micro":
            folder = micro_folder(table.micro, storage / "models_v2", texts=texts, seed=seed)
            verify_manifest(folder)
        else:
            folder = find_base(table.base, storage=storage)
    saved = folder if isinstance(folder, Path) and is_exported_model(folder) else None
    if saved is not None:
        refuse_other_heads(saved, n_future=table.n_future, heads=table.heads)
    kind, shipped = "causal language model", None
    if table.heads.init == "base":
        config = read_config(folder, kind=kind)
        shipped = find_shipped_heads(folder, config, n_future=table.n_future, shared=table.heads.shared)
    tokenizer, base = load_pretrained(folder, AutoModelForCausalLM, kind=kind, shipped=shipped, mesh=mesh)
    if table.heads.serve == "vllm" and base.config.model_type not in MIMO.families:
        raise WmtpError(
            f"vLLM drafts with `sequential` heads of {quoted(MIMO.families)} models only, "
            f"and `{folder}` is a `{base.config.model_type}` model",
            hint='set `model.heads.serve = "transformers"`, or for vLLM `model.heads.kind = "medusa"`',
        )
    if tokenizer.eos_token_id is None:
        raise WmtpError(f"the tokenizer of `{folder}` has no EOS token, so responses could not end")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = make_policy(
            base,
            n_future=table.n_future,
            head_kind=table.heads.kind,
            shared=table.heads.shared,
            serve=table.heads.serve,
            shipped=shipped,
        )
    if saved is not None and shipped is None:
        load_extra_heads(policy, saved)
    if table.train == "adapters":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapt(policy, table)
    name = f"{folder.parent.name}/{folder.name}" if isinstance(folder, Path) else folder
    unused = None if shipped is not None or saved is not None else _unused(shipped_layers(folder, base))
    return LoadedPolicy(policy=policy, tokenizer=tokenizer, base_name=name, unused=unused)


def _unused(shipped: Sequence[str]) -> str | None:
    """Return a message about the unused MTP tensors `shipped`; None if there are no such tensors."""
    if not shipped:
        return None
    others = f" and {len(shipped) - 1} other tensors" if shipped[1:] else ""
    return (
        f"the MTP layers of the base model are not used (`{shipped[0]}`{others}): `export` leaves them out, "
        "and its `config.json` does not promise them"
    )


def make_policy(
    base: Any,
    *,
    n_future: int,
    head_kind: HeadKind,
    shared: bool = False,
    serve: MtpServer = "transformers",
    shipped: ShippedHeads | None = None,
) -> Policy:
    """Make a policy from a causal LM and check that head 1 computes the LM's logits; see `probe`.

    A sharded model gives a sharded policy: layers are copied shard by shard, and all processes run the probe
    together. The arguments have the same meaning as the keys of the recipe's `[model]` and `[model.heads]`.
    `shipped` contains the MTP layers that were loaded with the model and become heads 2..K; their layout
    replaces `serve`. Without `shipped`, these heads are new.

    Raises:
        WmtpError: The model cannot be a trunk or does not work with this kind of head, or the MTP layers
            cannot become heads.
    """
    blocks = () if shipped is None else shipped.take_blocks(base)
    answers = observe(view_of(base))
    heads = HeadsTable(
        kind=head_kind, shared=shared, serve=serve if shipped is None else shipped.layout.serve
    )
    try:
        policy = Policy(base, unembedding=answers.unembedding, n_future=n_future, heads=heads)
    except WmtpError:
        raise
    except Exception as error:  # an unknown model can raise any exception
        raise WmtpError(
            f"a `{base.config.model_type}` model cannot have `{head_kind}` heads ({reason(error)})",
            hint="use another kind of heads, or another base model",
        ) from error
    if shipped is not None:
        shipped.load_into(policy, blocks)
        policy.shipped = shipped
    mesh = mesh_of_parameters(base)
    if mesh is not None:
        policy.to(mesh.device_type)
        shard_matrices([*decoder_layers(policy), *policy.heads.projections], mesh)
    policy.sparse_trunk = compare(view_of(policy), answers)
    return policy


def find_base(base: str, *, storage: Path) -> Path | str:
    """Return the directory of the transformers model that `base` names; return a hub id unchanged.

    If the directory has a manifest or contains an exported model, the files in the directory are verified.

    Args:
        base: A directory, a folder under `models_v2/`, a `.gguf` file (converted once) or a hub id.
        storage: The storage root.

    Raises:
        WmtpError: `base` does not name a model, the files of the model have been changed, an exported model
            has no manifest, or a `.gguf` file cannot be read or has unusable weights.
    """
    models = storage / "models_v2"
    gguf = base.endswith(".gguf")
    folder = _gguf_folder(Path(base), models) if gguf else _transformers_folder(base, models)
    if isinstance(folder, Path) and (is_exported_model(folder) or (folder / MANIFEST).is_file()):
        verify_manifest(folder)
    return folder


def base_folder(base: str, *, storage: Path) -> Path | str:
    """Return the result of `find_base` without verifying any files; `base` must not be a `.gguf` file.

    Raises:
        WmtpError: `base` does not name a model.
    """
    return _transformers_folder(base, storage / "models_v2")


def _transformers_folder(base: str, models: Path) -> Path | str:
    """Return the directory that `base` names, or `base` itself if it can only be a hub id."""
    stored = models / base
    for folder in (Path(base), stored):
        if (folder / "config.json").is_file():
            return folder
    versions = sorted(path.parent for path in stored.glob("*/config.json"))
    if len(versions) == 1:
        return versions[0]
    if versions:
        raise WmtpError(
            f"`{stored}` contains several versions: " + ", ".join(f"`{path.name}`" for path in versions),
            hint=f'name one, for example `model.base = "{base}/{versions[-1].name}"`',
        )
    if base.count("/") == 1 and not base.startswith((".", "/")) and not Path(base).parent.exists():
        return base
    raise WmtpError(
        f"there is no model `{base}`: neither a transformers directory nor a folder under `{models}`",
        hint="`model.base` is `micro`, a transformers directory, a `.gguf` file or a hub id `owner/name`",
    )


def _gguf_folder(file: Path, models: Path) -> Path:
    """Return the folder with a GGUF file's weights as safetensors; a new file is first converted."""
    if not file.is_file():
        raise WmtpError(
            f"there is no file `{file}`",
            hint="a `.gguf` path in `model.base` is relative to the current directory",
        )
    folder = models / file.stem / sha256_of(file)[:12]
    if not (folder / MANIFEST).is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with atomic_folder(folder) as temporary:
            try:
                tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
                base, info = AutoModelForCausalLM.from_pretrained(
                    file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
                )
            except Exception as error:  # the reader of GGUF files can raise any exception
                raise WmtpError(
                    f"`{file}` cannot be read as a GGUF model: {reason(error)}",
                    hint="the file is truncated, damaged or of a type that transformers cannot read: "
                    "download it again, or name the model's transformers directory",
                ) from error
            refuse_bad_weights(file, base, info)
            # transformers refuses to save a model with a quantiser, although its weights are float32 by now.
            if hasattr(base.config, "quantization_config"):
                del base.config.quantization_config
            base.hf_quantizer = None
            tokenizer.save_pretrained(temporary)
            base.save_pretrained(temporary)
    return folder
