"""Speed of self-speculative decoding against plain decoding, greedy, with each kind of heads.

    python benchmarks/decoding.py

The micro model of configs/baseline.toml is trained with each kind of heads, which takes one or two minutes
per kind. Then plain and self-speculative decoding continue held-out prompts, in turns, one prompt at a time
and in batches; the texts of both methods must be equal. The cost of verifying a draft grows with the batch.
The newest run of configs/smollm2_humaneval.toml that can be loaded is measured as well, without limits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from attrs import evolve
from harness import Row, in_turns, main, ratio_row, row, within
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.evaluation.finished_run import plan_of, prepare_finished
from weighted_mtp_core.generation.generate import Decoding, Generations, generate
from weighted_mtp_core.model.policy import HEADS
from weighted_mtp_core.recipe.schema import HeadKind
from weighted_mtp_core.training.prepare import Prepared

PROMPTS, BATCHES = 32, (1, 8)
PRETRAINED, PRETRAINED_PROMPTS = "smollm2_humaneval", 4
WAYS: tuple[Decoding, ...] = ("plain", "self_speculative")
LIMITS = {"parallel": (">= 1.5", ">= 2.5")}  # of the speed-up, and of the tokens per forward pass
BEST = ">= 1.6"
RECIPE = Path(__file__).parents[1] / "configs" / "baseline.toml"


def trained(kind: HeadKind, folder: Path, *, quick: bool) -> Prepared:
    """Train the micro model with heads of this kind; return its data and its best policy."""
    settings = (f"model.heads.kind={kind}", f"run.output_dir={folder / kind}", "tracker=[]")
    overrides = [word for each in settings for word in ("--set", each)]
    preset = ["--preset", "ci"] if quick else []
    command = [sys.executable, "-m", "weighted_mtp_core", "run", str(RECIPE), *overrides, *preset]
    subprocess.run(command, check=True, stdout=sys.stderr)
    (run,) = (file.parent for file in (folder / kind).rglob("run.json"))
    return opened(run)


def opened(run: Path) -> Prepared:
    """Return the data and the best policy of a run."""
    return prepare_finished(run, plan_of(run), log=lambda text: print(text, file=sys.stderr))


def newest_usable(folder: Path, name: str) -> Prepared | None:
    """Return data and best policy of the newest run called `name` that can be loaded; None if there is none.

    Runs without a best policy are left out. Another run is skipped, with a message, if it cannot be loaded,
    for example because its plugin is not installed.
    """
    runs = {file.parent.parent for file in folder.rglob(f"{name}/*/checkpoints/best_model.pt")}
    for run in sorted(runs, key=lambda each: each.name, reverse=True):
        try:
            return opened(run)
        except WmtpError as error:
            print(f"the run `{run}` is skipped: {error}", file=sys.stderr)
    return None


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table."""
    with tempfile.TemporaryDirectory() as folder:
        kinds: dict[str, Prepared] = {kind: trained(kind, Path(folder), quick=args.quick) for kind in HEADS}
    count, rounds = (4, 2) if args.quick else (PROMPTS, 7)
    rows = [each for size in BATCHES for each in rows_of(kinds, size, count=count, rounds=rounds)]
    pretrained = newest_usable(Path("storage/runs"), PRETRAINED)
    if pretrained is None:
        print(f"SmolLM2 is skipped: no usable run of configs/{PRETRAINED}.toml", file=sys.stderr)
        return rows
    count, rounds = (1, 1) if args.quick else (PRETRAINED_PROMPTS, 3)
    for size in BATCHES:
        rows += rows_of({"SmolLM2": pretrained}, size, count=count, rounds=rounds)
    return rows


def rows_of(policies: Mapping[str, Prepared], size: int, *, count: int, rounds: int) -> list[Row]:
    """Measure policies on `count` prompts, in batches of `size` prompts; `LIMITS` apply only if `size` is 1.

    Raises:
        RuntimeError: Plain and self-speculative decoding gave different texts.
    """
    found: dict[tuple[str, Decoding], Generations] = {}

    def decode(name: str, decoding: Decoding) -> None:
        prepared = policies[name]
        texts = [problem.prompt for problem in prepared.source.problems("test")[:count]]
        found[name, decoding] = generate(
            prepared.policy,
            prepared.codec.encode_prompts(texts),
            max_new_tokens=prepared.plan.recipe.evaluate.max_new_tokens,
            eos_id=prepared.codec.eos_id,
            decoding=decoding,
            batch_size=size,
        )

    times = in_turns(
        {f"{name} {way}": partial(decode, name, way) for name in policies for way in WAYS}, rounds=rounds
    )
    rows, speeds = [], []
    for name in policies:
        plain, drafted = (found[name, way] for way in WAYS)
        if plain.tokens != drafted.tokens:
            raise RuntimeError(
                f"self-speculative decoding with {name} heads gave another text than plain decoding"
            )
        speed, tokens = LIMITS.get(name, ("", "")) if size == 1 else ("", "")
        speeds.append(
            ratio_row(
                f"decoding, {name}: plain over self-speculative, batch {size}",
                *(times[f"{name} {way}"] for way in WAYS),
                limit=speed,
                note=f"{plain.emitted} tokens of {count} prompts",
            )
        )
        rows += [
            speeds[-1],
            row(
                f"decoding, {name}: tokens a forward pass, batch {size}",
                [drafted.tokens_per_forward],
                limit=tokens,
                unit="tokens",
                note="including the passes over prompts",
            ),
        ]
    if size == 1 and len(policies) > 1:
        best = max(speeds, key=lambda each: each.value)
        rows.append(
            evolve(
                best,
                name="decoding, best kind: plain over self-speculative, batch 1",
                limit=BEST,
                ok=within(best.value, BEST),
            )
        )
    return rows


if __name__ == "__main__":
    main(measure, __doc__)
