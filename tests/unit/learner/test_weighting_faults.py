"""A fault of a weighting is reported under its name, and the policy stays in its mode."""

import pytest
import torch
from small_policy import LABEL, Fixed, learner, learnt, policy
from weighted_mtp_core.api import WeightingStrategy, Weights, WmtpError
from weighted_mtp_core.errors import RunFailedError


class Failing(WeightingStrategy):
    """Raises what it is given."""

    def __init__(self, error):
        self.error = error

    def weigh(self, view):
        raise self.error


def test_a_step_in_which_each_target_has_weight_zero_is_a_warning(batch):
    class OnlyPrompts(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=(~view.response_BT).float())

    said = []
    trained = learner(policy(), OnlyPrompts(), log=said.append)
    for step in range(2):
        trained.learn(batch, step=step)

    (warning,) = said
    assert warning == (
        f"WARNING: {LABEL} gave each target of a step the weight 0; "
        "the policy learns nothing from such a step"
    )


def test_a_metric_that_would_replace_one_of_core_ends_the_run(batch):
    class Hides(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.response_BT.float(), metrics={"train_ce_head_1": 0.0})

    with pytest.raises(RunFailedError, match="returned a metric `train_ce_head_1`, which is the name of"):
        learner(policy(), Hides()).learn(batch, step=0)


def test_a_weighting_that_raises_is_named_with_what_it_raised(batch):
    with pytest.raises(RunFailedError) as failed:
        learnt(policy(), batch, Failing(ZeroDivisionError("no weights at step 3")))

    assert str(failed.value) == f"{LABEL} failed: ZeroDivisionError: no weights at step 3"


def test_a_weighting_that_explains_itself_keeps_its_hint(batch):
    with pytest.raises(RunFailedError) as failed:
        learnt(policy(), batch, Failing(WmtpError("no values", hint="add a critic")))

    assert str(failed.value) == f"{LABEL} failed: no values"
    assert failed.value.hint == "add a critic"


@pytest.mark.parametrize("mode", [True, False])
def test_weights_without_training_leave_the_policy_in_its_mode_also_after_an_error(batch, mode):
    model = policy().train(mode)

    learner(model, Fixed()).weigh(batch, step=0)
    assert model.training is mode
    with pytest.raises(RunFailedError):
        learner(model, Failing(ZeroDivisionError())).weigh(batch, step=0)

    assert model.training is mode


def test_weights_that_were_bad_since_the_last_look_are_found_before_a_checkpoint():
    trained = learner(policy(), Failing(AssertionError()))
    trained._values.note(torch.tensor([1.0, -1.0]))  # as on an accelerator, where weights are read rarely

    with pytest.raises(RunFailedError, match="returned weights with a negative weight in them"):
        trained.state_dict()
