"""`evaluate` and `generate` repeat what a run measured and wrote, and refuse a run that they cannot use."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from small_run import generated
from weighted_mtp_core.evaluation.evaluate import Trial, best_trial
from weighted_mtp_core.recipe.schema import EvaluateTable


@pytest.fixture
def copy_of(trained, tmp_path):
    """A copy of the run folder, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------ generate


def test_generate_writes_the_same_text_with_both_ways_of_decoding(wmtp):
    prompt = ("--prompt", "def f(x):\n", "--max-new-tokens", "20")

    plain = generated(wmtp, *prompt, "--decoding", "plain")

    assert plain.strip()
    assert generated(wmtp, *prompt, "--decoding", "self_speculative") == plain


def test_generate_reads_a_prompt_from_stdin(wmtp, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("def f(x):\n"))

    assert generated(wmtp) == generated(wmtp, "--prompt", "def f(x):")


def test_generate_says_what_it_took_on_stderr(wmtp):
    _, out, err = wmtp("generate", "--prompt", "def f(x):", "--max-new-tokens", "5", "--decoding", "plain")

    assert "5 tokens, 1.00 a forward pass" in err
    assert "forward pass" not in out


def test_generate_numbers_several_samples_and_the_seed_decides_them(wmtp):
    samples = ("--prompt", "def f", "--samples", "2", "--temperature", "1.0", "--seed")

    once = generated(wmtp, *samples, "5")

    assert once.startswith("--- sample 1 of 2\n")
    assert "\n--- sample 2 of 2\n" in once
    assert generated(wmtp, *samples, "5") == once
    assert generated(wmtp, *samples, "6") != once


def test_generate_refuses_an_empty_prompt(wmtp):
    code, _, err = wmtp("generate", "--prompt", "")

    assert code == 2
    assert err.startswith("error: the prompt is empty\nhint: ")


# ------------------------------------------------------------------ evaluate


def test_evaluate_repeats_what_the_run_measured(wmtp, trained, tmp_path):
    code, out, err = wmtp("evaluate", "--out", str(tmp_path / "out"))
    measured = next(
        line["metrics"]
        for line in reversed(read_lines(trained / "metrics.jsonl"))
        if line["kind"] == "metrics" and line["stage"] == "evaluate"
    )
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())

    assert code == 0, err
    assert report["metrics"] == measured
    assert report["split"] == "test"
    assert ["test_ce_head_1", f"{measured['test_ce_head_1']:.4g}"] in [
        line.split() for line in out.splitlines()
    ]
    for name in ("samples.jsonl", "verdicts.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (trained / "evaluation" / name).read_bytes()


def test_every_metric_and_timing_is_documented(wmtp, repository, tmp_path):
    def pattern(name):
        return re.sub(r"^verdict_.*|\d+", lambda found: "verdict_*" if found[0][0] == "v" else "#", name)

    wmtp("evaluate", "--samples", "2", "--temperature", "1", "--out", str(tmp_path))
    report = json.loads((tmp_path / "metrics.json").read_text())
    document = (repository / "docs" / "evaluation.md").read_text()

    documented = {pattern(name) for name in re.findall(r"`(\w+)`", document)}
    assert {pattern(name) for name in report["metrics"] | report["timings"]} - documented == set()


def test_evaluate_takes_split_samples_temperature_ks_and_problems(wmtp, tmp_path):
    settings = ["--samples", "3", "--temperature", "0.7", "--pass-at-k", "1,3", "--problems", "0"]

    code, _, err = wmtp("evaluate", "--split", "validation", *settings, "--out", str(tmp_path))
    report = json.loads((tmp_path / "metrics.json").read_text())

    assert code == 0, err
    assert report["split"] == "validation"
    assert {"validation_ce_head_1", "pass_at_1", "pass_at_3"} <= set(report["metrics"])
    assert (report["evaluate"]["samples"], report["evaluate"]["temperature"]) == (3, 0.7)
    assert len(read_lines(tmp_path / "samples.jsonl")) % 3 == 0


def test_evaluate_leaves_the_runs_own_files_and_adds_a_folder(wmtp, trained):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}

    wmtp("evaluate")

    after = {path for path in trained.rglob("*") if path.is_file()}
    assert {path: path.read_bytes() for path in before} == before
    assert {path.relative_to(trained).parts[0] for path in after - set(before)} == {"evaluations"}


def test_a_temperature_is_chosen_on_validation_and_reported_on_test(wmtp, tmp_path):
    code, out, err = wmtp(
        "evaluate", "--choose-temperature", "0.3,0.9", "--samples", "2", "--out", str(tmp_path)
    )
    report = json.loads((tmp_path / "metrics.json").read_text())

    assert code == 0, err
    assert [trial["temperature"] for trial in report["chosen_on_validation"]] == [0.3, 0.9]
    assert report["evaluate"]["temperature"] in {0.3, 0.9}
    assert report["split"] == "test"
    assert "validation at temperature 0.3  pass_at_1_of_1_problems 0.000" in out


def trial(temperature, pass_rate):
    table = EvaluateTable(samples=2, temperature=temperature)
    return Trial(table=table, pass_rate=pass_rate, metrics={})


def test_the_best_temperature_is_the_lowest_of_those_with_the_best_pass_rate():
    trials = [trial(0.2, 0.1), trial(0.8, 0.5), trial(0.6, 0.5)]

    assert best_trial(trials).table.temperature == 0.6


def test_a_temperature_chosen_on_validation_is_not_reported_there(wmtp):
    code, _, err = wmtp("evaluate", "--choose-temperature", "0.3,0.9", "--split", "validation")

    assert code == 2
    assert "so only `test` can be reported" in err


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_settings_are_checked_like_those_of_a_recipe(wmtp, command):
    code, _, err = wmtp(command, "--samples", "2")

    assert code == 2
    assert "evaluate.temperature: must be > 0 for `samples` = 2" in err


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_run_without_a_checkpoint_is_an_error(wmtp, command, copy_of):
    (copy_of / "checkpoints" / "best_model.pt").unlink()

    code, _, err = wmtp(command, run=str(copy_of))

    assert code == 2
    assert f"error: the run `{copy_of}` has no `checkpoints/best_model.pt`" in err


def test_other_data_than_the_runs_are_an_error(wmtp, copy_of):
    facts = json.loads((copy_of / "run.json").read_text())
    (copy_of / "run.json").write_text(json.dumps(facts | {"data.sha256": "0" * 64}))

    code, _, err = wmtp("evaluate", run=str(copy_of))

    assert code == 2
    assert "had the SHA-256 000000000000..., now they have" in err


def test_a_damaged_checkpoint_is_an_error(wmtp, copy_of):
    (copy_of / "checkpoints" / "best_model.pt").write_bytes(b"not a checkpoint")

    code, _, err = wmtp("generate", "--prompt", "a", run=str(copy_of))

    assert code == 2
    assert "is not a checkpoint of tensors" in err


def test_an_unusable_folder_is_an_error_before_anything_is_loaded(wmtp, tmp_path):
    (tmp_path / "file").write_text("")

    code, _, err = wmtp("evaluate", "--out", str(tmp_path / "file"))

    assert code == 2
    assert err.startswith("error: cannot make the folder")
