"""Stage 0: loads the data and the policy, with which the critic and the weighting are built later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from attrs import define, field
from numpy.typing import NDArray
from torch import Tensor

from weighted_mtp_core.api import (
    SPLITS,
    Batch,
    BuildContext,
    Critic,
    DataSource,
    Example,
    ModelContext,
    Scores,
    Split,
    WeightingStrategy,
    is_correct,
)
from weighted_mtp_core.data.batches import StepBatches, collate
from weighted_mtp_core.data.checks import check_examples, checked_version
from weighted_mtp_core.data.halves import Half, documents_of
from weighted_mtp_core.data.pairs import make_pairs
from weighted_mtp_core.data.samplers import Sampler, evenly_spread, in_order, pointwise
from weighted_mtp_core.data.texts import TextCodec, make_codec
from weighted_mtp_core.data.token_cache import TokenCache
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.generation.decoding_probe import manner_of
from weighted_mtp_core.metrics.critic import LengthOnly
from weighted_mtp_core.model.language_model import LanguageModel, frozen_losses, trainable_losses
from weighted_mtp_core.model.load import load_policy
from weighted_mtp_core.model.packing_probe import check_packing
from weighted_mtp_core.model.policy import Policy
from weighted_mtp_core.model.probe import check_positions
from weighted_mtp_core.model.trunk import frozen_trunk, trainable_trunk
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.recipe.schema import CriticTable, ModelTable
from weighted_mtp_core.recipe.train_table import PolicyTrainTable
from weighted_mtp_core.runtime.device import Compute
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.runtime.fsdp import callable_, view_of
from weighted_mtp_core.runtime.sharding import mesh_of
from weighted_mtp_core.runtime.state_digest import state_sha256
from weighted_mtp_core.training.critic_scores import critic_scores
from weighted_mtp_core.training.data_requirements import (
    check_given_weights,
    check_second_temperature,
    check_verdicts,
)
from weighted_mtp_core.training.reference_models import load_reference
from weighted_mtp_core.training.score_cache import CachedCritic, scores_key

_LARGEST_LOG = 700.0  # exp(710) overflows a float64
_MISSING = {
    "policy": "the policy learns from correct responses: each split needs some",
    "critic": "the critic learns from all responses: each split needs some",
}


@define(kw_only=True, eq=False, slots=False)
class Prepared:
    """The data and the policy of a run.

    Attributes:
        plan: The plan of the run.
        storage: The storage root.
        source: The data source.
        compute: The device and the precision of all computations.
        policy: The model, on the device.
        codec: Converts texts to the policy's token ids and back.
        base_name: The base model, for the tag `model_version`; see `LoadedPolicy.base_name`.
        cache: The tokens of the data, stored on disk.
        log: Receives messages for the user.
    """

    plan: Plan
    storage: Path
    source: DataSource
    compute: Compute
    policy: Policy
    codec: TextCodec
    base_name: str
    cache: TokenCache
    log: Callable[[str], None]
    _token_sets: dict[tuple[str, Split], TokenSet] = field(factory=dict, init=False)
    _critic_inputs: list[str] = field(factory=list, init=False)

    def policy_tokens(self, split: Split) -> TokenSet:
        """Return a split's examples that the policy imitates, as tokens, except those over `max_tokens`."""
        return self._tokens("policy", split, self.source.policy_examples)

    def critic_tokens(self, split: Split) -> TokenSet:
        """Return a split's correct and incorrect responses, as tokens, except those over `max_tokens`."""
        return self._tokens("critic", split, self.source.examples)

    def _tokens(self, purpose: str, split: Split, read: Callable[[Split], Sequence[Example]]) -> TokenSet:
        def examples() -> Sequence[Example]:
            data = self.plan.data
            with data.blamed(f"split `{split}`"):
                found = read(split)
                if not len(found):
                    raise WmtpError(f"there are no {purpose} examples", hint=_MISSING[purpose])
            return found

        if (purpose, split) not in self._token_sets:
            tokens = self.cache.open(purpose, split, examples=examples)
            if tokens.left_out:
                self.log(
                    f"{split}: left out {tokens.left_out} of {tokens.examples} {purpose} examples longer "
                    f"than {self.cache.max_tokens} tokens"
                )
            self._token_sets[purpose, split] = tokens
        return self._token_sets[purpose, split]

    def tokenise(self) -> None:
        """Make the token sets of all stages, so that data missing for a later stage are noticed at the start.

        Raises:
            WmtpError: The data source fails; a split has no examples; `TokenCache.open` refuses the examples,
                for example because all are too long; the weighting reads weights, and one is negative
                although the recipe does not allow it; or data that the recipe needs are missing: weights for
                its weighting, correct and incorrect responses for its critic, or test problems for a second
                temperature.
        """
        check_second_temperature(self.plan, self.source)
        for split in SPLITS:
            self.policy_tokens(split)
        check_given_weights(self.plan, self.policy_tokens("train"), log=self.log)
        if self.plan.critic is not None:
            for split in ("train", "validation"):
                check_verdicts(self.plan, self.critic_tokens(split), split=split)

    @cached_property
    def length_only(self) -> LengthOnly:
        """The baseline critic that uses only lengths, fitted on the training responses."""
        tokens = self.critic_tokens("train")
        return LengthOnly.fit(tokens.response_D, np.asarray(tokens.reward_D, np.float64))

    def values(self, scores: Scores) -> NDArray[np.float64] | None:
        """Return a critic's values, float64 `[B, T]`; None if the scores have neither V_t nor log V_t.

        V_t is the value of the prefix that ends at token t. If the scores have only log V_t, this number is
        taken as log(V_t / V_0), where V_0 is the value of the prompt. In place of V_0, which is unknown, the
        mean reward of the training responses is used, so a value V_t may exceed 1.
        """
        if scores.value_BT is not None or scores.log_value_BT is None:
            return None if scores.value_BT is None else scores.value_BT.cpu().double().numpy()
        log_value_BT = scores.log_value_BT.cpu().double().numpy()
        mean = float(np.mean(self.critic_tokens("train").reward_D, dtype=np.float64))
        values_BT: NDArray[np.float64] = mean * np.exp(log_value_BT.clip(-_LARGEST_LOG, _LARGEST_LOG))
        return values_BT

    @property
    def knows_slips(self) -> bool:
        """Whether the policy imitates incorrect responses with known mistakes.

        See `DataSource.oracle_weights`.
        """
        return self.source.oracle_weights and not is_correct(self.policy_tokens("train").reward_D).all()

    def batch(self, tokens: TokenSet, rows: NDArray[np.int64]) -> Batch:
        """Return the documents with the numbers `rows` as a batch on the device."""
        return collate(tokens, rows, device=self.compute.device)

    def batches_in_order(
        self, tokens: TokenSet, documents: NDArray[np.int64], *, batch_size: int
    ) -> Iterator[Batch]:
        """Yield the given documents, each once, in batches of documents of similar length, on the device."""
        return (self.batch(tokens, rows) for rows in in_order(tokens, documents, batch_size=batch_size))

    def policy_batches(self) -> StepBatches:
        """Return the global batches of stage 2."""
        recipe, device, tokens = self.plan.recipe, self.compute.device, self.policy_tokens("train")
        size, seed = recipe.train.batch_size, recipe.run.seed
        return StepBatches(tokens, recipe.data, batch_size=size, seed=seed, device=device)

    @cached_property
    def train_table(self) -> PolicyTrainTable:
        """The recipe's `[train]`, with `epochs` converted to a number of steps."""
        table = self.plan.recipe.train
        return table if table.epochs is None else table.for_epochs(self.policy_batches().batches_per_epoch)

    def critic_batches(self, critic: Critic, table: CriticTable) -> tuple[Callable[[int], Batch], float]:
        """Return a function that maps a step of stage 1 to its global batch, and the batches per epoch."""
        tokens = self.critic_tokens("train")
        units = make_pairs(tokens, table.pairs) if critic.batching == "pairs" else pointwise(tokens)
        seed = self.plan.recipe.run.seed
        sampler = Sampler(units, tokens.length_D, batch_size=table.train.batch_size, seed=seed)
        return lambda step: self.batch(tokens, sampler.rows(step)), sampler.batches_per_epoch

    def policy_validation(self) -> Iterator[Batch]:
        """Yield batches of the held-out examples on which the policy is validated."""
        table, tokens = self.plan.recipe.train, self.policy_tokens("validation")
        documents = evenly_spread(np.arange(len(tokens)), limit=table.validation_examples)
        rows = table.batch_size // table.accumulation  # a micro-batch of training fits into memory
        return self.batches_in_order(tokens, documents, batch_size=rows)

    def critic_validation(self, half: Half) -> NDArray[np.int64]:
        """Return the numbers of the documents on which the critic is measured in a validation half, int64.

        The half that chooses the checkpoint and the half that judges the critic have no problem in common.
        """
        table = self.plan.recipe.critic
        limit = 0 if table is None else table.train.validation_examples
        return evenly_spread(documents_of(half, self.critic_tokens("validation")), limit=limit)

    def with_score_cache(self, critic: Critic | None, batches: StepBatches) -> Critic | None:
        """Return the critic (None without one), with a cache of scores if recipe and critic allow caching.

        A critic that reads the policy gets no cache, because its scores change in each step.
        """
        recipe, chosen = self.plan.recipe, self.plan.critic
        if critic is None or chosen is None or recipe.critic is None:
            return critic
        if not recipe.critic.cache or not critic.cacheable or critic.reads_policy:
            return critic
        parts, inputs = recipe.train.accumulation, self._critic_inputs
        key = scores_key(
            critic, chosen, inputs=inputs, batches=batches, accumulation=parts, compute=self.compute
        )
        folder = self.storage / "signals" / key[:16]
        return CachedCritic(critic, batches, accumulation=parts, folder=folder)

    def scores(self, critic: Critic, batch: Batch, hidden_BTH: Tensor | None) -> Scores:
        """Return the critic's scores; `hidden_BTH` is None for a critic that does not read trunk states."""
        label = self.plan.critic_label
        return critic_scores(critic, batch, hidden_BTH, autocast=self.compute.autocast, label=label)

    @torch.no_grad()
    def trunk(self, batch: Batch) -> Tensor:
        """Return the policy's trunk states, float32 `[B, T, H]`, without a gradient.

        The policy is in evaluation mode afterwards.
        """
        self.policy.eval()
        with self.compute.autocast():
            return self.policy.trunk_states(batch.ids_BT, position_BT=batch.position_BT).float()

    @cached_property
    def _component_context(self) -> BuildContext:
        return BuildContext(
            seed=self.plan.recipe.run.seed,
            storage=self.storage,
            model=ModelContext(
                n_future=self.policy.n_future,
                hidden_size=self.policy.hidden_size,
                vocab_size=self.policy.vocab_size,
                device=self.compute.device,
                frozen_trunk=self._frozen_trunk,
                frozen_losses=self._frozen_losses,
                trainable_losses=partial(trainable_losses, self.policy),
                encode=self.codec.encode_part,
                decode=self.codec.decode_part,
                eos_id=self.codec.eos_id,
                trainable_trunk=partial(
                    trainable_trunk, self.policy, storage=self.storage, tokenizer=self.codec.tokenizer
                ),
            ),
        )

    def _frozen_trunk(self) -> Callable[[Batch], Tensor]:
        self._add_critic_input(self.policy)
        return self._in_autocast(frozen_trunk(self.policy))

    def _frozen_losses(self, path: Path | None) -> Callable[[Batch], Tensor]:
        if path is None:
            model = LanguageModel.copy_of(self.policy)
        else:
            model = load_reference(path, self.policy, tokenizer=self.codec.tokenizer)
        self._add_critic_input(model.policy)
        return self._in_autocast(frozen_losses(model))

    def _in_autocast(self, compute: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
        """Wrap a function of a frozen model, so that it computes in the precision of the policy."""

        def within(batch: Batch) -> Tensor:
            with self.compute.autocast():
                return compute(batch)

        return within

    def _add_critic_input(self, model: Policy) -> None:
        """Record digest and config of a model that a component reads, if scores may be cached."""
        if self.plan.recipe.critic is not None and self.plan.recipe.critic.cache:
            self._critic_inputs += [state_sha256(model.state_dict()), model.config.to_json_string()]

    def build_critic(self) -> Critic | None:
        """Build the recipe's critic; None if the recipe has no critic."""
        chosen = self.plan.critic
        return None if chosen is None else chosen.build(self._component_context)

    def build_weighting(self) -> WeightingStrategy:
        """Build the recipe's weighting."""
        built: WeightingStrategy = self.plan.weighting.build(self._component_context)
        return built


def compute_of(table: ModelTable) -> Compute:
    """Return the device and the precision that a recipe's `[model]` selects.

    Raises:
        WmtpError: This machine does not have the device, or the device does not support the dtype.
    """
    return Compute.resolve(
        device=table.device, dtype=table.dtype, tf32=table.tf32, deterministic=table.deterministic
    )


def prepare(plan: Plan, *, log: Callable[[str], None], distributed: Distributed = SINGLE_PROCESS) -> Prepared:
    """Load the data and the policy; with several processes and `model.shard`, the policy is sharded.

    Raises:
        WmtpError: The data, the base model or the device is missing or invalid; or the policy cannot be made
            as the recipe describes it, or cannot read packed rows or documents of `data.max_tokens` tokens.
    """
    recipe = plan.recipe
    storage, seed = Path(recipe.run.storage), recipe.run.seed
    compute = compute_of(recipe.model)
    compute.apply()
    with distributed.rank_zero_first():
        source: DataSource = plan.data.build(plan.data_context)
        version = checked_version(source, plan.data)
        log(f"data {version.name} {version.version} (sha256 {version.sha256[:12]})")
        for warning in check_examples(source, version, plan.data, storage=storage):
            log(warning)
    sharded = recipe.model.shard and not distributed.is_single_process
    loaded = load_policy(
        recipe.model,
        storage=storage,
        texts=partial(_training_texts, source),
        seed=seed,
        distributed=distributed,
        mesh=mesh_of(distributed, compute.device) if sharded else None,
    )
    check_positions(view_of(loaded.policy), recipe.data.max_tokens)
    policy = loaded.policy.to(compute.device)
    if recipe.model.train == "heads":
        policy.freeze_base()
    if recipe.model.activation_checkpointing:
        policy.recompute_activations()
    checked = view_of(policy)  # computes in float32, for which the tolerances of the checks were chosen
    if recipe.data.packing == "documents":
        check_packing(checked)
    manner = manner_of(checked, also_of=policy)
    callable_(policy, dtype=compute.dtype)
    if recipe.evaluate.decoding == "self_speculative" and manner.no_drafts is not None:
        log(f"evaluation decodes plainly: {manner.no_drafts}")
    if manner.no_cache is not None:
        log(f"evaluation reads each text again for each token, which is slow: {manner.no_cache}")
    millions = sum(parameter.numel() for parameter in policy.parameters()) / 1e6
    heads = f"{policy.n_future} heads on {compute.device}"
    if recipe.model.train == "adapters":
        trained = sum(each.numel() for each in policy.parameters() if each.requires_grad)
        heads += f"; {trained / 1e6:.1f} M are trained, in adapters and heads 2..K"
    log(f"policy {loaded.base_name}: {millions:.1f} M parameters, {heads}")
    if loaded.unused is not None:
        log(loaded.unused)
    limit, codec = recipe.data.max_tokens, make_codec(loaded.tokenizer, recipe.data)
    return Prepared(
        plan=plan,
        storage=storage,
        source=source,
        compute=compute,
        policy=policy,
        codec=codec,
        base_name=loaded.base_name,
        cache=TokenCache(
            storage, version, data=plan.data, codec=codec, max_tokens=limit, train_on=recipe.data.train_on
        ),
        log=log,
    )


def _training_texts(source: DataSource) -> Iterator[str]:
    for example in source.examples("train"):
        yield example.prompt
        yield example.response
