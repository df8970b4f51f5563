"""The checks and the logged metrics of weights, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.api import Weights, WmtpError
from weighted_mtp_core.metrics.weights import share_between_responses, weight_metrics
from weighted_mtp_core.model.targets import pair_index
from weighted_mtp_core.training.plugin_metrics import check_metrics
from weighted_mtp_core.training.weight_checks import ValueCheck, check_weights

LABEL = "weighting `my.own` (my-dist 1.0)"


def metrics(*weights):
    return {name: float(value) for name, value in weight_metrics(torch.tensor(weights)).items()}


def test_equal_weights_have_entropy_one_and_a_full_effective_sample():
    found = metrics(2.0, 2.0, 2.0, 2.0)

    assert found["weight_entropy"] == pytest.approx(1)
    assert found["effective_sample_share"] == pytest.approx(1)
    assert found["weight_mean"] == 2


def test_all_weight_on_one_pair_has_entropy_zero():
    found = metrics(0.0, 5.0, 0.0, 0.0)

    assert found["weight_entropy"] == 0
    assert found["effective_sample_share"] == pytest.approx(0.25)


def test_entropy_and_effective_sample_by_hand():
    found = metrics(1.0, 3.0)

    assert found["weight_entropy"] == pytest.approx(
        -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    )
    assert found["effective_sample_share"] == pytest.approx(16 / 10 / 2)


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=30), st.floats(0.1, 10))
def test_scaling_all_weights_moves_neither_entropy_nor_effective_sample(weights, scale):
    one, other = metrics(*weights), metrics(*(scale * weight for weight in weights))

    assert one["weight_entropy"] == pytest.approx(other["weight_entropy"], abs=1e-4)
    assert one["effective_sample_share"] == pytest.approx(other["effective_sample_share"], abs=1e-4)


def test_entropy_and_effective_sample_of_negative_weights_are_those_of_their_sizes():
    found, sizes = metrics(1.0, -3.0), metrics(1.0, 3.0)

    assert found["weight_mean"] == -1
    assert found["weight_entropy"] == sizes["weight_entropy"]
    assert found["effective_sample_share"] == sizes["effective_sample_share"]


def share(weights, responses):
    return float(share_between_responses(torch.tensor(weights), torch.tensor(responses), count=9))


def test_one_weight_per_response_puts_all_variance_between_responses():
    assert share([0.1, 0.1, 0.1, 2.3, 2.3], [3, 3, 3, 8, 8]) == pytest.approx(1)


def test_equal_means_of_all_responses_put_no_variance_between_them():
    assert share([1.0, 3.0, 0.0, 4.0, 2.0], [0, 0, 5, 5, 5]) == pytest.approx(0, abs=1e-6)


def test_equal_weights_have_no_variance_between_responses():
    assert share([0.1] * 7, [0, 0, 1, 1, 1, 1, 2]) == 0


@given(st.lists(st.tuples(st.floats(-3, 3, width=32), st.integers(0, 4)), min_size=2, max_size=30))
def test_the_share_between_responses_is_that_of_the_law_of_total_variance(pairs):
    weight_N, response_N = (np.array(each) for each in zip(*pairs, strict=True))
    if weight_N.std() < 1e-3:
        return
    mean_N = np.array([weight_N[response_N == each].mean() for each in response_N])

    assert share(weight_N.tolist(), response_N.tolist()) == pytest.approx(
        mean_N.var() / weight_N.var(), abs=1e-4
    )


def test_pairs_that_do_not_count_do_not_count():
    weight = torch.tensor([[[1.0], [9.0]]])
    target = torch.tensor([[[True], [False]]])

    counted = weight.flatten()[pair_index(target, preceding_BT=None)]

    assert float(weight_metrics(counted)["weight_mean"]) == 1


def test_no_pairs_give_no_metrics():
    assert weight_metrics(torch.zeros(0)) == {}


@pytest.mark.parametrize(
    ("weight", "fault"),
    [
        (torch.ones(2, 4), r"shape \(2, 4\), expected \(2, 3\) or \(2, 3, 5\)"),
        (torch.ones(2, 3, dtype=torch.bfloat16), "dtype torch.bfloat16, expected torch.float32"),
        (torch.ones(2, 3, requires_grad=True), "a gradient; weights must be detached"),
    ],
)
def test_a_bad_weight_tensor_is_named_with_its_maker(weight, fault):
    with pytest.raises(WmtpError, match=rf"`my.own` \(my-dist 1.0\) returned weights with .*{fault}"):
        check_weights(Weights(weight=weight), torch.ones(2, 3, dtype=torch.bool), n_future=5, label=LABEL)


@pytest.mark.parametrize(
    ("weight", "fault"),
    [
        (torch.full((2, 3), float("nan")), "NaN or infinity"),
        (torch.tensor([1.0, float("inf"), -1.0]), "NaN or infinity"),
        (torch.tensor([1.0, -1e-30]), "a negative weight"),
    ],
)
def test_bad_values_are_named_with_their_maker(weight, fault):
    check = ValueCheck(label=LABEL)
    check.note(weight)

    with pytest.raises(WmtpError, match=rf"`my.own` \(my-dist 1.0\) returned weights with {fault} in them"):
        check.raise_if_bad()


def test_negative_weights_pass_with_permission_and_others_still_do_not():
    check = ValueCheck(label=LABEL, negative=True)
    check.note(torch.tensor([1.0, -1.0]))
    check.raise_if_bad()
    check.note(torch.tensor([-1.0, float("-inf")]))

    with pytest.raises(WmtpError, match="NaN or infinity"):
        check.raise_if_bad()


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (None, "returned a `NoneType`, expected `Weights`"),
        (torch.ones(2, 3), "returned a `Tensor`, expected `Weights`"),
        (Weights(weight=[1.0]), "returned weights in a `list`, expected a tensor"),
    ],
)
def test_what_is_no_weights_is_refused_and_its_maker_named(returned, text):
    with pytest.raises(WmtpError) as failed:
        check_weights(returned, torch.ones(2, 3, dtype=torch.bool), n_future=5, label=LABEL)

    assert str(failed.value) == f"{LABEL} {text}"


@given(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=60))
def test_quantiles_are_those_of_numpy(weights):
    found = metrics(*weights)

    expected = np.quantile(np.float32(weights), [0.05, 0.5, 0.95])
    assert [found[f"weight_p{p}"] for p in ("05", "50", "95")] == pytest.approx(expected, abs=1e-5)


def test_quantiles_work_for_more_pairs_than_torch_quantile_accepts():
    count = 2**24 + 81
    found = weight_metrics(torch.arange(count - 1, -1, -1, dtype=torch.float32))

    assert float(found["weight_p05"]) == pytest.approx(0.05 * (count - 1), rel=1e-6)
    assert float(found["weight_p95"]) == pytest.approx(0.95 * (count - 1), rel=1e-6)


def test_weights_of_zero_for_each_target_are_a_warning_given_once():
    said = []
    check = ValueCheck(label=LABEL, log=said.append)
    for weights in ([1.0, 0.0], [0.0, 0.0], [0.0, 0.0]):
        weight = torch.tensor(weights)
        check.note(weight, all_zero=~weight.any())
        check.raise_if_bad()

    (warning,) = said
    assert warning == (
        f"WARNING: {LABEL} gave each target of a step the weight 0; "
        "the policy learns nothing from such a step"
    )


def test_a_negative_weight_is_worse_than_weights_of_zero():
    check = ValueCheck(label=LABEL)
    check.note(torch.tensor([-1.0, 0.0]), all_zero=torch.tensor(True))

    with pytest.raises(WmtpError, match="a negative weight"):
        check.raise_if_bad()


@pytest.mark.parametrize(
    "name",
    [
        *("train_loss", "value_loss", "train_ce_head_1", "validation_ce_head_12", "test_accuracy_head_2"),
        *("weight_mean", "weight_p05", "effective_sample_share", "policy_learning_rate", "critic_auc"),
        *("critic_gradient_norm", "policy_tokens_per_second", "pass_at_1", "tokens_per_forward"),
        *("validation_acceptance_head_2", "test_acceptance_length", "acceptance_position_2"),
        *("system/policy_flops_per_second", "generated_tokens_per_second"),
    ],
)
def test_a_metric_of_a_plugin_cannot_replace_one_of_core(name):
    with pytest.raises(WmtpError, match=f"returned a metric `{name}`, which is the name of a metric of core"):
        check_metrics({"own": 1.0, name: 1.0}, label=LABEL)


@pytest.mark.parametrize(
    ("value", "fault"),
    [("1", "type `str`"), (None, "type `NoneType`"), (torch.ones(2), r"shape \(2,\)")],
)
def test_a_metric_that_is_no_number_is_refused(value, fault):
    with pytest.raises(WmtpError, match=rf"returned a metric `own` of {fault}, expected a number"):
        check_metrics({"own": value}, label=LABEL)


def test_other_metrics_of_plugins_pass():
    check_metrics({"td_error_mean": torch.tensor(1.0), "value_mean": 1, "weight_own": 0.5}, label=LABEL)
