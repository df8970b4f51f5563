"""The tables `[train]` and `[critic.train]` as classes: length, optimiser and validation of a stage."""

from __future__ import annotations

from math import ceil
from typing import Literal, Self

from attrs import Factory, evolve, field, frozen
from attrs import validators as v

OptimiserName = Literal["adamw", "adamw_8bit", "muon"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
_STEPS, _DECAY_SHARE, _FINAL_SHARE = 300, 0.2, 0.1


@frozen(kw_only=True)
class OptimiserTable:
    """`[train.optimiser]` and `[critic.train.optimiser]`: how gradients change the parameters.

    `adamw_8bit` is AdamW with 8-bit moments. `muon` trains the matrices of hidden layers with Muon and all
    other parameters with AdamW. `betas` and `epsilon` are options of AdamW, whatever `name` is.
    """

    name: OptimiserName = "adamw"
    betas: tuple[float, float] = field(default=(0.9, 0.95))
    epsilon: float = field(default=1e-8, validator=v.gt(0))

    @betas.validator
    def _check_betas(self, _: object, value: tuple[float, float]) -> None:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"must be >= 0 and < 1: {list(value)}")


def _default_steps(table: TrainTable) -> int | None:
    return _STEPS if table.epochs is None else None


@frozen(kw_only=True)
class TrainTable:
    """`[critic.train]`: the training of the critic (stage 1). The table `[train]` has the same keys and more.

    The length of the stage is either a number of steps or a number of epochs; a number of epochs is converted
    to steps when the data are known. `batch_size` is the global batch size in rows. If `patience` is set, the
    stage ends early after `patience` consecutive validations without a better state. A step with a non-finite
    loss or gradient is skipped; after `max_bad_steps` consecutive skipped steps, the run stops.
    """

    epochs: float | None = field(default=None, validator=v.optional(v.gt(0)))
    given_steps: int | None = field(
        default=Factory(_default_steps, takes_self=True), alias="steps", validator=v.optional(v.ge(1))
    )
    batch_size: int = field(default=16, validator=v.ge(1))
    accumulation: int = field(default=1, validator=v.ge(1))
    optimiser: OptimiserTable = OptimiserTable()
    learning_rate: float = field(default=3e-4, validator=v.gt(0))
    warmup_steps: int = field(default=20, validator=v.ge(0))
    schedule: Schedule = "cosine"
    decay_share: float = field(default=_DECAY_SHARE, validator=[v.gt(0), v.le(1)])
    final_learning_rate: float = field(default=_FINAL_SHARE, validator=[v.ge(0), v.le(1)])
    weight_decay: float = field(default=0.01, validator=v.ge(0))
    max_grad_norm: float = field(default=1.0, validator=v.gt(0))
    validate_every: int = field(default=100, validator=v.ge(1))
    validation_examples: int = field(default=128, validator=v.ge(2))
    patience: int | None = field(default=None, validator=v.optional(v.ge(1)))
    log_every: int = field(default=10, validator=v.ge(1))
    max_bad_steps: int = field(default=5, validator=v.ge(1))

    @property
    def steps(self) -> int:
        """The number of steps; if the length is given in epochs, it is known only after `for_epochs`."""
        if self.given_steps is None:
            raise RuntimeError("the number of steps is not known before stage 0")
        return self.given_steps

    @property
    def length(self) -> str:
        """The length of the stage as text, such as `300 steps` or `2 epochs`."""
        return f"{self.steps} steps" if self.epochs is None else f"{self.epochs:g} epochs"

    def for_epochs(self, batches_per_epoch: float) -> Self:
        """Return the table with its epochs converted to steps, rounded up; a length in steps is kept."""
        if self.epochs is None:
            return self
        return evolve(self, epochs=None, steps=max(1, ceil(self.epochs * batches_per_epoch - 1e-9)))

    @given_steps.validator
    def _check_length(self, _: object, value: int | None) -> None:
        if value is not None and self.epochs is not None:
            raise ValueError("must be left out if `epochs` is given")

    @accumulation.validator
    def _check_accumulation(self, _: object, value: int) -> None:
        if self.batch_size % value:
            raise ValueError(f"must divide `batch_size` = {self.batch_size} evenly: {value}")

    @decay_share.validator
    def _check_decay(self, _: object, value: float) -> None:
        if value != _DECAY_SHARE and self.schedule != "wsd":
            raise ValueError(f'has no effect with `schedule = "{self.schedule}"`; leave it out: {value}')

    @final_learning_rate.validator
    def _check_final(self, _: object, value: float) -> None:
        if value != _FINAL_SHARE and self.schedule == "constant":
            raise ValueError(f'has no effect with `schedule = "constant"`; leave it out: {value}')


SelectBy = Literal["head_1", "later_heads", "acceptance"]


@frozen(kw_only=True)
class PolicyTrainTable(TrainTable):
    """`[train]`: the training of the policy (stage 2).

    `select_by` determines which state is the best in validation. With `head_1`, the best state has the lowest
    cross-entropy of head 1; with `later_heads`, the lowest mean cross-entropy of heads 2..K; with
    `acceptance`, the most tokens per pass of self-speculative decoding. The function `default_selection`
    returns the default of `select_by`. `head_learning_rate` is the learning rate of heads 2..K, and
    `embedding_learning_rate` is the learning rate of the embeddings and the unembedding; the default of each
    is `learning_rate`.
    """

    select_by: SelectBy | None = None
    head_learning_rate: float | None = field(default=None, validator=v.optional(v.gt(0)))
    embedding_learning_rate: float | None = field(default=None, validator=v.optional(v.gt(0)))


def default_selection(train: str | None, heads: str | None) -> SelectBy:
    """Return the default of `train.select_by` for the values of `model.train` and `loss.heads`.

    The default is `head_1`, unless only heads 2..K are trained. In that case, the default is `later_heads`,
    or `acceptance` if heads 2..K learn only head 1's distribution: their cross-entropy with the labels may
    then increase although more of their drafts are accepted.
    """
    if train != "heads":
        return "head_1"
    return "acceptance" if heads == "kl" else "later_heads"
