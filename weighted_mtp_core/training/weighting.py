"""The weighting of a run as stage 2 calls it: errors name the plugin, and the result is checked."""

from __future__ import annotations

from attrs import frozen

from weighted_mtp_core.api import Critic, Signal, StepView, WeightingStrategy, Weights
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.messages import reason
from weighted_mtp_core.training.weight_checks import check_weights


@frozen(kw_only=True, eq=False)
class Weighting:
    """A weighting strategy with the source of its signals.

    Attributes:
        strategy: Called once per step, with the whole global batch.
        needs: The signals that it declares.
        critic: Computes those signals that the core does not.
        label: Address, plugin, distribution and version, for messages.
    """

    strategy: WeightingStrategy
    needs: frozenset[Signal]
    critic: Critic | None
    label: str

    @property
    def scoring_critic(self) -> Critic | None:
        """The critic, if the strategy needs a signal from it."""
        return self.critic if self.needs & {Signal.VALUE, Signal.REFERENCE_LOSS} else None

    def weigh(self, view: StepView) -> Weights:
        """Return the strategy's weights; their type, shape and dtype are checked, their values are not.

        Raises:
            RunFailedError: The strategy failed, or returned no weights; the message names its plugin.
        """
        try:
            weights = self.strategy.weigh(view)
        except WmtpError as error:
            raise RunFailedError(f"{self.label} failed: {error}", hint=error.hint) from error
        except Exception as error:
            raise RunFailedError(f"{self.label} failed: {reason(error)}") from error
        check_weights(weights, view.response_BT, n_future=view.n_future, label=self.label)
        return weights
