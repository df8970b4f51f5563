"""Time and memory of the fused weighted loss, against the three matrix products that every loss needs.

    python benchmarks/loss.py

The heads return the trunk's states unchanged, so that only the loss is measured. V = 49152, K = 4, and 40 %
of the pairs are supervised, with random weights. On a CPU, D = 576 and T = 512, in float32; on a GPU,
D = 2048 and T = 8192, in bfloat16. Some rows have other T or K.

Shape letters: B rows, T positions, K heads, N supervised pairs of all heads, D hidden, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator

import torch
from attrs import frozen
from harness import GPU, MIB, Row, autocast, device, in_turns, main, peak_mib, ratio_row, row
from torch import Tensor, nn
from weighted_mtp_core.model.chunked_unembedding import CHUNK
from weighted_mtp_core.model.loss import normalisers, weighted_mtp_loss
from weighted_mtp_core.model.pair_predictions import PairPredictions
from weighted_mtp_core.model.targets import IGNORED, target_mask
from weighted_mtp_core.model.unembedding import Unembedding
from weighted_mtp_core.runtime.products import write_product

SUPERVISED = 0.4
D, DTYPE = (2048, torch.bfloat16) if GPU in os.environ else (576, torch.float32)


class BareHeads(nn.Module):
    """The parts of a policy that the loss uses: heads that change nothing, and an unembedding."""

    def __init__(self, n_future: int, vocabulary: int) -> None:
        super().__init__()
        self.n_future = n_future
        self.unembedding = Unembedding(nn.Linear(D, vocabulary, bias=False))

    chained = False

    @property
    def heads(self) -> BareHeads:
        """This object, which also has what the loss uses of a policy's heads."""
        return self

    def each_head_states(self, hidden_BTD: Tensor, **arguments: object) -> Iterator[Tensor]:
        """Yield the trunk's states, once for each head."""
        del arguments
        yield from [hidden_BTD] * self.n_future


@frozen(kw_only=True, eq=False)
class Case:
    """Inputs of one size, and the variants to measure as methods."""

    policy: BareHeads
    hidden_BTD: Tensor
    labels_BTK: Tensor
    weight_BTK: Tensor

    @classmethod
    def of(cls, positions: int, n_future: int, vocabulary: int) -> Case:
        """Make states, labels and weights from a fixed seed."""
        torch.manual_seed(0)
        shape = 1, positions, n_future
        with device():
            # All heads have equally many pairs. With random numbers of pairs, the largest number would grow
            # with K.
            counts_BTK = torch.rand(shape).argsort(dim=1) < SUPERVISED * positions
            return cls(
                policy=BareHeads(n_future, vocabulary),
                hidden_BTD=torch.randn(1, positions, D, dtype=DTYPE),
                labels_BTK=torch.randint(vocabulary, shape).where(counts_BTK, IGNORED),
                weight_BTK=torch.rand(shape).where(counts_BTK, 0.0),
            )

    def fused(self, weight_BTK: Tensor | None = None) -> None:
        """Compute loss and gradients in the same way as training."""
        weight_BTK = self.weight_BTK if weight_BTK is None else weight_BTK
        target_BTK, heads = target_mask(self.labels_BTK), self.policy.n_future
        with autocast():
            weighted_mtp_loss(
                self.policy,  # type: ignore[arg-type]  # has all parts of a Policy that the loss uses
                self._leaf(),
                labels_BTK=self.labels_BTK,
                weight_BTK=weight_BTK,
                normaliser_K=normalisers(weight_BTK, target_BTK, normalise="weights"),
                head_share_K=torch.full((heads,), 1 / heads, device=device()),
            )

    def losses_first(self) -> None:
        """Compute loss and gradients with weights that depend on the policy's losses, as in Rho-1."""
        with autocast():
            predictions = PairPredictions(self.policy, self._leaf().detach(), self.labels_BTK)  # type: ignore[arg-type]
            weight_BTK = predictions.losses()
        self.fused(weight_BTK)

    def full(self) -> None:
        """Compute loss and gradients with autograd from all logits, `[B, T, K, V]`."""
        target_BTK = target_mask(self.labels_BTK)
        normaliser_K = normalisers(self.weight_BTK, target_BTK, normalise="weights")
        states_BTD = self._leaf()
        heads = range(1, self.policy.n_future + 1)
        with autocast():
            logits = [self.policy.unembedding(states_BTD) for _ in heads]
        ce_BTK = nn.functional.cross_entropy(
            torch.stack(logits, dim=2).movedim(-1, 1),
            self.labels_BTK,
            ignore_index=IGNORED,
            reduction="none",
        )
        loss = ((self.weight_BTK * ce_BTK).sum(dim=(0, 1)) / normaliser_K).mean()
        torch.autograd.backward([loss])

    def _leaf(self) -> Tensor:
        """Clear the gradients, and return the states as a new leaf tensor that receives a gradient."""
        self.policy.zero_grad(set_to_none=True)
        return self.hidden_BTD.detach().requires_grad_()


