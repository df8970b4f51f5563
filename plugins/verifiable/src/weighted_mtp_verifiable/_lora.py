"""Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) for a trunk, with `peft`."""

from __future__ import annotations

from torch import nn
from weighted_mtp_core.api import WmtpError


def add_lora(trunk: nn.Module, *, rank: int) -> None:
    """Add an adapter to each linear layer of a trunk and freeze all other parameters.

    An adapter adds `2 * B A x`, where A has `rank` rows. B starts at 0, so the trunk's outputs do not change.

    Raises:
        WmtpError: `peft` is not installed, or the trunk has no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise WmtpError(
            f"`lora_rank = {rank}` needs the package `{error.name}`, which is not installed",
            hint="pip install 'weighted-mtp-verifiable[lora]'",
        ) from error
    linear = [name for name, module in trunk.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise WmtpError("the trunk has no linear layers to adapt", hint="`lora_rank = 0` trains all of it")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear)
    inject_adapter_in_model(config, trunk)
    for name, parameter in trunk.named_parameters():
        parameter.requires_grad_("lora_" in name)
