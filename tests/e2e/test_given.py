"""Weights in the data: weights of 1 change nothing, and other weights multiply the weights of a weighting."""

import json
from pathlib import Path

import pytest
import torch
from weighted_mtp_core.tracking.run_history import read_history

GIVEN = str(Path(__file__).parents[2] / "configs" / "given.toml")
ROWS = Path(__file__).parents[2] / "plugins" / "given" / "examples.jsonl"
QUICK = ("--preset", "ci", "--set", "train.steps=4")
PRODUCT = """{ use = "controls.product", options = { of = [
    { use = "given.weights" }, { use = "baseline_mtp.uniform" },
] } }"""


@pytest.fixture(scope="module")
def run(wmtp, tmp_path_factory):
    """Run the recipe of given weights for a few steps on rows; return the metrics and the trained policy."""

    def run(rows, *settings):
        folder = tmp_path_factory.mktemp("given")
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        options = [word for each in (f"data.options.path={file}", *settings) for word in ("--set", each)]
        found = wmtp("run", GIVEN, *QUICK, *options, cwd=folder)
        assert found.returncode == 0, found.stderr
        lines = [line for line in found.journal if line["stage"] == "policy"]
        trained = torch.load(next(found.folder.rglob("best_model.pt")), weights_only=True)
        return [{"step": line["step"], **line["metrics"]} for line in lines], trained

    return run


def rows(**keys):
    return [{**json.loads(line), **keys} for line in ROWS.read_text(encoding="utf-8").splitlines()]


def test_weights_of_one_train_as_uniform_weights_bit_for_bit(run):
    ones = rows(weight=1, weights=[[0, 2, 1.0]])

    given, given_policy = run(ones)
    uniform, uniform_policy = run(ones, 'weighting.use="baseline_mtp.uniform"')

    assert given == uniform
    assert set(given_policy) == set(uniform_policy)
    assert all(torch.equal(given_policy[name], each) for name, each in uniform_policy.items())


def test_a_product_multiplies_them_with_another_weighting(run):
    found, _ = run(rows(), f"weighting={PRODUCT}")
    (first, *_) = [each for each in found if "weight_mean" in each]

    assert 0.25 < first["weight_mean"] < 1
    assert (first["weight_p05"], first["weight_p95"]) in {(0.125, 1.0), (0.25, 1.0)}


CHAIN = """{ use = "code_tasks.micro_chain", options = { problems = 20, sandbox.workers = 1 } }"""


@pytest.mark.parametrize("weighting", ["given.weights", "baseline_mtp.uniform"])
def test_only_a_run_that_reads_the_weights_of_an_oracle_says_so(weighting, wmtp, tmp_path):
    settings = (f"data={CHAIN}", f'weighting.use="{weighting}"', "evaluate.problems=1")
    options = [word for each in settings for word in ("--set", each)]
    found = wmtp("run", GIVEN, *QUICK, *options, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    reads = weighting == "given.weights"

    assert read_history(found.folder).tags.get("wmtp.oracle") == ("true" if reads else None)
    report = (found.folder / "report.html").read_text(encoding="utf-8")
    assert ("they use knowledge that real data do not have" in report) == reads
