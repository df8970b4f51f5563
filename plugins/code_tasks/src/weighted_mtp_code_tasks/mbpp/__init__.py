"""The data source `code_tasks.mbpp`: MBPP's 964 problems, with correct and broken solutions.

The problems and their splits come from Austin et al. 2021, "Program Synthesis with Large Language Models".
"""

from __future__ import annotations

from functools import partial

from attrs import field, frozen
from attrs import validators as v
from weighted_mtp_core.api import BuildContext, DataSource, from_hub, sha256_of_file

from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings


@frozen(kw_only=True)
class MbppOptions:
    """`[data.options]` of `code_tasks.mbpp`.

    Attributes:
        path: The public `mbpp.jsonl`. Without this option, the data are downloaded once from the Hugging Face
            hub.
        samples: File of programs that models wrote: JSON lines, or a `.parquet` file, with the keys `task_id`
            and `program`. These programs are judged like all others.
        mutants: Maximum number of broken variants of each solution.
        incorrect_fraction: Share of incorrect responses among the training examples of the policy.
        seed: Seed of the random changes that break solutions.
        sandbox: Method of confinement and limits for running the programs.
    """

    path: str | None = None
    samples: str | None = None
    mutants: int = field(default=3, validator=v.ge(0))
    incorrect_fraction: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    seed: int = field(default=0, validator=v.ge(0))
    sandbox: SandboxSettings = field(factory=SandboxSettings)


def build_mbpp(options: MbppOptions, context: BuildContext) -> DataSource:
    """Build the data source; if its labels are not in storage, run and label its programs.

    Raises:
        WmtpError: The data cannot be downloaded, or a file or the sandbox cannot be used; see also
            `LabelledSource`.
    """
    from pathlib import Path

    from weighted_mtp_code_tasks.judging import AssertsJudge
    from weighted_mtp_code_tasks.labelled import LabelledSource
    from weighted_mtp_code_tasks.mbpp.problems import FORMAT, read_problems

    path = (
        Path(options.path)
        if options.path is not None
        else from_hub(
            "google-research-datasets/mbpp",
            "full",
            split="test+validation+train",
            folder=context.storage / "downloads",
        )
    )
    samples = None if options.samples is None else Path(options.samples)
    drawing = {"mutants_per_solution": options.mutants, "seed": options.seed}
    return LabelledSource(
        name="mbpp",
        recipe={
            "mbpp": FORMAT,
            "source": sha256_of_file(path),
            "samples": samples and sha256_of_file(samples),
            **drawing,
        },
        draw=partial(read_problems, path, samples=samples, **drawing),
        storage=context.storage,
        executor=context.executor,
        judge=AssertsJudge(sandbox=options.sandbox),
        incorrect_fraction=options.incorrect_fraction,
    )