def three_products(
    pairs: int, vocabulary: int, write: Callable[..., None] = write_product
) -> Callable[[], None]:
    """Return a function that computes only the three products of the loss, chunk by chunk and in place.

    The products are the logits, the gradient of the states and the gradient of the unembedding. The first two
    are computed with `write`, which has the arguments of `write_product`.
    """
    chunk, width = (8192, vocabulary) if GPU in os.environ else (CHUNK, 1024)
    with device():
        weight_VD, state_ND = torch.randn(vocabulary, D, dtype=DTYPE), torch.randn(pairs, D, dtype=DTYPE)
        logits_NV = torch.empty(min(chunk, pairs), vocabulary, dtype=DTYPE)
        gradient_ND, gradient_VD = torch.empty_like(state_ND), torch.zeros_like(weight_VD)

    def work() -> None:
        for first in range(0, pairs, chunk):
            rows = slice(first, min(first + chunk, pairs))
            part_NV = logits_NV[: rows.stop - rows.start]
            blocks = torch.split(weight_VD, width), torch.split(part_NV, width, dim=1)
            for block_MD, out_NM in zip(*blocks, strict=True):
                write(state_ND[rows], block_MD, out_NM=out_NM)
            write(part_NV, weight_VD.T, out_NM=gradient_ND[rows])
            gradient_VD.addmm_(part_NV.T, state_ND[rows], beta=0.5, alpha=1e-6)

    return work


def _write_with_torch(left_NI: Tensor, right_MI: Tensor, *, out_NM: Tensor) -> None:
    torch.mm(left_NI, right_MI.T, out=out_NM)


def prepare(variant: str, positions: int, n_future: int, vocabulary: int) -> Callable[[], object]:
    """Return one variant, for `peak_mib`, after a small call that loads what is loaded lazily."""

    def of(case: Case) -> Callable[[], object]:
        return {"fused": case.fused, "full": case.full}[variant]

    of(Case.of(16, n_future, 64))()
    return of(Case.of(positions, n_future, vocabulary))


def flatness(name: str, sizes: dict[int, tuple[int, int]], vocabulary: int) -> list[Row]:
    """Return the rows with the peak memory of each size, and with the largest over the smallest peak.

    The gradient of the unembedding is subtracted, because it is `[V, D]` for every size and so would hide any
    growth. Each size is measured three times, because a peak is occasionally some MiB higher.
    """
    gradient = vocabulary * D * 4 / MIB
    peaks = {
        size: [peak_mib(prepare, "fused", positions, n_future, vocabulary) - gradient for _ in range(3)]
        for size, (positions, n_future) in sizes.items()
    }
    rows = [row(f"loss: peak at {name} = {size}", found, unit="MiB") for size, found in peaks.items()]
    medians = [each.value for each in rows]
    worst = max(medians) / min(medians)
    return [*rows, row(f"loss: largest over smallest peak, over {name}", [worst], limit="<= 1.1", unit="x")]


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table."""
    positions, n_future, vocabulary, rounds = (64, 4, 512, 2) if args.quick else (512, 4, 49152, 4)
    positions = 8192 if GPU in os.environ and not args.quick else positions
    case = Case.of(positions, n_future, vocabulary)
    pairs = int(target_mask(case.labels_BTK).sum())
    times = in_turns(
        {
            "products": three_products(pairs, vocabulary),
            "torch": three_products(pairs, vocabulary, _write_with_torch),
            "fused": case.fused,
            "losses first": case.losses_first,
            "full": case.full,
        },
        rounds=rounds,
    )
    peaks = {each: peak_mib(prepare, each, positions, n_future, vocabulary) for each in ("fused", "full")}
    sizes = (16, 32) if args.quick else (512, 1024, 2048, 4096)
    heads = (1, 2) if args.quick else (1, 2, 4, 8)
    return [
        ratio_row("loss: time over three products", times["fused"], times["products"], limit="<= 1.3"),
        ratio_row("loss: time over full logits", times["fused"], times["full"], limit="<= 0.4"),
        ratio_row(
            "loss: time over three products, weights from current losses",
            times["losses first"],
            times["products"],
            limit="<= 1.6",
        ),
        ratio_row("loss: three products over those of torch", times["products"], times["torch"]),
        row("loss: peak", [peaks["fused"]], unit="MiB"),
        row("loss: peak of full logits", [peaks["full"]], unit="MiB"),
        row("loss: peak over full logits", [peaks["fused"] / peaks["full"]], limit="<= 0.15", unit="x"),
        *flatness("T", {size: (size, n_future) for size in sizes}, vocabulary),
        *flatness("K", {size: (positions, size) for size in heads}, vocabulary),
    ]


if __name__ == "__main__":
    main(measure, __doc__)
