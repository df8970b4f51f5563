"""Time of advantages and weights, against the same formulas in a Python loop over tokens.

    python benchmarks/advantages.py

The batch has B = 8 rows of T = 2048 tokens. Generalised advantage estimation gives advantages A, which are
whitened; the weights are `clip(exp(A / beta))`. The benchmark needs the plugin `verifiable`.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from harness import Row, in_turns, main, ratio_row, row
from torch import Tensor
from weighted_mtp_core.api import BuildContext, ModelContext, StepView, WeightingStrategy

from weighted_mtp_verifiable import TdErrorOptions, build_td_error

ROWS, PROMPT = 8, 100


def make_view(positions: int) -> StepView:
    """Return a weighting's view of a batch in which each row consists of a prompt and a response."""
    generator = torch.Generator().manual_seed(0)
    shape = ROWS, positions
    response_BT = (torch.arange(positions) >= min(PROMPT, positions // 2)).expand(shape)
    reward_BT = torch.randint(2, (ROWS, 1), generator=generator).float().expand(shape) * response_BT
    return StepView(
        ids_BT=torch.zeros(shape, dtype=torch.int64),
        document_BT=torch.zeros(shape, dtype=torch.int64),
        response_BT=response_BT,
        target_BTK=response_BT[:, :, None],
        n_future=1,
        step=0,
        training=True,
        reward_BT=reward_BT,
        value_BT=torch.rand(shape, generator=generator),
    )


def loop_weights(view: StepView, options: TdErrorOptions) -> Tensor:
    """Compute the weights of `verifiable.td_error` in a loop over tokens, with tensor operations."""
    assert view.value_BT is not None
    assert view.reward_BT is not None
    advantage_BT = torch.zeros_like(view.value_BT)
    rows, positions = view.ids_BT.shape
    for b in range(rows):
        after, last = torch.tensor(0.0), True
        for t in range(positions - 1, -1, -1):
            if not view.response_BT[b, t] and last:
                continue
            before = view.value_BT[b, t - 1] if t else torch.tensor(0.0)
            gained = view.reward_BT[b, t] if last else options.gamma * view.value_BT[b, t]
            after = gained - before + options.gamma * options.lam * after
            advantage_BT[b, t] = after
            last = False
    chosen = advantage_BT[view.response_BT]
    weight_BT = torch.zeros_like(advantage_BT)
    mean, std = chosen.mean(), chosen.std(correction=0)
    for b in range(rows):
        for t in range(positions):
            if view.response_BT[b, t]:
                weight_BT[b, t] = torch.exp((advantage_BT[b, t] - mean) / std / options.beta).clamp(
                    *options.clip
                )
    return weight_BT


def strategy(options: TdErrorOptions) -> WeightingStrategy:
    """Build `verifiable.td_error` in the same way as a run."""

    def nothing(*_: object) -> None:
        return None

    model = ModelContext(
        n_future=1,
        hidden_size=1,
        vocab_size=1,
        device=torch.device("cpu"),
        frozen_trunk=nothing,  # type: ignore[arg-type]  # not used by a weighting
    )
    return build_td_error(options, BuildContext(seed=0, storage=None, model=model))  # type: ignore[arg-type]


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table.

    Raises:
        RuntimeError: The weights of the plugin and of the loop differ by 0.001 or more, or are not finite.
    """
    options = TdErrorOptions(estimator="gae", whiten="batch")
    view = make_view(64 if args.quick else 2048)
    ours = strategy(options)
    gap = float((ours.weigh(view).weight - loop_weights(view, options)).abs().max())
    if not gap < 1e-3 or not math.isfinite(gap):
        raise RuntimeError(f"the loop's weights differ by {gap}")
    repeat = 20

    def many() -> None:
        for _ in range(repeat):
            ours.weigh(view)

    times = in_turns(
        {"ours": many, "loop": lambda: loop_weights(view, options)}, rounds=2 if args.quick else 7
    )
    own_ms = [seconds / repeat * 1e3 for seconds in times["ours"].cpu]
    wall = statistics.median(times["ours"].wall) / repeat * 1e3
    size = f"B = {ROWS}, T = {view.ids_BT.shape[1]}"
    return [
        ratio_row(
            f"weights: per-token loop over ours, {size}",
            times["loop"],
            times["ours"],
            scale=repeat,
            limit=">= 300",
        ),
        row(f"weights: ours, {size}", own_ms, unit="ms", limit="<= 2", wall=wall),
    ]


if __name__ == "__main__":
    main(measure, __doc__)
