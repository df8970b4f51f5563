"""`code_tasks.micro_chain`: programs with typical slips at known places, for experiments on token credit.

A problem is a chain of steps from the grammar of `micro_code`, and a response has one line for each step.
Each type of step, such as "add 3", has one typical mistake, called a slip: the same step with the next
constant ("add 4"). Slips are frequent in some types of steps. A response is correct if it passes the tests
when it is run, but the places of all slips are known: the weights in the data are 0 on the characters of a
slip and 1 elsewhere. A run with these weights shows the largest gain that a weighting of tokens could bring
on these data.
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
        problems: Number of distinct functions, which are split 8 : 1 : 1.
        length: Number of steps of each function.
        kinds: Types of the functions' arguments; each function has one of them.
        responses: Number of responses per function that may contain slips.
        twins: Number of additional responses per function without slips.
        slip_rates: Probability of a slip in a step: for the types with frequent slips, and for all other
            types.
        slipping_types: Share of the types of steps in which slips are frequent.
        imitate: Which training responses the policy imitates: `"all"`, or only the `"right"` ones.
        seed: Seed of the grammar; separate from `run.seed`, so that all seeds of a study share their data.
        sandbox: Back end and limits of the sandbox.
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
    """Build the data source; if its programs are not in storage, draw and label them."""
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
