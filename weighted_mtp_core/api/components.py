"""Define how components are declared and built, and the base classes of weightings and critics.

Shape letters: B batch rows, T positions, K heads (`n_future`), H hidden, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
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

A run can resume with another value of a marked option, and `compare` accepts runs in which the values of
a marked option differ.
"""

OptionsT = TypeVar("OptionsT")
BuiltT_co = TypeVar("BuiltT_co", covariant=True)


def _no_frozen_losses(_: Path | None) -> Callable[[Batch], Tensor]:
    raise WmtpError("this context has no policy, so `frozen_losses` is not available")


def _no_trainable_losses() -> torch.nn.Module:
    raise WmtpError("this context has no policy, so `trainable_losses` is not available")


def _no_trainable_trunk(_: str | None) -> torch.nn.Module:
    raise WmtpError("this context has no policy, so `trainable_trunk` is not available")


def _no_tokenizer(_: object) -> Any:
    raise WmtpError("this context has no tokenizer, so `encode` and `decode` are not available")


@frozen(kw_only=True, eq=False)
class ModelContext:
    """What a component receives from the policy: sizes, device, tokenizer and copies of the model.

    Attributes:
        n_future: K, the number of heads.
        hidden_size: H, the size of the trunk's hidden states.
        vocab_size: V, the number of token ids.
        device: The device on which the component must keep its tensors.
        frozen_trunk: `frozen_trunk()` copies the current trunk and returns a function that maps a `Batch` to
            float32 hidden states `[B, T, H]` without gradient, computed in the precision of the policy.
        frozen_losses: `frozen_losses(None)` copies the current policy; `frozen_losses(path)` loads another
            model that uses the policy's tokenizer. `path` is the file `best_model.pt` or the folder of a run
            with the same `[model]` table, or a transformers directory, such as an exported model.
            `frozen_losses` returns a function that maps a `Batch` to float32 next-token losses `[B, T]` in
            nats, indexed by the predicted token. The losses are 0 except on response tokens that follow
            another token. The losses are computed in the precision in which the policy computes its losses.
        trainable_losses: `trainable_losses()` copies the current policy and returns a module that maps a
            `Batch` to the same next-token losses as the function from `frozen_losses`, but with gradients.
            The module uses no dropout. The component must train and save the parameters of the module.
        trainable_trunk: `trainable_trunk(None)` copies the current trunk; `trainable_trunk(base)` loads all
            layers and the final norm of another model that uses the policy's tokenizer, where `base` has the
            form of a recipe's `model.base`. `trainable_trunk` returns a module that maps a `Batch` to float32
            hidden states `[B, T, H]`, with gradients and without dropout. H is the module's attribute
            `hidden_size`. The component must train and save the parameters of the module.
        encode: `encode(text)` returns the ids of a text that continues a response, without BOS and EOS. The
            name of a control token in the text, such as `<eos>`, is encoded as ordinary text.
        decode: `decode(ids)` returns the text that these token ids add to a response, including the space
            before a word; control tokens add no text. Use `decode([id])` for the text of one token.
    """

    n_future: int
    hidden_size: int
    vocab_size: int
    device: torch.device
    frozen_trunk: Callable[[], Callable[[Batch], Tensor]]
    frozen_losses: Callable[[Path | None], Callable[[Batch], Tensor]] = field(default=_no_frozen_losses)
    trainable_losses: Callable[[], torch.nn.Module] = field(default=_no_trainable_losses)
    trainable_trunk: Callable[[str | None], torch.nn.Module] = field(default=_no_trainable_trunk)
    encode: Callable[[str], list[int]] = field(default=_no_tokenizer)
    decode: Callable[[Sequence[int]], str] = field(default=_no_tokenizer)
    _eos_id: int | None = field(default=None, alias="eos_id")

    @property
    def eos_id(self) -> int:
        """The token id of EOS, the end-of-sequence token that ends each response.

        Raises:
            WmtpError: The context was created without a tokenizer.
        """
        if self._eos_id is None:
            raise WmtpError("this context has no tokenizer, so `eos_id` is not available")
        return self._eos_id


