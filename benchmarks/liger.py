"""Liger's fused linear scaled cross-entropy against our loss, for one head with a weight per token.

    python benchmarks/bench.py --gpu liger

D = 2048, V = 49152, T = 8192, 40 % of the tokens supervised, bfloat16. Liger's function returns the loss of
each token. The weights are applied to these losses, and autograd computes the gradients. On Hopper GPUs,
Liger uses a kernel; on other devices, it computes the logits in chunks, and computes them again for the
gradient. `make gpu` installs Liger from benchmarks/requirements-gpu.txt. Liger needs Triton, so this group
has no rows on a CPU.

Shape letters: T positions, N supervised pairs of head 1, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import GPU, Row, in_turns, main, peak_mib, ratio_row, row
from loss import Case
from weighted_mtp_core.model.targets import target_mask

PACKAGES = Path(__file__).parents[1] / ".venv" / "bench-packages"
SIZES = 8192, 1, 49152  # T, K, V


def liger_step(case: Case) -> Callable[[], torch.Tensor]:
    """Return a function that computes loss and gradients of the supervised pairs of head 1 with Liger."""
    sys.path.append(str(PACKAGES))
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    rows_N = target_mask(case.labels_BTK)[0, :, 0].nonzero()[:, 0]
    label_N, weight_N = case.labels_BTK[0, rows_N, 0], case.weight_BTK[0, rows_N, 0]
    matrix_VD = case.policy.unembedding.weight

    def step() -> torch.Tensor:
        state_ND = case.hidden_BTD[0].detach().requires_grad_().index_select(0, rows_N)
        ce_N = LigerFusedLinearScaledCrossEntropyFunction.apply(
            state_ND, matrix_VD.to(state_ND.dtype), label_N
        )
        loss = (weight_N * ce_N).sum() / weight_N.sum()
        case.policy.zero_grad(set_to_none=True)
        loss.backward()
        assert matrix_VD.grad is not None
        return matrix_VD.grad

    return step


def prepare(who: str) -> Callable[[], object]:
    """Return the function that computes one variant, for `peak_mib`."""
    case = Case.of(*SIZES)
    return case.fused if who == "ours" else liger_step(case)


def gap(case: Case, peer: Callable[[], torch.Tensor]) -> float:
    """Return the largest difference of the unembedding's gradients, over the largest entry of ours."""
    case.fused()
    own = case.policy.unembedding.weight.grad
    assert own is not None
    own = own.clone()
    return float((peer() - own).abs().max() / own.abs().max())


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table."""
    if GPU not in os.environ:
        print("Liger's kernels need a GPU")
        return []
    case = Case.of(*SIZES)
    peer = liger_step(case)
    difference = gap(case, peer)
    times = in_turns({"ours": case.fused, "Liger": peer}, rounds=3 if args.quick else 20, warmup=3)
    return [
        row("liger: largest relative difference of gradients", [difference], unit=""),
        ratio_row("liger: time of Liger's loss over ours", times["Liger"], times["ours"]),
        row("liger: ours", [1000 * each for each in times["ours"].wall], unit="ms"),
        row("liger: peak of ours", [peak_mib(prepare, "ours")], unit="MiB"),
        row("liger: peak of Liger's loss", [peak_mib(prepare, "Liger")], unit="MiB"),
    ]


if __name__ == "__main__":
    main(measure, __doc__)
