"""Time of whole training steps on a model with the shape of SmolLM2-135M, against transformers' own step.

    python benchmarks/step.py

B = 1, T = 256, 40 % of the tokens supervised, AdamW, random weights. All variants train the same base model
with the same optimiser, to save memory. The benchmark needs the plugins `baseline_mtp`
and `verifiable` and 5 GB of memory.

Shape letters: B rows, T positions, K heads, V vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from harness import Row, Times, autocast, device, in_turns, main, ratio_row, row
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.api import Batch, BuildContext, Critic, ModelContext, Signal, WeightingStrategy
from weighted_mtp_core.data.batches import StepBatches
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.trunk import frozen_trunk
from weighted_mtp_core.recipe.schema import DataTable, HeadKind, LossTable
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.training.optimisers import clip_gradients, make_optimisers
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.score_cache import CachedCritic
from weighted_mtp_core.training.weighting_inputs import Weighting

from weighted_mtp_baseline_mtp import UniformOptions, build_uniform
from weighted_mtp_verifiable import TdErrorOptions, ValueHeadOptions, build_td_error, build_value_head

DOCUMENTS, SUPERVISED = 4, 0.4
SQUARE = 2048  # size of the matrix product that measures the machine's rate
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
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
NEEDS = frozenset({Signal.REWARD, Signal.VALUE})
TRUNK_HEAD = ValueHeadOptions(body="policy", layers=0, lm_loss_weight=0.0)
SEPARATE = ValueHeadOptions(body="frozen", layers=0, lm_loss_weight=0.0)


def documents(vocabulary: int, positions: int, count: int = DOCUMENTS) -> TokenSet:
    """Return documents of equal length; the last 40 % of each are the response."""
    generator = np.random.default_rng(0)
    return TokenSet(
        ids_N=generator.integers(vocabulary, size=count * positions).astype(np.int32),
        start_D1=np.arange(count + 1) * positions,
        prompt_D=np.full(count, round(positions * (1 - SUPERVISED)), dtype=np.int32),
        reward_D=np.arange(count, dtype=np.float32) % 2,
        problem_D=np.arange(count),
        example_ids=[str(d) for d in range(count)],
    )


def sharing_parameters(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a copy of a model with the same parameter objects, because a policy changes its model."""
    shared: LlamaForCausalLM = copy.deepcopy(model, {id(each): each for each in model.parameters()})
    return shared


