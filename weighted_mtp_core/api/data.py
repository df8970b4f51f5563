"""Define data sources: components that supply examples for training and problems for evaluation."""

from __future__ import annotations

import enum
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from attrs import field, frozen
from attrs import validators as v

from weighted_mtp_core.api.components import Stateful
from weighted_mtp_core.errors import WmtpError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@overload
def is_correct(reward: float) -> bool: ...
@overload
def is_correct(reward: NDArray[np.floating[Any]]) -> NDArray[np.bool_]: ...
@overload
def is_correct(reward: Tensor) -> Tensor: ...
def is_correct(reward: Any) -> Any:
    """Return whether a response with this reward counts as correct: the reward must be at least 0.5.

    Args:
        reward: Rewards in [0, 1]: a number, or an array or tensor of any shape.

    Returns:
        A bool, or a boolean array or tensor of the same shape.
    """
    return reward >= 0.5


Span = tuple[int, int, float]
"""Characters of a response and their weight, as (start, end, weight); `end` is exclusive."""


def check_weight(value: object, name: str) -> None:
    """Raise ValueError unless `value` is a finite number; the message calls the value `name`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_spans(spans: Sequence[Span], *, length: int) -> None:
    """Raise ValueError if spans overlap, are empty, have invalid weights or exceed `length` characters."""
    end = 0
    for span in sorted(spans):
        start, end_before, end = span[0], end, span[1]
        check_weight(span[2], f"the weight of the span {list(span)}")
        if not 0 <= start < end <= length:
            raise ValueError(f"the span {list(span)} is not within the {length} characters of the text")
        if start < end_before:
            raise ValueError(f"the span {list(span)} begins before the end of another one")


def check_message_weights(message: Mapping[str, Any], number: int) -> None:
    """Raise ValueError if the weights of a message are invalid; `number` is its 1-based index in the chat."""
    for key in {"weight", "weights"} & set(message):
        if message["role"] != "assistant":
            raise ValueError(f"message {number} has `{key}`, but only the assistant's are learned")
    if "weight" in message:
        check_weight(message["weight"], f"the `weight` of message {number}")
    try:
        check_spans(message.get("weights", ()), length=len(message.get("content") or ""))
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from error


def _check_metadata(_: object, __: object, metadata: Mapping[str, str | float]) -> None:
    for key, value in metadata.items():
        if not isinstance(key, str) or isinstance(value, bool) or not isinstance(value, str | int | float):
            fault = f"must map strings to strings or numbers, got {key!r}: {value!r}"
            raise ValueError(f"`metadata` {fault}")  # noqa: TRY004 - a fault of the data


def _check_weight(_: object, __: object, value: float) -> None:
    check_weight(value, "`weight`")


@frozen(kw_only=True)
class Example:
    """One response to one problem.

    Attributes:
        example_id: Unique within the data source and the same in every run.
        problem_id: Id of the problem, shared by all responses to it.
        prompt: Text before the response; the policy is never trained to predict its tokens.
        response: Text that the policy learns to write. Core appends EOS to the response.
        reward: Verified outcome of the whole response, in [0, 1]; 1 if the outcome is unknown.
        weight: Weight that the data give to each token of the response, including EOS, for `Signal.GIVEN`.
            The weight is finite, and >= 0 unless `BuildContext.negative_weights` is true. If `weight` is
            None, the weight is 1.
        spans: Weights of parts of the response. A span (start, end, weight) covers the characters
            `response[start:end]`; spans do not overlap. The weight of a token in a span is the span's weight
            times `weight`; the weight of EOS and of tokens outside all spans is `weight`. For a token that
            crosses the edge of a span, the weights of its characters are averaged.
        messages: A chat, which the policy reads and learns instead of `prompt` and `response`, in the layout
            that chat templates read: objects with `role` and `content`. The last message has the role
            `assistant`. A message of the assistant may have a `weight`, which is multiplied by the example's
            `weight`, and `weights`, which are spans of the message's `content` in the form of `spans`. If an
            example has messages, core uses `prompt` and `response` only to check and describe the data, and
            to train the tokenizer of a `micro` model.
        tools: Descriptions of tools for the template of a chat.
        metadata: Other data about the response, as strings or numbers by key. A weighting receives this
            mapping in `StepView.metadata`.
    """

    example_id: str
    problem_id: str
    prompt: str
    response: str
    reward: float = field(validator=[v.ge(0.0), v.le(1.0)])
    weight: float | None = field(default=None, validator=v.optional(_check_weight))
    spans: tuple[Span, ...] | None = field(default=None)
    messages: tuple[Mapping[str, Any], ...] = field(default=())
    tools: tuple[Mapping[str, Any], ...] = ()
    metadata: Mapping[str, str | float] = field(factory=dict, validator=_check_metadata)

    @property
    def has_weights(self) -> bool:
        """Whether the data give weights for this response."""
        of_messages = any("weight" in message or "weights" in message for message in self.messages)
        return of_messages or self.weight is not None or self.spans is not None

    @messages.validator
    def _check_messages(self, _: object, messages: tuple[Mapping[str, Any], ...]) -> None:
        for number, message in enumerate(messages, start=1):
            check_message_weights(message, number)

    @spans.validator
    def _check_spans(self, _: object, spans: tuple[Span, ...] | None) -> None:
        if spans and self.messages:
            raise ValueError("`spans` are for a response, not for a chat")
        check_spans(spans or (), length=len(self.response))


@frozen(kw_only=True)
class Problem:
    """One task with a way to verify completions of its prompt.

    Attributes:
        problem_id: Unique within the data source and the same in every run.
        prompt: Text that the policy completes.
        entry_point: Name of the function that the tests call.
        tests: Python source that defines `check(candidate)`; `check` raises AssertionError if the candidate
            function is wrong.
        solution: A correct completion of the prompt, if one is known.
    """

    problem_id: str
    prompt: str
    entry_point: str
    tests: str
    solution: str | None = None


class VerdictKind(enum.Enum):
    """The kinds of verdict on one completion. Only PASSED, WRONG and ERROR judge the completion itself.

    PASSED: every test passed. WRONG: a test failed. ERROR: the program raised an exception. CPU_LIMIT,
    WALL_LIMIT, MEMORY, OUTPUT: the program exceeded a limit of CPU time, wall-clock time, memory or output.
    VIOLATION: the program attempted something forbidden. UNENCODABLE: the program returned a value that is
    too large or of a type that cannot be encoded. JUDGE_ERROR: verification itself failed.
    """

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
    """The verdict on one completion, with one line of explanation in `detail`."""

    kind: VerdictKind
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether every test passed."""
        return self.kind is VerdictKind.PASSED

    @property
    def is_label(self) -> bool:
        """Whether the verdict may become a training label: PASSED, WRONG or ERROR."""
        return self.kind in {VerdictKind.PASSED, VerdictKind.WRONG, VerdictKind.ERROR}


