"""The command `data sample` stores a model's texts, judged by a data source, as a version of a data set."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import cattrs
from attrs import asdict, frozen

from weighted_mtp_core import run_tags
from weighted_mtp_core.api import (
    SPLITS,
    DataSource,
    Example,
    Problem,
    Split,
    StoredDataset,
    Verdict,
    VerdictKind,
    example_statistics,
    store_dataset,
)
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.generation.samplers import SampledText, Sampler
from weighted_mtp_core.identifiers import flat
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.recipe.structure import plain
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.journal import Entry, Journal, read_journal

Unit = TypeVar("Unit")

_FORMAT = 1
SAMPLES, LEFT_OUT, STATISTICS = "samples.jsonl", "left_out.jsonl", "statistics.json"
_OF_EVALUATION = ("pass_at_k", "problems")  # keys of `[evaluate]` that do not affect the samples
_JUDGED_AT_ONCE = 128
_DIGITS = 6  # digits of log-probabilities after the decimal point


@frozen(kw_only=True, eq=False)
class SampledData:
    """The description of a data set of samples: what is sampled, and where the samples are stored.

    Attributes:
        model: Keys and values that identify the model, in a form that JSON can store; `name` is the model's
            name.
        sampler: Returns the sampler of the model; called only if texts are missing.
        problems: The problems.
        split: The split of the problems.
        source: The data source, which judges the completions.
        plan: The plan of the recipe: the number and length of the samples, the seed and the storage root.
        name: Name of the data set.
    """

    model: Mapping[str, Any]
    sampler: Callable[[], Sampler]
    problems: Sequence[Problem]
    split: Split
    source: DataSource
    plan: Plan
    name: str

    @property
    def depends_on(self) -> dict[str, Any]:
        """Everything on which the samples depend; a hash of these facts is the version of the data set."""
        data, table = self.source.version(), plain(self.plan.recipe.evaluate)
        options = dict(flat({"data": plain(self.plan.recipe.data)}))
        return {
            "format": _FORMAT,
            "model": dict(self.model),
            "data": {"name": data.name, "version": data.version, "sha256": data.sha256, "split": self.split},
            "options": {key: text for key, text in options.items() if key not in self.plan.same_result},
            "problems": len(self.problems),
            "evaluate": {key: value for key, value in table.items() if key not in _OF_EVALUATION},
            "seed": self.plan.recipe.run.seed,
            "source_sha256": self.plan.tags[run_tags.SOURCE_SHA256],
        }

    def store(self, display: Display) -> StoredDataset:
        """Return the data set; if it is not in storage, write it first.

        Texts and verdicts are kept in a journal. If the process is killed, the next call continues after the
        last entry of the journal.

        Raises:
            WmtpError: The journal or the stored data set is damaged, a prompt has no tokens or is too long,
                completions cannot be verified, or a server refuses the request or gives no log-probabilities.
            RunFailedError: A server does not answer, a log-probability is not finite, or no text can become
                data.
        """
        version = hashlib.sha256(json.dumps(self.depends_on, sort_keys=True).encode()).hexdigest()[:12]
        storage = Path(self.plan.recipe.run.storage)
        path = storage / "sampling" / f"{self.name}-{version}.jsonl"

        def write(folder: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(Journal(path)) as journal:
                self._write(folder, journal, display)

        stored = store_dataset(storage, name=self.name, version=version, write=write)
        path.unlink(missing_ok=True)
        return stored

    def _write(self, folder: Path, journal: Journal, display: Display) -> None:
        sampled = self._sample(journal, display)
        texts = [
            (problem, number, text)
            for problem, row in zip(self.problems, sampled, strict=True)
            for number, text in enumerate(row)
        ]
        attempts = [(problem, self.source.completion(problem, text.text)) for problem, _, text in texts]
        verdicts = self._judge(attempts, journal, display)
        kept: list[dict[str, Any]] = []
        left_out: list[dict[str, Any]] = []
        for (problem, number, text), (_, completion), verdict in zip(texts, attempts, verdicts, strict=True):
            why = _why_left_out(text, verdict)
            row = {
                "task_id": problem.problem_id,
                "sample": number,
                "prompt": problem.prompt,
                "response": text.text,
                "completion": completion,
                "verdict": verdict.kind.value,
                **({"is_correct": verdict.passed} if why is None else {"left_out": why}),
                "tokens": text.tokens,
                "logprobs": text.logprobs,
                "sampler": self.model["name"],
                "temperature": self.plan.recipe.evaluate.temperature,
                "seed": text.seed,
                "metadata": {"logprob": round(math.fsum(text.logprobs), _DIGITS)},
            }
            (kept if why is None else left_out).append(row)
        why_not = Counter(row["left_out"] for row in left_out)
        if not kept:
            raise RunFailedError(
                f"none of the {len(texts)} texts can become data: {_words(why_not)}",
                hint="raise `evaluate.max_new_tokens` if they are unfinished, or sample from another policy",
            )
        _write_rows(folder / SAMPLES, kept)
        _write_rows(folder / LEFT_OUT, left_out)
        splits = {split: example_statistics(()) for split in SPLITS}
        splits[self.split] = example_statistics(_examples(kept))
        statistics = {
            "splits": splits,
            "texts": len(texts),
            "verdicts": dict(Counter(verdict.kind.value for verdict in verdicts)),
            "left out": dict(why_not),
        }
        _write_json(folder / STATISTICS, statistics)
        _write_json(folder / "provenance.json", self.depends_on)

    def _sample(self, journal: Journal, display: Display) -> list[list[SampledText]]:
        """Return the texts of each problem."""
        samples = self.plan.recipe.evaluate.samples

        def compute(problems: Sequence[Problem], done: int) -> list[Any]:
            texts = sampler.sample(
                [(problem.problem_id, problem.prompt) for problem in problems],
                on_done=lambda more: display.update(done * samples + more, {}),
            )
            return [[_rounded(text) for text in row] for row in texts]

        known = _known(journal, "texts")
        if known:
            display.note(f"continues: texts of {len(known)} of {len(self.problems)} problems are there")
        if len(known) < len(self.problems):
            sampler = self.sampler()
            display.stage("sample", len(self.problems) * samples)
            at_once = max(1, sampler.at_once // samples)
            known = _resume(journal, "texts", self.problems, compute, known=known, at_once=at_once)
        return cattrs.structure(known, list[list[SampledText]])

    def _judge(
        self, attempts: Sequence[tuple[Problem, str]], journal: Journal, display: Display
    ) -> list[Verdict]:
        def compute(some: Sequence[tuple[Problem, str]], done: int) -> list[Any]:
            verdicts = self.source.verify(some)
            display.update(done + len(some), {})
            return [verdict.kind.value for verdict in verdicts]

        display.stage("judge", len(attempts))
        known = _known(journal, "verdicts")
        kinds = _resume(journal, "verdicts", attempts, compute, known=known, at_once=_JUDGED_AT_ONCE)
        return [Verdict(kind=VerdictKind(kind)) for kind in kinds]


def describe_counts(folder: Path) -> list[tuple[str, str]]:
    """Return lines about the texts of a stored data set: how many passed, and why texts are left out."""
    counts = json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
    passed = counts["verdicts"].get(VerdictKind.PASSED.value, 0)
    rows = [
        ("texts", f"{counts['texts']}: {_words(counts['verdicts'])}"),
        ("passed", f"{passed / counts['texts']:.1%} of the texts"),
    ]
    return [*rows, ("left out", _words(counts["left out"]))] if counts["left out"] else rows


def _known(journal: Journal, kind: str) -> list[Any]:
    """Return the results in the journal, in order.

    Raises:
        WmtpError: A line of the journal is damaged.
    """
    found: list[Any] = []
    for entry in read_journal(journal.path):
        if not isinstance(entry, Entry):
            raise WmtpError(f"`{journal.path}` is damaged", hint="delete it, then the command begins anew")
        if entry.kind == kind:
            found += entry.fields["results"]
    return found


def _resume(
    journal: Journal,
    kind: str,
    units: Sequence[Unit],
    compute: Callable[[Sequence[Unit], int], list[Any]],
    *,
    known: list[Any],
    at_once: int,
) -> list[Any]:
    """Return a result for each unit; compute missing results and write them to the journal.

    Args:
        journal: The journal.
        kind: Kind of the results in the journal.
        units: The units of work, for example problems.
        compute: Returns the results of some units in a form that JSON can store. The second argument of
            `compute` is the number of known results.
        known: The results of the first units, from the journal.
        at_once: Number of units that are computed together.
    """
    found = list(known)
    while len(found) < len(units):
        results = compute(units[len(found) : len(found) + at_once], len(found))
        journal.append(kind, {"results": results})
        found += results
    return found


def _rounded(text: SampledText) -> dict[str, Any]:
    """Return a text, with rounded log-probabilities, in a form that JSON can store.

    Raises:
        RunFailedError: A log-probability is not finite.
    """
    if not all(map(math.isfinite, text.logprobs)):
        raise RunFailedError(
            f"the log-probabilities of the text {text.text[:40]!r} are not finite",
            hint="the policy or the server computes NaN or infinity: use another dtype",
        )
    logprobs = [round(each, _DIGITS) for each in text.logprobs]
    return {**asdict(text), "logprobs": logprobs}


def _why_left_out(text: SampledText, verdict: Verdict) -> str | None:
    """Return why a text cannot become data; None if the text can become data."""
    if not text.finished:
        return "unfinished"  # training on the text would teach the policy to end there
    if not verdict.is_label:
        return verdict.kind.value
    if "\ufffd" in text.text:
        return "not_utf8"  # training on the text would teach the policy to write U+FFFD
    return None if text.text else "empty"


def _examples(rows: Sequence[Mapping[str, Any]]) -> Iterator[Example]:
    for number, row in enumerate(rows):
        yield Example(
            example_id=str(number),
            problem_id=row["task_id"],
            prompt=row["prompt"],
            response=row["response"],
            reward=float(row["is_correct"]),
        )


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
