"""The data source `code_tasks.gsm8k`: word problems of school mathematics.

A response is correct if its final number is correct. The data come from Cobbe et al. 2021, "Training
Verifiers to Solve Math Word Problems".
"""

from __future__ import annotations

from functools import partial

from attrs import field, frozen
from attrs import validators as v
from weighted_mtp_core.api import BuildContext, DataSource, WmtpError, from_hub, sha256_of_file


@frozen(kw_only=True)
class Gsm8kOptions:
    """`[data.options]` of `code_tasks.gsm8k`.

    The files are either `train` and `test`, or `path`; without these options, the public files are downloaded
    once from the Hugging Face hub. A file contains the public records (`question`, `answer`), or records with
    solutions of models (`question`, `ground_truth`, `solutions`). All solutions are judged; verdicts in files
    are ignored.

    Attributes:
        train: The public `train.jsonl`.
        test: The public `test.jsonl`.
        path: A single file whose questions are divided among the splits.
        validation_share: Share of the questions of the training file, or of `path`, in the split
            `validation`.
        test_share: Share of the questions of `path` in the split `test`.
        incorrect_fraction: Share of incorrect responses among the training examples of the policy.
    """

    train: str | None = None
    test: str | None = None
    path: str | None = None
    validation_share: float = field(default=0.1, validator=[v.ge(0), v.lt(1)])
    test_share: float = field(default=0.1, validator=[v.ge(0), v.lt(1)])
    incorrect_fraction: float = field(default=0.0, validator=[v.ge(0), v.lt(1)])


def build_gsm8k(options: Gsm8kOptions, context: BuildContext) -> DataSource:
    """Build the data source; if its labels are not in storage, judge its responses.

    Raises:
        WmtpError: The options name only one of `train` and `test`, or `path` in addition to these two; or a
            file cannot be used or downloaded; see also `LabelledSource`.
    """
    from pathlib import Path

    from weighted_mtp_code_tasks.gsm8k.numbers import NumberJudge
    from weighted_mtp_code_tasks.gsm8k.problems import FORMAT, Shares, read_problems
    from weighted_mtp_code_tasks.labelled import LabelledSource

    if (options.train is None) != (options.test is None) or (options.path and options.train):
        raise WmtpError(
            "name both public files (`train`, `test`) or one file (`path`)",
            hint='for example `train = "train.jsonl"` and `test = "test.jsonl"` in `[data.options]`',
        )
    if options.path is not None:
        shares = Shares(validation=options.validation_share, test=options.test_share)
        files = {Path(options.path): shares}
    elif options.train is not None and options.test is not None:
        train = Shares(validation=options.validation_share, test=0.0)
        files = {Path(options.train): train, Path(options.test): Shares(validation=0.0, test=1.0)}
    else:
        files = {
            from_hub("openai/gsm8k", "main", split=split, folder=context.storage / "downloads"): Shares(
                validation=options.validation_share if split == "train" else 0.0, test=float(split == "test")
            )
            for split in ("train", "test")
        }
    return LabelledSource(
        name="gsm8k",
        recipe={
            "gsm8k": FORMAT,
            "files": [
                [sha256_of_file(path), shares.validation, shares.test] for path, shares in files.items()
            ],
        },
        draw=partial(read_problems, files),
        storage=context.storage,
        executor=context.executor,
        judge=NumberJudge(),
        incorrect_fraction=options.incorrect_fraction,
    )
