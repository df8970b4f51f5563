"""The metrics that stage 3 computes from judged completions, and the files that it writes."""

import json
import math

import numpy as np
import pytest
from torch.nn.functional import cross_entropy
from weighted_mtp_core.api import Problem, Verdict, VerdictKind
from weighted_mtp_core.compare.measures import default_metrics, read_measures
from weighted_mtp_core.evaluation.evaluate import Evaluation
from weighted_mtp_core.evaluation.finished_run import plan_of, prepare_finished
from weighted_mtp_core.evaluation.judging import JudgedCompletions
from weighted_mtp_core.generation.generate import generate
from weighted_mtp_core.tracking.names import check_metric_name
from weighted_mtp_core.training.plugin_metrics import is_core_metric

PASSED, WRONG, LATE = VerdictKind.PASSED, VerdictKind.WRONG, VerdictKind.CPU_LIMIT


def judged(*rows, whole_split=True):
    """Verdicts of each problem's samples, whose texts are `    return 0`, `    return 1`, ..."""
    return JudgedCompletions(
        problems=tuple(
            Problem(problem_id=f"micro/{i}", prompt="def f():\n", entry_point="f", tests="")
            for i in range(len(rows))
        ),
        completions=tuple(tuple(f"    return {i}\n" for i in range(len(row))) for row in rows),
        verdicts=tuple(
            tuple(Verdict(kind=kind, detail=f"é\u2028{kind.value}") for kind in row) for row in rows
        ),
        whole_split=whole_split,
    )


THREE = ((PASSED, WRONG, WRONG, WRONG), (PASSED, PASSED, PASSED, LATE), (WRONG, WRONG, WRONG, LATE))


def test_pass_at_k_is_the_mean_over_problems():
    metrics = judged(*THREE).metrics([1, 2])

    assert metrics["pass_at_1"] == pytest.approx((1 / 4 + 3 / 4 + 0) / 3)
    assert metrics["pass_at_2"] == pytest.approx((1 - 3 / 6 + 1 + 0) / 3)  # C(3, 2) = 3 of C(4, 2) = 6


def test_the_share_of_each_verdict_shows_what_was_left_undecided():
    metrics = judged(*THREE).metrics([1])

    shares = {name: share for name, share in metrics.items() if name.startswith("verdict_")}
    assert shares == {"verdict_passed": 4 / 12, "verdict_wrong": 6 / 12, "verdict_cpu_limit": 2 / 12}


def test_a_part_of_a_split_says_so_in_the_name():
    assert "pass_at_1_of_3_problems" in judged(*THREE, whole_split=False).metrics([1])
    assert "pass_at_1" not in judged(*THREE, whole_split=False).metrics([1])


@pytest.mark.parametrize("whole_split", [True, False])
def test_every_tracker_can_hold_the_names(whole_split):
    rows = [[kind] for kind in VerdictKind]

    for name in judged(*rows, whole_split=whole_split).metrics([1]):
        assert check_metric_name(name) == name


def test_samples_are_saved_in_human_evals_format(tmp_path):
    samples, _ = judged((PASSED, WRONG), (WRONG, WRONG)).save(tmp_path / "evaluation")

    assert samples == tmp_path / "evaluation" / "samples.jsonl"
    assert [json.loads(line) for line in samples.read_text().splitlines()] == [
        {"task_id": f"micro/{problem}", "completion": f"    return {sample}\n"}
        for problem in (0, 1)
        for sample in (0, 1)
    ]


def test_verdicts_are_saved_one_a_line_in_the_order_of_the_samples(tmp_path):
    _, verdicts = judged((PASSED, LATE)).save(tmp_path)

    assert [json.loads(line) for line in verdicts.read_text().splitlines()] == [
        {"task_id": "micro/0", "passed": True, "verdict": "passed", "detail": "é\u2028passed"},
        {"task_id": "micro/0", "passed": False, "verdict": "cpu_limit", "detail": "é\u2028cpu_limit"},
    ]


def test_the_summary_names_pass_at_k_and_the_speed_of_decoding():
    metrics = judged(*THREE).metrics([1]) | {"tokens_per_forward": 1.234}

    rows = Evaluation(metrics=metrics, timings={}, files=()).summary()

    assert rows == [("pass at 1", "0.333"), ("decoding", "1.23 tokens per forward pass")]


