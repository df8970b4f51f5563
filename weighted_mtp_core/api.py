"""What a plugin imports, and all it imports: component kinds, the tensors they exchange, the hook marker.

Importing this module imports neither torch nor transformers nor mlflow.

Shape letters: B batch rows, T positions, K heads (`n_future`), H hidden, V vocabulary.

Index convention: every `[B, T]` tensor is indexed *by the token itself*; `[B, T, K]` tensors are indexed
(source position t, head k) and line up with the target `x[b, t + k]`. Only the core shifts.
"""

from __future__ import annotations

import enum
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import pluggy
from attrs import field, frozen
from attrs import validators as v

from weighted_mtp_core.errors import WmtpError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "Batch",
    "BuildContext",
    "Component",
    "Critic",
    "CriticLoss",
    "DataSource",
    "DatasetVersion",
    "Example",
    "MetricPoint",
    "ModelContext",
    "Problem",
    "RunInfo",
    "RunOutcome",
    "SandboxSettings",
    "Scores",
    "Signal",
    "Split",
    "Stateful",
    "StepView",
    "Tracker",
    "Verdict",
    "VerdictKind",
    "WeightingChoice",
    "WeightingStrategy",
    "Weights",
    "WmtpError",
    "hookimpl",
]

hookimpl = pluggy.HookimplMarker("weighted_mtp_core")
"""Marks a plugin's function as the implementation of a hook of `weighted_mtp_core.hookspecs`."""

OptionsT = TypeVar("OptionsT")
BuiltT_co = TypeVar("BuiltT_co", covariant=True)
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Signal(enum.Enum):
    """What may be known about a batch; a weighting declares which of it the core must compute."""

    REWARD = "reward"
    VALUE = "value"
    GROUP = "group"
    TOKEN_LOSS = "token_loss"  # noqa: S105 - a kind of signal, no secret
    TOKEN_ENTROPY = "token_entropy"  # noqa: S105
    REFERENCE_LOSS = "reference_loss"


# --------------------------------------------------------------------------- data


@frozen(kw_only=True)
class Example:
    """One labelled response to one problem.

    Attributes:
        example_id: Unique within the data source and stable across runs.
        problem_id: Shared by all responses to one problem.
        prompt: Text before the response; never a target.
        response: Text that the policy learns to write; the core appends EOS.
        reward: Verified outcome of the whole response, in [0, 1].
    """

    example_id: str
    problem_id: str
    prompt: str
    response: str
    reward: float = field(validator=[v.ge(0.0), v.le(1.0)])


@frozen(kw_only=True)
class Problem:
    """One task whose completions can be judged.

    Attributes:
        prompt: Text handed to the policy.
        entry_point: Name of the function that the tests call.
        tests: Python source that defines `check(candidate)` and raises AssertionError on a wrong answer.
        solution: A completion of `prompt` known to be right, if there is one.
    """

    problem_id: str
    prompt: str
    entry_point: str
    tests: str
    solution: str | None = None


class VerdictKind(enum.Enum):
    """How judging one completion ended. Only the first three say anything about the program."""

    PASSED = "passed"
    WRONG = "wrong"
    ERROR = "error"
    CPU_LIMIT = "cpu_limit"
    WALL_LIMIT = "wall_limit"
    MEMORY = "memory"
    OUTPUT = "output"
    VIOLATION = "violation"
    UNENCODABLE = "unencodable"
    JUDGE_ERROR = "judge_error"


