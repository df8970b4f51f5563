"""An exported run, also one of adapters, writes and measures what the run does."""

import hashlib
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
from safetensors.torch import load_file
from small_run import RECIPE, another_run, generated
from weighted_mtp_core.cli import main


@pytest.fixture(scope="module")
def exported(trained):
    """The run as an exported model."""
    path = trained.parents[4] / "models" / "tiny"
    assert main(["export", trained.name, "--to", str(path)]) == 0
    return path


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_exported_model_says_where_it_comes_from(exported, trained):
    facts = json.loads((exported / "weighted_mtp.json").read_text())

    assert (facts["format"], facts["n_future"], facts["heads"], facts["run"]) == (
        3,
        3,
        "parallel",
        trained.name,
    )
    assert facts["base"].startswith("micro/")
    assert facts["recipe_sha256"] == hashlib.sha256((trained / "recipe.toml").read_bytes()).hexdigest()
    assert (exported / "recipe.toml").read_bytes() == (trained / "recipe.toml").read_bytes()
    assert facts["data_sha256"] == json.loads((trained / "run.json").read_text())["data.sha256"]


def test_an_exported_model_writes_the_runs_text_without_its_data_and_plugins(
    wmtp, exported, tmp_path, monkeypatch
):
    settings = ("--prompt", "def f(x):\n", "--max-new-tokens", "20")
    text = generated(wmtp, *settings)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if not each.endswith("site")])
    monkeypatch.chdir(tmp_path)

    code, out, err = wmtp("generate", *settings, run=str(exported))

    assert code == 0, err
    assert out == text
    assert list(tmp_path.iterdir()) == []


def test_an_exported_model_measures_like_its_run_and_stays_as_it_is(wmtp, exported, trained, tmp_path):
    before = contents(exported)

    wmtp("evaluate", "--out", str(tmp_path))
    code, _, err = wmtp("evaluate", run=str(exported))
    (out,) = (trained.parents[4] / "evaluations" / "tiny").iterdir()

    assert code == 0, err
    reports = [json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, out)]
    assert reports[0]["metrics"] == reports[1]["metrics"]
    assert (out / "samples.jsonl").read_bytes() == (tmp_path / "samples.jsonl").read_bytes()
    assert contents(exported) == before


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_changed_exported_model_is_an_error(wmtp, command, exported, tmp_path):
    changed = Path(shutil.copytree(exported, tmp_path / "changed"))
    with (changed / "heads" / "model.safetensors").open("ab") as file:
        file.write(b"x")

    code, out, err = wmtp(command, *(["--prompt", "a"] if command == "generate" else []), run=str(changed))

    assert (code, out) == (2, "")
    assert f"error: `{changed}/heads/model.safetensors` changed since it was written" in err


def test_heads_trained_alone_leave_the_base_model_byte_for_byte_what_it_was(exported, trained, tmp_path):
    recipe = RECIPE.replace("n_future = 3", f'n_future = 3\n    base = "{exported}"\n    train = "heads"')
    (tmp_path / "recipe.toml").write_text(dedent(recipe).replace('"tiny"', '"heads"'))
    settings = ("train.steps=8", "train.learning_rate=0.01", "train.warmup_steps=0")
    quick = [word for each in settings for word in ("--set", each)]

    assert main(["run", str(tmp_path / "recipe.toml"), *quick]) == 0
    (run,) = (file.parent for file in trained.parents[2].rglob("run.json") if "heads" in file.parts[-3])
    assert main(["export", run.name, "--to", str(tmp_path / "out")]) == 0

    before, after = contents(exported), contents(tmp_path / "out")
    same = {path for path in before if before[path] == after[path]}
    assert Path("model.safetensors") in same
    assert Path("heads/model.safetensors") not in same


def test_export_replaces_an_exported_model_only_if_told_so(wmtp, exported):
    before = contents(exported)

    code, _, err = wmtp("export", "--to", str(exported))
    forced, out, _ = wmtp("export", "--to", str(exported), "--force")

    assert code == 2
    assert err.startswith(f"error: `{exported}` already exists\nhint: ")
    assert (forced, out) == (0, f"{exported}\n")
    assert contents(exported) == before


# ------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def adapted(trained):
    """A finished run that trained adapters and heads 2..K."""
    settings = ("model.train=adapters", "model.adapters={rank=2, dropout=0.1}", "model.base_dtype=bfloat16")
    quick = ("train.steps=8", "train.learning_rate=0.01", "train.warmup_steps=0")
    return another_run(trained, "adapted", *settings, *quick)


@pytest.fixture(scope="module")
def merged(adapted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "model"
    assert main(["export", adapted.name, "--to", str(folder)]) == 0
    return folder


def test_a_run_of_adapters_writes_the_same_text_with_both_ways_of_decoding_and_after_export(
    wmtp, adapted, merged
):
    prompt = ("--prompt", "What is 3 and 3?", "--max-new-tokens", "20")
    found = {
        generated(partial(wmtp, run=run), *prompt, "--decoding", decoding)
        for run in (adapted.name, str(merged))
        for decoding in ("plain", "self_speculative")
    }

    assert len(found) == 1


def test_an_exported_run_of_adapters_measures_like_the_run(wmtp, adapted, merged):
    evaluations = []
    for run in (adapted.name, str(merged)):
        code, out, err = wmtp("evaluate", run=run)
        assert code == 0, err
        evaluations.append([line for line in out.splitlines() if "pass" in line])

    assert evaluations[0]
    assert evaluations[0] == evaluations[1]


def test_only_the_adapter_is_exported_and_replaced_only_if_told_so(wmtp, adapted, tmp_path):
    to = ("--to", str(tmp_path / "adapter"))

    assert wmtp("export", "--adapter", *to, run=adapted.name)[0] == 0
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "recipe.toml",
        "manifest.json",
    }
    assert wmtp("export", "--adapter", *to, run=adapted.name)[0] == 2
    assert wmtp("export", "--adapter", *to, "--force", run=adapted.name)[0] == 0


def test_a_run_without_adapters_exports_none(wmtp, tmp_path):
    code, _, err = wmtp("export", "--adapter", "--to", str(tmp_path / "adapter"))

    assert code == 2
    assert err.startswith('error: the run has no adapter to export: its `model.train` is "all"\nhint: ')
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_and_a_server_are_not_exported_together(wmtp, adapted, tmp_path):
    to = ("--to", str(tmp_path / "adapter"), "--serve", "vllm")
    code, _, err = wmtp("export", "--adapter", *to, run=adapted.name)

    assert code == 2
    assert err.startswith("error: `--adapter` writes no heads, so no server drafts\n")


def test_an_exported_run_of_adapters_is_an_ordinary_model(merged):
    assert not any("lora" in name or "base_layer" in name for name in load_file(merged / "model.safetensors"))
    assert not any("lora" in name for name in load_file(merged / "heads" / "model.safetensors"))
