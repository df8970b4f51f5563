"""Checks in stage 0 that the data contain what the recipe's weighting, critic and evaluation need."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weighted_mtp_core.api import DataSource, Signal, Split, is_correct
from weighted_mtp_core.api.tensors import VALUES
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plan import Plan


def check_given_weights(plan: Plan, tokens: TokenSet, *, log: Callable[[str], None]) -> None:
    """Refuse a weighting that reads weights from the data if the training examples have no weights.

    If the weighting reads weights from the data, negative weights are refused, too, unless the recipe allows
    them. If the data contain weights but the weighting does not read them, a message is logged.

    Raises:
        WmtpError: The weighting reads weights from the data, but no training example has a weight, or a
            training example has a negative weight although the recipe does not allow negative weights.
    """
    reads = Signal.GIVEN in plan.weighting.needs
    if reads and tokens.given_N is None:
        raise WmtpError(
            f"weighting `{plan.weighting.address}` needs weights that come with the data, but no training "
            f"example of `{plan.data.address}` has any",
            hint="a row of `core.jsonl` gives them as `weight`, or for spans of characters as `weights`",
        )
    if reads and not plan.recipe.loss.negative_weights and tokens.given_N is not None:
        below = np.flatnonzero(tokens.given_N < 0)
        if len(below):
            document = int(np.searchsorted(tokens.start_D1, below[0], side="right")) - 1
            raise WmtpError(
                f"example `{tokens.example_ids[document]}` of `{plan.data.address}` has negative weights, "
                "which the recipe does not allow",
                hint="`loss.negative_weights = true` allows them, if the weighting declares them",
            )
    if not reads and tokens.given_N is not None:
        log(f"the data give weights, which weighting `{plan.weighting.address}` does not read")


def check_second_temperature(plan: Plan, source: DataSource) -> None:
    """Refuse a second temperature for pass@k if the data source has no test problems.

    Raises:
        WmtpError: The recipe sets `evaluate.second_temperature`, but the source has no test problems.
    """
    if plan.recipe.evaluate.second_temperature is not None and not source.problems("test"):
        raise WmtpError(
            f"`evaluate.second_temperature` needs problems, but data source `{plan.data.address}` has no "
            "problems in the split `test`",
            hint="delete the key, or use a data source that judges completions",
        )


def check_verdicts(plan: Plan, tokens: TokenSet, *, split: Split) -> None:
    """Refuse a critic that provides values if all responses of a split are correct or all are incorrect.

    Raises:
        WmtpError: The critic provides values, all responses of the split are correct or all are incorrect,
            and the recipe does not allow an uninformative critic.
    """
    table, critic = plan.recipe.critic, plan.critic
    if table is None or critic is None or table.allow_uninformative_critic:
        return
    correct = np.unique(is_correct(np.asarray(tokens.reward_D)))
    if critic.component.provides & {*VALUES} and len(correct) == 1:
        kind = "correct" if correct[0] else "incorrect"
        raise WmtpError(
            f"critic `{critic.address}` learns from correct and incorrect responses, but all {len(tokens)} "
            f"responses of the split `{split}` are {kind}",
            hint="a response without a verdict counts as correct; choose data with verdicts, or a weighting "
            "without a critic",
        )
