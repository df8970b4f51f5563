"""Which run is resumed, and what may have changed since it was interrupted."""

import json

import pytest
from weighted_mtp_core.api import DatasetVersion, WmtpError
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
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.runtime.distributed import Distributed
from weighted_mtp_core.tracking.journal import Journal
from weighted_mtp_core.tracking.run_folder import RunFolder, read_run

RECIPE = """
    [run]
    name = "first"
    storage = "{storage}"
    resume = "{resume}"
    [data]
    use = "{plugin}.lines"
    [data.options]
    folder = "x"
    [weighting]
    use = "{plugin}.flat"
"""


@pytest.fixture
def plan(example_plugin, write_recipe, tmp_path):
    """Make a plan; `resume` and overrides as a person would give them."""

    def plan(*overrides, resume="never"):
        text = RECIPE.format(storage=tmp_path / "storage", resume=resume, plugin=example_plugin)
        return make_plan(write_recipe(text, "recipe.toml"), overrides=overrides)

    return plan


@pytest.fixture
def leave(tmp_path):
    """Leave a run folder as a process of that plan would, with this status."""

    def leave(plan, status):
        folder = RunFolder.create(
            tmp_path / "storage" / "runs", experiment=plan.experiment, name=plan.recipe.run.name
        )
        folder.record(status=status, **plan.identity, fingerprint=fingerprint())
        folder.close()
        return folder.path

    return leave


def test_never_begins_anew(plan, leave):
    leave(plan(), "KILLED")

    assert run_to_resume(plan(), None) is None


@pytest.mark.parametrize("status", ["KILLED", "FAILED", "RUNNING"])
def test_auto_goes_on_with_an_unfinished_run_of_the_same_recipe(plan, leave, status):
    path = leave(plan(resume="auto"), status)

    assert run_to_resume(plan(resume="auto"), None) == path


def test_auto_goes_on_with_the_latest(plan, leave):
    paths = sorted(leave(plan(resume="auto"), "KILLED") for _ in range(3))

    assert run_to_resume(plan(resume="auto"), None) == paths[-1]


def test_auto_leaves_finished_runs_and_those_of_other_recipes(plan, leave):
    leave(plan(resume="auto"), "FINISHED")
    leave(plan("run.seed=7", resume="auto"), "KILLED")

    assert run_to_resume(plan(resume="auto"), None) is None


@pytest.mark.parametrize("change", ["train.steps=900", "train.patience=3", "train.epochs=2"])
def test_auto_leaves_a_run_with_another_length_of_training(plan, leave, change):
    """The learning rates of the steps that are done depend on the number of steps."""
    leave(plan(resume="auto"), "KILLED")

    assert run_to_resume(plan(change, resume="auto"), None) is None


@pytest.mark.parametrize("change", ["evaluate.samples=1", "checkpoint.every=7", "data.options.workers=2"])
def test_auto_goes_on_with_a_run_that_trains_the_same_policy(plan, leave, change):
    path = leave(plan(resume="auto"), "KILLED")

    assert run_to_resume(plan(change, resume="auto"), None) == path


def test_what_has_changed_since_a_run_began_is_not_forgotten(plan, leave):
    path = leave(plan(), "KILLED")
    assert changed_keys(read_run(path), plan("checkpoint.every=7")) == []
    changed = changed_keys(read_run(path), plan("train.steps=900", "train.learning_rate=0.5"))
    folder = RunFolder.open(path)
    folder.record(changed=changed)
    folder.close()

    assert changed == ["train.learning_rate", "train.steps"]
    assert changed_keys(read_run(path), plan()) == changed
    assert run_to_resume(plan(resume="auto"), None) is None


def test_auto_leaves_a_run_that_goes_on_elsewhere(plan, leave):
    path = leave(plan(resume="auto"), "RUNNING")
    folder = RunFolder.open(path)

    assert run_to_resume(plan(resume="auto"), None) is None
    folder.close()


def test_a_run_is_named_by_the_beginning_of_its_id(plan, leave):
    path = leave(plan(), "KILLED")

    assert run_to_resume(plan(), path.name[:15]) == path
    with pytest.raises(WmtpError, match="there is no run `1999`"):
        run_to_resume(plan(), "1999")


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=900",
        "train.max_bad_steps=1",
        "train.patience=3",
        "train.epochs=2",
        "checkpoint.every=7",
        "model.activation_checkpointing=true",
        "evaluate.samples=1",
        "data.options.workers=2",
        'run.tags=["a:b"]',
    ],
)
def test_what_moves_no_step_that_is_done_may_change(plan, leave, change):
    path = leave(plan(), "KILLED")

    refuse_changes(path, plan(change), allowed=())


def test_everything_else_is_refused_and_listed(plan, leave):
    path = leave(plan(), "KILLED")

    with pytest.raises(WmtpError) as caught:
        refuse_changes(path, plan("train.learning_rate=0.5", "run.seed=7"), allowed=())

    assert str(caught.value) == (
        f"the run `{path}` cannot continue with these changes:\n"
        "  run.seed: 42 -> 7\n"
        "  train.learning_rate: 0.0003 -> 0.5"
    )
    assert caught.value.hint.endswith("--allow-change run.seed")