@frozen(kw_only=True)
class Verdict:
    """The judgement of one completion, with one line of `detail` for people."""

    kind: VerdictKind
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether every test passed."""
        return self.kind is VerdictKind.PASSED

    @property
    def is_label(self) -> bool:
        """Whether the verdict may be used as a training label (passed, wrong or error)."""
        return self.kind in {VerdictKind.PASSED, VerdictKind.WRONG, VerdictKind.ERROR}


@frozen(kw_only=True)
class DatasetVersion:
    """Name, version and SHA-256 (hex) of the data that a run used."""

    name: str
    version: str
    sha256: str


# --------------------------------------------------------------------------- tensors


@frozen(kw_only=True, eq=False)
class Batch:
    """Rows of tokens with what is known about each token. All tensors live on one device.

    Attributes:
        ids_BT: int64 token ids; padding on the right.
        document_BT: int64 number of the document within its row, from 0; -1 on padding.
        response_BT: bool, True on response tokens (EOS included): the tokens that are targets.
        reward_BT: float32 reward of the response that a response token belongs to; 0 elsewhere.
        group_BT: int64, equal exactly for tokens of the same problem within this batch; -1 on padding.
        example_ids: The examples in the batch, row by row, for messages.
        position_BT: int64 position of each token in its document where rows hold several documents, 0 on
            padding; None where each row holds one, whose positions are 0, 1, ...
        place_BT: int64 array, on the host: where each token lies in the arrays that the batch was made from,
            -1 on padding; None if it was not made from any.
        reach_BT: int64 array, on the host: how many tokens of its document lie before each response token, 0
            elsewhere, so that nobody asks the device which pairs count; None where it is not known.
    """

    ids_BT: Tensor
    document_BT: Tensor
    response_BT: Tensor
    reward_BT: Tensor
    group_BT: Tensor
    example_ids: tuple[str, ...] = ()
    position_BT: Tensor | None = None
    place_BT: NDArray[np.int64] | None = None
    reach_BT: NDArray[np.int64] | None = None


@frozen(kw_only=True, eq=False)
class StepView:
    """What a weighting sees: the whole global batch of one step. A signal it did not declare is None.

    Attributes:
        ids_BT: int64 token ids.
        document_BT: int64 document number within the row; -1 on padding.
        response_BT: bool, True on the tokens that are targets.
        target_BTK: bool, True where the pair (source t, head k) counts, i.e. `x[t + k]` is a response
            token of the document of `x[t]`.
        n_future: K.
        step: Optimiser steps done in this stage.
        training: False during validation; moving statistics must then stay as they are.
        reward_BT: float32, `Signal.REWARD`: see `Batch.reward_BT`.
        group_BT: int64, `Signal.GROUP`: see `Batch.group_BT`.
        value_BT: float32, `Signal.VALUE`: V_t, the critic's value of the prefix that ends at token t.
        token_loss_BTK: float32, `Signal.TOKEN_LOSS`: the policy's current cross-entropy, 0 off `target_BTK`.
        token_entropy_BTK: float32, `Signal.TOKEN_ENTROPY`: the entropy, in nats, of what the policy's head
            expects there, whatever the target is; 0 off `target_BTK`.
        reference_loss_BT: float32, `Signal.REFERENCE_LOSS`: a reference model's next-token cross-entropy
            of token t, 0 off `response_BT`.
    """

    ids_BT: Tensor
    document_BT: Tensor
    response_BT: Tensor
    target_BTK: Tensor
    n_future: int
    step: int
    training: bool
    reward_BT: Tensor | None = None
    group_BT: Tensor | None = None
    value_BT: Tensor | None = None
    token_loss_BTK: Tensor | None = None
    token_entropy_BTK: Tensor | None = None
    reference_loss_BT: Tensor | None = None

    def to_pairs(self, x_BT: Tensor) -> Tensor:
        """Lay what belongs to target tokens onto the pairs that predict them: `[B, T, K]`, 0 elsewhere."""
        from weighted_mtp_core.model.targets import align_weights

        return align_weights(x_BT, self.target_BTK)

    def to_targets(self, x_BTK: Tensor) -> Tensor:
        """Lay what belongs to pairs onto their targets: entry (t, k) of the result is of head k for token t.

        It is 0 where head k has no source for token t, which lies too near the start of its document.
        """
        from weighted_mtp_core.model.targets import gather_by_target

        return gather_by_target(x_BTK, self.target_BTK)


@frozen(kw_only=True, eq=False)
class Weights:
    """Weights of target tokens.

    Attributes:
        weight: float32, detached, finite, >= 0. `[B, T]` (indexed by the target token, 0 off
            `response_BT`) or `[B, T, K]` (indexed by source and head, 0 off `target_BTK`).
        metrics: Scalars to log, as 0-dim tensors or floats; read after the step, so that nothing waits.
    """

    weight: Tensor
    metrics: Mapping[str, Tensor | float] = field(factory=dict)


@frozen(kw_only=True, eq=False)
class Scores:
    """What a critic says of each token; it fills exactly the fields whose signals it `provides`."""

    value_BT: Tensor | None = None
    reference_loss_BT: Tensor | None = None


@frozen(kw_only=True, eq=False)
class CriticLoss:
    """A critic's scalar training loss (fp32, with gradient) and scalars to log."""

    loss: Tensor
    metrics: Mapping[str, Tensor | float] = field(factory=dict)


