"""The tables of a recipe as classes, which define the type, default and range of every key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from attrs import field, frozen
from attrs import validators as v
from attrs.converters import optional

from weighted_mtp_core.identifiers import NAME, check_path, expand_home
from weighted_mtp_core.recipe.train_table import PolicyTrainTable, TrainTable
from weighted_mtp_core.run_tags import check_tags


@frozen(kw_only=True)
class RunTable:
    """`[run]`: the run's name, seed and folders.

    The default of `output_dir` is `<storage>/runs`, and the default of `experiment` is
    `<experiment_prefix>/<weighting plugin>`. `resume = "auto"` resumes the latest unfinished run with the
    same name, recipe and code, if there is one. `over_memory = "warn"` starts a run even if the forecast of
    its memory exceeds the free memory.
    """

    name: str = field(validator=v.matches_re(NAME))
    seed: int = field(default=42, validator=[v.ge(0), v.lt(2**32)])
    tags: tuple[str, ...] = field(default=(), validator=lambda _, __, value: check_tags(value))
    storage: str = field(default="storage", converter=expand_home)
    output_dir: str | None = field(default=None, converter=optional(expand_home))
    experiment: str | None = field(default=None)
    resume: Literal["never", "auto"] = "never"
    over_memory: Literal["refuse", "warn"] = field(default="refuse")

    @experiment.validator
    def _check_experiment(self, _: object, value: str | None) -> None:
        if value is not None:
            check_path(value)


@frozen(kw_only=True)
class MicroTable:
    """`[model.micro]`: the size of the model `base = "micro"`, a small Llama with its own byte-level BPE."""

    vocab_size: int = field(default=512, validator=v.ge(300))
    hidden_size: int = field(default=128, validator=v.ge(8))
    layers: int = field(default=4, validator=v.ge(2))
    attention_heads: int = field(default=4, validator=v.ge(1))

    @attention_heads.validator
    def _check_heads(self, _: object, value: int) -> None:
        if self.hidden_size % (2 * value):  # rotary embeddings rotate pairs of dimensions
            raise ValueError(
                f"must divide `hidden_size` = {self.hidden_size} into parts of even size: {value}"
            )


HeadKind = Literal["parallel", "medusa", "sequential"]
MtpServer = Literal["transformers", "vllm"]


@frozen(kw_only=True)
class HeadsTable:
    """`[model.heads]`: kind and options of heads 2..K.

    If `shared` is true, all `sequential` heads use one module; otherwise, each head has its own module.
    `serve` selects the program that will draft with `sequential` heads; this program determines what a module
    computes. With `init = "base"`, the modules are the layers for multi-token prediction that the base model
    ships, and the base model determines what a module computes.
    """

    kind: HeadKind = "parallel"
    init: Literal["new", "base"] = field(default="new")
    shared: bool = field(default=False)
    serve: MtpServer = field(default="transformers")

    @init.validator
    def _check_init(self, _: object, value: str) -> None:
        if value == "base" and self.kind != "sequential":
            raise ValueError(f'needs `kind = "sequential"`: base models do not ship `{self.kind}` heads')

    @shared.validator
    def _check_shared(self, _: object, value: bool) -> None:  # noqa: FBT001 - attrs calls it so
        if value and self.kind != "sequential":
            raise ValueError(f'needs `kind = "sequential"`: `{self.kind}` heads cannot share a module')

    @serve.validator
    def _check_serve(self, _: object, value: str) -> None:
        if value != "transformers" and self.kind != "sequential":
            raise ValueError(f'needs `kind = "sequential"`: `{self.kind}` heads are the same for all servers')
        if value != "transformers" and self.init == "base":
            raise ValueError('needs `init = "new"`: a base model determines what its layers compute')


@frozen(kw_only=True)
class AdaptersTable:
    """`[model.adapters]`: low-rank adapters (LoRA) of the base model, for `model.train = "adapters"`.

    An adapter adds `s B A x` to the output of a linear layer with input x, where the matrix A has `rank` rows
    and the matrix B has `rank` columns. The scale s of an adapter is `alpha / rank`, or `alpha / sqrt(rank)`
    if `rslora` is true; the default of `alpha` is `2 * rank`. `dropout` is applied to the input of an adapter
    in training. `dora` also trains the norm of each row of the adapted matrix. `targets` are the
    names of the adapted layers, for example `q_proj`; if `targets` is empty, all linear layers of the decoder
    layers are adapted. `heads` decides whether heads 2..K are trained whole, or through adapters of their
    decoder layers.
    """

    rank: int = field(default=8, validator=v.ge(1))
    alpha: float | None = field(default=None, validator=v.optional(v.gt(0)))
    dropout: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    targets: tuple[str, ...] = field(default=())
    rslora: bool = False
    dora: bool = False
    heads: Literal["whole", "adapted"] = "whole"


BaseDtype = Literal["float32", "bfloat16", "nf4"]


@frozen(kw_only=True)
class ModelTable:
    """`[model]`: the policy's base model and its heads.

    `base` is `micro`, a folder under `storage/models_v2`, a transformers directory, a `.gguf` file or a hub
    id. `shard` splits the matrices of the model over the processes of `torchrun` (FSDP2).
    `activation_checkpointing` stores only the input of each layer and recomputes all other activations in the
    backward pass. `train = "heads"` trains only heads 2..K and does not change the base model;
    `train = "adapters"` also trains low-rank adapters of the base model, and stores the matrices of the base
    model in `base_dtype`. `tf32` and `deterministic` determine how CUDA devices compute.
    """

    base: str = "micro"
    n_future: int = field(default=4, validator=[v.ge(1), v.le(16)])
    heads: HeadsTable = field(default=HeadsTable())
    train: Literal["all", "heads", "adapters"] = "all"
    adapters: AdaptersTable = field(default=AdaptersTable())
    micro: MicroTable = MicroTable()
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    base_dtype: BaseDtype = field(default="float32")
    shard: bool = False
    activation_checkpointing: bool = False
    tf32: bool = False
    deterministic: bool = False

    @heads.validator
    def _check_heads(self, _: object, value: HeadsTable) -> None:
        if value.serve == "vllm" and not value.shared and self.n_future > 2:
            raise ValueError(
                'must have `shared = true` for `serve = "vllm"`, which drafts all tokens with one module'
            )

    @adapters.validator
    def _check_adapters(self, _: object, value: AdaptersTable) -> None:
        if value.heads == "adapted" and self.heads.kind == "medusa":
            raise ValueError('must have `heads = "whole"`: `medusa` heads have no decoder layer to adapt')

    @base_dtype.validator
    def _check_base_dtype(self, _: object, value: str) -> None:
        if value != "float32" and self.train != "adapters":
            raise ValueError(f'needs `train = "adapters"`: with `{self.train}`, the base stays in float32')
        if value != "float32" and self.adapters.dora:
            raise ValueError("must be `float32` for `adapters.dora`, which trains norms of float32 matrices")


@frozen(kw_only=True)
class Selection:
    """A table of a recipe that selects a component.

    `use` is the address of the component: `<plugin>.<component>`, or `<plugin>` if the plugin has only one
    component of the kind. `options` are the options of the component.
    """

    use: str
    options: Mapping[str, Any] = field(factory=dict)


@frozen(kw_only=True)
class DataTable(Selection):
    """`[data]`: the data source, and how its examples become documents.

    Documents longer than `max_tokens` are left out and counted. `bos` determines whether documents begin with
    the token BOS; with `bos = "auto"`, they do if the tokenizer adds BOS to texts. `packing = "documents"`
    packs documents into rows of at most `pack_tokens` tokens in stage 2. Chats are rendered with the
    tokenizer's template, or with `chat_template`, which is a Jinja template. `train_on` selects the
    assistant's messages that the policy learns.
    """

    max_tokens: int = field(default=512, validator=v.ge(8))
    bos: Literal["auto", "always", "never"] = "auto"
    chat_template: str | None = None
    train_on: Literal["all", "last"] = "all"
    packing: Literal["none", "documents"] = "none"
    pack_tokens: int = field(default=2048, validator=v.ge(8))

    @pack_tokens.validator
    def _check_row_length(self, _: object, value: int) -> None:
        if self.packing == "documents" and value < self.max_tokens:
            raise ValueError(f"must be >= `max_tokens` = {self.max_tokens}, or a row is too short: {value}")


HeadTargets = Literal["labels", "kl", "both"]
_SCHEDULE_END = 0.5


@frozen(kw_only=True)
class LossTable:
    """`[loss]`: the normalisation of the weighted cross-entropies, and the share of each head in the loss.

    The share of head k is `head_weights[k - 1] * head_decay^(k - 1)`, divided by the sum over all heads; if
    `head_weights` is empty, each head has the weight 1. `head_schedule` adds or removes heads 2..K during the
    first steps of stage 2; `head_schedule_end` is the fraction of the steps after which the schedule ends.
    `heads` determines what heads 2..K learn: the labels, head 1's distribution of the same token (`kl`), or
    both in equal shares. With `detach_trunk`, heads 2..K train only their own parameters.
    `negative_weights` allows weights below 0 if the weighting declares negative weights.
    """

    normalise: Literal["weights", "tokens"] = "weights"
    head_weights: tuple[float, ...] = field(default=())
    head_decay: float = field(default=1.0, validator=[v.ge(0.01), v.le(100)])
    head_schedule: Literal["constant", "linear", "step", "forward", "reverse"] = field(default="constant")
    head_schedule_end: float = field(default=_SCHEDULE_END, validator=[v.gt(0), v.le(1)])
    heads: HeadTargets = field(default="labels")
    detach_trunk: bool = False
    negative_weights: bool = False

    @head_weights.validator
    def _check_shares(self, _: object, value: tuple[float, ...]) -> None:
        if any(share < 0 for share in value) or (value and not sum(value)):
            raise ValueError(f"must be >= 0 and not all 0: {list(value)}")

    @heads.validator
    def _check_signs(self, _: object, value: str) -> None:
        if value != "labels" and self.negative_weights:
            raise ValueError(
                f"must be `labels` with `negative_weights`, or heads 2..K unlearn head 1: {value}"
            )

    @head_schedule.validator
    def _check_first_head(self, _: object, value: str) -> None:
        if value != "constant" and self.head_weights and not self.head_weights[0]:
            raise ValueError(f"must be `constant` if head 1 has weight 0: {value}")

    @head_schedule_end.validator
    def _check_step(self, _: object, value: float) -> None:
        if value != _SCHEDULE_END and self.head_schedule == "constant":
            raise ValueError(f'has no effect with `head_schedule = "constant"`; leave it out: {value}')
        if value == 1 and self.head_schedule == "step":
            raise ValueError(f"must be < 1 with the schedule `step`, or only head 1 is trained: {value}")


@frozen(kw_only=True)
class PairsTable:
    """`[critic.pairs]`: pairs of a correct and an incorrect response, for a critic that learns from pairs.

    The lengths of the two responses of a pair differ by less than the factor `length_ratio`, and the correct
    response is the longer one in as many pairs as the shorter one. With `length_ratio = 1`, the lengths are
    equal; with `length_ratio = 0`, lengths are ignored. `difficulty_weights` has one number for each of five
    bins of a problem's share of correct responses, from hard to easy. The fraction of a bin's pairs that is
    kept is the number of the bin divided by the largest of the five numbers.
    """

    length_ratio: float = field(default=1.25)
    max_pairs_per_problem: int = field(default=0, validator=v.ge(0))
    difficulty_weights: tuple[float, ...] = field(default=())

    @length_ratio.validator
    def _check_ratio(self, _: object, value: float) -> None:
        if value != 0 and not 1 <= value < float("inf"):
            raise ValueError(f"must be 0 or at least 1: {value}")

    @difficulty_weights.validator
    def _check_weights(self, _: object, value: tuple[float, ...]) -> None:
        if value and (len(value) != 5 or min(value) < 0 or not 0 < max(value) < float("inf")):
            raise ValueError(f"must be 5 numbers >= 0 and not all 0, or none: {list(value)}")


@frozen(kw_only=True)
class CriticTable(Selection):
    """`[critic]`: the critic and its training (stage 1).

    `checkpoint` is the folder `checkpoints/critic` of an earlier run; if it is given, stage 1 loads this
    critic instead of training one. If the critic provides values, and these are not shown to be better than a
    constant, the run stops, unless `allow_uninformative_critic` is true. With `cache`, a run with one process
    stores the scores of a critic in `<storage>/signals`, if the critic allows caching and does not read the
    policy.
    """

    cache: bool = True
    checkpoint: str | None = None
    allow_uninformative_critic: bool = False
    pairs: PairsTable = PairsTable()
    train: TrainTable = field(default=TrainTable())


@frozen(kw_only=True)
class CheckpointTable:
    """`[checkpoint]`: the checkpoints of stages 1 and 2, from which `run --resume` continues.

    A checkpoint is written every `every` steps (unless `every` is 0), at the end of each stage, and when a
    signal requests it. Core keeps the last `keep` checkpoints and, unless `keep_every` is 0, the checkpoints
    at multiples of `keep_every` steps.
    """

    every: int = field(default=100, validator=v.ge(0))
    keep: int = field(default=2, validator=v.ge(1))
    keep_every: int = field(default=0, validator=v.ge(0))


@frozen(kw_only=True)
class EvaluateTable:
    """`[evaluate]`: how stage 3 generates and judges completions.

    `problems = 0` means all problems of the split; `examples = 0` means that the heads are measured on all
    examples of the split. With `second_temperature`, pass@k is also measured at this temperature.
    """

    pass_at_k: tuple[int, ...] = field(default=(1,))
    samples: int = field(default=1, validator=v.ge(1))
    temperature: float = field(default=0.0, validator=v.ge(0))
    second_temperature: float | None = field(default=None, validator=v.optional(v.gt(0)))
    max_new_tokens: int = field(default=128, validator=v.ge(1))
    decoding: Literal["plain", "self_speculative"] = "self_speculative"
    batch_size: int = field(default=32, validator=v.ge(1))
    problems: int = field(default=0, validator=v.ge(0))
    examples: int = field(default=0, validator=v.ge(0))

    @pass_at_k.validator
    def _check_samples(self, _: object, value: tuple[int, ...]) -> None:
        if any(not 1 <= k <= self.samples for k in value):
            raise ValueError(f"must be between 1 and `samples` = {self.samples}: {list(value)}")

    @temperature.validator
    def _check_sampling(self, _: object, value: float) -> None:
        if self.samples > 1 and value == 0:
            raise ValueError(
                f"must be > 0 for `samples` = {self.samples}, or every sample is the same: {value}"
            )


@frozen(kw_only=True)
class TrackerTable(Selection):
    """`[[tracker]]`: one destination of metrics and artifacts; a recipe can have any number of trackers.

    If a tracker is unreachable at the end of a run, the run waits at most as long as the largest
    `close_seconds` of its trackers; the command `track sync` sends the remaining data later.
    """

    close_seconds: float = field(default=30.0, validator=v.ge(0))


@frozen(kw_only=True)
class Recipe:
    """A whole recipe, after the recipe file, the files in `extends`, preset and overrides were merged."""

    run: RunTable
    model: ModelTable = ModelTable()
    data: DataTable
    weighting: Selection
    critic: CriticTable | None = None
    loss: LossTable = LossTable()
    train: PolicyTrainTable = field(default=PolicyTrainTable())
    checkpoint: CheckpointTable = CheckpointTable()
    evaluate: EvaluateTable = EvaluateTable()
    tracker: tuple[TrackerTable, ...] = ()
