"""`export --serve` writes a draft model for a server that takes the heads, and a run names such commands."""

import json
import re
import shlex

import pytest
import torch
from safetensors.torch import load_file
from small_run import another_run
from weighted_mtp_core.cli import main


@pytest.fixture(scope="module")
def medusa(trained):
    """A finished run with medusa heads."""
    return another_run(trained, "medusa", "model.heads.kind=medusa")


def hints(run):
    """Return what report.md recommends as `export it` and `serve it`, without those that it lacks."""
    lines = re.findall(r"- \*\*(.+?)\*\*: (.*)", (run / "report.md").read_text())
    return {name: value for name, value in lines if name in {"export it", "serve it"}}


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