# --------------------------------------------------------------------------- building


def _no_frozen_losses(_: Path | None) -> Callable[[Batch], Tensor]:
    raise WmtpError("there is no policy here whose losses could be frozen")


def _no_trainable_trunk(_: str | None) -> torch.nn.Module:
    raise WmtpError("there is no policy here whose trunk could be trained")


@frozen(kw_only=True, eq=False)
class ModelContext:
    """The policy as far as a component may know it while it is being built.

    Attributes:
        n_future: K.
        hidden_size: H of the trunk's states.
        vocab_size: V.
        device: Where the component's tensors must live.
        frozen_trunk: Returns an independent copy of the trunk as it is now, without gradients:
            a function from a `Batch` to float32 states `[B, T, H]`.
        frozen_losses: Returns the next-token loss of an independent copy of the policy, as it is now or as
            a `best_model.pt` holds it: a function from a `Batch` to float32 losses `[B, T]`, indexed by the
            token, 0 where no response token follows another.
        trainable_trunk: Returns an independent copy of the trunk as it is now, or the body of the model that
            is named as `model.base` is (its tokenizer must be the policy's): a module that is called with a
            `Batch` and returns float32 states `[B, T, H]`, with gradients and without dropout. H is its
            attribute `hidden_size`. Its parameters are the component's to train and to keep.
    """

    n_future: int
    hidden_size: int
    vocab_size: int
    device: torch.device
    frozen_trunk: Callable[[], Callable[[Batch], Tensor]]
    frozen_losses: Callable[[Path | None], Callable[[Batch], Tensor]] = field(default=_no_frozen_losses)
    trainable_trunk: Callable[[str | None], torch.nn.Module] = field(default=_no_trainable_trunk)


@frozen(kw_only=True)
class SandboxSettings:
    """`[sandbox]`: where untrusted programs run, and what one program may use.

    `backend = "auto"` takes the first of bubblewrap and landlock that works and refuses where neither does;
    `"trusted"` runs programs without a sandbox, for data whose every program you trust.
    """

    backend: Literal["auto", "bubblewrap", "landlock", "trusted"] = "auto"
    cpu_seconds: float = field(default=5.0, validator=v.gt(0))
    wall_seconds: float = field(default=30.0, validator=v.gt(0))
    memory_mb: int = field(default=512, validator=v.ge(64))
    workers: int = field(default=0, validator=v.ge(0))  # 0: one a core


@frozen(kw_only=True)
class WeightingChoice:
    """An option that names another weighting, as the table `[weighting]` does.

    A component whose options hold one (or a tuple of them) wraps it. Core knows by the type: before anything
    is built it loads the named plugin, checks its options and adds its needs to those of the component.

    Attributes:
        use: `<plugin>.<component>`, or `<plugin>` if it offers just one weighting.
        options: The options table of that weighting.
    """

    use: str
    options: Mapping[str, Any] = field(factory=dict)


