"""What a run cost: measured, recorded under names that trackers accept, and shown."""

import time

import pytest
import torch
from mlflow.utils.validation import _validate_metric_name
from weighted_mtp_core.compare.cost import cost_section, median_costs
from weighted_mtp_core.compare.measures import RunMeasures, read_measures
from weighted_mtp_core.report.page import write_report
from weighted_mtp_core.runtime.cost import matrix_rate, peak_memory
from weighted_mtp_core.runtime.device import Compute
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS
from weighted_mtp_core.tracking.journal import Journal
from weighted_mtp_core.tracking.names import check_metric_name
from weighted_mtp_core.tracking.run_history import Point
from weighted_mtp_core.training.stage_cost import StageCost, cost_of

CPU = torch.device("cpu")
MIB = 1 << 20


def stage_cost(rate=None):
    return StageCost(stage="policy", device=CPU, matrix_rate=rate, distributed=SINGLE_PROCESS)


def test_the_peak_of_the_host_contains_a_tensor_that_is_gone():
    before = peak_memory(CPU)["host"]
    torch.ones(max(before, 64 * MIB) // 4)

    assert peak_memory(CPU)["host"] > before + 32 * MIB


def test_the_matrix_rate_is_measured_once_and_leaves_the_random_numbers_alone():
    matrix_rate.cache_clear()
    compute = Compute(device=CPU, dtype=torch.float32)
    state, began = torch.get_rng_state(), time.perf_counter()
    rate = matrix_rate(compute)
    spent = time.perf_counter() - began

    assert rate == matrix_rate(compute) > 2 * 1024**3 / spent
    assert torch.equal(torch.get_rng_state(), state)


def test_the_share_is_that_of_the_operations_per_second_of_all_processes():
    cost = stage_cost(rate=2e9)
    cost.begin()
    cost.add(tokens=100, flops=3e6)
    cost.add(tokens=50, flops=1e6)
    time.sleep(0.01)
    found = cost.read()

    rate = found["system/policy_flops_per_second"]
    assert found["policy_tokens_per_second"] == pytest.approx(rate * 150 / 4e6)
    assert found["system/policy_matrix_rate_share"] == pytest.approx(rate / 2e9)
    assert 4e6 / rate >= 0.01


def test_a_pause_is_not_part_of_the_time():
    cost = stage_cost()
    cost.begin()
    cost.add(tokens=1000, flops=0)
    with cost.pause():
        time.sleep(0.2)

    assert cost.read()["policy_tokens_per_second"] > 1000 / 0.2


def test_operations_that_are_not_known_are_not_recorded():
    cost = stage_cost(rate=1e9)
    cost.add(tokens=10, flops=0)

    assert cost.read().keys() == {"policy_tokens_per_second", "system/policy_peak_host_memory_megabytes"}


def test_every_tracker_accepts_the_names():
    cost = stage_cost(rate=1e9)
    cost.add(tokens=10, flops=10)

    for name in (*cost.read(), "system/policy_peak_device_memory_megabytes"):
        assert check_metric_name(name) == name
        _validate_metric_name(name)


def test_the_cost_of_a_stage_has_medians_of_rates_and_the_last_peak():
    series = {
        "policy_tokens_per_second": [Point(1, 10.0, 0), Point(2, 900.0, 0), Point(3, 11.0, 0)],
        "system/policy_peak_host_memory_megabytes": [Point(1, 10.0, 0), Point(2, 30.0, 0)],
        "system/critic_peak_host_memory_megabytes": [Point(1, 99.0, 0)],
    }

    assert cost_of("policy", series) == {"tokens_per_second": 11.0, "peak_host_memory": 30.0}


# ------------------------------------------------------------------ report and comparison


def write_journal(folder, **timings):
    journal = Journal(folder / "metrics.jsonl")
    journal.append("run", {"run_id": "r", "name": "n", "experiment": "e"})
    for step in (10, 20):
        at = {"step": step, "stage": "policy"}
        journal.append("metrics", {**at, "metrics": {"policy_learning_rate": 1e-3}}, time_ms=100 * step)
        journal.append("timings", {**at, "metrics": timings}, time_ms=100 * step)
    journal.close()
    return folder


COST = {
    "policy_tokens_per_second": 1234.0,
    "system/policy_flops_per_second": 45.25e9,
    "system/policy_matrix_rate_share": 0.41,
    "system/policy_peak_host_memory_megabytes": 812.5,
}


def test_the_report_shows_the_cost(tmp_path):
    html = write_report(write_journal(tmp_path, **COST)).read_text()

    assert "1,234 tokens/s, 45.2 GFLOP/s, 41% of the rate of a large matrix product" in html
    assert "812 MB of the host" in html
    assert "of the device" not in html


def test_a_run_is_read_with_its_cost_and_its_timings_can_be_compared(tmp_path):
    run = read_measures(write_journal(tmp_path, **COST))

    assert run.last["policy_tokens_per_second"] == 1234
    assert run.cost == {
        "tokens_per_second": 1234.0,
        "flops_per_second": 45.25e9,
        "matrix_rate_share": 0.41,
        "peak_host_memory": 812.5,
    }


def measures(seconds, **cost):
    return RunMeasures(last={"policy_seconds": seconds}, curves={}, step_seconds=1.0, cost=cost)


def test_a_comparison_shows_the_medians_over_the_seeds():
    runs = {
        "one": {
            seed: measures(10.0 * seed, tokens_per_second=1000.0 * seed, flops_per_second=2e9 * seed)
            for seed in (1, 2, 9)
        },
        "two": {1: measures(5.0, tokens_per_second=3000.0)},
    }

    *_, head, _, first, second = cost_section(median_costs(runs))

    assert head == "| arm | seconds | tokens/s | GFLOP/s |"
    assert first == "| `one` | 20.0 | 2,000 | 4.0 |"
    assert second == "| `two` | 5.0 | 3,000 | - |"
