"""`verify`: judge completions against problems, both in HumanEval's public format, in the sandbox."""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.exit_codes import EXIT_DONE
from weighted_mtp_core.messages import did_you_mean

if TYPE_CHECKING:
    from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings
    from weighted_mtp_core.api import Verdict

_DESCRIPTION = """\
Judge samples in a sandbox. Problems: JSON lines with task_id, prompt, entry_point and test, which defines
check(candidate). Samples: JSON lines with task_id and completion. A file may be gzipped (.gz). Writes per
sample task_id, passed, verdict and detail, in the order of the samples."""
_EPILOG = """\
examples:
  verify --problems HumanEval.jsonl.gz --samples samples.jsonl --out results.jsonl
  verify --problems P.jsonl --samples S.jsonl --out R.jsonl --timeout 10 --memory 1024

verdicts: passed, wrong and error say something about a program; cpu_limit, wall_limit, memory, output,
violation, unencodable and judge_error leave it undecided. A sample without a problem, a malformed line or
a missing sandbox is an error, not a failed sample."""

_PROBLEM_KEYS = ("task_id", "prompt", "entry_point", "test")
_SAMPLE_KEYS = ("task_id", "completion")
_FAULTS_SHOWN = 10
_WALL_SECONDS_PER_CPU_SECOND = 6.0  # the backstop


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify", help="judge completions against problems", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument("--problems", metavar="P.jsonl", type=Path, required=True)
    parser.add_argument("--samples", metavar="S.jsonl", type=Path, required=True)
    parser.add_argument("--out", metavar="R.jsonl", type=Path, required=True, help="written whole at the end")
    parser.add_argument("--timeout", metavar="S", type=_positive(float), default=5.0, help="CPU seconds (5)")
    parser.add_argument(
        "--memory", metavar="MB", type=_positive(int), default=512, help="address space (512)"
    )
    parser.add_argument("--workers", metavar="N", type=_positive(int), default=0, help="(one a core)")
    return parser


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < 1e9:
            raise argparse.ArgumentTypeError(f"`{text}` is not above 0")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its messages
    return parse


def main(args: argparse.Namespace) -> int:
    """Judge and write the results."""
    from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings
    from weighted_mtp_core.storage.atomic import atomic_write

    if args.memory < 64:
        raise WmtpError(f"`--memory {args.memory}`: an interpreter needs at least 64 MB")
    if args.out.resolve() in {args.problems.resolve(), args.samples.resolve()}:
        raise WmtpError(f"`--out {args.out}` would overwrite its own input")
    problems = read_problems(args.problems)
    samples = read_samples(args.samples, problems)
    settings = SandboxSettings(
        cpu_seconds=args.timeout,
        wall_seconds=max(30.0, _WALL_SECONDS_PER_CPU_SECOND * args.timeout),
        memory_mb=args.memory,
        workers=args.workers,
    )
    verdicts = judge(problems, samples, settings=settings)
    lines = [
        json.dumps(
            {
                "task_id": sample["task_id"],
                "passed": verdict.passed,
                "verdict": verdict.kind.value,
                "detail": verdict.detail,
            }
        )
        for sample, verdict in zip(samples, verdicts, strict=True)
    ]
    atomic_write(args.out, "".join(f"{line}\n" for line in lines))
    counts = Counter(verdict.kind.value for verdict in verdicts)
    print(f"{counts['passed']} of {len(samples)} samples passed; results in {args.out}")
    print(", ".join(f"{kind} {count}" for kind, count in counts.most_common()))
    return EXIT_DONE


def judge(
    problems: Mapping[str, Mapping[str, str]],
    samples: Sequence[Mapping[str, str]],
    *,
    settings: SandboxSettings,
) -> list[Verdict]:
    """Judge samples, showing progress on a terminal; one verdict a sample, in their order."""
    from rich.console import Console
    from rich.progress import Progress

    from weighted_mtp_code_tasks.sandbox import Job, Sandbox, humaneval_tests

    tests = {
        name: humaneval_tests(
            prompt=problem["prompt"], entry_point=problem["entry_point"], test=problem["test"]
        )
        for name, problem in problems.items()
    }
    jobs = [
        Job(
            problems[sample["task_id"]]["prompt"] + sample["completion"],
            problems[sample["task_id"]]["entry_point"],
            tests[sample["task_id"]],
        )
        for sample in samples
    ]
    console = Console(stderr=True)
    with (
        Sandbox(settings) as sandbox,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(f"verifying in {sandbox.provenance['backend']}", total=len(jobs))
        return sandbox.judge(jobs, on_done=lambda: progress.advance(task))


# --------------------------------------------------------------------------- reading


def read_problems(path: Path) -> dict[str, dict[str, str]]:
    """Return problems by `task_id`.

    Raises:
        WmtpError: The file cannot be read, or lines of it are malformed.
    """
    rows, faults = _read_rows(path, _PROBLEM_KEYS)
    problems: dict[str, dict[str, str]] = {}
    for line, row in rows:
        if row["task_id"] in problems:
            faults.append(f"line {line}: a second problem `{row['task_id']}`")
        if not row["entry_point"].isidentifier():
            faults.append(f"line {line}, entry_point: `{row['entry_point']}` is no function's name")
        problems[row["task_id"]] = row
    _raise_any(path, faults)
    return problems


def read_samples(path: Path, problems: Mapping[str, object]) -> list[dict[str, str]]:
    """Return samples in their order.

    Raises:
        WmtpError: The file cannot be read, lines of it are malformed, or samples have no problem.
    """
    rows, faults = _read_rows(path, _SAMPLE_KEYS)
    unknown = [(line, row["task_id"]) for line, row in rows if row["task_id"] not in problems]
    faults += [f"line {line}: no problem has the task_id `{name}`" for line, name in unknown]
    _raise_any(path, faults, hint=did_you_mean(unknown[0][1], problems) if unknown else None)
    return [row for _, row in rows]


def _read_rows(path: Path, keys: Sequence[str]) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """Return the well-formed rows with their line numbers, and what is wrong with the others."""
    rows: list[tuple[int, dict[str, str]]] = []
    faults: list[str] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            faults.append(f"line {number}: no JSON ({error})")
            continue
        if not isinstance(row, dict):
            faults.append(f"line {number}: expected an object, got {type(row).__name__}")
            continue
        wrong = [key for key in keys if not isinstance(row.get(key), str)]
        faults += [
            f"line {number}, {key}: " + ("expected a string" if key in row else "is missing") for key in wrong
        ]
        if not wrong:
            rows.append((number, {key: row[key] for key in keys}))
    if not rows and not faults:
        faults.append("is empty")
    return rows, faults


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WmtpError(f"cannot read `{path}`: {reason}") from error


def _raise_any(path: Path, faults: Sequence[str], *, hint: str | None = None) -> None:
    if not faults:
        return
    problems = "1 problem" if len(faults) == 1 else f"{len(faults)} problems"
    more = [f"and {len(faults) - _FAULTS_SHOWN} more"] if len(faults) > _FAULTS_SHOWN else []
    shown = "".join(f"\n  {fault}" for fault in [*faults[:_FAULTS_SHOWN], *more])
    raise WmtpError(f"{path}: {problems}{shown}", hint=hint)
