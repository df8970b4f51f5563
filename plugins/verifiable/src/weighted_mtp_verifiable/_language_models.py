"""A critic made of two language models: one of correct responses, and one of all responses.

Let V_t be the probability of success after token t, and x_t this token. By Bayes' rule,

    V_t / V_{t-1} = p(x_t | prefix, success) / p(x_t | prefix).

The model p_right, trained on correct responses, estimates the numerator; the model p_all, trained on all
responses, estimates the denominator. Let V_0 be the value of the prompt. Then log(V_t / V_0) is the sum of
log p_right(x_s | prefix) - log p_all(x_s | prefix) over the response tokens s <= t. The ratio p_right / p_all
is also the contrastive estimate of Lin et al. 2024 (https://arxiv.org/abs/2411.19943) and the implicit reward
of Yuan et al. 2024 (https://arxiv.org/abs/2412.01981).

Shape letters: B batch rows, T positions, H hidden, R selected rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import fields, frozen
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

from weighted_mtp_verifiable._reductions import document_cumsum

if TYPE_CHECKING:
    from weighted_mtp_verifiable import LanguageModelsOptions

Losses = Callable[[Batch], Tensor]

_TOKENS = 32
"""Divisor of the summed loss of a response, so that the gradient is about as large as for a mean over tokens.

The divisor is a constant because division by the actual number of tokens would give tokens of short responses
more weight than tokens of long responses.
"""


@frozen(kw_only=True, eq=False)
class _Pair:
    """The two models of a fold, as functions that map a batch to next-token losses `[B, T]` in nats."""

    right: Losses
    everything: Losses

    def log_ratio(self, batch: Batch) -> Tensor:
        """Return log p_right - log p_all of the response tokens, `[B, T]`; 0 for other tokens."""
        return self.everything(batch) - self.right(batch)


class LanguageModels(Critic):
    """Computes values from the ratio of the probabilities that two language models assign to a response.

    Args:
        options: The options of the component.
        context: Provides copies of the policy, or loads the finished models.
    """

    reads_policy = False
    cacheable = True

    def __init__(self, options: LanguageModelsOptions, context: BuildContext) -> None:
        model = context.model
        self._models = nn.ModuleList()
        self.trainable = options.right_model is None
        self._pairs: Sequence[_Pair]
        if options.right_model is not None and options.all_model is not None:
            right, everything = Path(options.right_model), Path(options.all_model)
            self._pairs = [
                _Pair(right=model.frozen_losses(right), everything=model.frozen_losses(everything))
            ]
            return
        with torch.random.fork_rng(devices=[]):  # adapters use the global generator
            torch.default_generator.manual_seed(context.seed)
            for _ in range(2 * options.folds):
                self._models.append(model.trainable_losses())
                if options.lora_rank:
                    add_adapters(self._models[-1], rank=options.lora_rank)
                    _share_frozen(self._models[-1], of=self._models[0])
        self._pairs = [
            _Pair(right=right, everything=everything)
            for right, everything in zip(self._models[::2], self._models[1::2], strict=True)
        ]

    @torch.no_grad()
    def score(self, batch: Batch, hidden_BTH: Tensor | None) -> Scores:
        """Return log(V_t / V_0) for each token t, float32 `[B, T]`; 0 on the prompt.

        Here V_t is the probability of success after token t, and V_0 the probability after the prompt.
        """
        del hidden_BTH
        ratio_BT = self._pairs[0].log_ratio(batch)
        for fold, pair in enumerate(self._pairs[1:], start=1):
            ratio_BT = pair.log_ratio(batch).where(self._fold(batch) == fold, ratio_BT)
        # MPS does not support float64. Neighbouring float32 numbers near 4,000 (nats) differ by 2.4e-4.
        exact_BT = ratio_BT if ratio_BT.device.type == "mps" else ratio_BT.double()
        return Scores(log_value_BT=document_cumsum(exact_BT, batch.document_BT).float())

    def loss(self, batch: Batch, hidden_BTH: Tensor | None) -> CriticLoss:
        """Return the sum of the losses of all models; all tokens have the same weight.

        The metrics are the two parts of this sum: the losses of the models of correct responses, and of the
        models of all responses. Loss and metrics are not means over tokens. So if a batch is split into
        parts, the means of the parts' results, weighted by rows, are the results of the batch.
        """
        del hidden_BTH
        right_BT = batch.response_BT & is_correct(batch.reward_BT)
        sums = {
            name: torch.zeros((), device=batch.ids_BT.device)
            for name in ("language_model_loss_right", "language_model_loss_all")
        }
        for fold, pair in enumerate(self._pairs):
            sees_BT = batch.response_BT if len(self._pairs) == 1 else self._fold(batch) != fold
            for name, model, learns_BT in zip(
                sums, (pair.right, pair.everything), (right_BT, batch.response_BT), strict=True
            ):
                part, mask_BT = _rows_with(batch, learns_BT & sees_BT)
                sums[name] = sums[name] + model(part).where(mask_BT, 0.0).sum()
        losses = {name: total / (_TOKENS * len(batch.ids_BT)) for name, total in sums.items()}
        return CriticLoss(
            loss=torch.stack(list(losses.values())).sum(),
            metrics={name: loss.detach() for name, loss in losses.items()},
        )

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the trained parameters of all models; none if the models are finished ones."""
        return (each for each in self._models.parameters() if each.requires_grad)

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors of the models, each shared tensor once; empty if stage 1 trains no models."""
        kept = self._models.state_dict(keep_vars=True)
        names = {id(tensor): name for name, tensor in reversed(kept.items())}
        return {name: kept[name] for name in reversed(names.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the tensors.

        Raises:
            WmtpError: The tensors belong to other models or to another number of folds.
        """
        own = self.state_dict()
        shapes = {name: getattr(each, "shape", None) for name, each in state.items()}
        if shapes != {name: each.shape for name, each in own.items()}:
            raise WmtpError(
                "the state is not that of these `language_models`",
                hint="use the `[critic.options]` and the `[model]` table of the run that wrote it",
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def _fold(self, batch: Batch) -> Tensor:
        """Return for each token the number of the fold to which its problem belongs, int64 `[B, T]`."""
        if batch.problem_BT is None:
            raise WmtpError("`folds` needs batches that contain the hash of each problem's id")
        return batch.problem_BT.remainder(len(self._pairs))


def _share_frozen(model: nn.Module, *, of: nn.Module) -> None:
    """Replace the frozen parameters of `model` with the equal parameters of `of`, to save memory."""
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.requires_grad:
            path, _, last = name.rpartition(".")
            model.get_submodule(path).register_parameter(last, of.get_parameter(name))


def _rows_with(batch: Batch, mask_BT: Tensor) -> tuple[Batch, Tensor]:
    """Return the rows of the batch that have a token in the mask, and the mask of these rows, `[R, T]`.

    If no row has a token in the mask, the first row is returned, so that all parameters get a gradient, which
    is then 0.
    """
    row_R = mask_BT.any(dim=1).nonzero().flatten()
    if len(row_R) == len(mask_BT):
        return batch, mask_BT
    if not len(row_R):
        row_R = row_R.new_zeros(1)
    tensors: dict[str, Any] = {
        each.name: value[row_R]
        for each in fields(Batch)
        if isinstance(value := getattr(batch, each.name), Tensor)
    }
    return Batch(**tensors), mask_BT[row_R]
