"""An exported model is an ordinary language model in transformers, and the whole policy in a recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.export.transformers import cast_parameters, refuse_to_replace, write_export
from weighted_mtp_core.generation.generate import generate
from weighted_mtp_core.model.exported_model import ExportFacts, read_facts
from weighted_mtp_core.model.load import load_policy, make_policy
from weighted_mtp_core.recipe.schema import HeadsTable, ModelTable

V, K, EOS = 40, 3, 1
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def llama(*, tied):
    config = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**config))


def qwen2(*, tied):
    config = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    return Qwen2ForCausalLM(Qwen2Config(**config))


def gpt2(*, tied):
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2, tie_word_embeddings=tied))


KINDS = [
    (base, tied, head)
    for base in (llama, qwen2, gpt2)
    for tied in (True, False)
    for head in ("parallel", "medusa", "sequential")
]
IDS = [f"{base.__name__}-{'tied' if tied else 'untied'}-{head}" for base, tied, head in KINDS]


def tokenizer(model_type="llama"):
    """A tokenizer that transformers reads back as it is, for a model of this type."""
    if model_type == "qwen2":  # transformers puts the type's own pre-tokenizer into it
        vocabulary = {"<pad>": 0, "<eos>": EOS, **{chr(95 + i): i for i in range(2, V)}}
        return Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<pad>", eos_token="<eos>")
    words = {"<pad>": 0, "<eos>": EOS, **{f"w{i}": i for i in range(2, V)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def trained(base=llama, *, tied=True, head="parallel", **options):
    """A policy with every parameter far from its initial value, and different heads."""
    policy = make_policy(base(tied=tied), n_future=K, head_kind=head, **options).eval()
    torch.manual_seed(0)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return policy


def exported(policy, path, own=None):
    facts = ExportFacts(
        n_future=policy.n_future,
        heads=policy.head_kind,
        run="20261123-140924-abcdef",
        recipe_sha256="0" * 64,
        base="micro/1",
        data_sha256=None,
        shared=policy.heads_table.shared,
        serve=policy.heads_table.serve,
    )
    write_export(
        policy, own or tokenizer(policy.config.model_type), path, facts=facts, recipe=b"# the recipe\n"
    )
    return path


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def loaded(path, *, n_future=K, head="parallel", **options):
    table = ModelTable(base=str(path), n_future=n_future, heads=HeadsTable(kind=head, **options))
    return load_policy(table, storage=path.parent, texts=tuple, seed=1).policy.eval()


def logits(policy, *, heads=K):
    ids_BT = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden_BTH = policy.trunk_states(ids_BT)
        return [policy.logits(k, hidden_BTH, ids_BT=ids_BT) for k in range(1, heads + 1)]


@pytest.mark.parametrize(("base", "tied", "head"), KINDS, ids=IDS)
def test_every_head_is_restored_exactly(base, tied, head, tmp_path):
    policy = trained(base, tied=tied, head=head)

    restored = loaded(exported(policy, tmp_path / "out"), head=head)

    assert all(torch.equal(one, other) for one, other in zip(logits(policy), logits(restored), strict=True))
    shared = restored.trunk.get_input_embeddings().weight is restored.unembedding.weight
    assert shared == tied


@pytest.mark.parametrize(("base", "tied", "head"), KINDS, ids=IDS)
def test_head_1_is_an_ordinary_language_model(base, tied, head, tmp_path):
    policy = trained(base, tied=tied, head=head)

    model = AutoModelForCausalLM.from_pretrained(exported(policy, tmp_path / "out")).eval()

    ids_BT = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids_BT).logits, logits(policy)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("base", "tied", "head"), KINDS, ids=IDS)
def test_the_files_of_the_top_folder_hold_only_tensors_of_the_base_model(base, tied, head, tmp_path):
    path = exported(trained(base, tied=tied, head=head), tmp_path / "out")

    written = {name for file in path.glob("*.safetensors") for name in load_file(file)}

    # Tied unembeddings are not written a second time.
    assert written == set(base(tied=tied).state_dict()) - ({"lm_head.weight"} if tied else set())


@pytest.mark.parametrize(("base", "tied", "head"), KINDS, ids=IDS)
def test_parameters_in_bfloat16_are_read_back_by_transformers_and_as_all_heads(base, tied, head, tmp_path):
    policy = trained(base, tied=tied, head=head)
    cast_parameters(policy, torch.bfloat16)
    path = exported(policy, tmp_path / "out")
    policy.float()

    model = AutoModelForCausalLM.from_pretrained(path).eval()

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(path / "heads" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    restored = logits(loaded(path, head=head))
    assert all(torch.equal(one, other) for one, other in zip(logits(policy), restored, strict=True))
    ids_BT = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            model.float()(input_ids=ids_BT).logits, logits(policy)[0], rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("options", [{"shared": True}, {"shared": True, "serve": "vllm"}])
def test_sequential_heads_are_restored_in_their_own_form_only(options, tmp_path):
    policy = trained(qwen2, head="sequential", **options)
    path = exported(policy, tmp_path / "out")

    restored = loaded(path, head="sequential", **options)

    assert all(torch.equal(one, other) for one, other in zip(logits(policy), logits(restored), strict=True))
    key = next(iter(options))
    with pytest.raises(WmtpError) as caught:
        loaded(path, head="sequential")
    assert f"has heads with `{key} = {json.dumps(options[key])}`" in str(caught.value)
    assert caught.value.hint.startswith(f"set `model.heads.{key} = {json.dumps(options[key])}`; ")


def test_a_tokenizer_that_transformers_reads_back_as_another_one_is_an_error(tmp_path):
    policy = trained(qwen2)

    with pytest.raises(WmtpError, match="reads the exported tokenizer back as another one") as caught:
        exported(policy, tmp_path / "out", tokenizer("llama"))

    assert caught.value.hint == "train on the tokenizer that `AutoTokenizer` loads for this type of model"
    assert list(tmp_path.iterdir()) == []


def test_new_heads_can_begin_on_an_exported_head_1(tmp_path):
    policy = make_policy(llama(tied=True), n_future=1, head_kind="parallel").eval()
    path = exported(policy, tmp_path / "out")

    restored = loaded(path, head="medusa")

    assert len(restored.heads) == K
    torch.testing.assert_close(logits(restored, heads=1), logits(policy, heads=1), rtol=1e-6, atol=1e-6)


def test_a_policy_of_one_head_needs_no_folder_of_heads(tmp_path):
    policy = make_policy(llama(tied=True), n_future=1, head_kind="parallel").eval()
    path = exported(policy, tmp_path / "out")

    restored = loaded(path, n_future=1)

    assert not (path / "heads").exists()
    assert torch.equal(logits(restored, heads=1)[0], logits(policy, heads=1)[0])


def test_exporting_does_not_change_the_policy(tmp_path):
    policy = trained()
    before = logits(policy)

    exported(policy, tmp_path / "out")

    assert all(torch.equal(one, other) for one, other in zip(before, logits(policy), strict=True))


def test_plain_transformers_generates_the_text_of_head_1_in_a_fresh_process(tmp_path):
    policy = trained(tied=False)
    path = exported(policy, tmp_path / "out")
    prompts = [[5, 9, 17], [30, 2], [11, 12, 13, 14]]
    written = generate(policy, prompts, max_new_tokens=24, eos_id=EOS).tokens
    texts = [" ".join(f"w{token}" for token in ids) for ids in prompts]
    program = """
        import json, sys, torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        path, prompts = sys.argv[1], json.loads(sys.argv[2])
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        written = []
        for prompt in prompts:
            ids_BT = tokenizer(prompt, return_tensors="pt").input_ids
            ids = model.generate(ids_BT, max_new_tokens=24)[0, ids_BT.shape[1]:].tolist()
            written.append([token for token in ids if token != tokenizer.eos_token_id])
        assert not any(name.startswith("weighted_mtp") for name in sys.modules)
        print(json.dumps(written))
    """

    done = subprocess.run(
        [sys.executable, "-I", "-c", dedent(program), str(path), json.dumps(texts)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )

    assert json.loads(done.stdout) == [list(ids) for ids in written]
    assert len(set(written)) == 3


def test_tokenizer_and_end_of_text_are_exported(tmp_path):
    path = exported(trained(), tmp_path / "out")

    assert AutoTokenizer.from_pretrained(path).decode([5, 6]) == "w5 w6"
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == EOS


def test_every_file_is_readable_by_others(tmp_path):
    path = exported(trained(), tmp_path / "out")

    assert {oct(file.stat().st_mode & 0o444) for file in (path, *path.rglob("*"))} == {oct(0o444)}


def test_a_recipe_may_use_fewer_heads(tmp_path):
    policy = trained()

    restored = loaded(exported(policy, tmp_path / "out"), n_future=2)

    assert len(restored.heads) == restored.n_future == 2
    for one, other in zip(logits(policy, heads=2), logits(restored, heads=2), strict=True):
        assert torch.equal(one, other)


def test_more_heads_than_there_are_is_an_error(tmp_path):
    path = exported(trained(), tmp_path / "out")

    with pytest.raises(WmtpError) as caught:
        loaded(path, n_future=4)

    assert str(caught.value) == f"the exported model `{path}` has 3 heads, `model.n_future` is 4"
    assert caught.value.hint.startswith("set `model.n_future = 3` or less; to begin with fresh heads, copy")


def test_another_kind_of_heads_is_an_error(tmp_path):
    path = exported(trained(), tmp_path / "out")

    with pytest.raises(WmtpError) as caught:
        loaded(path, head="medusa")

    assert (
        str(caught.value)
        == f"the exported model `{path}` has `parallel` heads, `model.heads.kind` is `medusa`"
    )


def test_a_copy_without_the_facts_is_an_ordinary_base_model(tmp_path):
    policy = trained()
    path = exported(policy, tmp_path / "out")
    (path / "weighted_mtp.json").unlink()
    (path / "manifest.json").unlink()

    restored = loaded(path, n_future=4, head="medusa")

    assert torch.allclose(logits(restored)[0], logits(policy)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["model.safetensors", "heads/model.safetensors", "weighted_mtp.json"])
def test_a_changed_byte_is_an_error(name, tmp_path):
    path = exported(trained(), tmp_path / "out")
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)

    with pytest.raises(WmtpError, match=f"{name}` changed since it was written"):
        loaded(path)


def test_a_missing_manifest_is_an_error(tmp_path):
    path = exported(trained(), tmp_path / "out")
    (path / "manifest.json").unlink()

    with pytest.raises(WmtpError, match=r"has no `manifest\.json`"):
        loaded(path)


def test_an_older_format_is_an_error_that_says_to_export_anew(tmp_path):
    path = exported(trained(), tmp_path / "out")
    about = json.loads((path / "weighted_mtp.json").read_text())
    (path / "weighted_mtp.json").write_text(json.dumps({**about, "format": 1, "core": "0.0.9"}))

    with pytest.raises(WmtpError, match=r"written by weighted-mtp-core 0\.0\.9 in format 1, ") as caught:
        read_facts(path)

    assert caught.value.hint == "export the run anew"


def test_a_newer_format_is_an_error_that_says_what_to_install(tmp_path):
    path = exported(trained(), tmp_path / "out")
    about = json.loads((path / "weighted_mtp.json").read_text())
    (path / "weighted_mtp.json").write_text(json.dumps({**about, "format": 99, "core": "9.0.0"}))

    with pytest.raises(WmtpError, match=r"written by weighted-mtp-core 9\.0\.0, which is newer") as caught:
        read_facts(path)

    assert caught.value.hint == "pip install 'weighted-mtp-core>=9.0.0'"


def test_a_failed_export_leaves_nothing_new_and_the_old_one_complete(tmp_path):
    path = exported(trained(), tmp_path / "out")
    before = contents(path)
    unwritable = trained(head="medusa")
    unwritable.heads[1].register_buffer("odd", torch.empty(2, device="meta"))

    with pytest.raises(NotImplementedError):
        exported(unwritable, path)

    assert contents(path) == before
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_an_export_replaces_an_existing_one(tmp_path):
    exported(trained(), tmp_path / "out")

    restored = loaded(exported(trained(head="medusa"), tmp_path / "out"), head="medusa")

    assert restored.head_kind == "medusa"
    assert [child.name for child in tmp_path.iterdir()] == ["out"]


def test_force_replaces_an_exported_model_and_nothing_else(tmp_path):
    path, other = exported(trained(), tmp_path / "out"), tmp_path / "other"
    other.mkdir()
    refuse_to_replace(tmp_path / "new", force=False)
    refuse_to_replace(path, force=True)
    refuse_to_replace(other, force=True)
    (other / "thesis.txt").write_text("years of work")

    with pytest.raises(WmtpError, match="already exists") as caught:
        refuse_to_replace(path, force=False)
    with pytest.raises(WmtpError, match="is not an exported model, so `--force` does not replace it"):
        refuse_to_replace(other, force=True)
    with pytest.raises(WmtpError, match="is not an exported model"):
        refuse_to_replace(Path(other / "thesis.txt"), force=True)

    assert caught.value.hint == "choose another `--to`, or replace it with --force"
