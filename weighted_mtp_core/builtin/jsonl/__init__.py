"""`core.jsonl`: your own examples, one JSON object a line, in the Alpaca layout (Taori et al. 2023)."""

from __future__ import annotations

from attrs import field, frozen
from attrs import validators as v

from weighted_mtp_core.api import BuildContext, DataSource, WmtpError


@frozen(kw_only=True)
class JsonlOptions:
    """`[data.options]` of `core.jsonl`: either `path`, or a file a split.

    Attributes:
        path: One file, split by problem.
        train: File of the split `train`.
        validation: File of the split `validation`.
        test: File of the split `test`.
        validation_share: Share of the problems of `path` that validate.
        test_share: Share of the problems of `path` that test.
        seed: Of that split.
    """

    path: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    validation_share: float = field(default=0.1, validator=[v.ge(0), v.lt(1)])
    test_share: float = field(default=0.1, validator=[v.ge(0), v.lt(1)])
    seed: int = field(default=0, validator=v.ge(0))


def build_jsonl(options: JsonlOptions, context: BuildContext) -> DataSource:  # noqa: ARG001 - the same for all
    """Build the data source; every line is read and checked."""
    from weighted_mtp_core.builtin.jsonl.source import JsonlSource

    files = {"train": options.train, "validation": options.validation, "test": options.test}
    if (options.path is None) == all(file is None for file in files.values()):
        raise WmtpError(
            "name either one file (`path`) or a file for each split (`train`, `validation`, `test`)",
            hint='for example `path = "data/solutions.jsonl"` in `[data.options]`',
        )
    return JsonlSource(options)
