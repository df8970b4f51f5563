"""`evaluate`, `generate` and `export` on a run that the real stages made: two steps of a tiny model."""

import hashlib
import io
import json
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file
from weighted_mtp_core.cli import main
from weighted_mtp_core.evaluation.evaluate import Trial, best_trial
from weighted_mtp_core.recipe.schema import EvaluateTable

RECIPE = """
    tracker = []
    [run]
    name = "tiny"
    [model]
    n_future = 3
    micro = { hidden_size = 16, layers = 2, attention_heads = 2, vocab_size = 300 }
    [data]
    use = "sums"
    [weighting]
    use = "flat_weights"
    [train]
    steps = 2
    batch_size = 4
    [evaluate]
    problems = 1
    max_new_tokens = 6
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, judged_plugin, flat_plugin):
    """The folder of a finished run, in `storage/runs` of the working folder."""
    folder = tmp_path_factory.mktemp("trained")
    for plugin, module, source in (
        ("flat_weights", "wmtp_flat", flat_plugin),
        ("sums", "wmtp_sums", judged_plugin),
    ):
        metadata = folder / "site" / f"{module}-0.3.0.dist-info"
        metadata.mkdir(parents=True)
        (folder / "site" / f"{module}.py").write_text(source)
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {module}\nVersion: 0.3.0\n"
            "Requires-Dist: weighted-mtp-core>=0.1,<0.2\n"
        )
        (metadata / "entry_points.txt").write_text(f"[weighted_mtp_core]\n{plugin} = {module}\n")
    (folder / "recipe.toml").write_text(dedent(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder / "site"))
        assert main(["run", "recipe.toml"]) == 0
        (run,) = (file.parent for file in (folder / "storage" / "runs").rglob("run.json"))
        yield run


@pytest.fixture
def wmtp(trained, capsys):
    """Run a command on the finished run; return exit code, stdout and stderr."""

    def wmtp(command, *arguments, run=trained.name):
        code = main([command, run, *arguments])
        return (code, *capsys.readouterr())

    return wmtp


@pytest.fixture
def copy_of(trained, tmp_path):
    """A copy of the run folder, to be damaged."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def generated(wmtp, *arguments):
    code, out, err = wmtp("generate", *arguments)
    assert code == 0, err
    return out


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


# ------------------------------------------------------------------ export


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


@pytest.mark.parametrize(
    ("server", "takes"),
    [
        ("transformers", "it takes `sequential`"),
        ("vllm", "it takes `medusa`, `sequential`"),
        ("sglang", "it takes no kind of heads that is trained here"),
    ],
)
def test_heads_that_a_server_does_not_take_are_an_error_before_anything_is_written(
    wmtp, tmp_path, server, takes
):
    code, out, err = wmtp("export", "--to", str(tmp_path / "out"), "--serve", server)

    assert (code, out) == (2, "")
    assert err.startswith(f"error: `{server}` cannot draft with `parallel` heads: {takes}\nhint: ")
    assert list(tmp_path.iterdir()) == []


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


# ------------------------------------------------------------------ export --serve


def another_run(trained, name, *settings):
    """Run the recipe again, with changes and under another name; return the folder of the run."""
    changes = [word for each in settings for word in ("--set", each)]
    assert main(["run", "recipe.toml", "--run-name", name, *changes]) == 0
    (run,) = (file.parent for file in trained.parents[1].rglob(f"{name}/*/run.json"))
    return run


@pytest.fixture(scope="module")
def medusa(trained):
    """A finished run with medusa heads."""
    return another_run(trained, "medusa", "model.heads.kind=medusa")


def hints(run):
    """Return what report.md recommends as `export it` and `serve it`, without those that it lacks."""
    lines = re.findall(r"- \*\*(.+?)\*\*: (.*)", (run / "report.md").read_text())
    return {name: value for name, value in lines if name in {"export it", "serve it"}}


def test_a_run_ends_with_the_commands_that_export_and_serve_it(medusa, capsys, monkeypatch, tmp_path):
    told = hints(medusa)
    monkeypatch.chdir(tmp_path)

    _, m, package, *words = shlex.split(told["export it"])
    code, printed = main(words), capsys.readouterr().out

    assert (m, package, code) == ("-m", "weighted_mtp_core", 0)
    assert printed.splitlines() == ["models/medusa", told["serve it"]]
    draft = json.loads(shlex.split(told["serve it"])[-1])
    assert (tmp_path / draft["model"] / "config.json").is_file()


def test_a_run_with_heads_that_no_server_takes_ends_without_such_commands(trained):
    assert hints(trained) == {}


def test_the_draft_model_holds_the_exported_heads_in_the_dtype_of_the_model(medusa, tmp_path, capsys):
    path = tmp_path / "out"

    code = main(["export", str(medusa), "--to", str(path), "--serve", "vllm", "--dtype", "bfloat16"])
    command = capsys.readouterr().out.splitlines()[-1]

    assert code == 0
    assert shlex.split(command)[3:5] == ["--dtype", "bfloat16"]
    draft, heads = (load_file(path / name / "model.safetensors") for name in ("medusa", "heads"))
    assert draft["lm_heads.0.weight"].dtype == torch.bfloat16
    for k in (2, 3):
        assert torch.equal(draft[f"blocks.{k - 2}.layers.0.weight"], heads[f"head_{k}.linear.weight"])


def test_without_a_server_there_is_no_draft_model_and_no_command(medusa, tmp_path, capsys):
    assert main(["export", str(medusa), "--to", str(tmp_path / "out")]) == 0

    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert not (tmp_path / "out" / "medusa").exists()


def test_a_policy_of_one_head_has_nothing_to_serve_drafts_with(trained, tmp_path, capsys):
    run = another_run(trained, "single", "model.n_future=1", "model.heads.kind=medusa")

    code = main(["export", str(run), "--to", str(tmp_path / "out"), "--serve", "vllm"])

    assert code == 2
    assert "error: the policy has one head, so nothing drafts in `vllm`\n" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert hints(run) == {}


def test_medusa_heads_on_a_finished_run_leave_its_model_file_as_it_is(trained, tmp_path):
    base, served = tmp_path / "base", tmp_path / "served"
    plain = another_run(trained, "plain", "model.n_future=1")
    assert main(["export", str(plain), "--to", str(base)]) == 0
    changes = ("model.heads.kind=medusa", "model.train=heads", "train.steps=8", "train.learning_rate=0.01")

    run = another_run(trained, "later", f'model.base="{base}"', *changes)
    assert main(["export", str(run), "--to", str(served), "--serve", "vllm"]) == 0

    before, after = (json.loads((path / "manifest.json").read_text())["files"] for path in (base, served))
    assert after["model.safetensors"] == before["model.safetensors"]
    heads = load_file(served / "medusa" / "model.safetensors")
    assert all(heads[f"blocks.{number}.layers.0.weight"].any() for number in range(2))


def test_export_replaces_an_exported_model_only_if_told_so(wmtp, exported):
    before = contents(exported)

    code, _, err = wmtp("export", "--to", str(exported))
    forced, out, _ = wmtp("export", "--to", str(exported), "--force")

    assert code == 2
    assert err.startswith(f"error: `{exported}` already exists\nhint: ")
    assert (forced, out) == (0, f"{exported}\n")
    assert contents(exported) == before
