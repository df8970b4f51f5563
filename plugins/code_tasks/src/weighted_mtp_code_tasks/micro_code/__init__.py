"""The data source `code_tasks.micro_code`: generated problems for experiments that take minutes.

The option `level` is the number of steps of each function. Functions of one step are easy to learn; functions
of more steps are harder.
"""

from __future__ import annotations

from functools import partial

from attrs import field, frozen
from attrs import validators as v
from weighted_mtp_core.api import BuildContext, DataSource

from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings


@frozen(kw_only=True)
class MicroCodeOptions:
    """`[data.options]` of `code_tasks.micro_code`.

    Attributes:
        problems: Number of distinct functions: 80 % for training, 10 % for validation, 10 % for the test.
        level: Number of steps of each function.
        solutions: Maximum number of different correct bodies per function.
        mutants: Maximum number of broken variants of each correct body.
        incorrect_fraction: Share of incorrect responses among the training examples of the policy.
        seed: Seed of the problems and responses. It is separate from `run.seed`, so that runs with different
            seeds use the same data.
        sandbox: Method of confinement and limits for running the programs.
    """

    problems: int = field(default=2000, validator=v.ge(10))
    level: int = field(default=2, validator=[v.ge(1), v.le(5)])
    solutions: int = field(default=2, validator=v.ge(1))
    mutants: int = field(default=1, validator=v.ge(0))
    incorrect_fraction: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    seed: int = field(default=0, validator=v.ge(0))
    sandbox: SandboxSettings = field(factory=SandboxSettings)


def build_micro_code(options: MicroCodeOptions, context: BuildContext) -> DataSource:
    """Build the data source; if its labels are not in storage, generate, run and label its programs."""
    from weighted_mtp_code_tasks.judging import FunctionJudge
    from weighted_mtp_code_tasks.labelled import LabelledSource
    from weighted_mtp_code_tasks.micro_code.generate import FORMAT, draw_problems

    drawing = {
        "problems": options.problems,
        "level": options.level,
        "solutions": options.solutions,
        "mutants_per_solution": options.mutants,
        "seed": options.seed,
    }
    return LabelledSource(
        name="micro_code",
        recipe={"grammar": FORMAT, **drawing},
        draw=partial(draw_problems, **drawing),
        storage=context.storage,
        executor=context.executor,
        judge=FunctionJudge(sandbox=options.sandbox),
        incorrect_fraction=options.incorrect_fraction,
    )
