"""Speed of self-speculative decoding against plain decoding, greedy, on a finished run.

    make run
    python benchmarks/decoding.py --run storage/runs/...

The policy continues held-out prompts both ways, one prompt at a time and in batches, in turns; the texts must
be equal. A verified draft costs more in a larger batch. A finished run of configs/smollm2_humaneval.toml, if
there is one, is measured as well, without limits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from attrs import evolve
from harness import Row, in_turns, main, ratio_row, row
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.evaluation.finished_run import plan_of, prepare_finished
from weighted_mtp_core.generation.generate import Decoding, Generations, generate

PROMPTS, BATCHES = 32, (1, 8)
PRETRAINED, PRETRAINED_PROMPTS = "smollm2_humaneval", 4


def newest_run(folder: Path, *, pretrained: bool) -> Path | None:
    """Return the latest run, of the recipe with the pretrained model or of the other recipes."""
    runs = [path.parent.parent for path in folder.rglob("checkpoints/best_model.pt")]
    found = [run for run in runs if (run.parent.name == PRETRAINED) == pretrained]
    return max(found, key=lambda run: run.name, default=None)


def measure(args: argparse.Namespace) -> list[Row]:
    """Measure the group.

    Raises:
        WmtpError: There is no finished run.
    """
    folder = Path("storage/runs")
    run = args.run or newest_run(folder, pretrained=False)
    if run is None:
        raise WmtpError(f"there is no finished run below `{folder}`", hint="make run")
    rows = measure_run(run, "decoding", count=4 if args.quick else PROMPTS, rounds=2 if args.quick else 7)
    pretrained = newest_run(folder, pretrained=True)
    if pretrained is None:
        print(f"SmolLM2 is skipped: no finished run of configs/{PRETRAINED}.toml", file=sys.stderr)
        return rows
    count, rounds = (1, 1) if args.quick else (PRETRAINED_PROMPTS, 3)
    found = measure_run(pretrained, "decoding, SmolLM2", count=count, rounds=rounds)
    return [*rows, *(evolve(each, limit="", ok=None) for each in found)]


def measure_run(run: Path, name: str, *, count: int, rounds: int) -> list[Row]:
    """Measure the policy of one run on `count` prompts.

    Raises:
        RuntimeError: The two ways of decoding gave different texts.
    """
    prepared = prepare_finished(run, plan_of(run), log=lambda text: print(text, file=sys.stderr))
    problems = prepared.source.problems("test")[:count]
    texts = [problem.prompt for problem in problems]
    prompts = prepared.codec.encode_prompts(texts)
    rows = []
    for size in BATCHES:
        found: dict[Decoding, Generations] = {}

        def decode(decoding: Decoding, size: int, results: dict[Decoding, Generations]) -> None:
            results[decoding] = generate(
                prepared.policy,
                prompts,
                max_new_tokens=prepared.plan.recipe.evaluate.max_new_tokens,
                eos_id=prepared.codec.eos_id,
                decoding=decoding,
                batch_size=size,
            )

        ways: tuple[Decoding, ...] = ("plain", "self_speculative")
        variants: dict[str, Callable[[], object]] = {way: partial(decode, way, size, found) for way in ways}
        times = in_turns(variants, rounds=rounds)
        plain, drafted = found["plain"], found["self_speculative"]
        if plain.tokens != drafted.tokens:
            raise RuntimeError("self-speculative decoding gave another text than plain decoding")
        rows += [
            ratio_row(
                f"{name}: plain over self-speculative, batch {size}",
                times["plain"],
                times["self_speculative"],
                limit=">= 1.5" if size == 1 else "",
                note=f"{plain.emitted} tokens of {len(prompts)} prompts",
            ),
            row(
                f"{name}: tokens a forward pass, batch {size}",
                [drafted.tokens_per_forward],
                limit=">= 2.5" if size == 1 else "",
                unit="tokens",
                note="including the passes over prompts",
            ),
        ]
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
