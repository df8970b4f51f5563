"""The data source `code_tasks.micro_chain`: programs with known mistakes, for experiments on token credit.

A problem is a chain of steps from the grammar of `micro_code`. A response has one line for each step and may
have a further line that only returns the result. Each type of step with a constant, such as "add 3", has one
typical mistake, called a slip: the same step with the next constant ("add 4"). Slips are frequent in some
types of steps with a constant and rare in the others; steps without a constant have no slips. As usual, a
response is correct if it passes the tests when it is run. In addition, the positions of all slips are known:
the weights in the data are 0 for the characters of a slip and 1 for all other characters. A run with these
weights shows the largest gain that a weighting of tokens can bring on these data.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from attrs import field, frozen
from attrs import validators as v
from weighted_mtp_core.api import BuildContext, DataSource

from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings


@frozen(kw_only=True)
class MicroChainOptions:
    """`[data.options]` of `code_tasks.micro_chain`.

    Attributes:
        problems: Number of distinct functions: 80 % for training, 10 % for validation, 10 % for the test.
        length: Number of steps of each function.
        kinds: Types of arguments; each function has one argument of one of these types.
        responses: Number of responses per function that may contain slips.
        twins: Number of additional responses per function that contain no slips.
        slip_rates: Two probabilities of a slip in a step with a constant: the first for types of steps in
            which slips are frequent, the second for all other types.
        slipping_types: Share of the types in which slips are frequent, among the types of steps with a
            constant.
        imitate: Training responses that the policy imitates: `"all"`, or only the correct ones (`"right"`).
        seed: Seed of the problems and responses. It is separate from `run.seed`, so that runs with different
            seeds use the same data.
        sandbox: Method of confinement and limits for running the programs.
    """

    problems: int = field(default=1000, validator=v.ge(10))
    length: int = field(default=4, validator=[v.ge(1), v.le(8)])
    kinds: tuple[Literal["int", "list", "text"], ...] = field(default=("int",), validator=v.min_len(1))
    responses: int = field(default=1, validator=v.ge(1))
    twins: int = field(default=0, validator=v.ge(0))
    slip_rates: tuple[float, float] = field(
        default=(0.7, 0.05), validator=v.deep_iterable([v.ge(0), v.le(1)])
    )
    slipping_types: float = field(default=0.5, validator=[v.ge(0), v.le(1)])
    imitate: Literal["all", "right"] = "all"
    seed: int = field(default=0, validator=v.ge(0))
    sandbox: SandboxSettings = field(factory=SandboxSettings)


def build_micro_chain(options: MicroChainOptions, context: BuildContext) -> DataSource:
    """Build the data source; if its labels are not in storage, generate, run and label its programs."""
    from weighted_mtp_code_tasks.judging import FunctionJudge
    from weighted_mtp_code_tasks.micro_chain.chains import FORMAT, draw_chains
    from weighted_mtp_code_tasks.micro_chain.source import ChainSource

    drawing: dict[str, Any] = {
        "problems": options.problems,
        "length": options.length,
        "kinds": options.kinds,
        "responses": options.responses,
        "twins": options.twins,
        "slip_rates": options.slip_rates,
        "slipping_types": options.slipping_types,
        "seed": options.seed,
    }
    return ChainSource(
        name="micro_chain",
        recipe={"grammar": FORMAT, **drawing},
        draw=partial(draw_chains, **drawing),
        storage=context.storage,
        executor=context.executor,
        judge=FunctionJudge(sandbox=options.sandbox),
        imitate=options.imitate,
    )
