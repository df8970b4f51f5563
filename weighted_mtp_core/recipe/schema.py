"""The recipe's tables as classes: every key, its type, default and range. No dict crosses this boundary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from attrs import field, frozen
from attrs import validators as v

from weighted_mtp_core.identifiers import NAME, check_path, check_tags


@frozen(kw_only=True)
class RunTable:
    """`[run]`: what the run is called and where it goes.

    `output_dir` is `<storage>/runs` unless given; `experiment` is `<experiment_prefix>/<weighting plugin>`.
    `resume = "auto"` goes on with the latest unfinished run of the same recipe, if there is one.
    """

    name: str = field(validator=v.matches_re(NAME))
    seed: int = field(default=42, validator=[v.ge(0), v.lt(2**32)])
    tags: tuple[str, ...] = field(default=())
    storage: str = "storage"
    output_dir: str | None = None
    experiment: str | None = field(default=None)
    resume: Literal["never", "auto"] = "never"

    @tags.validator
    def _be_tags(self, _: object, value: tuple[str, ...]) -> None:
        check_tags(value)

    @experiment.validator
    def _be_a_path(self, _: object, value: str | None) -> None:
        if value is not None:
            check_path(value)


@frozen(kw_only=True)
class MicroTable:
    """`[model.micro]`: the shape of `base = "micro"`, a small Llama with its own byte-level BPE."""

    vocab_size: int = field(default=512, validator=v.ge(300))
    hidden_size: int = field(default=128, validator=v.ge(8))
    layers: int = field(default=4, validator=v.ge(2))
    attention_heads: int = field(default=4, validator=v.ge(1))

    @attention_heads.validator
    def _divide_hidden_size(self, _: object, value: int) -> None:
        if self.hidden_size % (2 * value):  # rotary embeddings turn pairs of dimensions
            raise ValueError(f"must divide `hidden_size` = {self.hidden_size} into even parts: {value}")


@frozen(kw_only=True)
class ModelTable:
    """`[model]`: the policy's base and its heads.

    `base` is `micro`, a folder under `storage/models_v2`, a transformers directory, a `.gguf` file
    or a hub id. `shard` splits the layers' parameters over the processes of `torchrun` (FSDP2).
    `activation_checkpointing` computes each layer twice, to keep only its input between the two.
    """

    base: str = "micro"
    n_future: int = field(default=4, validator=[v.ge(1), v.le(16)])
    head: Literal["transformer", "linear"] = "transformer"
    micro: MicroTable = MicroTable()
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    shard: bool = False
    activation_checkpointing: bool = False


@frozen(kw_only=True)
class Selection:
    """`use` names a component (`<plugin>.<component>`, or `<plugin>` if it offers one of the kind)."""

    use: str
    options: Mapping[str, Any] = field(factory=dict)


@frozen(kw_only=True)
class DataTable(Selection):
    """`[data]`: the data source. Documents over `max_tokens` are left out and counted.

    `packing = "documents"` lays several documents into each row of stage 2, up to `pack_tokens` of them.
    """

    max_tokens: int = field(default=512, validator=v.ge(8))
    packing: Literal["none", "documents"] = "none"
    pack_tokens: int = field(default=2048, validator=v.ge(8))

    @pack_tokens.validator
    def _hold_every_document(self, _: object, value: int) -> None:
        if self.packing == "documents" and value < self.max_tokens:
            raise ValueError(f"must be >= `max_tokens` = {self.max_tokens}, or a row is too short: {value}")


@frozen(kw_only=True)
class TrainTable:
    """`[train]` and `[critic.train]`: one optimisation. `batch_size` is the global batch, in rows.

    A step whose loss or gradient is not finite is skipped; `max_bad_steps` in a row stop the run.
    """

    steps: int = field(default=300, validator=v.ge(1))
    batch_size: int = field(default=16, validator=v.ge(1))
    accumulation: int = field(default=1, validator=v.ge(1))
    learning_rate: float = field(default=3e-4, validator=v.gt(0))
    warmup_steps: int = field(default=20, validator=v.ge(0))
    final_learning_rate: float = field(default=0.1, validator=[v.ge(0), v.le(1)])
    weight_decay: float = field(default=0.01, validator=v.ge(0))
    max_grad_norm: float = field(default=1.0, validator=v.gt(0))
    validate_every: int = field(default=100, validator=v.ge(1))
    validation_examples: int = field(default=128, validator=v.ge(2))
    log_every: int = field(default=10, validator=v.ge(1))
    max_bad_steps: int = field(default=5, validator=v.ge(1))

    @accumulation.validator
    def _divide_batch_size(self, _: object, value: int) -> None:
        if self.batch_size % value:
            raise ValueError(f"must divide `batch_size` = {self.batch_size} evenly: {value}")


@frozen(kw_only=True)
class LossTable:
    """`[loss]`: what the weighted cross-entropies are divided by, and the heads' shares (alpha).

    Head k's share is `head_weights[k - 1] * head_decay^(k - 1)`, all divided by their sum; an empty
    `head_weights` is a 1 for each head. `head_schedule` lets heads 2..K come or go in the first
    `head_schedule_end` of the steps. With `detach_trunk` they learn from the trunk without shaping it.
    """

    normalise: Literal["weights", "tokens"] = "weights"
    head_weights: tuple[float, ...] = field(default=())

    @head_weights.validator
    def _be_shares(self, _: object, value: tuple[float, ...]) -> None:
        if any(share < 0 for share in value) or (value and not sum(value)):
            raise ValueError(f"must be >= 0 and not all 0: {list(value)}")

    head_decay: float = field(default=1.0, validator=[v.ge(0.01), v.le(100)])
    head_schedule: Literal["constant", "linear", "step", "forward", "reverse"] = field(default="constant")
    head_schedule_end: float = field(default=0.5, validator=[v.gt(0), v.le(1)])
    detach_trunk: bool = False

    @head_schedule.validator
    def _have_something_to_begin_with(self, _: object, value: str) -> None:
        if value != "constant" and self.head_weights and not self.head_weights[0]:
            raise ValueError(f"must be `constant` where head 1 weighs nothing: {value}")


@frozen(kw_only=True)
class PairsTable:
    """`[critic.pairs]`: which responses to a problem meet, for a critic that learns from pairs.

    Lengths of a pair differ by less than the factor `length_ratio` (1: not at all), and the right one is the
    longer as often as the shorter one; 0 leaves lengths aside. `difficulty_weights` are one for each fifth of
    the share of right responses to a problem, the hardest first: of the pairs of such problems so much is
    kept, relative to the largest weight.
    """

    length_ratio: float = field(default=1.25)
    max_pairs_per_problem: int = field(default=0, validator=v.ge(0))
    difficulty_weights: tuple[float, ...] = field(default=())

    @length_ratio.validator
    def _be_a_ratio(self, _: object, value: float) -> None:
        if value != 0 and not 1 <= value < float("inf"):
            raise ValueError(f"must be 0 or at least 1: {value}")

    @difficulty_weights.validator
    def _be_one_a_bin(self, _: object, value: tuple[float, ...]) -> None:
        if value and (len(value) != 5 or min(value) < 0 or not 0 < max(value) < float("inf")):
            raise ValueError(f"must be 5 numbers >= 0 and not all 0, or none: {list(value)}")


@frozen(kw_only=True)
class CriticTable(Selection):
    """`[critic]`: the critic and its own optimisation (stage 1).

    `checkpoint` is the folder `checkpoints/critic` of an earlier run: stage 1 is then skipped. A critic that
    is not better than a constant stops the run unless `allow_uninformative_critic` is set. `cache` keeps the
    scores of a critic that does not read the policy under `<storage>/signals`.
    """

    cache: bool = True
    checkpoint: str | None = None
    allow_uninformative_critic: bool = False
    pairs: PairsTable = PairsTable()
    train: TrainTable = TrainTable()


@frozen(kw_only=True)
class CheckpointTable:
    """`[checkpoint]`: what `run --resume` goes on from, in both trainings.

    `every = 0` means at the end of each training only. The last `keep` are kept, and those at multiples of
    `keep_every` steps.
    """

    every: int = field(default=100, validator=v.ge(0))
    keep: int = field(default=2, validator=v.ge(1))
    keep_every: int = field(default=0, validator=v.ge(0))


@frozen(kw_only=True)
class EvaluateTable:
    """`[evaluate]`: stage 3. `problems = 0` means the whole split."""

    pass_at_k: tuple[int, ...] = field(default=(1,))
    samples: int = field(default=1, validator=v.ge(1))
    temperature: float = field(default=0.0, validator=v.ge(0))
    max_new_tokens: int = field(default=128, validator=v.ge(1))
    decoding: Literal["plain", "self_speculative"] = "self_speculative"
    batch_size: int = field(default=32, validator=v.ge(1))
    problems: int = field(default=0, validator=v.ge(0))

    @pass_at_k.validator
    def _have_enough_samples(self, _: object, value: tuple[int, ...]) -> None:
        if any(not 1 <= k <= self.samples for k in value):
            raise ValueError(f"must be between 1 and `samples` = {self.samples}: {list(value)}")

    @temperature.validator
    def _make_samples_differ(self, _: object, value: float) -> None:
        if self.samples > 1 and value == 0:
            raise ValueError(
                f"must be > 0 for `samples` = {self.samples}, or every sample is the same: {value}"
            )


@frozen(kw_only=True)
class TrackerTable(Selection):
    """`[[tracker]]`: one destination; any number of them.

    The end of a run waits `close_seconds` for a tracker that is away; `track sync` sends the rest later.
    """

    close_seconds: float = field(default=30.0, validator=v.ge(0))


@frozen(kw_only=True)
class Recipe:
    """A whole recipe, resolved: what `extends`, presets and `--set` left."""

    run: RunTable
    model: ModelTable = ModelTable()
    data: DataTable
    weighting: Selection
    critic: CriticTable | None = None
    loss: LossTable = LossTable()
    train: TrainTable = TrainTable()
    checkpoint: CheckpointTable = CheckpointTable()
    evaluate: EvaluateTable = EvaluateTable()
    tracker: tuple[TrackerTable, ...] = ()
