"""Continue a prompt with a finished run.

The best policy of the run generates the text. The length limit, temperature, decoding and seed are those of
the run's recipe unless an option sets them. RUN may also be an exported model, which needs neither data nor
plugins. The text goes to stdout, and all other output goes to stderr; with several samples, a header line
precedes each text.

examples:
  generate 20261123-140924 --prompt 'def add(a, b):'
  generate models/sorter --prompt 'def add(a, b):'                    an exported model
  generate 20261123-140924 --samples 3 --temperature 0.8 < prompt.txt
  generate 20261123-140924 --prompt 'def f(x):' --decoding plain      one token per forward pass
"""

from __future__ import annotations

import argparse
import sys

from weighted_mtp_core.cli.arguments import add_run_arguments, evaluate_overrides
from weighted_mtp_core.errors import WmtpError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, also=", or an exported model")
    parser.add_argument("--prompt", metavar="TEXT", help="(default: stdin, without its last line break)")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="a text is cut off after N tokens")
    parser.add_argument("--temperature", metavar="T", type=float, help="0 is greedy")
    parser.add_argument("--samples", metavar="N", type=int, default=1, help="number of texts (default: 1)")
    parser.add_argument("--decoding", choices=("plain", "self_speculative"), help="with or without drafts")
    parser.add_argument("--seed", metavar="S", type=int, help="seed of the samples (default: run.seed)")


def main(args: argparse.Namespace) -> None:
    from weighted_mtp_core.evaluation.finished_run import find_finished, policy_loader
    from weighted_mtp_core.generation.generate import sample_completions

    run = find_finished(args.runs, args.run)
    changes = evaluate_overrides(args, "max_new_tokens", "temperature", "samples", "decoding")
    loader = policy_loader(run, overrides=["evaluate.pass_at_k=[1]", *changes])
    prompt = args.prompt if args.prompt is not None else sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise WmtpError("the prompt is empty", hint="give one: --prompt 'def add(a, b):'")
    policy, codec = loader.load(_log)
    table = loader.recipe.evaluate
    written = sample_completions(
        policy,
        codec,
        [("prompt", prompt)],
        samples=table.samples,
        temperature=table.temperature,
        seed=loader.recipe.run.seed if args.seed is None else args.seed,
        max_new_tokens=table.max_new_tokens,
        decoding=table.decoding,
        batch_size=table.batch_size,
        autocast=loader.compute.autocast,
    )
    for number, text in enumerate(written.completions[0], start=1):
        if table.samples > 1:
            print(f"--- sample {number} of {table.samples}")
        print(text)
    count, rate = written.generations.emitted, written.generations.tokens_per_forward
    _log(f"{count} tokens, {rate:.2f} a forward pass, {written.generations.seconds:.1f} s")


def _log(text: str) -> None:
    print(text, file=sys.stderr)
