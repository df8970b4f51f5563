"""Weights from verifiable rewards, with or without a critic that learns which tokens make a response correct.

The critics are `verifiable.value_head` and `verifiable.language_models`. The weightings
`verifiable.td_error` and `verifiable.success_ratio` need a critic; the weighting `verifiable.group_advantage`
does not. This module only declares the components; the build functions import the algorithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from attrs import Attribute, field, frozen
from attrs import validators as v
from weighted_mtp_core.api import (
    BuildContext,
    Component,
    Critic,
    Signal,
    WeightingStrategy,
    hookimpl,
)


def _refuse_unused(attribute: Attribute[Any], value: object, *, key: str, choice: str) -> None:
    """Refuse a value that is not the default and has no effect, because the option `key` is `choice`."""
    if value != attribute.default:
        raise ValueError(f'has no effect with `{key} = "{choice}"`; leave it out: {value}')


def _check_range(_: object, __: object, value: tuple[float, float]) -> None:
    low, high = value
    if not 0 <= low <= high or high == 0:
        raise ValueError(f"must be [low, high] with 0 <= low <= high and high > 0: {list(value)}")


@frozen(kw_only=True)
class TdErrorOptions:
    """`[weighting.options]` of `verifiable.td_error`.

    Attributes:
        estimator: `"gae"` uses generalised advantage estimation (GAE), a sum of TD errors. `"td"` uses the TD
            error of the token alone, as `"gae"` does with `lam = 0`.
        gamma: Discount per token.
        lam: Decay λ of GAE. With 0, the advantage compares the critic's values after and before the token
            (for the last token, the reward and the value before it); with 1, it compares the reward and the
            value before the token. In a response of about 1 / (1 - gamma * lam) tokens or fewer, the
            advantage of every token contains a large share of the reward, which is the same for all tokens of
            the response. Weights then differ more between responses than between the tokens of a response.
        beta: Temperature; a smaller temperature spreads the weights further apart.
        clip: Limits [low, high] to which the weight exp(A / beta) is clipped; A is the advantage after the
            options `whiten` and `sign` are applied.
        whiten: How advantages are whitened to mean 0 and standard deviation 1: `"batch"` uses the statistics
            of the batch, `"ema"` uses moving statistics, and `"none"` does not whiten.
        ema_decay: Weight of the old moving statistics in each training step, for `whiten = "ema"`.
        sign: `"advantage"` uses the advantage A as it is after the option `whiten`. `"reward"` uses max(A, 0)
            in a correct response, so that the weights of its tokens are at least 1 before clipping, and
            min(A, 0) in an incorrect response, so that the weights of its tokens are at most 1 before
            clipping.
        positives_only: Whether incorrect responses get weight 0; the statistics of whitening still include
            these responses.
        per_response: Whether the clipped weights of each response are scaled to mean 1, so that weights
            differ only between the tokens of a response, not between responses. A response whose weights are
            all 0 is not scaled.
    """

    estimator: Literal["gae", "td"] = "gae"
    gamma: float = field(default=1.0, validator=[v.gt(0), v.le(1)])
    lam: float = field(default=0.95, validator=[v.ge(0), v.le(1)])
    beta: float = field(default=1.0, validator=v.gt(0))
    clip: tuple[float, float] = field(default=(0.1, 3.0), validator=_check_range)
    whiten: Literal["batch", "ema", "none"] = "batch"
    ema_decay: float = field(default=0.99, validator=[v.ge(0), v.lt(1)])
    sign: Literal["advantage", "reward"] = "advantage"
    positives_only: bool = False
    per_response: bool = False

    @lam.validator
    def _check_lam(self, attribute: Attribute[float], value: float) -> None:
        if self.estimator == "td":
            _refuse_unused(attribute, value, key="estimator", choice="td")

    @ema_decay.validator
    def _check_decay(self, attribute: Attribute[float], value: float) -> None:
        if self.whiten != "ema":
            _refuse_unused(attribute, value, key="whiten", choice=self.whiten)


def build_td_error(options: TdErrorOptions, context: BuildContext) -> WeightingStrategy:
    """Build the weighting."""
    from weighted_mtp_verifiable._td_error import TdError

    return TdError(options, device=context.model.device)


@frozen(kw_only=True)
class SuccessRatioOptions:
    """`[weighting.options]` of `verifiable.success_ratio`.

    Attributes:
        where: `"all"` computes weights from ratios in all responses; a ratio is the probability of success
            after a token, divided by the probability before it. `"wrong"` computes weights from ratios in
            incorrect responses only; the tokens of correct responses have the weight 1.
        cap: Upper limit of the ratio, before the exponent is applied.
        power: Exponent of the capped ratio; 0 makes all weights 1, and a number above 1 increases the
            differences between weights.
        span: `"token"` compares the values after and before the token. `"line"` compares the values after and
            before the token's line, so that all tokens of a line have the same weight.
        heads: `"target"` gives a token the same weight for every head. With `"path"`, the ratio of head k,
            which predicts token t + k from token t, is V_{t+k} / V_t, where V_t is the value after token t.
            This ratio is the product of the ratios of the tokens t + 1 to t + k (with `span = "line"`, of
            their lines). If t is a prompt token, the value at the end of the prompt replaces V_t.
    """

    where: Literal["all", "wrong"] = "all"
    cap: float = field(default=10.0, validator=[v.gt(0), v.lt(math.inf)])
    power: float = field(default=1.0, validator=[v.ge(0), v.lt(math.inf)])
    span: Literal["token", "line"] = "token"
    heads: Literal["target", "path"] = "target"


def build_success_ratio(options: SuccessRatioOptions, context: BuildContext) -> WeightingStrategy:
    """Build the weighting."""
    from weighted_mtp_verifiable._success_ratio import SuccessRatio

    return SuccessRatio(options, context.model)


def refuse_ranks(critic: object) -> str | None:
    """Return why a critic with these options is refused; None if it is accepted."""
    if isinstance(critic, ValueHeadOptions) and critic.objective == "bradley_terry":
        return (
            'needs probabilities of success, but `objective = "bradley_terry"` only ranks responses: '
            'use `"monte_carlo"` or `"lambda_return"`'
        )
    return None


@frozen(kw_only=True)
class GroupAdvantageOptions:
    """`[weighting.options]` of `verifiable.group_advantage`.

    Attributes:
        beta: Temperature; a smaller temperature spreads the weights further apart.
        clip: Limits [low, high] to which weights are clipped.
        positives_only: Whether incorrect responses get weight 0; the mean reward of a problem still includes
            these responses.
    """

    beta: float = field(default=1.0, validator=v.gt(0))
    clip: tuple[float, float] = field(default=(0.1, 3.0), validator=_check_range)
    positives_only: bool = False


def build_group_advantage(options: GroupAdvantageOptions, context: BuildContext) -> WeightingStrategy:
    """Build the weighting."""
    from weighted_mtp_verifiable._group_advantage import GroupAdvantage

    del context
    return GroupAdvantage(options)


@hookimpl
def wmtp_weighting_strategies() -> Iterable[Component[Any, WeightingStrategy]]:
    """Offer `verifiable.td_error`, `verifiable.success_ratio` and `verifiable.group_advantage`."""
    yield Component(
        name="td_error",
        summary="exp(advantage / beta), clipped; advantages from a critic's values and the reward.",
        options=TdErrorOptions,
        build=build_td_error,
        needs=frozenset({Signal.REWARD, Signal.VALUE}),
    )
    yield Component(
        name="success_ratio",
        summary="The probability of success after a token, divided by the probability before it.",
        options=SuccessRatioOptions,
        build=build_success_ratio,
        needs=frozenset({Signal.REWARD, Signal.LOG_VALUE}),
        refuse_critic=refuse_ranks,
    )
    yield Component(
        name="group_advantage",
        summary="exp((reward - mean reward of the same problem) / beta), clipped: one weight per response.",
        options=GroupAdvantageOptions,
        build=build_group_advantage,
        needs=frozenset({Signal.REWARD, Signal.GROUP}),
    )


@frozen(kw_only=True)
class ValueHeadOptions:
    """`[critic.options]` of `verifiable.value_head`.

    Attributes:
        objective: `"monte_carlo"` trains the values in a response to predict the reward. `"lambda_return"`
            trains these values to predict a mixture of the reward and the critic's own later values.
            `"bradley_terry"` only ranks a correct response above an incorrect response to the same problem.
        lam: Decay λ for `objective = "lambda_return"`: with 0, the target of a value is the critic's next
            value alone (after the last token, the reward); with 1, it is the reward alone.
        lam_schedule: `"constant"` keeps λ at `lam`. `"linear"` changes λ from `lam_start` at the first step
            to `lam` at the last step, because the critic's later values are useful targets only after some
            training on the reward.
        lam_start: Decay λ of the first step for `lam_schedule = "linear"`.
        body: What the head reads. `"own"`: a small transformer that is trained with the head. `"policy"`: the
            current states of the policy's trunk. `"frozen"`: the states of a copy of the policy's trunk that
            is never trained. `"trunk"`: the states of a copy of the policy's trunk that is trained with the
            head.
        base: For `body = "trunk"`: another model to copy, in the form of the recipe's `model.base`. The model
            must use the policy's tokenizer.
        lora_rank: For `body = "trunk"`: the rank of adapters to train instead of the trunk; 0 trains the
            whole trunk.
        layers: Number of the critic's own transformer layers, which read tokens or the states of a trunk. 0,
            which `body = "own"` does not allow, is the head alone.
        hidden_size: Width of the critic's own layers and of its head.
        heads: Number of attention heads in each of the critic's own layers.
        lm_loss_weight: Weight of the loss of a language-model head, which is trained on correct responses.
            The critic then also reads each token's negative log-likelihood under the language-model head.
            This input is the most useful one after a short training run. With 0, the critic has neither this
            head nor this input.
    """

    objective: Literal["monte_carlo", "lambda_return", "bradley_terry"] = "monte_carlo"
    lam: float = field(default=0.95, validator=[v.ge(0), v.le(1)])
    lam_schedule: Literal["constant", "linear"] = field(default="constant")
    lam_start: float = field(default=1.0, validator=[v.ge(0), v.le(1)])
    body: Literal["own", "policy", "frozen", "trunk"] = "own"
    base: str | None = field(default=None)
    lora_rank: int = field(default=0, validator=v.ge(0))
    layers: int = field(default=2, validator=v.ge(0))
    hidden_size: int = field(default=128, validator=v.ge(8))
    heads: int = field(default=4, validator=v.ge(1))
    lm_loss_weight: float = field(default=2.0, validator=v.ge(0))

    @lam.validator
    def _check_lam(self, attribute: Attribute[float], value: float) -> None:
        if self.objective != "lambda_return":
            _refuse_unused(attribute, value, key="objective", choice=self.objective)

    @lam_schedule.validator
    def _check_schedule(self, attribute: Attribute[str], value: str) -> None:
        if self.objective != "lambda_return":
            _refuse_unused(attribute, value, key="objective", choice=self.objective)

    @lam_start.validator
    def _check_start(self, attribute: Attribute[float], value: float) -> None:
        if self.lam_schedule != "linear":
            _refuse_unused(attribute, value, key="lam_schedule", choice=self.lam_schedule)

    @base.validator
    @lora_rank.validator
    def _check_trunk_options(self, _: object, value: str | int | None) -> None:
        if value and self.body != "trunk":
            raise ValueError(f'is for `body = "trunk"`, not for `body = "{self.body}"`: {value}')

    @layers.validator
    def _check_own_layers(self, _: object, value: int) -> None:
        if self.body == "own" and value < 1:
            raise ValueError(f'must be >= 1 for `body = "own"`: {value}')

    @heads.validator
    def _check_heads(self, _: object, value: int) -> None:
        if self.hidden_size % (2 * value):  # rotary embeddings rotate pairs of dimensions
            raise ValueError(
                f"must divide `hidden_size` = {self.hidden_size} into parts of even size: {value}"
            )


def build_value_head(options: ValueHeadOptions, context: BuildContext) -> Critic:
    """Build the critic."""
    from weighted_mtp_verifiable._value_head import ValueHead

    return ValueHead(options, context)


@frozen(kw_only=True)
class LanguageModelsOptions:
    """`[critic.options]` of `verifiable.language_models`.

    Attributes:
        right_model: A trained model of correct responses: the folder or the `best_model.pt` of a run with the
            same `[model]` table, or a transformers directory with the policy's tokenizer. Without this
            option, stage 1 trains the model of correct responses and the model of all responses, which both
            begin as copies of the policy.
        all_model: A trained model of all responses, in the same form; required if `right_model` is given, and
            refused otherwise.
        folds: Number of folds into which problems are divided. With 2 or more folds, each fold has two models
            of its own, which are trained on all other folds. So no model scores a response to a problem on
            which it was trained.
        lora_rank: Rank of adapters to train instead of whole models; all models then share the frozen
            parameters of one copy of the policy. 0 trains whole models.
    """

    right_model: str | None = None
    all_model: str | None = field(default=None)
    folds: int = field(default=1, validator=v.ge(1))
    lora_rank: int = field(default=0, validator=v.ge(0))

    @all_model.validator
    def _check_both(self, _: object, value: str | None) -> None:
        if (value is None) != (self.right_model is None):
            raise ValueError(f"`right_model` and `all_model` must be given together: {value}")

    @folds.validator
    def _check_folds(self, _: object, value: int) -> None:
        if value > 1 and self.right_model is not None:
            raise ValueError(f"must be 1 for models that are not trained in this run: {value}")

    @lora_rank.validator
    def _check_rank(self, _: object, value: int) -> None:
        if value and self.right_model is not None:
            raise ValueError(f"must be 0 for models that are not trained in this run: {value}")


def build_language_models(options: LanguageModelsOptions, context: BuildContext) -> Critic:
    """Build the critic."""
    from weighted_mtp_verifiable._language_models import LanguageModels

    return LanguageModels(options, context)


@hookimpl
def wmtp_critics() -> Iterable[Component[Any, Critic]]:
    """Offer the critics `verifiable.value_head` and `verifiable.language_models`."""
    yield Component(
        name="value_head",
        summary="Predicts at every token whether the response will be verified as correct.",
        options=ValueHeadOptions,
        build=build_value_head,
        provides=frozenset({Signal.VALUE}),
    )
    yield Component(
        name="language_models",
        summary="Values from the ratio of two language models: of correct responses, and of all responses.",
        options=LanguageModelsOptions,
        build=build_language_models,
        provides=frozenset({Signal.LOG_VALUE}),
    )
