"""A trained policy as a transformers directory: head 1 as an ordinary language model, the other heads beside.

Plain transformers loads the directory without this package and sees head 1. Here the others come back too:
`extra_heads.safetensors` holds heads 2..K as `head_<k>.<name>`, `weighted_mtp.json` says what they are, and
`manifest.json` holds the SHA-256 of every file. `recipe.toml` is the recipe of the run that trained them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import weighted_mtp_core
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.model.policy import HeadKind, Policy, language_model
from weighted_mtp_core.storage.manifest import atomic_folder

FORMAT = 1
"""Raise it when the directory changes so that this release cannot read older ones."""

FACTS, EXTRA_HEADS, RECIPE = "weighted_mtp.json", "extra_heads.safetensors", "recipe.toml"


@frozen(kw_only=True)
class ExportFacts:
    """What `weighted_mtp.json` says of an exported policy.

    Attributes:
        n_future: K.
        head: Kind of heads 2..K.
        run: Id of the run that trained it.
        recipe_sha256: Of the file `recipe.toml`.
        base: Name and version of the model that it was made of.
        data_sha256: Of the data that it was trained on; None if the run did not record it.
    """

    n_future: int
    head: HeadKind
    run: str
    recipe_sha256: str
    base: str
    data_sha256: str | None


def is_export(folder: Path) -> bool:
    """Return whether a folder is an exported policy."""
    return (folder / FACTS).is_file()


def refuse_to_replace(path: Path, *, force: bool) -> None:
    """Refuse to write over what is there; with `force`, over all but an exported policy or an empty folder.

    Raises:
        WmtpError: Something is there that must stay.
    """
    if not path.exists():
        return
    if not force:
        raise WmtpError(f"`{path}` is there already", hint="choose another `--to`, or replace it: --force")
    if not path.is_dir() or not (is_export(path) or not any(path.iterdir())):
        raise WmtpError(
            f"`{path}` is no exported model, so `--force` does not replace it", hint="choose another `--to`"
        )


def write_export(policy: Policy, tokenizer: Any, path: Path, *, facts: ExportFacts, recipe: bytes) -> None:
    """Write the directory, whole or not at all; an exported model that is there is replaced.

    Args:
        policy: Its parameters are written in the dtype that they have.
        tokenizer: Its EOS ends texts in transformers, too.
        path: Where to.
        facts: What is not in the policy.
        recipe: Contents of the run's `recipe.toml`.

    Raises:
        RunFailedError: There is no room, or no permission.
    """
    model = language_model(policy)
    model.generation_config = _generation_config(tokenizer)
    about = {"format": FORMAT, "core": weighted_mtp_core.__version__, **attrs.asdict(facts)}
    try:
        with atomic_folder(path, replace=True) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            save_file(_extra_heads(policy), folder / EXTRA_HEADS)
            (folder / FACTS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            (folder / RECIPE).write_bytes(recipe)
    except (OSError, SafetensorError) as error:
        raise RunFailedError(f"cannot write the exported model `{path}`: {error}") from error


def read_facts(folder: Path) -> ExportFacts:
    """Read `weighted_mtp.json`.

    Raises:
        WmtpError: It cannot be read, or a newer release wrote it.
    """
    path = folder / FACTS
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        core = about["core"]
        if about["format"] > FORMAT:
            raise WmtpError(
                f"`{folder}` was written by weighted-mtp-core {core}, which is newer than this one "
                f"({weighted_mtp_core.__version__})",
                hint=f"pip install 'weighted-mtp-core>={core}'",
            )
        return ExportFacts(**{each.name: about[each.name] for each in attrs.fields(ExportFacts)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WmtpError(f"`{path}` cannot be read: {error!r}", hint="restore it, or export anew") from error


def refuse_other_heads(folder: Path, *, n_future: int, head_kind: HeadKind) -> None:
    """Refuse to make a policy of an exported one that has not all the heads it needs; fewer are no fault.

    Raises:
        WmtpError: The heads are of another kind, or too few.
    """
    facts = read_facts(folder)
    afresh = f"to begin with fresh heads, copy the directory without `{FACTS}` and `manifest.json`"
    if n_future > facts.n_future:
        raise WmtpError(
            f"the exported model `{folder}` has {facts.n_future} heads, `model.n_future` is {n_future}",
            hint=f"set `model.n_future = {facts.n_future}` or less; {afresh}",
        )
    if n_future > 1 and head_kind != facts.head:
        raise WmtpError(
            f"the exported model `{folder}` has `{facts.head}` heads, `model.head` is `{head_kind}`",
            hint=f'set `model.head = "{facts.head}"`; {afresh}',
        )


def restore_heads(policy: Policy, folder: Path) -> None:
    """Give heads 2, 3, ... the weights that an exported policy's have.

    Raises:
        WmtpError: The file's tensors are not those of these heads.
    """
    state = load_file(folder / EXTRA_HEADS)
    for k, head in enumerate(policy.heads, start=1):
        if k == 1:
            continue
        start = f"head_{k}."
        own = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        try:
            head.load_state_dict(own)
        except RuntimeError as error:
            raise WmtpError(
                f"head {k} in `{folder / EXTRA_HEADS}` does not fit its trunk: {str(error).splitlines()[0]}",
                hint="export it anew",
            ) from error


def _extra_heads(policy: Policy) -> dict[str, Tensor]:
    """Return the tensors of heads 2..K."""
    return {
        f"head_{k}.{name}": tensor.detach().cpu().contiguous()
        for k, head in enumerate(policy.heads, start=1)
        if k > 1
        for name, tensor in head.state_dict().items()
    }


def _generation_config(tokenizer: Any) -> Any:
    """Return what makes transformers' `generate` end where ours does, greedy unless told otherwise."""
    from transformers import GenerationConfig

    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=eos if pad is None else pad,
        do_sample=False,
    )
