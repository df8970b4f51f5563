"""Refuses a run that certainly needs more memory than is free, before any weights are loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.memory.available import free_main_memory, free_memory
from weighted_mtp_core.memory.documents import Documents
from weighted_mtp_core.memory.empty_policy import config_of
from weighted_mtp_core.memory.forecast import Forecast, forecast, size
from weighted_mtp_core.memory.longest import longest_documents
from weighted_mtp_core.memory.parts import Target
from weighted_mtp_core.memory.savings import savings
from weighted_mtp_core.model.families import text_config
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.runtime.device import memory_of
from weighted_mtp_core.runtime.distributed import Distributed
from weighted_mtp_core.training.prepare import compute_of

TOLERANCE = 0.15
"""Largest accepted relative difference between a forecast and the measured peak (docs/performance.md)."""

_SHOWN = 3  # maximum number of keys in the hint of a refusal


@frozen(kw_only=True)
class Lack:
    """A shortage of one kind of memory: a run needs more bytes of this memory than are free.

    Attributes:
        where: The device, or `main memory`.
        needed: Bytes that the run needs, according to the forecast.
        free: Bytes that are free.
    """

    where: str
    needed: int
    free: int

    @property
    def is_certain(self) -> bool:
        """Whether the run does not fit even if it needs less than the forecast by the share `TOLERANCE`."""
        return self.needed * (1 - TOLERANCE) > self.free


def lacks(found: Forecast, *, device: int | None, host: int | None) -> list[Lack]:
    """Return each kind of memory that a forecast exceeds; free memory is in bytes, None if it is unknown."""
    kind = found.target.device
    pairs = [("main memory", found.host_peak, host)]
    if kind != "cpu":
        pairs = [(f"`{kind}`", found.peak, device), *pairs]
    return [
        Lack(where=where, needed=needed, free=free)
        for where, needed, free in pairs
        if free is not None and needed > free
    ]


def find_target(
    plan: Plan, *, processes: int, device_memory: int | None = None
) -> tuple[Target, int | None, int | None]:
    """Return the target of a run, and the free bytes of device and main memory; None for unknown bytes.

    Args:
        plan: The plan.
        processes: Number of processes that train together.
        device_memory: Memory in bytes of a GPU on another machine, whose main memory is then unknown; or, if
            the recipe's device is `cpu`, the main memory of the other machine. None stands for this machine
            and its free memory.

    Raises:
        WmtpError: This machine does not have the recipe's device, or the device does not support the recipe's
            dtype.
    """
    table = plan.recipe.model
    local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if device_memory is not None and table.device != "cpu":
        dtype = torch.float32 if table.dtype == "float32" else torch.bfloat16
        target = Target(device="cuda", dtype=dtype, memory=device_memory, processes=processes, local=local)
        return target, device_memory, None
    compute = compute_of(table)
    target = Target(
        device=compute.device.type,
        dtype=compute.dtype,
        memory=memory_of(compute.device),
        processes=processes,
        local=local,
    )
    free = free_main_memory() if device_memory is None else device_memory
    return target, free_memory(compute.device), free


def refuse_too_large(plan: Plan, distributed: Distributed) -> str | None:
    """Refuse a run that cannot fit into the free memory; return a warning if the run might not fit.

    A warning is also returned if the forecast fits, but leaves out a part of the run. None is returned if the
    whole run fits, or if an error prevents the forecast. A model that is small compared with the free memory
    is accepted at once. The recipe's `run.over_memory = "warn"` replaces the refusal with a warning.

    Raises:
        WmtpError: The run needs more than the free memory, even if the forecast is too high by its tolerance;
            or this machine does not have the recipe's device, or the device does not support the dtype.
    """
    target, device, host = find_target(plan, processes=distributed.size)
    try:
        config = config_of(plan.recipe.model, storage=Path(plan.recipe.run.storage))
        free = (device, None if host is None else host // target.local, 1 << 62)
        if _is_small(config, plan, least=min(each for each in free if each is not None)):
            return None
        documents = longest_documents(plan, tokenise=True)
        found = forecast(plan, documents, target)
    except WmtpError:  # the run itself reports this error, together with other errors
        return None
    missing = lacks(found, device=device, host=host)
    if not missing and found.uncounted:
        return f"WARNING: the forecast of the run's memory does not count {'; '.join(found.uncounted)}"
    if not missing:
        return None
    worst = max(missing, key=lambda each: each.needed / max(each.free, 1))
    rows, tokens = found.rows
    text = (
        f"the run needs {size(worst.needed)} of {worst.where} for {rows} x {tokens} tokens at a time, and "
        f"{size(worst.free)} are free"
    )
    if plan.recipe.run.over_memory == "warn" or not any(each.is_certain for each in missing):
        return f"WARNING: {text}, according to `check --memory`"
    raise WmtpError(text, hint=_hint(plan, documents, found))


def _hint(plan: Plan, documents: Documents, found: Forecast) -> str:
    keys = [f"`{each.change}` saves {size(each.saved)}" for each in savings(plan, documents, found)[:_SHOWN]]
    go_on = '`run.over_memory = "warn"` starts the run nevertheless'
    return "; ".join([*keys, "`check RECIPE --memory` shows what takes memory", go_on])


def _is_small(config: Any, plan: Plan, *, least: int) -> bool:
    """Return whether a run certainly fits: an estimate of several times its real need is below `least`."""
    recipe, text = plan.recipe, text_config(config)
    experts = any("expert" in name and not name.startswith("_") for name in vars(text))
    other_model = plan.critic is not None and getattr(plan.critic.options, "base", None) is not None
    if experts or other_model or not hasattr(text, "hidden_size"):
        return False
    width, layers = int(text.hidden_size), int(text.num_hidden_layers) + recipe.model.n_future
    given = getattr(text, "intermediate_size", None) or 4 * width
    inner = int(max(given) if isinstance(given, list) else given)  # some families have a width for each layer
    parameters = layers * (8 * width * width + 4 * width * inner) + 4 * int(text.vocab_size) * width
    rows = max(recipe.train.batch_size, recipe.evaluate.batch_size)
    tokens = recipe.data.max_tokens + recipe.evaluate.max_new_tokens
    if recipe.data.packing == "documents":
        tokens = max(tokens, recipe.data.pack_tokens)
    heads = int(getattr(text, "num_attention_heads", 1))
    activations = rows * tokens * layers * (100 * width + 20 * inner + 2 * heads * tokens) * 4
    return (2 if plan.critic else 1) * (40 * parameters + activations) < least
