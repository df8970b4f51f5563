"""Examples, problems and verdicts, and the kind of component that offers them: the data source."""

from __future__ import annotations

import enum
from abc import abstractmethod
from collections.abc import Sequence
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
    """Return whether a response with this reward counts as correct: whether the reward is at least 0.5.

    Args:
        reward: Rewards in [0, 1]: a number, or an array or tensor of any shape.

    Returns:
        A bool, or a boolean array or tensor of the same shape.
    """
    return reward >= 0.5


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


class DataSource(Stateful):
    """Examples to learn from and problems to be judged on: random access, deterministic order."""

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """Return every labelled response of the split, right and wrong ones: the critic's data."""

    def policy_examples(self, split: Split) -> Sequence[Example]:
        """Return what the policy imitates; by default the correct responses."""
        return [example for example in self.examples(split) if is_correct(example.reward)]

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
