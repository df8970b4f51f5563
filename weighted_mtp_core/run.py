"""Execute the four stages of a run: prepare, critic, policy, evaluate. Start here to read the code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from attrs import frozen

from weighted_mtp_core import run_tags
from weighted_mtp_core.api import Batch, Critic, Signal
from weighted_mtp_core.api.tensors import VALUES
from weighted_mtp_core.checkpointing.best_model import load_component
from weighted_mtp_core.checkpointing.manager import Checkpoints
from weighted_mtp_core.checkpointing.resume import (
    LAST_STEP,
    STEPS,
    changed_keys,
    fingerprint,
    other_machine,
    refuse_changes,
    refuse_other_data,
    run_to_resume,
)
from weighted_mtp_core.checkpointing.snapshot import Snapshot
from weighted_mtp_core.data.halves import HALVES
from weighted_mtp_core.evaluation.evaluate import Evaluation, evaluate
from weighted_mtp_core.export.serving import serving_hints
from weighted_mtp_core.memory.fit import refuse_too_large
from weighted_mtp_core.metrics.critic_report import CriticReport
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.recipe.train_table import TrainTable
from weighted_mtp_core.report.page import write_report
from weighted_mtp_core.report.token_measures import measure_tokens
from weighted_mtp_core.report.token_report import save_token_report
from weighted_mtp_core.report.token_values import VALUES_FILE, table_of_values
from weighted_mtp_core.runtime.distributed import Distributed
from weighted_mtp_core.runtime.fsdp import shard
from weighted_mtp_core.runtime.sharding import mesh_of_parameters
from weighted_mtp_core.storage.atomic import atomic_write
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.opening import open_recorder
from weighted_mtp_core.tracking.rank_log import RankLog
from weighted_mtp_core.tracking.recorder import Recorder
from weighted_mtp_core.tracking.run_folder import CHANGED, read_run
from weighted_mtp_core.training.critic_learner import CriticLearner, check_informative
from weighted_mtp_core.training.loop import Learner, Trained, train
from weighted_mtp_core.training.optimisers import check_optimisers
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.prepare import Prepared, prepare
from weighted_mtp_core.training.reference_models import VOCABULARY, vocabulary_sha256


def run_plan(plan: Plan, *, resume: str | None = None, allow_change: Sequence[str] = ()) -> None:
    """Execute a plan, that is, a whole run, and print a summary of the results.

    Args:
        plan: The plan to execute.
        resume: Folder, id or part of the id of the run to continue; if None, `run.resume` decides.
        allow_change: Keys with values that may differ from the recipe of the run to continue.

    Raises:
        WmtpError: The input is invalid, or this machine lacks something that the run needs.
        RunFailedError: The run failed after it was opened; the run was closed as FAILED.
        KeyboardInterrupt: A signal ended the run, which was closed as KILLED.
    """
    check_optimisers(plan.recipe)
    distributed = Distributed.init(plan.recipe.model.device)
    previous = run_to_resume(plan, resume) if distributed.is_rank_zero else None
    if previous is not None:
        refuse_changes(previous, plan, allowed=allow_change)
    warning = refuse_too_large(plan, distributed) if distributed.is_rank_zero else None
    with (
        Display() as display,
        _open_recorder(plan, display, previous, distributed) as recorder,
        Checkpoints(
            folder=recorder.folder.checkpoints,
            table=plan.recipe.checkpoint,
            log=recorder.log,
            distributed=distributed,
        ) as checkpoints,
    ):
        run = _Run(
            plan=plan,
            recorder=recorder,
            display=display,
            checkpoints=checkpoints,
            snapshot=_start_or_resume(plan, recorder, checkpoints, previous, distributed),
            distributed=distributed,
        )
        if warning is not None:
            recorder.log(warning)
        prepared = run.prepare(allow_change)
        critic, report = run.train_critic(prepared)
        learner, trained = run.train_policy(prepared, critic)
        evaluation = run.evaluate(prepared, step=trained.last_step)
        run.write_report(prepared, learner, critic, report)
        rows = [
            *([] if report is None else report.summary()),
            *trained.summary(),
            *evaluation.summary(),
            ("run", str(recorder.folder.path)),
            *(("look at it", line) for line in recorder.where()),
            *serving_hints(
                recorder.folder.path, Path("models", plan.recipe.run.name), policy=prepared.policy
            ),
        ]
        recorder.report(rows)
        display.summary(rows)
    distributed.shutdown()


def _open_recorder(
    plan: Plan, display: Display, previous: Path | None, distributed: Distributed
) -> Recorder | RankLog:
    """Open the run in the first process, and send the path of its folder to the other processes."""
    if distributed.is_rank_zero:
        recorder = open_recorder(plan, display, resume=previous)
        distributed.broadcast(str(recorder.folder.path))
        return recorder
    return RankLog(Path(distributed.broadcast("")), distributed.rank)


def _start_or_resume(
    plan: Plan,
    recorder: Recorder | RankLog,
    checkpoints: Checkpoints,
    previous: Path | None,
    distributed: Distributed,
) -> Snapshot | None:
    """Record recipe and machine of a run, and return the snapshot from which the run resumes.

    The result is None if the run is new, or if a resumed run has no intact snapshot.
    """
    if previous is not None and (warning := other_machine(previous, distributed)):
        recorder.log(warning)
    if distributed.is_rank_zero:
        changed = {} if previous is None else {CHANGED: changed_keys(read_run(previous), plan)}
        recorder.folder.record(**plan.identity, **changed, fingerprint=fingerprint(distributed))
        recorder.tags({run_tags.SOURCE_SHA256: plan.tags[run_tags.SOURCE_SHA256]})  # changes if resumed
    if not distributed.any_rank(flag=previous is not None):
        return None
    with distributed.rank_zero_first():
        snapshot = checkpoints.newest()
    where = "the beginning" if snapshot is None else f"step {snapshot.step} of stage `{snapshot.stage}`"
    recorder.log(f"continuing run {recorder.folder.run_id} from {where}")
    return snapshot


@frozen(kw_only=True, eq=False)
class _Run:
    """The stages of one run, each as a method."""

    plan: Plan
    recorder: Recorder | RankLog
    display: Display
    checkpoints: Checkpoints
    snapshot: Snapshot | None
    distributed: Distributed

    def prepare(self, allow_change: Sequence[str]) -> Prepared:
        """Execute stage 0: load the data and the policy."""
        torch.manual_seed(self.plan.recipe.run.seed)
        prepared = prepare(self.plan, log=self.recorder.log, distributed=self.distributed)
        with self.distributed.rank_zero_first():
            prepared.tokenise()
        if self.plan.recipe.train.epochs is not None:
            per_epoch = prepared.policy_batches().batches_per_epoch
            self._record_steps("train", prepared.train_table.steps, per_epoch)
        version, folder = prepared.source.version(), self.recorder.folder
        if self.distributed.is_rank_zero and refuse_other_data(folder, version, allowed=allow_change):
            self.recorder.datasets([version])
        self.recorder.tags({run_tags.MODEL_VERSION: prepared.base_name})
        if self.distributed.is_rank_zero:
            folder.record(**{VOCABULARY: vocabulary_sha256(prepared.codec.tokenizer)})
        if prepared.source.oracle_weights and Signal.GIVEN in self.plan.weighting.needs:
            self.recorder.tags({run_tags.ORACLE: "true"})
        return prepared

    def train_critic(self, prepared: Prepared) -> tuple[Critic | None, CriticReport | None]:
        """Execute stage 1: build the critic, train or load it if necessary, and measure its values.

        Returns:
            The critic, or None if the recipe has no critic; and the report on the critic's values, or None if
            there is no critic or the critic provides no values.
        """
        table, selected, critic = self.plan.recipe.critic, self.plan.critic, prepared.build_critic()
        if table is None or selected is None or critic is None:
            return None, None
        mesh = mesh_of_parameters(prepared.policy)
        if mesh is not None:
            shard(critic.blocks, mesh)
        folder = self.recorder.folder.checkpoints / "critic"
        learner = CriticLearner(
            critic=critic, prepared=prepared, table=table.train, distributed=self.distributed, best=folder
        )
        if table.checkpoint is not None:
            load_component(critic, Path(table.checkpoint))
            self.recorder.log(f"critic loaded from `{table.checkpoint}`")
        trains, judged = (
            table.checkpoint is None and critic.trainable,
            bool(selected.component.provides & {*VALUES}),
        )
        if trains or judged:
            learner.check_problems(table, log=self.recorder.log)
        last_step = -1
        if trains:
            with self.distributed.rank_zero_first():
                batches, batches_per_epoch = prepared.critic_batches(critic, table)
            learner.table = table.train.for_epochs(batches_per_epoch)
            if self.snapshot is not None and self.snapshot.stage == "policy":
                learner.load_best()
                last_step = int(read_run(folder.parents[1]).get(LAST_STEP["critic"], learner.table.steps))
            else:
                if table.train.epochs is not None:
                    self._record_steps("critic.train", learner.table.steps, batches_per_epoch)
                last_step = self._train(learner, learner.table, batches).last_step
        if not judged:
            return critic, None
        report = learner.measure("judging")
        # The step is one after the last validation, so that the final measure is the metric's last value.
        found = report.metrics() | learner.training_metrics()
        self.recorder.metrics(learner.stage, last_step + 1, found)
        if not check_informative(report, selected.address, table, log=self.recorder.log):
            self.recorder.tags({run_tags.UNINFORMATIVE_CRITIC: "true"})
        return critic, report

    def train_policy(self, prepared: Prepared, critic: Critic | None) -> tuple[PolicyLearner, Trained]:
        """Execute stage 2: train the policy with weighted multi-token prediction."""
        with self.distributed.rank_zero_first():
            batches = prepared.policy_batches()
            prepared.policy_tokens("validation")
        if self.distributed.is_single_process:
            critic = prepared.with_score_cache(critic, batches)
        best = self.recorder.folder.checkpoints / "best_model.pt"
        learner = PolicyLearner.make(prepared, critic, best=best, distributed=self.distributed)
        trained = self._train(learner, prepared.train_table, batches)
        self.recorder.artifact(best, "checkpoints")
        return learner, trained

    def evaluate(self, prepared: Prepared, *, step: int) -> Evaluation:
        """Execute stage 3: measure the best policy on the examples and problems of the test split.

        Args:
            prepared: The data and the policy.
            step: The last step of stage 2, under which the metrics are recorded.

        Returns:
            The evaluation; empty in a process that is not needed after stage 2.
        """
        if not self._takes_part:
            return Evaluation(metrics={}, timings={}, files=())
        folder = self.recorder.folder.path / "evaluation" if self.distributed.is_rank_zero else None
        evaluation = evaluate(prepared, self.plan.recipe.evaluate, display=self.display, folder=folder)
        self.recorder.metrics("evaluate", step, evaluation.metrics)
        self.recorder.timings("evaluate", step, evaluation.timings)
        for file in evaluation.files:
            self.recorder.artifact(file, "evaluation")
        return evaluation

    def write_report(
        self, prepared: Prepared, learner: PolicyLearner, critic: Critic | None, report: CriticReport | None
    ) -> None:
        """Write the report page of the run and, if the critic provides values, a table of these values."""
        if not self._takes_part:
            return
        reliability = () if report is None else report.reliability
        tokens = measure_tokens(prepared, learner, critic=critic, reliability=reliability)
        table = None
        if critic is not None and report is not None:
            documents = np.concatenate([prepared.critic_validation(half) for half in HALVES])
            batches = prepared.batches_in_order(
                prepared.critic_tokens("validation"),
                documents,
                batch_size=self.plan.recipe.train.batch_size,
            )
            shown = self.display.counted("values", len(documents), batches)
            table = table_of_values(prepared, learner, critic=critic, batches=shown)
        if not self.distributed.is_rank_zero:
            return
        folder = self.recorder.folder.path
        self.recorder.artifact(save_token_report(tokens, folder), "")
        self.recorder.artifact(write_report(folder), "")
        if table is not None:
            atomic_write(folder / "evaluation" / VALUES_FILE, table)
            self.recorder.artifact(folder / "evaluation" / VALUES_FILE, "evaluation")

    @property
    def _takes_part(self) -> bool:
        """Whether this process is needed after stage 2: the first one always, others if they have shards."""
        return self.distributed.is_rank_zero or self.plan.recipe.model.shard

    def _train(self, learner: Learner, table: TrainTable, batch_of: Callable[[int], Batch]) -> Trained:
        self.display.stage(learner.stage, table.steps)
        torch.manual_seed(self.plan.recipe.run.seed)
        resumes = self.snapshot is not None and self.snapshot.stage == learner.stage
        trained = train(
            learner,
            table,
            batch_of=batch_of,
            reporter=self.recorder,
            checkpoints=self.checkpoints,
            resume=self.snapshot if resumes else None,
            distributed=self.distributed,
        )
        self.recorder.log(f"{learner.stage}: kept step {trained.best_step} of {table.steps}")
        last, planned = LAST_STEP[learner.stage], STEPS[learner.stage]
        was = read_run(self.recorder.folder.path)
        if self.distributed.is_rank_zero:
            self.recorder.folder.record(**{last: trained.last_step, planned: table.steps})
        tag = f"{run_tags.STOPPED_EARLY_PREFIX}{learner.stage}"
        if trained.last_step < table.steps:
            self.recorder.log(
                f"{learner.stage}: stopped early after step {trained.last_step} of {table.steps}"
            )
            self.recorder.tags({tag: str(trained.last_step)})
        elif was.get(last, 0) < was.get(planned, 0):
            self.recorder.tags({tag: "no"})  # the run stopped early before it was resumed
        return trained

    def _record_steps(self, key: str, steps: int, batches_per_epoch: float) -> None:
        """Record the number of steps of a stage for which the recipe gives a number of epochs."""
        self.recorder.log(f"`{key}.epochs`: {steps} steps, with {batches_per_epoch:g} steps per epoch")
        self.recorder.params({f"{key}.steps": str(steps)})
        if self.distributed.is_rank_zero:
            self.recorder.folder.record(**{f"{key}.batches_per_epoch": batches_per_epoch})