def test_a_change_that_is_allowed_by_name_is_taken(plan, leave):
    path = leave(plan(), "KILLED")

    refuse_changes(path, plan("model.micro.layers=3"), allowed=["model"])
    with pytest.raises(WmtpError, match=r"model\.micro\.layers: 4 -> 3"):
        refuse_changes(path, plan("model.micro.layers=3"), allowed=["mod"])


def test_another_version_of_a_plugin_is_refused(plan, leave):
    path = leave(plan(), "KILLED")
    facts = json.loads((path / "run.json").read_text())
    now = facts["distributions"]["wmtp-example"]
    facts["distributions"]["wmtp-example"] = now.replace("1.2.3", "1.2.2")
    (path / "run.json").write_text(json.dumps(facts))

    with pytest.raises(WmtpError, match=r"distributions\.wmtp-example: 1\.2\.2, .* -> 1\.2\.3, "):
        refuse_changes(path, plan(), allowed=())


def test_a_finished_run_does_not_go_on_unless_it_is_to_train_further(plan, leave):
    path = leave(plan(), "FINISHED")

    with pytest.raises(WmtpError, match="is finished"):
        refuse_changes(path, plan(), allowed=())
    refuse_changes(path, plan("train.steps=900"), allowed=())


def record(path, stage, *steps):
    journal = Journal(RunFolder(path=path).journal)
    for step in steps:
        journal.append("metrics", {"step": step, "stage": stage, "metrics": {f"{stage}_loss": 1.0}})
    journal.close()


def test_a_finished_run_is_not_measured_anew_with_other_settings(plan, leave):
    path = leave(plan(), "FINISHED")
    record(path, "evaluate", 300)

    with pytest.raises(WmtpError, match=r"was evaluated with other settings of `\[evaluate\]`") as caught:
        refuse_changes(path, plan("evaluate.max_new_tokens=4"), allowed=())
    assert f"-m weighted_mtp_core evaluate {path}" in caught.value.hint
    with pytest.raises(WmtpError, match="is finished"):
        refuse_changes(path, plan("checkpoint.every=7"), allowed=())
    refuse_changes(path, plan("evaluate.max_new_tokens=4", "train.steps=900"), allowed=())


def test_a_run_that_was_killed_after_its_evaluation_is_not_measured_anew(plan, leave):
    path = leave(plan(), "KILLED")
    record(path, "evaluate", 300)

    refuse_changes(path, plan(), allowed=())
    with pytest.raises(WmtpError, match="was evaluated with other settings"):
        refuse_changes(path, plan("evaluate.max_new_tokens=4"), allowed=())


@pytest.mark.parametrize("known_by", ["journal", "checkpoint"])
def test_fewer_steps_than_done_are_refused(plan, leave, known_by):
    path = leave(plan(), "KILLED")
    if known_by == "journal":
        record(path, "policy", 0, 8)
    else:
        (path / "checkpoints" / "policy-00000008").mkdir()

    refuse_changes(path, plan("train.steps=8"), allowed=())
    with pytest.raises(WmtpError, match=r"has done 8 steps of stage `policy`; `train.steps` is 7"):
        refuse_changes(path, plan("train.steps=7"), allowed=())


def test_a_critic_that_is_trained_keeps_its_steps(plan, leave):
    critic = "critic.use=example.judge"
    path = leave(plan(critic), "KILLED")
    record(path, "critic", 0, 5)

    refuse_changes(path, plan(critic, "critic.train.steps=900"), allowed=())
    with pytest.raises(WmtpError, match=r"has done 5 steps of stage `critic`; `critic.train.steps` is 4"):
        refuse_changes(path, plan(critic, "critic.train.steps=4"), allowed=())
    record(path, "policy", 0)
    refuse_changes(path, plan(critic), allowed=())
    with pytest.raises(WmtpError, match=r"has ended stage `critic` after 300 steps"):
        refuse_changes(path, plan(critic, "critic.train.steps=900"), allowed=())


@pytest.mark.parametrize("change", ["train.select_by=acceptance", "model.train=heads"])
def test_the_measure_that_chose_the_best_state_cannot_be_allowed_to_change(plan, leave, change):
    path = leave(plan(), "KILLED")

    refuse_changes(path, plan("train.select_by=head_1"), allowed=["train"])
    refuse_changes(path, plan(change), allowed=["train", "model"])
    record(path, "policy", 0)
    refuse_changes(path, plan("train.select_by=head_1"), allowed=["train"])
    with pytest.raises(WmtpError, match=r"chooses the state to keep by `head_1`; `train.select_by` is now `"):
        refuse_changes(path, plan(change), allowed=["train", "model"])