@frozen(kw_only=True, eq=False)
class BuildContext:
    """What `Component.build` gets beside its options.

    Attributes:
        seed: For the component's own generator.
        storage: The storage root (`storage/`), for caches.
        sandbox: How programs are judged.
    """

    seed: int
    storage: Path
    sandbox: SandboxSettings = SandboxSettings()
    _model: ModelContext | None = field(default=None, alias="model")
    _weightings: Callable[[WeightingChoice], WeightingStrategy] | None = field(
        default=None, alias="weightings"
    )

    @property
    def model(self) -> ModelContext:
        """The policy's side.

        Raises:
            WmtpError: The component is built before there is a policy (data sources and trackers are).
        """
        if self._model is None:
            raise WmtpError("this component is built before the policy exists, so `context.model` is empty")
        return self._model

    def build_weighting(self, choice: WeightingChoice) -> WeightingStrategy:
        """Build a weighting that the component's own options name; each call gives a new object.

        Raises:
            WmtpError: It cannot be built.
        """
        if self._weightings is None:
            raise WmtpError(f"`{choice.use}` is named by no option that core has checked")
        return self._weightings(choice)


@frozen(kw_only=True)
class Component(Generic[OptionsT, BuiltT_co]):
    """One thing a plugin offers, declared without importing anything heavy.

    Attributes:
        name: `[a-z][a-z0-9_]*`; the address is `<plugin>.<name>`.
        summary: One line for `plugins list`.
        options: A frozen attrs class; the recipe's `options` table is structured into it strictly.
        build: Makes the object; imports torch inside.
        needs: Signals that must be computed for it (weightings).
        provides: Signals that it can fill (critics).
    """

    name: str = field(validator=v.matches_re(r"[a-z][a-z0-9_]*"))
    summary: str
    options: type[OptionsT]
    build: Callable[[OptionsT, BuildContext], BuiltT_co] = field(validator=v.is_callable())
    needs: frozenset[Signal] = frozenset()
    provides: frozenset[Signal] = frozenset()


# --------------------------------------------------------------------------- kinds


class Stateful(ABC):  # noqa: B024 - both methods have a default: most components keep no state
    """Keeps state across checkpoints. The default keeps none and refuses any."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that `load_state_dict` restores exactly."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`'s result.

        Raises:
            WmtpError: `state` holds what this component does not keep.
        """
        if state:
            raise WmtpError(
                f"`{type(self).__name__}` keeps no state, but a checkpoint holds "
                + ", ".join(f"`{key}`" for key in sorted(state))
            )


class WeightingStrategy(Stateful):
    """Turns what is known about a batch into weights on target tokens."""

    @abstractmethod
    def weigh(self, view: StepView) -> Weights:
        """Weigh the whole global batch of a step. Called without gradients, once a step."""


class Critic(Stateful):
    """Scores positions: a value head, a value model, a reference model.

    Attributes:
        trainable: Whether stage 1 trains it; if so `loss` and `parameters` are used.
        reads_policy: Whether `score` and `loss` want the policy's trunk states; if not, `hidden_BTH` is None.
        batching: How stage 1 composes batches: `"pointwise"`, or `"pairs"`: rows 2i and 2i + 1 are a
            correct and an incorrect response to one problem.
        cacheable: Whether scores depend on nothing but the batch, `state_dict()`, the options and what
            `ModelContext` gave. If so, and if it does not read the policy, core computes them once for each
            document and run, and not again in later runs; not so, for example, of a model read from a file
            that is not in the state.
        blocks: Modules of the critic, decoder layers for example, whose parameters core may split over
            several processes (FSDP2) before stage 1. `state_dict()` then holds sharded tensors for them, and
            `load_state_dict` is given tensors laid out like those.
    """

    trainable: bool = False
    reads_policy: bool = True
    cacheable: bool = False
    batching: Literal["pointwise", "pairs"] = "pointwise"
    blocks: Sequence[torch.nn.Module] = ()

    @abstractmethod
    def score(self, batch: Batch, hidden_BTH: Tensor | None) -> Scores:
        """Score a batch without gradients; the trunk states `[B, T, H]` are detached."""

    def begin_step(self, step: int, *, steps: int) -> None:
        """Hear that step `step` (from 0) of the `steps` of stage 1 begins, also after a resumed one.

        For schedules; what a step changes must follow from these two numbers. It may be told of no step at
        all, and is then to act as at the end.
        """

    def loss(self, batch: Batch, hidden_BTH: Tensor | None) -> CriticLoss:  # noqa: ARG002 - no default
        """Return the training loss of a batch; gradients must reach `parameters()` and nothing else."""
        raise WmtpError(f"critic `{type(self).__name__}` says it is trainable, but has no `loss`")

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """Return the parameters that stage 1 trains."""
        return ()


