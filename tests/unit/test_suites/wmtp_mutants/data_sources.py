"""Correct data sources, and mutants for the checks that only data sources must pass."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
from attrs import frozen
from weighted_mtp_core.api import DatasetVersion, DataSource, Example, Problem, Verdict, VerdictKind


@frozen(kw_only=True)
class NumberOptions:
    shift: int = 0


class SoundNumbers(DataSource):
    """Numbers to be doubled; problem n belongs to split n % 3; every other response is wrong."""

    caught_by: ClassVar[set[str]] = set()
    options = NumberOptions
    splits: ClassVar = {"train": 0, "validation": 1, "test": 2}

    def __init__(self, options: Any, context: Any) -> None:
        self.shift = options.shift

    def examples(self, split: Any) -> Sequence[Example]:
        return [
            Example(
                example_id=f"{n}/{reward:.0f}",
                problem_id=str(n),
                prompt=f"Twice {n + self.shift} is ",
                response=str(2 * (n + self.shift) + 1 - int(reward)),
                reward=reward,
            )
            for n in range(self.splits[split], 24, 3)
            for reward in (1.0, 0.0)
        ]

    def version(self) -> DatasetVersion:
        text = "".join(repr(self.examples(split)) for split in self.splits)
        return DatasetVersion(name="numbers", version="1", sha256=hashlib.sha256(text.encode()).hexdigest())

    def problems(self, split: Any) -> Sequence[Problem]:
        return [
            Problem(
                problem_id=str(n),
                prompt=f"Twice {n + self.shift} is ",
                entry_point="none",
                tests="",
                solution=str(2 * (n + self.shift)),
            )
            for n in range(self.splits[split], 24, 3)
        ]

    def verify(self, attempts: Any) -> list[Verdict]:
        return [
            Verdict(kind=VerdictKind.PASSED if completion == problem.solution else VerdictKind.WRONG)
            for problem, completion in attempts
        ]


class SoundWithoutProblems(SoundNumbers):
    """Cannot verify, and says so."""

    problems = DataSource.problems
    verify = DataSource.verify


class NothingToImitate(SoundNumbers):
    caught_by: ClassVar = {"test_there_is_something_to_train_on"}

    def policy_examples(self, split: Any) -> Sequence[Example]:
        return []


class Rotating(Sequence[Example]):
    """Iteration begins with the second item and ends with the first, unlike access by index."""

    def __init__(self, items: list[Example]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: Any) -> Any:
        return self.items[i]

    def __iter__(self) -> Any:
        return iter([*self.items[1:], self.items[0]])


class OrderOfItsOwn(SoundNumbers):
    caught_by: ClassVar = {"test_examples_are_random_access"}

    def examples(self, split: Any) -> Sequence[Example]:
        return Rotating(list(super().examples(split)))

    def version(self) -> DatasetVersion:
        return SoundNumbers(NumberOptions(shift=self.shift), None).version()


class EmptyResponse(SoundNumbers):
    caught_by: ClassVar = {"test_prompts_and_responses_hold_text"}

    def examples(self, split: Any) -> Sequence[Example]:
        first, *others = super().examples(split)
        return [attrs.evolve(first, response=""), *others]


class AnotherOrderEachTime(SoundNumbers):
    caught_by: ClassVar = {"test_the_same_examples_come_twice_in_the_same_order"}

    def __init__(self, options: Any, context: Any) -> None:
        super().__init__(options, context)
        self.asked = 0

    def examples(self, split: Any) -> Sequence[Example]:
        self.asked += 1
        examples = super().examples(split)
        return examples[::-1] if self.asked % 2 == 0 else examples

    def version(self) -> DatasetVersion:
        return SoundNumbers(NumberOptions(shift=self.shift), None).version()


class OrderOfASet(SoundNumbers):
    caught_by: ClassVar = {"test_examples_do_not_depend_on_the_hash_seed"}

    def examples(self, split: Any) -> Sequence[Example]:
        by_id = {example.example_id: example for example in super().examples(split)}
        return [by_id[name] for name in set(by_id)]


class SameIdsInEverySplit(SoundNumbers):
    caught_by: ClassVar = {"test_example_ids_are_unique"}

    def examples(self, split: Any) -> Sequence[Example]:
        return [attrs.evolve(each, example_id=str(i)) for i, each in enumerate(super().examples(split))]


class TrainsOnTheTest(SoundNumbers):
    caught_by: ClassVar = {"test_splits_share_no_problem"}

    def policy_examples(self, split: Any) -> Sequence[Example]:
        return [*super().policy_examples(split), *super().policy_examples("test")]


class ShortSha(SoundNumbers):
    caught_by: ClassVar = {"test_the_version_names_the_data"}

    def version(self) -> DatasetVersion:
        return attrs.evolve(super().version(), sha256=super().version().sha256[:36])


class VersionOfNothing(SoundNumbers):
    caught_by: ClassVar = {"test_other_data_have_another_sha256"}

    def version(self) -> DatasetVersion:
        return attrs.evolve(super().version(), sha256="0" * 64)


class VerdictsInAnyOrder(SoundNumbers):
    caught_by: ClassVar = {"test_verdicts_tell_right_from_wrong_in_order"}

    def verify(self, attempts: Any) -> list[Verdict]:
        return super().verify(attempts)[::-1]


class PassesEverything(SoundNumbers):
    caught_by: ClassVar = {"test_verdicts_tell_right_from_wrong_in_order"}

    def verify(self, attempts: Any) -> list[Verdict]:
        return [Verdict(kind=VerdictKind.PASSED) for _ in attempts]


class VerifiesNothing(SoundWithoutProblems):
    caught_by: ClassVar = {"test_a_source_without_problems_says_so"}

    def verify(self, attempts: Any) -> list[Verdict]:
        return []
