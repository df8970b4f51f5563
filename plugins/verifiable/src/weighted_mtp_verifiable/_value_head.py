"""A critic that predicts at every token the probability that the response will be verified as correct.

With the objective `bradley_terry`, the predictions are not probabilities; they only rank the responses to the
same problem.

Shape letters: B batch rows, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from weighted_mtp_core.api import (
    Batch,
    BuildContext,
    Critic,
    CriticLoss,
    Scores,
    WmtpError,
    add_adapters,
    is_correct,
)

from weighted_mtp_verifiable import _objective
from weighted_mtp_verifiable._reductions import mean_of_row_means
from weighted_mtp_verifiable._value_net import ValueNet, ValueNetOutput

if TYPE_CHECKING:
    from weighted_mtp_verifiable import ValueHeadOptions

_OBJECTIVES = {
    "monte_carlo": _objective.monte_carlo,
    "lambda_return": _objective.lambda_return,
    "bradley_terry": _objective.bradley_terry,
}


class ValueHead(Critic):
    """Returns the value `V_t = sigmoid(logit_t)` of each prefix, where `ValueNet` computes logit_t.

    Args:
        options: The options of the component.
        context: Provides seed, sizes and device, and a trunk if the options use one.
    """

    trainable = True
    cacheable = True

    def __init__(self, options: ValueHeadOptions, context: BuildContext) -> None:
        model = context.model
        self._options = options
        self.batching: Literal["pointwise", "pairs"] = (
            "pairs" if options.objective == "bradley_terry" else "pointwise"
        )
        self.reads_policy = options.body == "policy"
        self._frozen_trunk = model.frozen_trunk() if options.body == "frozen" else None
        with torch.random.fork_rng(devices=[]):
            # `torch.manual_seed` would also reseed the global generators of all accelerators.
            torch.default_generator.manual_seed(context.seed)
            self._trunk = _trunk(options, context) if options.body == "trunk" else None
            net = ValueNet(
                options, vocab_size=model.vocab_size, state_size=self._state_size(model.hidden_size)
            )
        self._net = net.to(model.device)
        self.blocks = (*self._net.layers, *_layers(self._trunk))
        self._lam = options.lam

    @torch.no_grad()
    def score(self, batch: Batch, hidden_BTH: Tensor | None) -> Scores:
        """Return the value V_t of the prefix that ends at each token t, float32 `[B, T]`, in [0, 1]."""
        return Scores(value_BT=torch.sigmoid(self._forward(batch, hidden_BTH).logit_BT.float()))

    def begin_step(self, step: int, *, steps: int) -> None:
        """Set the decay λ of the lambda-return to its scheduled value for this step."""
        if self._options.lam_schedule == "linear":
            share = step / max(steps - 1, 1)
            self._lam = (1 - share) * self._options.lam_start + share * self._options.lam

    def loss(self, batch: Batch, hidden_BTH: Tensor | None) -> CriticLoss:
        """Return the loss of the objective plus the weighted language-model loss on correct responses."""
        output = self._forward(batch, hidden_BTH)
        objective = _OBJECTIVES[self._options.objective](output.logit_BT, batch, lam=self._lam)
        correct_BT = batch.response_BT & is_correct(batch.reward_BT)
        lm_loss = mean_of_row_means(output.token_nll_BT, correct_BT)
        return CriticLoss(
            loss=objective + self._options.lm_loss_weight * lm_loss,
            metrics={
                "value_objective": objective.detach(),
                "value_accuracy": _objective.final_accuracy(output.logit_BT.detach(), batch),
                "value_writing_loss": lm_loss.detach(),
            },
        )

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the trained parameters of the network, and of the critic's trunk or its adapters."""
        trunk = () if self._trunk is None else self._trunk.parameters()
        return (each for each in (*self._net.parameters(), *trunk) if each.requires_grad)

    def state_dict(self) -> dict[str, Any]:
        """Return all tensors of the network and, with `body = "trunk"`, all tensors of the critic's trunk."""
        return dict(self._modules.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the tensors.

        Raises:
            WmtpError: The tensors belong to a network of another shape.
        """
        try:
            self._modules.load_state_dict(state)
        except RuntimeError as error:
            raise WmtpError(
                "the state is not that of this `value_head`: " + str(error).splitlines()[-1].strip(),
                hint="use the `[critic.options]` and the base model of the run that wrote it",
            ) from error

    @property
    def _modules(self) -> nn.Module:
        return self._net if self._trunk is None else nn.ModuleDict({"net": self._net, "trunk": self._trunk})

    def _state_size(self, policy_hidden_size: int) -> int | None:
        """Return the size of the states that the network reads; None if it reads token ids."""
        if self._trunk is not None:
            size: int = getattr(self._trunk, "hidden_size")  # noqa: B009 - nn.Module is typed as tensors
            return size
        return None if self._options.body == "own" else policy_hidden_size

    def _forward(self, batch: Batch, hidden_BTH: Tensor | None) -> ValueNetOutput:
        output: ValueNetOutput = self._net(self._inputs(batch, hidden_BTH), batch)
        return output

    def _inputs(self, batch: Batch, hidden_BTH: Tensor | None) -> Tensor:
        """Return the input of the network: token ids `[B, T]` or states of a trunk `[B, T, H]`."""
        if self._frozen_trunk is not None:
            return self._frozen_trunk(batch)
        if self._trunk is not None:
            states_BTH: Tensor = self._trunk(batch)
            return states_BTH
        if not self.reads_policy:
            return batch.ids_BT
        if hidden_BTH is None:
            raise WmtpError('`value_head` with `body = "policy"` needs the policy\'s trunk states')
        return hidden_BTH.detach()


def _trunk(options: ValueHeadOptions, context: BuildContext) -> nn.Module:
    trunk = context.model.trainable_trunk(options.base)
    if options.lora_rank:
        add_adapters(trunk, rank=options.lora_rank)
    return trunk.to(context.model.device)


def _layers(trunk: nn.Module | None) -> Sequence[nn.Module]:
    """Return the layers of the trunk; empty if there is no trunk or it has no list of layers."""
    modules = () if trunk is None else trunk.modules()
    return next((tuple(each) for each in modules if isinstance(each, nn.ModuleList)), ())
