"""Read an exported model: an ordinary transformers model with head 1, and a folder with heads 2..K.

`export.transformers` writes exported models. In an exported model, `weighted_mtp.json` describes the heads
and their origin, `heads/model.safetensors` contains the tensors of heads 2..K, if there are any, with the
names `head_<k>.<name>`, and `recipe.toml` is the recipe of the training run. Heads 2..K have their own folder
because servers read every `*.safetensors` file of the top folder and refuse tensors that the model does not
have. Heads that were made from MTP layers of the base model (`init = "base"`) are not in this folder but in
the files of the model, under the names of the MTP layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import attrs
from attrs import frozen
from safetensors.torch import load_file

import weighted_mtp_core
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.recipe.schema import HeadKind, HeadsTable, MtpServer
from weighted_mtp_core.runtime.sharding import all_like
from weighted_mtp_core.storage.manifest import MANIFEST

FORMAT = 3
"""Format number of exported models; increase it when the code can no longer read the previous format."""

FACTS, EXTRA_HEADS, RECIPE = "weighted_mtp.json", "heads/model.safetensors", "recipe.toml"
ADAPTER_CONFIG = "adapter_config.json"


@frozen(kw_only=True)
class ExportFacts:
    """The contents of `weighted_mtp.json`, except the versions of the format and of core.

    Attributes:
        n_future: K, the number of heads.
        heads: Kind of heads 2..K.
        run: Id of the run that trained the policy.
        recipe_sha256: SHA-256 of `recipe.toml`.
        base: The base model, see `LoadedPolicy.base_name`.
        data_sha256: SHA-256 of the training data; None if the run did not record it.
        shared: Whether `sequential` heads share one module.
        serve: The recipe's `model.heads.serve`: the server for which new `sequential` heads were trained.
            Heads that were trained for another server compute other states.
        init: `"base"` if `sequential` heads are the base model's MTP layers, which are stored under the base
            model's names; otherwise `"new"`.
    """

    n_future: int
    heads: HeadKind
    run: str
    recipe_sha256: str
    base: str
    data_sha256: str | None
    shared: bool = False
    serve: MtpServer = "transformers"
    init: Literal["new", "base"] = "new"


def is_exported_model(folder: Path) -> bool:
    """Return whether a folder contains an exported model."""
    return (folder / FACTS).is_file()


def is_exported_adapter(folder: Path) -> bool:
    """Return whether a folder contains the config, recipe and manifest that `export --adapter` writes."""
    return all((folder / name).is_file() for name in (ADAPTER_CONFIG, RECIPE, MANIFEST))


def read_facts(folder: Path) -> ExportFacts:
    """Read `weighted_mtp.json`.

    Raises:
        WmtpError: `weighted_mtp.json` cannot be read, or a newer or older release wrote it in another format.
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
        if about["format"] < FORMAT:
            raise WmtpError(
                f"`{folder}` was written by weighted-mtp-core {core} in format {about['format']}, "
                f"this release ({weighted_mtp_core.__version__}) reads format {FORMAT}",
                hint="export the run anew",
            )
        return ExportFacts(**{each.name: about[each.name] for each in attrs.fields(ExportFacts)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WmtpError(f"`{path}` cannot be read: {error!r}", hint="restore it, or export anew") from error


def refuse_other_heads(folder: Path, *, n_future: int, heads: HeadsTable) -> None:
    """Refuse an exported model with heads that do not fit the recipe, unless the model has only head 1.

    The exported model may have more heads than the recipe.

    Raises:
        WmtpError: The exported model has fewer heads than the recipe, heads of another kind, or heads with
            other options; or its `weighted_mtp.json` cannot be used, see `read_facts`.
    """
    facts = read_facts(folder)
    if facts.n_future == 1:
        return  # the policy gets new heads 2..K
    afresh = f"to begin with fresh heads, copy the directory without `{FACTS}` and `manifest.json`"
    if n_future > facts.n_future:
        raise WmtpError(
            f"the exported model `{folder}` has {facts.n_future} heads, `model.n_future` is {n_future}",
            hint=f"set `model.n_future = {facts.n_future}` or less; {afresh}",
        )
    if n_future > 1 and heads.kind != facts.heads:
        raise WmtpError(
            f"the exported model `{folder}` has `{facts.heads}` heads, `model.heads.kind` is `{heads.kind}`",
            hint=f'set `model.heads.kind = "{facts.heads}"`; {afresh}',
        )
    for key, its, own in (
        ("init", facts.init, heads.init),
        ("shared", facts.shared, heads.shared),
        ("serve", facts.serve, heads.serve),
    ):
        if n_future > 1 and its != own:
            its_value, own_value = json.dumps(its), json.dumps(own)
            raise WmtpError(
                f"the exported model `{folder}` has heads with `{key} = {its_value}`, "
                f"`model.heads.{key}` is `{own_value}`",
                hint=f"set `model.heads.{key} = {its_value}`; {afresh}",
            )


def load_extra_heads(policy: Policy, folder: Path) -> None:
    """Load the weights of heads 2..K from an exported model.

    If the policy or the exported model has only head 1, the function does nothing.

    Raises:
        WmtpError: The tensors in `heads/model.safetensors` do not fit the heads of the policy, or
            `weighted_mtp.json` cannot be used, see `read_facts`.
    """
    if policy.n_future == 1 or read_facts(folder).n_future == 1:
        return
    state = load_file(folder / EXTRA_HEADS)
    for k, head in enumerate(policy.heads[1:], start=2):
        start = f"head_{k}."
        own = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        try:
            head.load_state_dict(all_like(head.state_dict(), own))
        except RuntimeError as error:
            raise WmtpError(
                f"head {k} in `{folder / EXTRA_HEADS}` does not fit its trunk: {str(error).splitlines()[0]}",
                hint="export it anew",
            ) from error