@frozen(kw_only=True)
class WeightingChoice:
    """The type of an option that selects another weighting, with the keys of the table `[weighting]`.

    The type of an option may also be a tuple of `WeightingChoice`. Before anything is built, core loads the
    plugin of each chosen weighting, checks the options of the weighting, and adds the `needs` of the
    weighting to the `needs` of the component. The component builds the chosen weighting with
    `BuildContext.build_weighting`.

    Attributes:
        use: Address of the chosen weighting: `<plugin>.<component>`, or `<plugin>` if the plugin has only one
            weighting.
        options: Options of the chosen weighting.
    """

    use: str
    options: Mapping[str, Any] = field(factory=dict)


def not_chosen(choice: WeightingChoice) -> WmtpError:
    """Return the error for a weighting that no option of a component selects."""
    return WmtpError(f"`{choice.use}` is not named by an option of this component")


@frozen(kw_only=True, eq=False)
class BuildContext:
    """What `Component.build` receives in addition to the options.

    Attributes:
        seed: Seed for the component's own random generator.
        storage: The storage root, by default `storage/`, for files and caches.
        negative_weights: Whether the weights of examples may be negative. If `negative_weights` is False, a
            data source must refuse a negative weight with an error that contains the file and the row.
        executor: Runs expensive parts of the preparation of data, possibly on other machines, so its tasks
            must be functions of installed modules. If `executor` is None, a data source uses the CPU cores of
            this machine.
    """

    seed: int
    storage: Path
    negative_weights: bool = False
    executor: Executor | None = None
    _model: ModelContext | None = field(default=None, alias="model")
    _weightings: Callable[[WeightingChoice], WeightingStrategy] | None = field(
        default=None, alias="weightings"
    )

    @property
    def model(self) -> ModelContext:
        """Sizes, device, tokenizer and copies of the policy, for weightings and critics.

        Raises:
            WmtpError: The component is a data source or a tracker; core builds both before the policy.
        """
        if self._model is None:
            raise WmtpError("this component is built before the policy exists, so `context.model` is empty")
        return self._model

    def build_weighting(self, choice: WeightingChoice) -> WeightingStrategy:
        """Build the weighting that an option of the component selects; each call returns a new object.

        Raises:
            WmtpError: The weighting cannot be built, or no option of the component selects it.
        """
        if self._weightings is None:
            raise not_chosen(choice)
        return self._weightings(choice)


@frozen(kw_only=True)
class Finding:
    """One line of the checklist that `doctor` prints.

    Attributes:
        mark: `FAILED` if a run that uses the component would fail on this machine; `doctor` then exits with
            code 1. A `warning` does not change the exit code.
        name: What was checked, in one or two words.
        text: The result of the check; it must not contain secrets.
        hint: What the user can do about a failed check or a warning.
    """

    mark: Literal["ok", "warning", "FAILED"]
    name: str
    text: str
    hint: str | None = None


@frozen(kw_only=True)
class Component(Generic[OptionsT, BuiltT_co]):
    """The declaration of a component. A declaration must not import torch or any other slow package.

    Attributes:
        name: Must match `[a-z][a-z0-9_]*`; the address of the component is `<plugin>.<name>`.
        summary: One line about the component, which `plugins show` prints.
        options: A frozen, keyword-only attrs class. The recipe's table `options` becomes an instance of this
            class; unknown keys and values of a wrong type are errors.
        build: Called with the options and the context; returns the component. Slow packages such as torch are
            imported inside the build function.
        needs: Signals that a weighting reads.
        provides: Signals that a critic provides.
        negative_weights: Whether a weighting may return negative weights; the recipe must allow them too. A
            weighting that wraps other weightings sets `negative_weights` to True if it can handle negative
            weights of the wrapped weightings.
        refuse_critic: Called with the options of the recipe's critic before anything is built; returns why
            the weighting cannot use this critic, for example "needs probabilities", or None if the weighting
            can use it.
        examine: Called by the command `doctor` with the options and the storage root; checks what the
            component needs on this machine, such as a server or a sandbox. `examine` builds nothing and
            yields one finding for each check.
    """

    name: str = field(validator=v.matches_re(r"[a-z][a-z0-9_]*"))
    summary: str
    options: type[OptionsT]
    build: Callable[[OptionsT, BuildContext], BuiltT_co] = field(validator=v.is_callable())
    needs: frozenset[Signal] = frozenset()
    provides: frozenset[Signal] = frozenset()
    negative_weights: bool = False
    refuse_critic: Callable[[Any], str | None] | None = None
    examine: Callable[[OptionsT, Path], Iterable[Finding]] | None = None


