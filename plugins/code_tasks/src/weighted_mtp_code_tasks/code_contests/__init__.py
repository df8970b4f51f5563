"""The data source `code_tasks.code_contests`: correct and incorrect programs from programming contests.

The programs read stdin and write stdout. The data come from Li et al. 2022, "Competition-Level Code
Generation with AlphaCode".
"""

from __future__ import annotations

from functools import partial

from attrs import field, frozen
from attrs import validators as v
from weighted_mtp_core.api import BuildContext, DataSource, WmtpError, sha256_of_file

from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings


@frozen(kw_only=True)
class CodeContestsOptions:
    """`[data.options]` of `code_tasks.code_contests`; only programs in Python 3 are used.

    Attributes:
        train: Public files of the split `train`: `.parquet` files or JSON lines.
        validation: Public files of the split `valid`: `.parquet` files or JSON lines.
        test: Public files of the split `test`: `.parquet` files or JSON lines.
        problems: Maximum number of problems per split, from the beginning of the files; 0 means no limit.
        cases: Maximum number of tests per problem: first public tests, then private, then generated tests.
        solutions: Maximum number of programs per problem that are correct according to the files.
        incorrect: Maximum number of programs per problem that are incorrect according to the files.
        incorrect_fraction: Share of incorrect responses among the training examples of the policy.
        sandbox: Method of confinement and limits for running the programs.
    """

    train: tuple[str, ...] = field(default=())
    validation: tuple[str, ...] = field(default=())
    test: tuple[str, ...] = field(default=())
    problems: int = field(default=0, validator=v.ge(0))
    cases: int = field(default=10, validator=v.ge(1))
    solutions: int = field(default=4, validator=v.ge(1))
    incorrect: int = field(default=4, validator=v.ge(0))
    incorrect_fraction: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])
    sandbox: SandboxSettings = field(factory=SandboxSettings)


def build_code_contests(options: CodeContestsOptions, context: BuildContext) -> DataSource:
    """Build the data source; if its labels are not in storage, run and label its programs.

    Raises:
        WmtpError: The options name no files, or a file or the sandbox cannot be used; see also
            `LabelledSource`.
    """
    from pathlib import Path

    from weighted_mtp_core.api import Split

    from weighted_mtp_code_tasks.code_contests.problems import FORMAT, Limits, read_problems
    from weighted_mtp_code_tasks.judging import StdinJudge
    from weighted_mtp_code_tasks.labelled import LabelledSource

    named: dict[Split, tuple[str, ...]] = {
        "train": options.train,
        "validation": options.validation,
        "test": options.test,
    }
    files = {split: [Path(path) for path in paths] for split, paths in named.items() if paths}
    if not files:
        raise WmtpError(
            "name the public files of a split (`train`, `validation`, `test`): they are too large to fetch",
            hint='for example `train = ["data/train-00000-of-00039.parquet"]` in `[data.options]`',
        )
    limits = Limits(
        problems=options.problems,
        cases=options.cases,
        solutions=options.solutions,
        incorrect=options.incorrect,
    )
    return LabelledSource(
        name="code_contests",
        recipe={
            "code_contests": FORMAT,
            "files": {split: [sha256_of_file(path) for path in paths] for split, paths in files.items()},
            **limits.as_dict(),
        },
        draw=partial(read_problems, files, limits),
        storage=context.storage,
        executor=context.executor,
        judge=StdinJudge(sandbox=options.sandbox),
        incorrect_fraction=options.incorrect_fraction,
        # Many problems have several correct answers, but tests for only one of them.
        tolerated_failures=0.5,
    )
