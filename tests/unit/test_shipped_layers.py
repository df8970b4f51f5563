"""A base model that ships MTP layers is trained without them, and its export does not promise them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from weighted_mtp_core.cli import main
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.export.transformers import write_export
from weighted_mtp_core.model.exported_model import ExportFacts
from weighted_mtp_core.model.load import load_policy
from weighted_mtp_core.model.pretrained import load_pretrained
from weighted_mtp_core.model.shipped_layers import promise_no_layers, shipped_layers
from weighted_mtp_core.recipe.schema import HeadsTable, ModelTable

FAMILIES = ("deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5_text", "qwen2")
RECIPE = """
    tracker = []
    [run]
    name = "tiny"
    [model]
    base = "{base}"
    n_future = 2
    [data]
    use = "sums"
    [weighting]
    use = "flat_weights"
    [train]
    steps = 1
    batch_size = 2
    [evaluate]
    problems = 1
    max_new_tokens = 2
"""


@pytest.fixture(scope="module")
def shipping(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "tests" / "models")
        import shipping

        yield shipping


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request, shipping, tmp_path_factory):
    """The folder of a base model, and the names of its MTP tensors."""
    path = tmp_path_factory.mktemp(request.param) / "base"
    return path, shipping.shipping_directory(request.param, path)


def load(path):
    table = ModelTable(base=str(path), n_future=2, heads=HeadsTable(kind="medusa"))
    return load_policy(table, storage=path.parent, texts=tuple, seed=1)


def exported(loaded, path):
    facts = ExportFacts(
        n_future=2, heads="medusa", run="r", recipe_sha256="0" * 64, base=loaded.base_name, data_sha256=None
    )
    write_export(loaded.policy, loaded.tokenizer, path, facts=facts, recipe=b"")
    return path


def promises(values):
    """The keys of a config that describe MTP layers, except for numbers that are 0."""
    return {name: value for name, value in values.items() if ("mtp" in name or "nextn" in name) and value}


def test_the_tensors_of_the_mtp_layers_are_recognised(directory):
    path, shipped = directory

    assert set(shipped_layers(path, AutoModelForCausalLM.from_pretrained(path))) == shipped


def test_they_are_also_recognised_in_several_files(directory, tmp_path):
    path, shipped = directory
    state = load_file(path / "model.safetensors")
    files = {name: "b.safetensors" if name in shipped else "a.safetensors" for name in state}
    for file in ("a", "b"):
        save_file(
            {name: state[name] for name in state if files[name][0] == file}, tmp_path / f"{file}.safetensors"
        )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))

    assert set(shipped_layers(tmp_path, AutoModelForCausalLM.from_pretrained(path))) == shipped


def test_they_are_also_recognised_in_the_files_of_a_hub_id(shipping, tmp_path, monkeypatch):
    revision = tmp_path / "models--owner--name" / "snapshots" / "5e1f"
    shipped = shipping.shipping_directory("qwen3_5_text", revision)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("5e1f")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    table = ModelTable(base="owner/name", n_future=2, heads=HeadsTable(kind="medusa"))
    line = load_policy(table, storage=tmp_path, texts=tuple, seed=1).unused

    assert f"`{min(shipped)}` and {len(shipped) - 1} other tensors" in line


def test_head_1_is_the_model_without_the_mtp_layers(directory, tmp_path):
    path, shipped = directory
    policy = load(path).policy.eval()
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path)
    ids_BT = torch.arange(3, 43).reshape(2, 20)

    with torch.no_grad():
        found = policy.logits(1, policy.trunk_states(ids_BT))
        expected = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(input_ids=ids_BT).logits

    assert not shipped & set(load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_body_of_such_a_model_loads_too(directory):
    _, body = load_pretrained(directory[0], AutoModel, kind="transformer")

    assert "layers.3.input_layernorm.weight" in body.state_dict()
    assert "layers.4.input_layernorm.weight" not in body.state_dict()


def test_that_they_are_not_used_is_reported_in_one_line(directory, caplog):
    path, shipped = directory

    line = load(path).unused

    kernels = "transformers.integrations.hub_kernels"  # says that a faster kernel is not installed
    assert [each.getMessage() for each in caplog.records if each.name != kernels] == []
    assert line == (
        f"the MTP layers of the base model are not used (`{min(shipped)}` and {len(shipped) - 1} other "
        "tensors): `export` leaves them out, and its `config.json` does not promise them"
    )


@pytest.mark.usefixtures("flat_weights")
def test_the_run_reports_it_at_its_start(shipping, install_plugin, judged_plugin, write_recipe, tmp_path):
    shipping.shipping_directory("deepseek_v3", tmp_path / "base")
    install_plugin("sums", judged_plugin)
    recipe = write_recipe(RECIPE.format(base=tmp_path / "base"))

    assert main(["run", str(recipe)]) == 0

    (log,) = Path("storage").rglob("training.log")
    lines = log.read_text().splitlines()
    told = [
        number for number, line in enumerate(lines) if "the MTP layers of the base model are not used" in line
    ]
    assert len(told) == 1
    assert told[0] < next(number for number, line in enumerate(lines) if "kept step" in line)


def test_an_exported_model_neither_has_nor_promises_them(directory, tmp_path):
    path, shipped = directory
    before = AutoConfig.from_pretrained(path)

    out = exported(load(path), tmp_path / "out")

    assert not shipped & set(load_file(out / "model.safetensors"))
    assert promises(json.loads((out / "config.json").read_text())) == {}
    after = AutoConfig.from_pretrained(out)
    assert promises(before.to_dict())
    assert promises(after.to_dict()) == {}
    assert not getattr(after, "num_mtp_layers", 0)  # what transformers' `generate(use_mtp=True)` reads
    assert load(out).unused is None


def test_a_model_without_mtp_layers_is_exported_without_a_promise_that_is_a_default(shipping, tmp_path):
    shipping.tiny_model("deepseek_v3").save_pretrained(tmp_path / "base")
    shipping.tokenizer("deepseek_v3").save_pretrained(tmp_path / "base")
    loaded = load(tmp_path / "base")

    out = exported(loaded, tmp_path / "out")

    assert loaded.unused is None
    assert AutoConfig.from_pretrained(tmp_path / "base").num_mtp_layers == 1
    assert AutoConfig.from_pretrained(out).num_mtp_layers == 0


def test_lists_of_the_kinds_of_mtp_layers_are_removed_and_other_keys_stay():
    config = AutoConfig.for_model("mellum", num_nextn_predict_layers=1)
    others = {name for name in config.to_dict() if "mtp" not in name and "nextn" not in name}

    promise_no_layers(config)

    assert promises(config.to_dict()) == {}
    assert others <= set(config.to_dict())


def test_the_text_model_of_a_config_with_several_models_promises_none():
    config = AutoConfig.for_model("qwen3_5", text_config={"mtp_num_hidden_layers": 1})
    assert config.text_config.mtp_num_hidden_layers == 1

    promise_no_layers(config)

    assert promises(config.to_dict()["text_config"]) == {}


@pytest.mark.parametrize("number", [4, 46])  # transformers ignores layer 46 of this family
def test_a_decoder_layer_that_the_config_leaves_out_is_not_taken_for_an_mtp_layer(number, shipping, tmp_path):
    shipping.shipping_directory("glm4_moe", tmp_path / "base")
    more = f"model.layers.{number}."
    file = tmp_path / "base" / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(file).items() if ".layers.4." not in name}
    last = {name: tensor for name, tensor in state.items() if ".layers.3." in name}
    later = {name.replace("model.layers.3.", more): tensor.clone() for name, tensor in last.items()}
    save_file({**state, **later}, file, metadata={"format": "pt"})

    with pytest.raises(WmtpError) as caught:
        load(tmp_path / "base")

    assert "tensors are not part of `Glm4MoeForCausalLM` as `config.json` describes it" in str(caught.value)
    assert f"`{more}input_layernorm.weight`" in str(caught.value)
