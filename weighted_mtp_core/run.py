"""A plan carried out: prepare, critic, policy, evaluate; recorded from the first line to the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from attrs import frozen
from torch import nn

from weighted_mtp_core.api import Batch, Critic, Signal
from weighted_mtp_core.checkpointing.best_model import load_component, load_model, save_component, save_model
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.checkpointing.resume import (
    fingerprint,
    other_machine,
    refuse_changes,
    refuse_other_data,
    run_to_resume,
)
from weighted_mtp_core.checkpointing.snapshot import Snapshot
from weighted_mtp_core.data.pairs import make_pairs
from weighted_mtp_core.data.samplers import Rows, Sampler, pointwise
from weighted_mtp_core.errors import RunFailedError
from weighted_mtp_core.evaluation.evaluate import Evaluation, evaluate
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.plugins.selection import SelectedComponent
from weighted_mtp_core.recipe.schema import CriticTable, TrainTable
from weighted_mtp_core.report.page import write_report
from weighted_mtp_core.report.token_measures import measure_tokens
from weighted_mtp_core.report.token_report import save_token_report
from weighted_mtp_core.report.token_values import VALUES_FILE, table_of_values
from weighted_mtp_core.runtime.distributed import Distributed, decoder_layers, shard
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.rank_log import RankLog
from weighted_mtp_core.tracking.recorder import Recorder, open_recorder
from weighted_mtp_core.training.critic_learner import CriticLearner, CriticReport
from weighted_mtp_core.training.loop import Learner, Trained, train
from weighted_mtp_core.training.policy_learner import Arm, PolicyLearner
from weighted_mtp_core.training.prepare import Prepared, prepare


def run_plan(plan: Plan, *, resume: str | None = None, allow_change: Sequence[str] = ()) -> None:
    """Carry out a plan and show a summary.

    Args:
        plan: What to do.
        resume: The run to go on with, as a person names it; None leaves it to the recipe.
        allow_change: Keys that may differ from the run that goes on.

    Raises:
        WmtpError: Something it needs is missing or wrong; nothing was trained.
        RunFailedError: It failed on the way; the run is closed as FAILED.
    """
    distributed = Distributed.init()
    old = run_to_resume(plan, resume) if distributed.is_rank_zero else None
    if old is not None:
        refuse_changes(old, plan, allowed=allow_change)
    with (
        Display() as display,
        _open_record(plan, display, old, distributed) as record,
        Checkpoints(
            folder=record.folder.checkpoints,
            table=plan.recipe.checkpoint,
            log=record.log,
            distributed=distributed,
        ) as checkpoints,
    ):
        snapshot = _begin_or_go_on(plan, record, checkpoints, old, distributed)
        stages = _Stages(
            plan=plan,
            record=record,
            display=display,
            checkpoints=checkpoints,
            snapshot=snapshot,
            distributed=distributed,
        )
        prepared = stages.prepare(allow_change)
        critic, report = stages.critic(prepared)
        trained, learner = stages.policy(prepared, critic)
        evaluation = stages.evaluate(prepared)
        stages.show(prepared, learner, critic, report)
        rows = _summary(record, report, trained, evaluation)
        record.report(rows)
        display.summary(rows)
    distributed.shutdown()


def _open_record(
    plan: Plan, display: Display, old: Path | None, distributed: Distributed
) -> Recorder | RankLog:
    """Open the run in the first process, and tell the others where it lies."""
    if distributed.is_rank_zero:
        record = open_recorder(plan, display, resume=old)
        distributed.broadcast(str(record.folder.path))
        return record
    return RankLog(Path(distributed.broadcast("")), distributed.rank)


def _begin_or_go_on(
    plan: Plan,
    record: Recorder | RankLog,
    checkpoints: Checkpoints,
    old: Path | None,
    distributed: Distributed,
) -> Snapshot | None:
    """Write down what the run is; of an old one, find where it goes on."""
    if old is not None and (changed := other_machine(old, distributed)):
        record.log(
            f"WARNING: this machine differs from the one that the run began on ({changed}): what follows is "
            "equal up to rounding (about 1e-4 after some hundred steps), no longer bit for bit"
        )
    if distributed.is_rank_zero:
        record.folder.record(**plan.identity, fingerprint=fingerprint(distributed))
    if not distributed.any_rank(flag=old is not None):
        return None
    with distributed.rank_zero_first():
        snapshot = checkpoints.newest()
    where = "the beginning" if snapshot is None else f"step {snapshot.step} of stage `{snapshot.stage}`"
    record.log(f"going on with run {record.folder.run_id} from {where}")
    return snapshot


@frozen(kw_only=True, eq=False)
class _Stages:
    """The four stages of one run."""

    plan: Plan
    record: Recorder | RankLog
    display: Display
    checkpoints: Checkpoints
    snapshot: Snapshot | None
    distributed: Distributed

    def prepare(self, allow_change: Sequence[str]) -> Prepared:
        """Stage 0: data and policy."""
        torch.manual_seed(self.plan.recipe.run.seed)
        with self.distributed.rank_zero_first():
            prepared = prepare(self.plan, log=self.record.log)
        version = prepared.source.version()
        if self.distributed.is_rank_zero and refuse_other_data(
            self.record.folder, version, allowed=allow_change
        ):
            self.record.datasets([version])
        self.record.tags({"model_version": prepared.base_name})
        return prepared

    def critic(self, prepared: Prepared) -> tuple[Critic | None, CriticReport | None]:
        """Stage 1: train the critic, or load it, or do without."""
        table, chosen = self.plan.recipe.critic, self.plan.critic
        critic = prepared.build_critic()
        if table is None or chosen is None or critic is None:
            return None, None
        self._shard(critic.blocks)
        learner = self._critic_learner(prepared, critic, table)
        if table.checkpoint is not None:
            load_component(critic, Path(table.checkpoint))
            self.record.log(f"critic loaded from `{table.checkpoint}`")
        elif critic.trainable:
            with self.distributed.rank_zero_first():
                tokens = prepared.critic_tokens("train")
            units = make_pairs(tokens, table.pairs) if critic.batching == "pairs" else pointwise(tokens)
            sampler = self._sampler(units, tokens.length_D, table.train)
            if self.snapshot is not None and self.snapshot.stage == "policy":
                learner.load_best()
            else:
                self._train(learner, table.train, lambda step: prepared.batch(tokens, sampler.rows(step)))
        if Signal.VALUE not in chosen.component.provides:
            return critic, None
        report = learner.measure()
        if self.snapshot is None and (table.checkpoint is not None or not critic.trainable):
            self.record.metrics(learner.stage, 0, report.metrics())  # no training did
        self._judge_critic(report, table, chosen)
        return critic, report

    def policy(self, prepared: Prepared, critic: Critic | None) -> tuple[Trained, PolicyLearner]:
        """Stage 2: weighted multi-token training."""
        recipe, chosen = self.plan.recipe, self.plan.weighting
        with self.distributed.rank_zero_first():
            tokens, held_out = prepared.policy_tokens("train"), prepared.policy_tokens("validation")
        batches = prepared.policy_batches(tokens)
        best = self.record.folder.checkpoints / "best_model.pt"
        learner = PolicyLearner(
            policy=prepared.policy,
            arm=Arm(
                weighting=prepared.build_weighting(),
                needs=chosen.needs,
                critic=prepared.cached(critic, batches) if self.distributed.is_single_process else critic,
                label=f"weighting `{chosen.address}` of {chosen.plugin}",
            ),
            loss=recipe.loss,
            steps=recipe.train.steps,
            accumulation=recipe.train.accumulation,
            autocast=prepared.autocast,
            validation=lambda: (
                batch
                for batch, _ in prepared.validation_batches(
                    held_out,
                    batch_size=recipe.train.batch_size,
                    limit=recipe.train.validation_examples,
                )
            ),
            distributed=self.distributed,
            best=best,
            save=partial(save_model, prepared.policy, best, distributed=self.distributed),
            restore=partial(load_model, prepared.policy, best),
        )
        self._shard(decoder_layers(prepared.policy))  # now: critic and weighting have made their copies
        trained = self._train(learner, recipe.train, batches)
        self.record.artifact(best, "checkpoints")
        return trained, learner

    def evaluate(self, prepared: Prepared) -> Evaluation:
        """Stage 3: the best policy on held-out problems."""
        table = self.plan.recipe.evaluate
        if not self.distributed.is_rank_zero and not self.plan.recipe.model.shard:
            return Evaluation(metrics={}, timings={}, files=())
        folder = self.record.folder.path / "evaluation" if self.distributed.is_rank_zero else None
        evaluation = evaluate(prepared, table, display=self.display, folder=folder)
        step = self.plan.recipe.train.steps
        self.record.metrics("evaluate", step, evaluation.metrics)
        self.record.timings("evaluate", step, evaluation.timings)
        for file in evaluation.files:
            self.record.artifact(file, "evaluation")
        return evaluation

    def show(
        self, prepared: Prepared, learner: PolicyLearner, critic: Critic | None, report: CriticReport | None
    ) -> None:
        """After stage 3: the page that shows the run."""
        if not self.distributed.is_rank_zero and not self.plan.recipe.model.shard:
            return
        reliability = () if report is None else report.reliability
        look = measure_tokens(prepared, learner, critic=critic, reliability=reliability)
        if self.distributed.is_rank_zero:
            folder = self.record.folder.path
            self.record.artifact(save_token_report(look, folder), "")
            self.record.artifact(write_report(folder), "")
        if critic is not None and report is not None:
            self._table_values(prepared, learner, critic)

    def _table_values(self, prepared: Prepared, learner: PolicyLearner, critic: Critic) -> None:
        """Keep the values and weights of the responses that the critic was measured on."""
        recipe = self.plan.recipe
        assert recipe.critic is not None
        batches = prepared.validation_batches(
            prepared.critic_tokens("validation"),
            batch_size=recipe.train.batch_size,
            limit=recipe.critic.train.validation_examples,
        )
        table = table_of_values(prepared, learner, critic=critic, batches=(batch for batch, _ in batches))
        if self.distributed.is_rank_zero:
            file = self.record.folder.path / "evaluation" / VALUES_FILE
            file.parent.mkdir(exist_ok=True)
            atomic_write(file, table)
            self.record.artifact(file, "evaluation")

    def _shard(self, blocks: Sequence[nn.Module]) -> None:
        if self.plan.recipe.model.shard and not self.distributed.is_single_process:
            shard(blocks, self.distributed)

    def _train(self, learner: Learner, table: TrainTable, batch_of: Callable[[int], Batch]) -> Trained:
        self.display.stage(learner.stage, table.steps)
        torch.manual_seed(self.plan.recipe.run.seed)
        here = self.snapshot if self.snapshot is not None and self.snapshot.stage == learner.stage else None
        trained = train(
            learner,
            table,
            batch_of=batch_of,
            reporter=self.record,
            checkpoints=self.checkpoints,
            resume=here,
            distributed=self.distributed,
        )
        self.record.log(f"{learner.stage}: kept step {trained.best_step} of {table.steps}")
        return trained

    def _sampler(self, units: Rows, length_D: Rows, table: TrainTable) -> Sampler:
        return Sampler(units, length_D, batch_size=table.batch_size, seed=self.plan.recipe.run.seed)

    def _critic_learner(self, prepared: Prepared, critic: Critic, table: CriticTable) -> CriticLearner:
        folder = self.record.folder.checkpoints / "critic"
        return CriticLearner(
            critic=critic,
            trunk=prepared.trunk,
            steps=table.train.steps,
            accumulation=table.train.accumulation,
            validation=lambda: prepared.validation_batches(
                prepared.critic_tokens("validation"),
                batch_size=table.train.batch_size,
                limit=table.train.validation_examples,
            ),
            length_only=lambda: prepared.length_only,
            distributed=self.distributed,
            best=folder,
            save=partial(save_component, critic, folder, distributed=self.distributed),
            restore=partial(load_component, critic, folder),
        )

    def _judge_critic(self, report: CriticReport, table: CriticTable, chosen: SelectedComponent) -> None:
        """Say what the critic knows; stop before stage 2 if that is nothing."""
        if report.informative:
            losses = f"loss {report.critic.bce:.3f}, of a constant {report.constant.bce:.3f}"
            self.record.log(f"critic: {report.words}; {losses}")
            return
        verdict = f"critic `{chosen.address}` is no better than a constant: {report.words}"
        if not table.allow_uninformative_critic:
            raise RunFailedError(
                verdict,
                hint="train it longer or on more data, or set `critic.allow_uninformative_critic = true`",
            )
        self.record.log(f"WARNING: {verdict}")
        self.record.tags({"wmtp.uninformative_critic": "true"})


def _summary(
    record: Recorder | RankLog, report: CriticReport | None, trained: Trained, evaluation: Evaluation
) -> list[tuple[str, str]]:
    """Return what a person wants to know when a run is done."""
    rows: list[tuple[str, str]] = []
    if report is not None:
        auc = f"AUC {report.critic.auc:.3f} [{report.auc_low:.3f}, {report.auc_high:.3f}]"
        beside = f"length alone: {report.length_only.auc:.3f}"
        loss = f"loss {report.critic.bce:.3f} (a constant: {report.constant.bce:.3f})"
        rows.append(("critic", f"{auc} ({beside}), {loss}"))
    before, after = (v.metrics["validation_ce_head_1"] for v in (trained.start, trained.best))
    rows.append(("policy", f"held-out loss {before:.3f} -> {after:.3f} at step {trained.best_step}"))
    rows += evaluation.summary()
    rows.append(("run", str(record.folder.path)))
    rows += [("look at it", line) for line in record.where()]
    return rows
