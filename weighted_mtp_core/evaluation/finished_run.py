"""Reopens a finished run or an exported model (recipe, data and best policy), and exports a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from attrs import frozen

from weighted_mtp_core.checkpointing.best_model import load_model
from weighted_mtp_core.data.texts import TextCodec, make_codec
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.export.adapter import refuse_without_adapter, write_adapter
from weighted_mtp_core.export.serving import Server, refuse_unserved, serving_command
from weighted_mtp_core.export.transformers import cast_parameters, write_export
from weighted_mtp_core.model.adapters import merge_adapters
from weighted_mtp_core.model.exported_model import RECIPE, ExportFacts, is_exported_model, read_facts
from weighted_mtp_core.model.load import load_policy
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.plan import Plan, make_plan
from weighted_mtp_core.recipe.load import load_recipe
from weighted_mtp_core.recipe.schema import Recipe
from weighted_mtp_core.runtime.device import Compute
from weighted_mtp_core.storage.manifest import MANIFEST, sha256_of
from weighted_mtp_core.tracking.run_folder import RunFolder, find_run, read_run
from weighted_mtp_core.training.prepare import Prepared, compute_of, prepare


def find_finished(runs: Path, text: str) -> Path:
    """Return the folder of an exported model or of a run.

    Raises:
        WmtpError: `text` does not name an exported model, and no run or more than one run matches it.
    """
    path = Path(text)
    return path.absolute() if is_exported_model(path) else find_run(runs, text)


def plan_of(folder: Path, *, overrides: Sequence[str] = ()) -> Plan:
    """Return the plan of a run or of an exported model, from its resolved recipe.

    Args:
        folder: The run folder, or the exported model.
        overrides: Changes `key=value` to the recipe, checked like the values of `--set`.

    Raises:
        WmtpError: The run has no checkpoint of its best policy, or `make_plan` refuses the recipe or an
            override.
    """
    if is_exported_model(folder):
        return make_plan(folder / RECIPE, overrides=[*_export_overrides(folder), *overrides])
    checkpoint = _checkpoint(folder)
    if not checkpoint.is_file():
        raise WmtpError(
            f"the run `{folder}` has no `{checkpoint.relative_to(folder)}`",
            hint="stage 2 ended before a validation, or only a tracker has the file: copy it from there",
        )
    return make_plan(RunFolder(path=folder).recipe, overrides=overrides)


def prepare_finished(folder: Path, plan: Plan, *, log: Callable[[str], None]) -> Prepared:
    """Load the data of a run or of an exported model, and its best policy.

    Raises:
        WmtpError: The data differ from the data of the run, the file of the policy is damaged, or the data,
            the base model or the device is missing or invalid.
    """
    exported = is_exported_model(folder)
    prepared = prepare(plan, log=log)
    was = read_facts(folder).data_sha256 if exported else read_run(folder).get("data.sha256")
    now = prepared.source.version().sha256
    if was is not None and was != now:
        raise WmtpError(
            f"the data of {'the model' if exported else 'the run'} `{folder}` had the SHA-256 {was[:12]}..., "
            f"now they have {now[:12]}...",
            hint="restore the training data; the policy may have been trained on test examples of other data",
        )
    if not exported:
        load_model(prepared.policy, _checkpoint(folder))
    return prepared


@frozen(kw_only=True, eq=False)
class PolicyLoader:
    """A policy that has not been loaded yet, for generating text.

    Attributes:
        recipe: The recipe of the policy.
        load: Loads the policy and its text codec; the argument is a function that shows messages to the user.
    """

    recipe: Recipe
    load: Callable[[Callable[[str], None]], tuple[Policy, TextCodec]]

    @property
    def compute(self) -> Compute:
        """The device and the precision with which the policy computes."""
        return compute_of(self.recipe.model)


def policy_loader(folder: Path, *, overrides: Sequence[str]) -> PolicyLoader:
    """Return a loader for the policy of a run or of an exported model.

    Unlike the policy of a run, an exported model is loaded without data and plugins.

    Raises:
        WmtpError: The run has no checkpoint of its best policy, or the recipe or an override is invalid.
    """
    if is_exported_model(folder):
        recipe = load_recipe(folder / RECIPE, overrides=[*_export_overrides(folder), *overrides])
        return PolicyLoader(recipe=recipe, load=partial(_load_export, folder, recipe))
    plan = plan_of(folder, overrides=overrides)

    def load(log: Callable[[str], None]) -> tuple[Policy, TextCodec]:
        prepared = prepare_finished(folder, plan, log=log)
        return prepared.policy, prepared.codec

    return PolicyLoader(recipe=plan.recipe, load=load)


def policy_sha256(folder: Path) -> str:
    """Return the SHA-256 of a run's policy file, or of the manifest of all files of an exported model."""
    return sha256_of(folder / MANIFEST if is_exported_model(folder) else _checkpoint(folder))


