"""The data source `code_tasks.micro_chain`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attrs import define
from weighted_mtp_core.api import Example, Split, is_correct

from weighted_mtp_code_tasks.labelled import LabelledSource


@define(kw_only=True, eq=False, slots=False)
class ChainSource(LabelledSource):
    """Supplies judged responses whose weights are 0 for the characters of a slip, otherwise 1.

    Attributes:
        imitate: Training responses that the policy imitates: `all`, or only the correct ones (`right`).
    """

    oracle_weights = True  # without an annotation, so that attrs does not make it an argument
    imitate: Literal["all", "right"] = "all"

    def policy_examples(self, split: Split) -> Sequence[Example]:
        """Return the responses that the policy imitates; for validation and test, the problems' solutions.

        The held-out responses are not used, because few of them are correct, and the correct ones contain few
        steps of the types in which slips are frequent. Solutions contain all types of steps with their usual
        frequency.
        """
        if split == "train":
            return [each for each in self.examples(split) if self.imitate == "all" or is_correct(each.reward)]
        return [
            Example(
                example_id=f"{problem.problem_id}/solution",
                problem_id=problem.problem_id,
                prompt=problem.prompt,
                response=problem.solution or "",
                reward=1.0,
            )
            for problem in self.problems(split)
        ]