def test_the_summary_names_loss_accuracy_and_accepted_drafts_of_every_head():
    metrics = {"test_ce_head_1": 0.1234, "test_ce_head_2": math.nan, "test_ce_head_3": 2.0}
    metrics |= {"test_accuracy_head_1": 0.9876, "test_accuracy_head_2": math.nan, "test_accuracy_head_3": 0.5}
    metrics |= {"acceptance_length": 1.85, "acceptance_position_2": 0.6, "acceptance_position_3": 0.25}

    rows = Evaluation(metrics=metrics, timings={}, files=()).summary()

    assert rows == [
        ("head 1", "test loss 0.123, accuracy 98.8%"),
        ("head 2", "test loss nan, accuracy nan%, 60.0% of its drafts accepted"),
        ("head 3", "test loss 2.000, accuracy 50.0%, 25.0% of its drafts accepted"),
    ]


def test_the_summary_names_the_number_of_examples_if_they_are_not_the_whole_split():
    metrics = {"test_ce_head_1_of_200_examples": 0.1234, "test_accuracy_head_1_of_200_examples": 0.9876}

    rows = Evaluation(metrics=metrics, timings={}, files=()).summary()

    assert rows == [("head 1", "test loss 0.123 on 200 examples, accuracy 98.8%")]


FLAT = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, WeightingStrategy, Weights, hookimpl

    @frozen(kw_only=True)
    class NoOptions:
        pass

    class Flat(WeightingStrategy):
        def __init__(self, options, context):
            pass

        def weigh(self, view):
            return Weights(weight=view.response_BT.float())

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(name="flat", summary="Flat.", options=NoOptions, build=Flat)
"""


def test_drafts_are_measured_on_prompts_of_the_split_if_the_data_have_no_problems(
    wmtp_install_plugin, wmtp_tiny_run
):
    wmtp_install_plugin("flat", FLAT)
    settings = {"temperature": 0.7, "max_new_tokens": 12}

    run = wmtp_tiny_run({"weighting": {"use": "flat"}, "evaluate": settings})

    prepared = prepare_finished(run.folder, plan_of(run.folder, overrides=()), log=print)
    examples = prepared.source.policy_examples("test")
    alone = generate(
        prepared.policy,
        prepared.codec.encode_prompts([example.prompt for example in examples]),
        streams=[example.example_id for example in examples],
        eos_id=prepared.codec.eos_id,
        seed=42,
        decoding="self_speculative",
        batch_size=1,
        **settings,
    )
    assert alone.verified >= 10
    assert {name: run.metrics[name] for name in alone.metrics()} == alone.metrics()
    assert run.metrics["acceptance_length"] == 1 + run.metrics["acceptance_position_2"]


def test_heads_are_measured_on_some_examples_of_the_split_and_the_names_say_so(
    wmtp_install_plugin, wmtp_tiny_run
):
    wmtp_install_plugin("flat", FLAT)

    run = wmtp_tiny_run({"weighting": {"use": "flat"}, "evaluate": {"examples": 3, "decoding": "plain"}})

    prepared = prepare_finished(run.folder, plan_of(run.folder, overrides=()), log=print)
    tokens = prepared.policy_tokens("test")
    losses = []
    for document in (0, round((len(tokens) - 1) / 2), len(tokens) - 1):
        batch = prepared.batch(tokens, np.array([document]))
        logits = prepared.policy.logits(1, prepared.policy.trunk_states(batch.ids_BT))[0, :-1]
        is_target = batch.response_BT[0, 1:]
        losses += cross_entropy(logits, batch.ids_BT[0, 1:], reduction="none")[is_target].tolist()
    assert len(tokens) > 3
    assert run.metrics["test_ce_head_1_of_3_examples"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    measured = {name for name in run.metrics if name.startswith("test_")}
    assert {name.partition("_of_")[2] for name in measured} == {"3_examples"}
    assert measured == set(filter(is_core_metric, measured))
    assert [name for name in default_metrics([read_measures(run.folder)]) if name.startswith("test_ce")]


def test_the_progress_of_measuring_the_heads_is_shown(wmtp_install_plugin, wmtp_tiny_run, capsys):
    wmtp_install_plugin("flat", FLAT)

    wmtp_tiny_run({"weighting": {"use": "flat"}, "evaluate": {"examples": 3, "decoding": "plain"}})

    assert "\ntest loss: 3 steps\n" in capsys.readouterr().out


def test_plain_decoding_of_data_without_problems_generates_nothing(wmtp_install_plugin, wmtp_tiny_run):
    wmtp_install_plugin("flat", FLAT)

    run = wmtp_tiny_run({"weighting": {"use": "flat"}, "evaluate": {"decoding": "plain"}})

    assert "tokens_per_forward" not in run.metrics
    assert run.metrics["test_acceptance_length"] >= 1