def test_a_run_that_stopped_early_goes_on_with_more_patience_only(plan, leave):
    path = leave(plan("train.patience=2"), "FINISHED")
    folder = RunFolder.open(path)
    folder.record(**{LAST_STEP["policy"]: 40, STEPS["policy"]: 300})
    folder.close()
    record(path, "evaluate", 40)

    for change in ("train.patience=2", "train.patience=1"):
        with pytest.raises(WmtpError, match="is finished") as caught:
            refuse_changes(path, plan(change, "train.steps=900"), allowed=())
        assert caught.value.hint == "raise `train.patience` to train it further"
    with pytest.raises(WmtpError, match=r"was evaluated with other settings of `\[evaluate\]`"):
        refuse_changes(path, plan("train.patience=2", "evaluate.max_new_tokens=4"), allowed=())
    refuse_changes(path, plan("train.patience=3", "evaluate.max_new_tokens=4"), allowed=())
    refuse_changes(path, plan(), allowed=())


def test_a_run_of_some_epochs_goes_on_for_more_epochs_or_steps(plan, leave):
    path = leave(plan("train.epochs=3"), "FINISHED")
    folder = RunFolder.open(path)
    folder.record(**{"train.batches_per_epoch": 20.0, LAST_STEP["policy"]: 60, STEPS["policy"]: 60})
    folder.close()
    record(path, "policy", 0, 60)

    with pytest.raises(WmtpError, match="is finished") as caught:
        refuse_changes(path, plan("train.epochs=3"), allowed=())
    assert caught.value.hint == "raise `train.epochs` to train it further"
    refuse_changes(path, plan("train.epochs=3.1"), allowed=())
    refuse_changes(path, plan("train.steps=61"), allowed=())
    with pytest.raises(WmtpError, match="is finished"):
        refuse_changes(path, plan("train.steps=60"), allowed=())


def test_fewer_epochs_than_done_are_refused(plan, leave):
    path = leave(plan("train.epochs=3"), "KILLED")
    refuse_changes(
        path, plan("train.epochs=0.1"), allowed=()
    )  # it ended before the size of the data was known
    folder = RunFolder.open(path)
    folder.record(**{"train.batches_per_epoch": 20.0})
    folder.close()
    record(path, "policy", 0, 30)

    refuse_changes(path, plan("train.epochs=1.5"), allowed=())
    with pytest.raises(WmtpError, match=r"has done 30 steps of stage `policy`; `train.steps` is 29"):
        refuse_changes(path, plan("train.epochs=1.45"), allowed=())


def test_another_optimiser_cannot_be_allowed_once_the_stage_has_begun(plan, leave):
    critic = "critic.use=example.judge"
    path = leave(plan(critic), "KILLED")
    other, of_critic = "train.optimiser.name=muon", "critic.train.optimiser.name=adamw_8bit"
    allowed = ["train.optimiser", "critic.train.optimiser"]

    with pytest.raises(WmtpError, match=r"train\.optimiser\.name: adamw -> muon"):
        refuse_changes(path, plan(critic, other), allowed=())
    refuse_changes(path, plan(critic, other, of_critic), allowed=allowed)
    record(path, "critic", 0)
    refuse_changes(path, plan(critic, other), allowed=allowed)
    with pytest.raises(
        WmtpError, match="has begun stage `critic` with `adamw`, whose state `adamw_8bit` canno"
    ):
        refuse_changes(path, plan(critic, of_critic), allowed=allowed)
    record(path, "policy", 0)
    refuse_changes(path, plan(critic, of_critic), allowed=allowed)
    with pytest.raises(
        WmtpError, match="has begun stage `policy` with `adamw`, whose state `muon` cannot use"
    ):
        refuse_changes(path, plan(critic, other), allowed=allowed)


def test_other_trained_parameters_cannot_be_allowed_once_the_policy_is_trained(plan, leave):
    selects = "train.select_by=acceptance"
    path = leave(plan(selects), "KILLED")
    other = plan(selects, "model.train=heads")

    refuse_changes(path, other, allowed=["model.train"])
    record(path, "policy", 0)
    with pytest.raises(
        WmtpError, match="has begun stage `policy` with `all`, whose state `heads` cannot use"
    ) as caught:
        refuse_changes(path, other, allowed=["model.train"])

    assert caught.value.hint == "undo the change of `model.train`, or begin a new run"


def test_other_data_are_refused(plan, leave):
    folder = RunFolder.open(leave(plan(), "KILLED"))
    first = DatasetVersion(name="lines", version="1", sha256="a" * 64)
    second = DatasetVersion(name="lines", version="1", sha256="b" * 64)

    assert refuse_other_data(folder, first, allowed=())
    assert not refuse_other_data(folder, first, allowed=())
    with pytest.raises(WmtpError, match=r"data\.sha256: a{64} -> b{64}"):
        refuse_other_data(folder, second, allowed=())
    assert refuse_other_data(folder, second, allowed=["data.sha256"])


def test_another_number_of_processes_is_told(plan, leave):
    path = leave(plan(), "KILLED")

    assert other_machine(path, Distributed()) is None
    assert other_machine(path, Distributed(rank=0, size=2)) == (
        "WARNING: this machine differs from the one that last executed the run (processes 1 -> 2): from here "
        "on, results are equal up to rounding (about 1e-4 after some hundred steps), not bit for bit"
    )