def export_run(
    run: Path,
    to: Path,
    *,
    dtype: torch.dtype,
    serve: Server | None,
    adapter: bool = False,
    log: Callable[[str], None],
) -> str | None:
    """Write the best policy of a run as a transformers directory, or only its adapter in the format of peft.

    If the directory `to` exists, it is replaced.

    Args:
        run: The run folder.
        to: The directory.
        dtype: The dtype of the parameters in the files.
        serve: The server that will draft with heads 2..K; None if no server needs these heads.
        adapter: Whether to write only the adapter of the base model instead, in the format of peft.
        log: Receives messages for the user.

    Returns:
        The command that serves the exported model with the server `serve`; None if `serve` is None or if
            only the adapter is written.

    Raises:
        WmtpError: The run has no policy or no adapter, its data or base model is missing, the server does
            not support its heads, or transformers, peft or the server would load the files as another model.
        RunFailedError: The directory cannot be written.
    """
    plan = plan_of(run, overrides=['model.device="cpu"'])
    model = plan.recipe.model
    if adapter:  # before anything is loaded
        refuse_without_adapter(model)
    if serve is not None:
        refuse_unserved(serve, heads=model.heads, n_future=model.n_future)
    prepared = prepare_finished(run, plan, log=log)
    recipe = RunFolder(path=run).recipe
    if adapter:
        write_adapter(prepared.policy, to, dtype=dtype, recipe=recipe.read_bytes())
        return None
    merge_adapters(prepared.policy)
    cast_parameters(prepared.policy, dtype)
    facts = ExportFacts(
        n_future=prepared.policy.n_future,
        heads=model.heads.kind,
        init=model.heads.init,
        shared=model.heads.shared,
        serve=model.heads.serve,
        run=run.name,
        recipe_sha256=sha256_of(recipe),
        base=prepared.base_name,
        data_sha256=read_run(run).get("data.sha256"),
    )
    write_export(
        prepared.policy, prepared.codec.tokenizer, to, facts=facts, recipe=recipe.read_bytes(), serve=serve
    )
    if serve is None:
        return None
    return serving_command(to, server=serve, kind=model.heads.kind, dtype=dtype, n_future=model.n_future)


def _load_export(folder: Path, recipe: Recipe, log: Callable[[str], None]) -> tuple[Policy, TextCodec]:
    compute = compute_of(recipe.model)
    compute.apply()
    loaded = load_policy(recipe.model, storage=Path(recipe.run.storage), texts=tuple, seed=recipe.run.seed)
    log(f"policy {folder.name}: {loaded.policy.n_future} heads on {compute.device}")
    return loaded.policy.to(compute.device), make_codec(loaded.tokenizer, recipe.data)


def _export_overrides(folder: Path) -> list[str]:
    """Return the overrides with which a run's recipe loads the exported model on this machine."""
    base = f"model.base={json.dumps(str(folder), ensure_ascii=False)}"
    return [base, 'model.device="auto"', 'model.train="all"', 'model.base_dtype="float32"']


def _checkpoint(run: Path) -> Path:
    return RunFolder(path=run).checkpoints / "best_model.pt"
