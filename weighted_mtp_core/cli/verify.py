"""Judge completions against problems.

The data source of the recipe judges samples, that is, completions of its problems. A file of samples consists
of JSON lines with task_id (or problem_id) and completion, gzipped (.gz) or not, such as the samples.jsonl of
a run. For each sample, in the order of the samples, the command writes task_id, passed, verdict and detail.

examples:
  verify configs/baseline.toml --samples samples.jsonl --out results.jsonl
  verify configs/baseline.toml --samples samples.jsonl --out results.jsonl --split validation

Only the data source of the recipe is used; --set data.use=PLUGIN.SOURCE selects another data source.
The verdicts passed, wrong and error state whether the completion is correct; the verdicts cpu_limit,
wall_limit, memory, output, violation, unencodable and judge_error leave this undecided. A sample without a
problem, a malformed line or a missing sandbox is an error of the command, not a failed sample.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from weighted_mtp_core.api import SPLITS, DataSource, Problem, Record, read_records
from weighted_mtp_core.cli.arguments import add_recipe_arguments, plan_from
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.messages import did_you_mean
from weighted_mtp_core.storage.atomic import atomic_write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--samples", metavar="S.jsonl", type=Path, required=True, help="file of samples")
    parser.add_argument("--out", metavar="R.jsonl", type=Path, required=True, help="file of verdicts")
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="split of the problems (default: test)"
    )


def main(args: argparse.Namespace) -> None:
    from rich.console import Console

    plan = plan_from(args)
    named = [value for key, value in plan.params.items() if key.startswith("data.options.")]
    if args.out.resolve() in {Path(path).resolve() for path in (args.samples, *plan.files, *named)}:
        raise WmtpError(f"`--out {args.out}` would overwrite its own input")
    source: DataSource = plan.data.build(plan.data_context)
    problems = {problem.problem_id: problem for problem in source.problems(args.split)}
    if not problems:
        raise WmtpError(
            f"data source `{plan.data.address}` has no problems in the split `{args.split}`",
            hint=_split_hint(source, None),
        )
    attempts = read_samples(args.samples, problems, source=source)
    with Console(stderr=True).status(f"judging {len(attempts)} samples"):
        verdicts = source.verify(attempts)
    rows = [
        {
            "task_id": problem.problem_id,
            "passed": verdict.passed,
            "verdict": verdict.kind.value,
            "detail": verdict.detail,
        }
        for (problem, _), verdict in zip(attempts, verdicts, strict=True)
    ]
    atomic_write(args.out, "".join(f"{json.dumps(row)}\n" for row in rows))
    counts = Counter(verdict.kind.value for verdict in verdicts)
    print(f"{counts['passed']} of {len(attempts)} samples passed; results in {args.out}")
    print(", ".join(f"{kind} {count}" for kind, count in counts.most_common()))


def read_samples(
    path: Path, problems: Mapping[str, Problem], *, source: DataSource
) -> list[tuple[Problem, str]]:
    """Return each sample's problem and completion, in the order of the file.

    Args:
        path: The file of samples.
        problems: The problems of the chosen split, keyed by id.
        source: The data source. If the problem of a sample is in another split, the hint of the error names
            this split.

    Raises:
        WmtpError: The file cannot be read, has malformed lines, or has samples without a problem; the message
            lists up to 20 of these lines.
    """
    unknown: list[str] = []

    def sample(record: Record) -> tuple[Problem, str]:
        name, completion = record.get("task_id", record.get("problem_id")), record.get("completion")
        if not isinstance(name, str):
            raise ValueError("needs `task_id` (or `problem_id`), a string")  # noqa: TRY004 - a fault of the file
        if not isinstance(completion, str):
            raise ValueError("needs `completion`, a string")  # noqa: TRY004
        if name not in problems:
            unknown.append(name)
            raise ValueError(f"no problem has the task_id `{name}`")
        return problems[name], completion

    try:
        return read_records(path, sample)
    except WmtpError as error:
        hint = (_split_hint(source, unknown) or did_you_mean(unknown[0], problems)) if unknown else None
        raise WmtpError(str(error), hint=hint) from error


def _split_hint(source: DataSource, names: Collection[str] | None) -> str | None:
    """Return a hint that names the splits with problems of these ids, or None if there is no such split.

    If `names` is None, all splits that have any problems are named.
    """
    found = [
        f"`--split {split}`"
        for split in SPLITS
        if any(names is None or problem.problem_id in names for problem in source.problems(split))
    ]
    return f"the problems are in another split: add {' or '.join(found)}" if found else None
