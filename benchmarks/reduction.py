"""What eight data-parallel processes send: gradients in buckets, against one call for each tensor.

    python benchmarks/reduction.py

The processes share two cores and communicate through gloo, so times mean little. The benchmark counts the
calls, and how many bytes are sent while the backward pass still runs. The model has the depth of
SmolLM2-135M, half its width, and K = 4. The benchmark needs 6 GB of memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from attrs import define, frozen
from harness import Row, main, row
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch, StepView, WeightingStrategy, Weights
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.recipe.schema import LossTable
from weighted_mtp_core.runtime.distributed import Distributed
from weighted_mtp_core.runtime.gradient_reduction import GradientReduction
from weighted_mtp_core.training import policy_learner
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting

K, POSITIONS = 4, 32
HALF = {
    "vocab_size": 49152,
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@define
class Sent:
    """What one process sends in one step to sum gradients, and the wall time of the step in seconds.

    `early` is the number of bytes that are sent before the backward pass has computed the last gradient.
    """

    calls: int = 0
    bytes: int = 0
    early: int = 0
    seconds: float = 0.0


class Ones(WeightingStrategy):
    """The same weight for each response token."""

    def weigh(self, view: StepView) -> Weights:
        """Return ones."""
        return Weights(weight=view.response_BT.float())


@frozen(kw_only=True, eq=False)
class Work:
    """The work of one process; all forked processes share `policy`, because it is never updated."""

    policy: Policy
    processes: int
    rounds: int
    folder: Path

    def run(self, rank: int, results: Any) -> None:
        """Run both variants in turns; the first process sends its measurements to the parent process."""
        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.folder / 'store'}",
            rank=rank,
            world_size=self.processes,
            timeout=timedelta(minutes=10),
        )
        found: dict[str, list[Sent]] = {"buckets": [], "tensors": []}
        for turn in range(-1, self.rounds):
            for name in sorted(found, reverse=turn % 2 == 1):
                sent = self._step(rank, as_tensors=name == "tensors")
                if turn >= 0:
                    found[name].append(sent)
        if rank == 0:
            results.put(found)
        dist.destroy_process_group()

    def _step(self, rank: int, *, as_tensors: bool) -> Sent:
        learner = PolicyLearner(
            policy=self.policy,
            weighting=Weighting(strategy=Ones(), needs=frozenset(), critic=None, label="benchmark"),
            loss=LossTable(),
            steps=1,
            pairs_per_step=(1.0,) * K,
            accumulation=1,
            distributed=Distributed(rank=rank, size=self.processes),
            autocast=lambda: torch.autocast("cpu", enabled=False),
            validation=list,
            best=self.folder / "best",
        )
        sent, batch = Sent(), batch_of(self.policy.vocab_size, rows=self.processes)
        self.policy.zero_grad(set_to_none=True)
        with ExitStack() as patches:
            if as_tensors:  # one call for each tensor, after the backward pass
                patches.enter_context(patch.object(policy_learner, "bucket_bytes", lambda _: 1))
                patches.enter_context(patch.object(GradientReduction, "begin", lambda _: None))
            dist.barrier()
            patches.enter_context(counted(sent, self.policy))
            began = time.perf_counter()
            learner.learn(batch, step=0)
            sent.seconds = time.perf_counter() - began
        return sent


@contextmanager
def counted(sent: Sent, policy: Policy) -> Iterator[None]:
    """Count the calls that sum gradients during the `with` block."""
    send, last = dist.all_reduce, next(policy.trunk.parameters())

    def all_reduce(tensor: torch.Tensor, **options: Any) -> Any:
        if options.get("async_op"):
            sent.calls += 1
            sent.bytes += tensor.nbytes
            sent.early += tensor.nbytes * (last.grad is None)
        return send(tensor, **options)

    with patch.object(dist, "all_reduce", all_reduce):
        yield


def batch_of(vocabulary: int, *, rows: int) -> Batch:
    """Return a batch in which the second half of each row is supervised."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (rows, POSITIONS), generator=generator)
    zero_BT = torch.zeros_like(ids_BT)
    return Batch(
        ids_BT=ids_BT,
        document_BT=zero_BT,
        response_BT=(torch.arange(POSITIONS) >= POSITIONS // 2).expand(rows, -1),
        reward_BT=zero_BT.float(),
        group_BT=zero_BT,
    )


def measure(args: argparse.Namespace) -> list[Row]:
    """Start the processes and return the rows of the first process; all processes send the same."""
    processes, rounds, shape = (2, 1, TINY) if args.quick else (8, 3, HALF)
    base = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    policy = make_policy(base, n_future=K, head_kind="parallel").train()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        work = Work(policy=policy, processes=processes, rounds=rounds, folder=Path(folder))
        started = [context.Process(target=partial(work.run, rank, results)) for rank in range(processes)]
        for process in started:
            process.start()
        found: dict[str, list[Sent]] = results.get(timeout=1800)
        for process in started:
            process.join()
    buckets, tensors = found["buckets"], found["tensors"]
    note = f"{processes} processes, {tensors[0].bytes / 1e6:.0f} MB of gradients"
    pairs = list(zip(buckets, tensors, strict=True))
    calls = f"{buckets[0].calls} and {tensors[0].calls} calls"
    return [
        row(
            "reduction: calls over one a tensor",
            [a.calls / b.calls for a, b in pairs],
            limit="<= 0.1",
            unit="x",
            note=calls,
        ),
        row(
            "reduction: bytes over one call a tensor",
            [a.bytes / b.bytes for a, b in pairs],
            limit="<= 1",
            unit="x",
            note=note,
        ),
        row(
            "reduction: share of the bytes sent during backward",
            [a.early / a.bytes for a in buckets],
            limit=">= 0.7",
            unit="x",
        ),
        row(
            "reduction: wall time of a step over one call a tensor",
            [a.seconds / b.seconds for a, b in pairs],
            limit="<= 1.05",
            unit="x",
        ),
        row("reduction: wall time of a step, one call a tensor", [b.seconds for b in tensors], unit="s"),
    ]


if __name__ == "__main__":
    main(measure, __doc__)
