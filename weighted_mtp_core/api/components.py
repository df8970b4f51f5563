"""What a plugin declares (`Component`), what building gets, and the kinds `WeightingStrategy` and `Critic`.

Shape letters: B batch rows, T positions, K heads (`n_future`), H hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import pluggy
from attrs import field, frozen
from attrs import validators as v

from weighted_mtp_core.api.tensors import Batch, CriticLoss, Scores, Signal, StepView, Weights
from weighted_mtp_core.errors import WmtpError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

hookimpl = pluggy.HookimplMarker("weighted_mtp_core")
"""Marks a plugin's function as the implementation of a hook of `weighted_mtp_core.hookspecs`."""

SAME_RESULT: Mapping[str, bool] = MappingProxyType({"weighted_mtp_core.same_result": True})
"""Marks an option that does not change the result of a run: `field(default=0, metadata=SAME_RESULT)`.

A run can be resumed with another value of it, and compared with runs that have another value.
"""

OptionsT = TypeVar("OptionsT")
BuiltT_co = TypeVar("BuiltT_co", covariant=True)


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
    """

    seed: int
    storage: Path
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
class Finding:
    """One line of the checklist that `doctor` prints.

    Attributes:
        mark: `FAILED` if a run that uses the component cannot work here; `doctor` then exits with code 1.
        name: What was tried, in one or two words.
        text: The result. It must contain no secret.
        hint: What to do about it.
    """

    mark: Literal["ok", "warning", "FAILED"]
    name: str
    text: str
    hint: str | None = None


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
        examine: Tries what the component needs on this machine (a server, a sandbox), for `doctor`. Gets the
            options and the storage root, builds nothing, and yields one finding a line.
    """

    name: str = field(validator=v.matches_re(r"[a-z][a-z0-9_]*"))
    summary: str
    options: type[OptionsT]
    build: Callable[[OptionsT, BuildContext], BuiltT_co] = field(validator=v.is_callable())
    needs: frozenset[Signal] = frozenset()
    provides: frozenset[Signal] = frozenset()
    examine: Callable[[OptionsT, Path], Iterable[Finding]] | None = None


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