class Stateful(ABC):  # noqa: B024 - both methods have a default: most components keep no state
    """A component with state that checkpoints save. By default, a component has no state."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, from which `load_state_dict` restores the component exactly.

        Each entry is a tensor or a value that JSON can store.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned.

        Raises:
            WmtpError: `state` was saved by another component.
        """
        if state:
            raise WmtpError(
                f"`{type(self).__name__}` has no state, but the checkpoint contains "
                + ", ".join(f"`{key}`" for key in sorted(state))
            )


class WeightingStrategy(Stateful):
    """Computes the weights of target tokens from the signals of a batch."""

    @abstractmethod
    def weigh(self, view: StepView) -> Weights:
        """Return the weights of the global batch.

        Core calls `weigh` without gradients: once per step of stage 2, and with `view.training` False for
        batches that are only measured.
        """


class Critic(Stateful):
    """Scores every token of a batch, for example with a value head, a value model or a reference model.

    Core calls `score` and `loss` under autocast with the policy's dtype, so matrix products may be in
    bfloat16. Scores and losses must be float32: convert tensors with `.float()` before sums, softmax and the
    last steps of a score.

    Attributes:
        trainable: Whether stage 1 trains the critic, unless the recipe's `critic.checkpoint` names a trained
            critic. A trainable critic must define `loss` and `parameters`, and must provide `Signal.VALUE` or
            `Signal.LOG_VALUE`, because stage 1 keeps the state in which the values have the highest AUC on
            held-out responses.
        reads_policy: Whether `score` and `loss` use the hidden states of the policy's trunk. If
            `reads_policy` is False, the argument `hidden_BTH` of `score` and `loss` is None.
        batching: Composition of the batches of stage 1. With `"pointwise"`, the rows are any responses; with
            `"pairs"`, rows 2i and 2i + 1 are a correct and an incorrect response to the same problem.
        cacheable: Whether scores depend only on the batch, the options, `state_dict()` and the frozen models
            that `ModelContext` returned. `cacheable` must be False, for example, if the critic itself loads a
            model from a file and does not include this model in its state. If `cacheable` is True and
            `reads_policy` is False, stage 2 of a run with one process computes the scores of each document
            once, and later runs with the same critic, data and batches reuse the scores, unless the recipe
            sets `critic.cache = false`.
        blocks: Modules, such as decoder layers, with matrices that core may shard over several processes
            (FSDP2) before stage 1. After sharding, `state_dict()` contains sharded tensors for these
            matrices, and `load_state_dict` receives tensors with the same sharding.
    """

    trainable: bool = False
    reads_policy: bool = True
    cacheable: bool = False
    batching: Literal["pointwise", "pairs"] = "pointwise"
    blocks: Sequence[torch.nn.Module] = ()

    @abstractmethod
    def score(self, batch: Batch, hidden_BTH: Tensor | None) -> Scores:
        """Return the scores of a batch, without gradient.

        Args:
            batch: Some rows of a batch, on the policy's device.
            hidden_BTH: float32 hidden states of the policy's trunk, detached; None unless `reads_policy`.
        """

    def begin_step(self, step: int, *, steps: int) -> None:
        """Prepare for a stage-1 step, for example by updating a schedule; called before each step.

        The effect must depend only on the arguments, so that a resumed run continues the schedule. If core
        never calls `begin_step`, the critic must behave as in the last step of stage 1.

        Args:
            step: 0-based index of the step.
            steps: Number of steps of stage 1.
        """

    def loss(self, batch: Batch, hidden_BTH: Tensor | None) -> CriticLoss:  # noqa: ARG002 - no default
        """Return the training loss of a batch, with a gradient for all `parameters()` and for nothing else.

        Args:
            batch: Some rows of the global batch, on the policy's device.
            hidden_BTH: float32 hidden states of the policy's trunk, detached; None unless `reads_policy`.

        Raises:
            WmtpError: The critic does not define `loss`.
        """
        raise WmtpError(f"critic `{type(self).__name__}` is trainable but does not define `loss`")

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """Return the parameters that stage 1 trains; empty if the critic is not trainable."""
        return ()
