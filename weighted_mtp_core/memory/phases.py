"""Simulates the phases of a run on tensors without values, and finds the peak of memory in each phase.

The phases are the training of the critic, and the training, the validation and the evaluation of the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import torch
from attrs import define, field
from torch import nn

from weighted_mtp_core.api import Batch, Critic
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.generation.decoding import Decoder
from weighted_mtp_core.generation.draft_heads import DecodingHeads
from weighted_mtp_core.generation.generate import most_tokens
from weighted_mtp_core.memory.components import UniformWeights, build_critic
from weighted_mtp_core.memory.documents import Documents
from weighted_mtp_core.memory.empty_policy import config_of, empty_policy
from weighted_mtp_core.memory.live_tensors import (
    CAST,
    GRADIENTS,
    LiveTensors,
    without_values,
)
from weighted_mtp_core.memory.parts import (
    CACHE,
    CRITIC,
    GATHERED,
    OPTIMISER,
    OTHER,
    PARAMETERS,
    SENT,
    TRAINING,
    TRUNK,
    VALIDATION,
    Phase,
    Phases,
    Target,
)
from weighted_mtp_core.memory.shards import Shards
from weighted_mtp_core.messages import reason
from weighted_mtp_core.model import chunked_unembedding
from weighted_mtp_core.model.chunked_unembedding import MOST_ROWS, ChunkedUnembedding
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.stored_base import restore_base, store_base
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.recipe.schema import Recipe
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.runtime.device import LEAST_BUCKET, many_passes
from weighted_mtp_core.training import eight_bit
from weighted_mtp_core.training.head_quality import head_quality
from weighted_mtp_core.training.optimisers import clip_gradients, make_optimisers
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.weighting_inputs import Weighting


def find_phases(plan: Plan, documents: Documents, target: Target, *, only: str | None = None) -> Phases:
    """Simulate the phases of a plan on tensors without values.

    Args:
        plan: The plan.
        documents: The documents of the data, from which the largest batches are made.
        target: The device and the processes of the run.
        only: Name of the only phase to simulate; None stands for all phases.

    Raises:
        WmtpError: The config of the base model cannot be read, the model is not supported as a policy, or a
            package is missing.
    """
    recipe = plan.recipe
    config = config_of(recipe.model, storage=Path(recipe.run.storage))
    _make_tables(recipe)
    with _two_chunks(target.memory), without_values() as live:
        try:
            with live.labelled(PARAMETERS):
                policy = empty_policy(config, recipe.model)
        except WmtpError:
            raise
        except Exception as error:  # an unknown model can raise any exception
            raise WmtpError(
                f"the memory of a run cannot be forecast for a `{config.model_type}` model ({reason(error)})"
            ) from error
        live.chunk = MOST_ROWS, policy.vocab_size
        live.part = OTHER
        return _Simulation(
            plan=plan,
            documents=documents,
            dtype=target.dtype,
            processes=target.processes,
            live=live,
            policy=policy,
            only=only,
            shards=Shards.of(policy, target, wanted=recipe.model.shard),
        ).run()


def _make_tables(recipe: Recipe) -> None:
    """Make torchao and bitsandbytes create their tables of codes before the simulation.

    torchao and bitsandbytes keep the first tables that they create. If these tables were created during the
    simulation, a run in the same process after the forecast would compute with tables that have no values.
    """
    stages = [recipe.train, *([] if recipe.critic is None else [recipe.critic.train])]
    for table in (each for each in stages if each.optimiser.name == "adamw_8bit"):
        parameter = nn.Parameter(torch.zeros(64, 64))
        parameter.grad = torch.zeros_like(parameter)
        _update(make_optimisers([parameter], table))
    if recipe.model.base_dtype == "nf4":
        with torch.random.fork_rng(devices=[]):
            layer = nn.Sequential(nn.Linear(64, 64)).requires_grad_(False)
        store_base(layer, "nf4")
        restore_base(layer)


@contextmanager
def _two_chunks(memory: int | None) -> Iterator[None]:
    """Inside this context, compute only two chunks of logits, and two pieces of a parameter's update.

    More chunks or pieces would not change the peak, because all of them take equal memory. The chunks have
    the size for a device with `memory` bytes.
    """
    every = ChunkedUnembedding.chunks

    def two(unembedding: ChunkedUnembedding, count: int) -> Iterator[slice]:
        return islice(every(unembedding, count), 2)

    size = patch.object(chunked_unembedding, "memory_of", lambda _: memory)
    update = patch.object(eight_bit, "pieces", lambda count, size: range(0, count, size)[:2])
    with size, update, patch.object(ChunkedUnembedding, "chunks", two):
        yield


@define(kw_only=True, eq=False)
class _Simulation:
    """The simulation of one run; its tensors have no values."""

    plan: Plan
    documents: Documents
    dtype: torch.dtype
    processes: int
    live: LiveTensors
    policy: Policy
    only: str | None
    shards: Shards
    optimisers: list[torch.optim.Optimizer] = field(factory=list)
    optimiser_bytes: int = 0
    critic_bytes: int = 0
    rows: tuple[int, int] = (0, 0)
    uncounted: list[str] = field(factory=list)

    def run(self) -> Phases:
        """Run all phases in the order of a run."""
        recipe = self.plan.recipe
        before, found = self.live.live, list[Phase]()
        critic = self._critic()
        self.critic_bytes = self.live.live - before
        if critic is not None and critic.trainable and recipe.critic and recipe.critic.checkpoint is None:
            found += self._phase("critic training", partial(self._train_critic, critic, recipe.critic.train))
        self.optimisers = self._optimisers(
            recipe.train, self.policy.parameters(), list(self.policy.embedding_parameters())
        )
        found += self._phase(TRAINING, partial(self._train_policy, critic))
        found += self._phase(VALIDATION, self._validate)
        self.optimisers.clear()
        found += self._phase("evaluation", self._evaluate)
        parameters = list(self.policy.parameters())
        return Phases(
            found=tuple(found),
            parameters=sum(each.numel() for each in parameters),
            model=_bytes(parameters),
            held=round(_bytes(parameters) * self.shards.kept(parameters)),
            saved=self._saved(),
            optimiser=self.optimiser_bytes,
            critic=self.critic_bytes,
            rows=self.rows,
            uncounted=tuple(self.uncounted),
        )

    def _phase(self, name: str, simulate: Callable[[], Iterable[nn.Parameter]]) -> Iterator[Phase]:
        """Simulate a phase and yield it; yield nothing if the simulation fails or `only` names another phase.

        Args:
            name: The name of the phase.
            simulate: Runs the phase on tensors without values and returns the parameters that it trains.

        Raises:
            WmtpError: `simulate` raises this error; other exceptions count as a failed simulation.
        """
        if self.only not in (None, name):
            return
        self.live.restart()
        try:
            trained = self.shards.kept(simulate())
        except WmtpError:
            raise
        except Exception as error:  # noqa: BLE001 - code of a plugin or a model may raise any error
            self._note(name, error)
            return
        shares = {
            PARAMETERS: self.shards.kept(self.policy.parameters()),
            GRADIENTS: trained,
            OPTIMISER: trained,
        }
        shares[CAST] = (
            0.0 if self.shards.exist else 1.0
        )  # a gathered matrix has the dtype of the forward pass
        found = {part: round(size * shares.get(part, 1.0)) for part, size in self.live.at_peak.items()}
        if self.shards.exist:
            found[GATHERED] = self.shards.gathered(trains=GRADIENTS in found)
        elif self.processes > 1 and GRADIENTS in found:
            found[SENT] = max(LEAST_BUCKET, *(each.nbytes for each in self.policy.parameters()))
        parts = {part: size for part, size in found.items() if size}
        yield Phase(name=name, parts=parts)

    def _saved(self) -> int:
        """Return the bytes of the parameters in a file of the policy; with adapters, without the base."""
        is_adapted = self.plan.recipe.model.train == "adapters"
        return _bytes(each for each in self.policy.parameters() if each.requires_grad or not is_adapted)

    def _note(self, what: str, error: Exception) -> None:
        first = next(iter(str(error).splitlines()), "")
        self.uncounted.append(f"{what} ({type(error).__name__}: {first})")

    def _batch(self, table: TrainTable, *, packed: bool) -> Batch:
        """Return the rows of at most two micro-batches of one process.

        A third micro-batch would need no more memory: the gradients exist from the second micro-batch on.
        """
        rows = max(1, -(-table.batch_size // (table.accumulation * self.processes)))
        return self.documents.batch(
            self.plan.recipe.data, rows=rows * min(table.accumulation, 2), packed=packed
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def _in_trunk(self) -> Iterator[None]:
        """Inside this context, tensors that the trunk makes in a forward pass belong to the part `TRUNK`."""

        def enter(*_: object) -> None:
            self.live.part = TRUNK

        def leave(*_: object) -> None:
            self.live.part = OTHER

        trunk = self.policy.trunk
        with trunk.register_forward_pre_hook(enter), trunk.register_forward_hook(leave):
            yield

    def _critic(self) -> Critic | None:
        with self.live.labelled(CRITIC):
            try:
                return build_critic(self.plan, self.policy)
            except Exception as error:  # noqa: BLE001 - code of a plugin may raise any error
                self._note("critic", error)
                return None

    def _optimisers(
        self, table: TrainTable, parameters: Iterable[nn.Parameter], embeddings: Collection[nn.Parameter] = ()
    ) -> list[torch.optim.Optimizer]:
        """Return optimisers whose state exists, as after the first step of a stage."""
        trained = [each for each in parameters if each.requires_grad]
        optimisers = make_optimisers(trained, table, embeddings=embeddings)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        before = self.live.live
        with self.live.labelled(OPTIMISER):
            _update(optimisers)
        gradients = _bytes(trained)
        self.optimiser_bytes = round((self.live.live - before + gradients) * self.shards.kept(trained))
        return optimisers

    def _train(
        self, optimisers: Sequence[torch.optim.Optimizer], table: TrainTable, learn: Callable[[], object]
    ) -> list[nn.Parameter]:
        """Simulate one training step; return the trained parameters."""
        groups = [group for each in optimisers for group in each.param_groups]
        trained: list[nn.Parameter] = [each for group in groups for each in group["params"]]
        self.live.watch(trained, written=self.policy.unembedding.parameters())
        self.live.restart()
        learn()
        clip_gradients(trained, table.max_grad_norm)
        _update(optimisers)
        return trained

    def _train_critic(self, critic: Critic, table: TrainTable) -> list[nn.Parameter]:
        def learn() -> None:
            batch = self._batch(table, packed=False)
            rows = len(batch.ids_BT) // min(table.accumulation, 2)
            for part in (batch,) if rows == len(batch.ids_BT) else (batch, batch):
                states = None
                if critic.reads_policy:
                    with torch.no_grad(), self._autocast():
                        states = self.policy.trunk_states(part.ids_BT, position_BT=part.position_BT).float()
                with self._autocast():
                    loss = critic.loss(part, states).loss
                loss.backward()  # type: ignore[no-untyped-call]

        critic.begin_step(0, steps=table.given_steps or 1)
        return self._train(self._optimisers(table, critic.parameters()), table, learn)

    def _train_policy(self, critic: Critic | None) -> list[nn.Parameter]:
        recipe = self.plan.recipe
        learner = PolicyLearner(
            policy=self.policy,
            weighting=Weighting(
                strategy=UniformWeights(), needs=self.plan.weighting.needs, critic=critic, label="memory"
            ),
            loss=recipe.loss,
            steps=recipe.train.given_steps or 1,
            pairs_per_step=[1.0] * recipe.model.n_future,
            accumulation=min(recipe.train.accumulation, 2),
            autocast=self._autocast,
            validation=list,
            best=Path(),
        )
        with self._in_trunk():
            batch = self._batch(recipe.train, packed=True)
            self.rows = len(batch.ids_BT) // learner.accumulation, batch.ids_BT.shape[1]
            return self._train(self.optimisers, recipe.train, lambda: learner.learn(batch, step=0))

    def _validate(self) -> list[nn.Parameter]:
        recipe = self.plan.recipe
        self.policy.train()
        rows = min(recipe.train.batch_size // recipe.train.accumulation, recipe.train.validation_examples)
        self._measure(rows)
        return [each for each in self.policy.parameters() if each.requires_grad]

    def _measure(self, rows: int) -> None:
        batch = self.documents.batch(self.plan.recipe.data, rows=rows, packed=False)
        with self._in_trunk(), torch.no_grad():
            head_quality(self.policy, [batch], split="validation", autocast=self._autocast)

    def _evaluate(self) -> list[nn.Parameter]:
        """Simulate test losses, and the first and the last token that are generated after long prompts."""
        table = self.plan.recipe.evaluate
        self._measure(table.batch_size)
        self.policy.eval()
        drafts = self.policy.n_future - 1 if table.decoding == "self_speculative" else 0
        last = int(min(most_tokens(self.policy), self.documents.longest_prompt + table.max_new_tokens))
        casts = self.dtype != torch.float32
        with torch.no_grad(), many_passes(self.policy, self._autocast) if casts else nullcontext():
            heads = DecodingHeads.of(self.policy, drafts=drafts)
            self._decoder(heads).start([[0] * (last - table.max_new_tokens)] * table.batch_size)
            peak, at_peak = self.live.peak, self.live.at_peak
            decoder = self._decoder(heads)
            with self.live.labelled(CACHE):
                decoder.start([[0] * last] * table.batch_size)
            self.live.restart()
            decoder.step()
        if peak > self.live.peak:
            self.live.peak, self.live.at_peak = peak, at_peak
        return []

    def _decoder(self, heads: DecodingHeads) -> Decoder:
        table = self.plan.recipe.evaluate
        generators = [torch.Generator() for _ in range(table.batch_size)]
        return Decoder(heads=heads, temperature=table.temperature, generators=generators)


def _update(optimisers: Iterable[torch.optim.Optimizer]) -> None:
    for each in optimisers:
        each.step()
        each.zero_grad(set_to_none=True)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(each.nbytes for each in parameters)
