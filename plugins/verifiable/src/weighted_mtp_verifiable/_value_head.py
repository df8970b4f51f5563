"""A critic that predicts at every token whether the response will be verified as right.

The values of the prefixes are what `verifiable.td_error` turns into advantages.

Shape letters: B batch rows, T positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from weighted_mtp_core.api import Batch, BuildContext, Critic, CriticLoss, Scores, WmtpError

from weighted_mtp_verifiable import _objective
from weighted_mtp_verifiable._value_net import Judgement, ValueNet

if TYPE_CHECKING:
    from weighted_mtp_verifiable import ValueHeadOptions

_OBJECTIVES = {
    "monte_carlo": _objective.monte_carlo,
    "lambda_return": _objective.lambda_return,
    "bradley_terry": _objective.bradley_terry,
}


class ValueHead(Critic):
    """Values `V_t = sigmoid(logit_t)` from a `ValueNet` on token ids, on an own trunk or on detached states.

    Args:
        options: See `ValueHeadOptions`.
        context: Seed, sizes, device, and the frozen trunk if the options ask for it.
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
            # Not torch.manual_seed: it would reseed every accelerator's global generator as well.
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
        """Return V_t, float32, in (0, 1)."""
        return Scores(value_BT=torch.sigmoid(self._judge(batch, hidden_BTH).logit_BT.float()))

    def begin_step(self, step: int, *, steps: int) -> None:
        """Move lambda along its schedule."""
        if self._options.lam_schedule == "linear":
            share = step / max(steps - 1, 1)
            self._lam = (1 - share) * self._options.lam_start + share * self._options.lam

    def loss(self, batch: Batch, hidden_BTH: Tensor | None) -> CriticLoss:
        """Return the objective's loss, plus that of writing correct responses."""
        judgement = self._judge(batch, hidden_BTH)
        objective = _OBJECTIVES[self._options.objective](judgement.logit_BT, batch, lam=self._lam)
        correct_BT = batch.response_BT & (batch.reward_BT >= _objective.CORRECT)
        writing = _objective.row_mean(judgement.surprise_BT, correct_BT)
        return CriticLoss(
            loss=objective + self._options.writing * writing,
            metrics={
                "value_objective": objective.detach(),
                "value_accuracy": _objective.final_accuracy(judgement.logit_BT.detach(), batch),
                "value_writing_loss": writing.detach(),
            },
        )

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return those of the network and of its own trunk; of one with adapters, theirs alone."""
        trunk = () if self._trunk is None else self._trunk.parameters()
        return (each for each in (*self._net.parameters(), *trunk) if each.requires_grad)

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors of the network and of its own trunk, of what adapters leave alone too."""
        return dict(self._modules.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them.

        Raises:
            WmtpError: They are those of a network of another shape.
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

    def _state_size(self, policys: int) -> int | None:
        """Return the width of the states that the network reads; None for token ids."""
        if self._trunk is not None:
            size: int = getattr(self._trunk, "hidden_size")  # noqa: B009 - nn.Module's type knows only tensors
            return size
        return None if self._options.body == "own" else policys

    def _judge(self, batch: Batch, hidden_BTH: Tensor | None) -> Judgement:
        judgement: Judgement = self._net(self._source(batch, hidden_BTH), batch)
        return judgement

    def _source(self, batch: Batch, hidden_BTH: Tensor | None) -> Tensor:
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
        from weighted_mtp_verifiable._lora import add_lora

        add_lora(trunk, rank=options.lora_rank)
    return trunk.to(context.model.device)


def _layers(trunk: nn.Module | None) -> Sequence[nn.Module]:
    """Return the trunk's stack of layers; none where it has no such list."""
    modules = () if trunk is None else trunk.modules()
    return next((tuple(each) for each in modules if isinstance(each, nn.ModuleList)), ())