class DataSource(Stateful):
    """Examples to learn from and problems to be judged on: random access, deterministic order."""

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """Return every labelled response of the split, right and wrong ones: the critic's data."""

    def policy_examples(self, split: Split) -> Sequence[Example]:
        """Return what the policy imitates; by default the responses with full reward."""
        return [example for example in self.examples(split) if example.reward >= 1.0]

    @abstractmethod
    def version(self) -> DatasetVersion:
        """Return what identifies this data, after preparation.

        Core keeps the tokens of a version, of a plugin's version and of its options, and does not read the
        examples again: data that depend on anything else must have another `sha256`.
        """

    def problems(self, split: Split) -> Sequence[Problem]:  # noqa: ARG002 - the default has none
        """Return the problems of the split; empty where the source cannot verify."""
        return ()

    def completion(self, problem: Problem, text: str) -> str:  # noqa: ARG002 - the default takes all
        """Return what counts of a text that the policy wrote after a problem's prompt; by default all of it.

        What it returns is saved and handed to `verify`, which must not change it.
        """
        return text

    def verify(self, attempts: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Judge completions, one verdict per (problem, completion), in the same order.

        Raises:
            WmtpError: The source cannot verify.
        """
        raise WmtpError(f"data source `{type(self).__name__}` cannot verify its {len(attempts)} completions")


class RunOutcome(enum.Enum):
    """How a run ended, in MLflow's words."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


@frozen(kw_only=True)
class RunInfo:
    """A run as trackers see it.

    Attributes:
        run_id: Unique id, also the name of the run folder.
        name: The recipe's `run.name`.
        experiment: `<experiment_prefix>/<weighting plugin>`, or the recipe's own.
        params: The resolved recipe flattened to dotted keys, and dataset version and checksum.
        tags: See the README's table of tags.
        datasets: Recorded as dataset inputs.
        folder: The run folder.
        started_ms: When it began, in milliseconds since 1970.
    """

    run_id: str
    name: str
    experiment: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    datasets: tuple[DatasetVersion, ...]
    folder: Path
    started_ms: int = field(factory=lambda: time.time_ns() // 1_000_000)


@frozen(kw_only=True)
class MetricPoint:
    """One finite value of one metric; `time_ms` is when it was measured, not when it is sent."""

    name: str
    value: float
    step: int
    time_ms: int


class Tracker(Stateful):
    """Sends a run elsewhere. Called from one thread at a time, behind the core's durable journal.

    Every method may raise to say "not delivered": the core tries again later with the same arguments, so
    each must bear being repeated. A `WmtpError` says "never will be": before training it stops the run, later
    the lines are left out, loudly. A tracker that groups runs takes an option `experiment_prefix`.
    """

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """Open the run, or reopen it if `run.run_id` was opened before; repeated as more becomes known."""

    @abstractmethod
    def log_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Record up to 1000 points in order."""

    @abstractmethod
    def log_artifact(self, path: Path, subdir: str) -> None:
        """Store a file under `subdir` (may be empty); may come after `finish` if it failed before."""

    @abstractmethod
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or overwrite tags."""

    @abstractmethod
    def finish(self, outcome: RunOutcome, *, time_ms: int | None = None) -> None:
        """Close the run, which ended at `time_ms` (now, if that is None)."""

    def where(self) -> str:
        """Return one line that tells a person how to look at the run."""
        return ""
