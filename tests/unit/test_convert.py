"""Old YAML files become recipes: every key goes somewhere, and `docs/migration.md` says where."""

from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.cli import main
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plan import make_plan
from weighted_mtp_core.recipe.convert import convert, read_old
from weighted_mtp_core.recipe.old_layout import RULES, Old

OLD = """
    experiment:
      name: "my wmtp: 2"
      description: "Weights
        from a critic"
      stage: weighted
      tags: [production, "team:a"]
    models:
      policy:
        path: storage/models/llama
        params: {dim: 4096, n_future_tokens: 3}
        dtype: float16
    dataset: {train: train.jsonl, validation: valid.jsonl, max_length: 2048}
    data_sampling: {n_samples: 100000}
    training:
      n_epochs: 2.0
      batch_size: 8
      gradient_accumulation_steps: 2
      learning_rate: 1e-5     # which YAML reads as text
      beta: 1.2
      weight_clip_max: 2
      k_percent: 0.7
      lr_scheduler: {warmup_ratio: 0.1}
    checkpoint: {save_checkpoint_every: 0.5}
    mlflow: {tracking_uri: "https://mlflow.example.org", experiment: weighted-mtp/production}
    evaluation: {pass_at_k: [1, 5]}
    surprise: 1
"""


@pytest.fixture
def old(tmp_path):
    """Write old files and read them."""

    def old(*texts, processes=1):
        files = [tmp_path / f"{i}.yaml" for i in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            file.write_text(dedent(text))
        return read_old(files, processes=processes)

    return old


def converted(old, **settings):
    return convert(
        old, **{"weighting": "example.flat", "options": ("beta", "clip"), "critic": None} | settings
    )


def test_an_old_file_becomes_a_recipe(old):
    table = converted(old(OLD, processes=4)).table

    assert table == {
        "run": {
            "name": "my_wmtp_2",
            "tags": ["production:true", "team:a"],
            "experiment": "weighted-mtp/production",
        },
        "model": {"base": "storage/models/llama", "n_future": 3, "dtype": "auto"},
        "data": {
            "use": "core.jsonl",
            "options": {"train": "train.jsonl", "validation": "valid.jsonl"},
            "max_tokens": 2048,
        },
        "weighting": {"use": "example.flat", "options": {"beta": 1.2, "clip": [0.1, 2.0]}},
        "train": {
            "steps": 3125,  # 2 x 100,000 / (8 x 2 x 4)
            "batch_size": 64,
            "accumulation": 2,
            "learning_rate": 1e-5,
            "warmup_steps": 312,
        },
        "checkpoint": {"every": 781},  # half of 1562.5
        "evaluate": {"pass_at_k": [1, 5], "samples": 5, "temperature": 0.8},
        "tracker": [{"use": "core.mlflow", "options": {"tracking_uri": "https://mlflow.example.org"}}],
    }


def test_what_has_no_place_is_listed_with_the_reason(old):
    dropped = dict(converted(old(OLD)).dropped)

    assert dropped["training.k_percent"] == "`example.flat` has no option `keep`"
    assert dropped["models.policy.params.dim"] == "the model's own `config.json` says it"
    assert dropped["surprise"] == "unknown: nothing here corresponds to it"


def test_steps_that_the_file_does_not_tell_are_said_to_be_missing(old):
    found = converted(old("training: {n_epochs: 2, batch_size: 8, lr_scheduler: {warmup_ratio: 0.1}}"))

    assert "train.steps" in dict(found.dropped)["training.n_epochs"]
    assert "train.warmup_steps" in dict(found.dropped)["training.lr_scheduler.warmup_ratio"]


def test_stages_of_their_own_tables_are_read_too(old):
    text = "training: {stage1: {learning_rate: 5e-5}, stage2: {learning_rate: 1e-5, batch_size: 4}}"

    table = converted(old(text), critic="example.judge").table
    without = converted(old(text))

    assert table["critic"] == {"use": "example.judge", "train": {"learning_rate": 5e-5}}
    assert table["train"] == {"learning_rate": 1e-5, "batch_size": 4}
    assert dict(without.dropped)["training.stage1.learning_rate"] == "there is no critic"


@pytest.mark.parametrize("uri", ["''", "file://./mlruns", "storage/mlruns", "https://user:secret@host"])
def test_a_tracking_uri_that_no_recipe_may_hold_is_left_to_the_environment(old, uri):
    found = converted(old(f"mlflow: {{tracking_uri: {uri}}}"))

    assert found.table["tracker"] == [{"use": "core.mlflow"}]
    assert "secret" not in str(found.dropped)


def test_later_files_win_key_by_key(old):
    found = old("runtime: {seed: 1, device: cpu}", "runtime: {seed: 2}")

    assert found.values == {"runtime.seed": 2, "runtime.device": "cpu"}


@given(st.sets(st.sampled_from([rule.old.replace("*", "anything") for rule in RULES])))
def test_no_key_is_lost(keys):
    values = {key: [1] if key.endswith(("pass_at_k", "tags")) else "1" for key in keys}
    found = converted(Old(values=values))

    assert sorted(key for key, _ in found.moved + found.dropped) == sorted(keys)


def test_the_documentation_shows_every_rule(repository):
    text = (repository / "docs" / "migration.md").read_text().split("## Every old key")[1]
    expected = [
        f"| `{rule.old}` | {f'`{rule.new}`' if rule.new else '-'} | {rule.note} |".replace("  |", " |")
        for rule in RULES
        if not rule.old.startswith("training.stage2.")
    ]

    assert [line for line in text.splitlines() if line.startswith("| `")] == expected


@pytest.mark.parametrize("text", ["- 1", "a: [", ""])
def test_what_is_no_table_is_refused(old, text):
    with pytest.raises(WmtpError):
        old(text)


def test_the_command_writes_a_recipe_that_passes_check(example_plugin, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.yaml").write_text(dedent(OLD))

    code = main(["recipe", "convert", "old.yaml", "--weighting", "example.flat"])

    said = capsys.readouterr().out
    assert code == 0
    assert "surprise" in said
    assert said.endswith("written to old.toml\nit passes `check`\n")
    assert make_plan(tmp_path / "old.toml").recipe.train.steps == 12500
    assert (tmp_path / "old.toml").read_text().startswith("# Weights from a critic\n")


def test_the_command_overwrites_nothing(example_plugin, tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(dedent(OLD))
    (tmp_path / "old.toml").write_text("mine")

    assert main(["recipe", "convert", str(tmp_path / "old.yaml"), "--weighting", "example.flat"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "old.toml").read_text() == "mine"