@frozen(kw_only=True, eq=False)
class Bench:
    """One base model, policies that share its parameters, one optimiser, and the batches."""

    base: LlamaForCausalLM
    policies: Mapping[str, Policy]
    batches: StepBatches
    optimiser: torch.optim.Optimizer
    scratch: Path

    @classmethod
    @contextmanager
    def of(
        cls,
        shape: Mapping[str, int],
        positions: int,
        heads: Mapping[str, tuple[HeadKind, int]],
        *,
        batch_size: int = 1,
        base_is_frozen: bool = False,
    ) -> Iterator[Bench]:
        """Make everything except critics; `heads` maps the name of each policy to its kind of heads and K."""
        config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=2048)
        with device():
            base = LlamaForCausalLM(config).train()
        policies = {
            name: make_policy(sharing_parameters(base), n_future=n_future, head_kind=kind).train()
            for name, (kind, n_future) in heads.items()
        }
        if base_is_frozen:
            for policy in policies.values():
                policy.freeze_base()
        distinct = dict.fromkeys(each for policy in policies.values() for each in policy.parameters())
        batches = StepBatches(
            documents(shape["vocab_size"], positions, max(DOCUMENTS, batch_size)),
            DataTable(use="benchmark"),
            batch_size=batch_size,
            seed=0,
            device=device(),
        )
        (optimiser,) = make_optimisers(distinct, TrainTable(learning_rate=1e-5))
        with tempfile.TemporaryDirectory() as scratch:
            yield cls(
                base=base,
                policies=policies,
                batches=batches,
                optimiser=optimiser,
                scratch=Path(scratch),
            )

    def context(self) -> BuildContext:
        """Return the context with which components for the first policy are built."""
        policy = next(iter(self.policies.values()))
        model = ModelContext(
            n_future=policy.n_future,
            hidden_size=policy.hidden_size,
            vocab_size=policy.vocab_size,
            device=device(),
            frozen_trunk=partial(frozen_trunk, policy),
        )
        return BuildContext(seed=0, storage=self.scratch, model=model)

    def transformers_step(self) -> Callable[[int], None]:
        """Return a training step with the model and the loss of transformers, which computes all logits."""
        parameters = list(self.base.parameters())

        def step(number: int) -> None:
            batch = self.batches(number)
            labels_BT = batch.ids_BT.where(batch.response_BT, -100)
            with autocast():
                loss = self.base(input_ids=batch.ids_BT, labels=labels_BT, use_cache=False).loss
            loss.backward()
            self._update(parameters)

        return step

    def learner(
        self,
        policy: Policy,
        weighting: WeightingStrategy,
        *,
        needs: frozenset[Signal] = frozenset(),
        critic: Critic | None = None,
        loss: LossTable | None = None,
    ) -> PolicyLearner:
        """Return the learner of stage 2, which adds gradients to the parameters of a policy."""
        return PolicyLearner(
            policy=policy,
            weighting=Weighting(strategy=weighting, needs=needs, critic=critic, label="benchmark"),
            loss=loss or LossTable(),
            steps=1000,
            pairs_per_step=self.batches.pairs_per_step(policy.n_future),
            accumulation=1,
            autocast=autocast,
            validation=_no_batches,
            best=self.scratch / "best",
        )

    def our_step(self, learner: PolicyLearner) -> Callable[[int], None]:
        """Return a function that runs a training step of stage 2."""
        parameters = list(learner.parameters())

        def step(number: int) -> None:
            learner.learn(self.batches(number), step=number)
            self._update(parameters)

        return step

    def cached(self, critic: Critic) -> Critic:
        """Return a critic whose scores are all in a cache."""
        table = CachedCritic(critic, self.batches, accumulation=1, folder=self.scratch / "signals")
        for number in range(DOCUMENTS):
            table.score(self.batches(number), None)
        return table

    def _update(self, parameters: list[torch.nn.Parameter]) -> None:
        clip_gradients(parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def _no_batches() -> list[Batch]:
    return []


def flops(step: Callable[[int], None]) -> int:
    """Return the number of floating-point operations in a step's matrix products, except in attention."""

    def accumulated(_: Any, left: tuple[int, ...], right: tuple[int, ...], *_rest: Any, **_more: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    def with_onednn(left: tuple[int, ...], right: tuple[int, ...], *_rest: Any, **_more: Any) -> int:
        return 2 * left[0] * left[1] * right[0]

    formulas = {
        torch.ops.aten.addmm_: accumulated,
        torch.ops.mkldnn._linear_pointwise: with_onednn,  # noqa: SLF001
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step(0)
    return int(counter.get_total_flops())


def numbered(step: Callable[[int], None]) -> Callable[[], None]:
    """Return a function that runs the next step at each call."""
    done = 0

    def work() -> None:
        nonlocal done
        step(done)
        done += 1

    return work


def measure(args: argparse.Namespace) -> list[Row]:
    """Run this benchmark; return the rows of its table."""
    shape, positions, rounds = (TINY, 32, 3) if args.quick else (SMOLLM2, 256, 4)
    with Bench.of(shape, positions, {"four": ("parallel", 4), "one": ("parallel", 1)}) as bench:
        context, four, one = bench.context(), bench.policies["four"], bench.policies["one"]
        uniform = build_uniform(UniformOptions(), context)

        def weighted(critic: Critic) -> Callable[[int], None]:
            td_error = build_td_error(TdErrorOptions(), context)
            return bench.our_step(bench.learner(four, td_error, needs=NEEDS, critic=critic))

        steps = {
            "transformers": bench.transformers_step(),
            "K = 1": bench.our_step(bench.learner(one, uniform)),
            "K = 4": bench.our_step(bench.learner(four, uniform)),
            "cached": weighted(bench.cached(build_value_head(ValueHeadOptions(), context))),
            "trunk": weighted(build_value_head(TRUNK_HEAD, context)),
            "separate": weighted(build_value_head(SEPARATE, context)),
        }
        counts = {name: flops(step) for name, step in steps.items()}
        left, right = torch.randn(2, SQUARE, SQUARE).unbind()
        variants: dict[str, Callable[[], object]] = {name: numbered(step) for name, step in steps.items()}
        times = in_turns({**variants, "product": lambda: left @ right}, rounds=rounds)
    return rows_of(times, counts)


def rows_of(times: dict[str, Times], counts: dict[str, int]) -> list[Row]:
    """Return the rows from the measured times and the counted operations."""
    own, peer = times["K = 4"], times["transformers"]
    rate = [2 * SQUARE**3 / seconds / 1e9 for seconds in times["product"].cpu]
    return [
        ratio_row("step: K = 4 over transformers' next-token step", own, peer, limit="<= 1.15"),
        ratio_row("step: K = 1 over transformers' next-token step", times["K = 1"], peer, limit="<= 0.9"),
        ratio_row(
            "step: K = 4 over K = 1, over the ratio of their operations",
            own,
            times["K = 1"],
            scale=counts["K = 1"] / counts["K = 4"],
            limit="<= 1.05",
            note=f"{counts['K = 4'] / 1e9:.0f} and {counts['K = 1'] / 1e9:.0f} GFLOP",
        ),
        ratio_row(
            "step: share of the product rate that K = 4 reaches",
            times["product"],
            own,
            scale=counts["K = 4"] / (2 * SQUARE**3),
            limit=">= 0.78",
        ),
        ratio_row(
            "step: share of the product rate that transformers reaches",
            times["product"],
            peer,
            scale=counts["transformers"] / (2 * SQUARE**3),
        ),
        row(f"step: product rate, {SQUARE} cubed", rate, unit="GFLOP/s"),
        row("step: transformers' next-token step", peer.cpu, unit="s"),
        ratio_row("step: verifiable over baseline, values cached", times["cached"], own, limit="<= 1.03"),
        ratio_row("step: verifiable over baseline, head on the trunk", times["trunk"], own, limit="<= 1.05"),
        ratio_row("step: verifiable over baseline, separate body", times["separate"], own, limit="<= 1.3"),
    ]


if __name__ == "__main__":
    main(measure, __doc__)