@frozen(kw_only=True)
class DatasetVersion:
    """Name, version and SHA-256 (64 hexadecimal digits) of the data of a run."""

    name: str
    version: str
    sha256: str


class DataSource(Stateful):
    """Supplies, for each split, examples for training and problems for evaluation.

    All returned sequences must support random access and have the same order in every process. A problem
    must not be in two splits.

    Attributes:
        oracle_weights: Whether the weights in the data mark known mistakes, which real data cannot do: such
            weights are below 1 on mistakes and 1 elsewhere. If the weighting of a run reads oracle weights,
            the run gets the tag `wmtp.oracle`, because its result is an upper bound. A run on data with
            oracle weights measures the critic's values at the marked mistakes. If the policy learns from
            incorrect responses, the run also measures the weights of its weighting there.
    """

    oracle_weights: bool = False

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """Return all examples of the split, correct and incorrect; the critic learns from all of them."""

    def policy_examples(self, split: Split) -> Sequence[Example]:
        """Return the examples that the policy learns from; by default all correct examples."""
        return [example for example in self.examples(split) if is_correct(example.reward)]

    @abstractmethod
    def version(self) -> DatasetVersion:
        """Return the name, version and checksum of the data.

        Core caches the tokens of the data. As long as the returned version, the source code of the plugin and
        the options stay the same, core may use tokens that an earlier run cached. If the data can change for
        any other reason, `sha256` must change with the data.
        """

    def problems(self, split: Split) -> Sequence[Problem]:  # noqa: ARG002 - the default has none
        """Return the problems of the split.

        By default, there are no problems, because a source that does not define `verify` cannot verify
        completions.
        """
        return ()

    def completion(self, problem: Problem, text: str) -> str:  # noqa: ARG002 - the default takes all
        """Extract the completion from the text that the policy wrote; by default, return the whole text.

        Core saves the extracted completion and passes it unchanged to `verify`.

        Args:
            problem: The problem with the prompt that the policy continued.
            text: The text that the policy wrote after the prompt.
        """
        return text

    def verify(self, attempts: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Return one verdict for each pair (problem, completion), in the order of the pairs.

        Raises:
            WmtpError: The source cannot verify completions.
        """
        raise WmtpError(f"data source `{type(self).__name__}` cannot verify its {len(attempts)} completions")
