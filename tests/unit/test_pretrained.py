"""A run stops before training if files of the base model are incomplete or belong to different models."""

import json

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.load import load_policy
from weighted_mtp_core.model.probe import check_positions
from weighted_mtp_core.recipe.schema import HeadsTable, MicroTable, ModelTable

MICRO = ModelTable(micro=MicroTable(vocab_size=300, hidden_size=16, layers=2, attention_heads=2), n_future=2)
SHAPE = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
LAYER = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


def load(storage, table=MICRO):
    return load_policy(table, storage=storage, texts=lambda: ("def f(xs):\n    return sorted(xs)\n",), seed=1)


@pytest.fixture(scope="module")
def tokenizer(storage):
    return load(storage).tokenizer


@pytest.fixture
def directory(tokenizer, tmp_path):
    """A transformers directory of an untied Llama."""
    torch.manual_seed(7)
    path = tmp_path / "mine"
    LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def refusal(storage, directory):
    """Return the message and the hint with which a directory is refused."""
    with pytest.raises(WmtpError) as caught:
        load(storage, evolve(MICRO, base=str(directory), heads=HeadsTable(kind="medusa")))
    return str(caught.value), caught.value.hint


def rewrite(directory, change):
    """Change the tensors of a directory."""
    file = directory / "model.safetensors"
    state = change({name: tensor.clone() for name, tensor in load_file(file).items()})
    save_file(state, file, metadata={"format": "pt"})


def configure(directory, **values):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_the_directory_as_it_is_loads(storage, directory):
    assert load(storage, evolve(MICRO, base=str(directory))).policy.n_future == 2


def test_a_missing_layer_is_named(storage, directory):
    rewrite(directory, lambda state: {name: each for name, each in state.items() if ".layers.1." not in name})

    message, hint = refusal(storage, directory)

    assert f"{directory}/model.safetensors`: 9 tensors of `LlamaForCausalLM` are missing" in message
    assert "`model.layers.1.input_layernorm.weight`" in message
    assert "copy or download the model again" in hint


def test_a_missing_unembedding_is_named(storage, directory):
    rewrite(directory, lambda state: {name: each for name, each in state.items() if name != "lm_head.weight"})

    message, hint = refusal(storage, directory)

    assert "1 tensors of `LlamaForCausalLM` are missing: `lm_head.weight`" in message
    assert "`tie_word_embeddings`" in hint


def test_tensors_of_a_compiled_model_are_explained(storage, directory):
    rewrite(directory, lambda state: {f"_orig_mod.{name}": each for name, each in state.items()})

    message, hint = refusal(storage, directory)

    assert "`lm_head.weight`" in message
    assert "begin with `_orig_mod.`: a compiled model was saved" in hint


def test_weights_of_another_architecture_are_explained(storage, directory):
    other = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2))
    rewrite(directory, lambda _: {name: each.clone() for name, each in other.state_dict().items()})

    message, hint = refusal(storage, directory)

    assert "are missing: `lm_head.weight`" in message or "are missing: `model." in message
    assert "of another architecture" in hint


def test_more_layers_than_the_config_has_are_refused(storage, directory):
    configure(directory, num_hidden_layers=1)

    message, _ = refusal(storage, directory)

    assert "9 tensors are not part of `LlamaForCausalLM` as `config.json` describes it" in message
    assert "`model.layers.1.input_layernorm.weight`" in message


def test_biases_that_the_config_switches_off_are_refused(storage, directory):
    def with_bias(state):
        return {**state, LAYER.replace("weight", "bias"): torch.ones(16)}

    rewrite(directory, with_bias)

    message, _ = refusal(storage, directory)

    assert "`model.layers.1.self_attn.q_proj.bias`" in message


def test_a_tensor_of_another_shape_is_named(storage, directory):
    rewrite(directory, lambda state: {**state, LAYER: torch.ones(16, 8)})

    message, _ = refusal(storage, directory)

    assert f"1 tensors have other shapes than in the config: `{LAYER}` [16, 8] instead of [16, 16]" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(storage, directory, value):
    def damaged(state):
        state[LAYER][3, 4] = value
        return state

    rewrite(directory, damaged)

    message, hint = refusal(storage, directory)

    assert f"{directory}/model.safetensors`: 1 tensors contain NaN or infinity: `{LAYER}`" in message
    assert "earlier checkpoint" in hint


def test_a_cut_file_is_named(storage, directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    message, hint = refusal(storage, directory)

    assert f"`{file}` cannot be read" in message
    assert "truncated or damaged" in hint


def test_a_file_that_is_no_safetensors_is_named(storage, directory):
    file = directory / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")

    message, _ = refusal(storage, directory)

    assert f"`{file}` cannot be read" in message


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, b"text"])
def test_a_bad_gguf_file_is_named(storage, tmp_path, content):
    file = tmp_path / "small.gguf"
    file.write_bytes(content)

    message, _ = refusal(storage, file)

    assert f"`{file}` cannot be read as a GGUF model" in message
    assert not list((storage / "models_v2").glob("small/*"))


def test_an_adapter_beside_the_model_is_refused(storage, directory):
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')

    message, hint = refusal(storage, directory)

    assert "contains an adapter, `adapter_config.json`" in message
    assert "merge_and_unload" in hint


def test_quantised_weights_are_refused(storage, directory):
    configure(directory, quantization_config={"quant_method": "gptq", "bits": 4})

    message, hint = refusal(storage, directory)

    assert "are quantised (gptq), so they cannot be trained" in message
    assert "unquantised" in hint


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(storage, directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(301 - len(tokenizer))])
    tokenizer.save_pretrained(directory)

    message, hint = refusal(storage, directory)

    assert "has 1 tokens beyond the model's embedding of 300 rows: `<extra" in message
    assert "` is 300" in message
    assert "resize_token_embeddings" in hint


def test_an_eos_token_beyond_the_embedding_is_refused(storage, directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(300 - len(tokenizer))])
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(directory)

    message, _ = refusal(storage, directory)

    assert "`<end>` is 300" in message


def test_an_unknown_model_type_is_refused(storage, directory):
    configure(directory, model_type="abacus")

    message, _ = refusal(storage, directory)

    assert "cannot be loaded as a causal language model" in message
    assert "abacus" in message


def test_a_config_that_is_cut_is_refused(storage, directory):
    file = directory / "config.json"
    file.write_text(file.read_text()[:60])

    message, _ = refusal(storage, directory)

    assert f"`{directory}` cannot be loaded" in message


def test_a_broken_tokenizer_is_named(storage, directory):
    (directory / "tokenizer.json").write_text("{")

    message, _ = refusal(storage, directory)

    assert f"the tokenizer of `{directory}` cannot be loaded" in message


def test_documents_may_not_be_longer_than_a_learned_table_of_positions(storage, tokenizer, tmp_path):
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    policy = load(storage, evolve(MICRO, base=str(tmp_path / "gpt2"))).policy

    check_positions(policy, 64)
    with pytest.raises(WmtpError, match="cannot read a document of 65 tokens") as caught:
        check_positions(policy, 65)

    assert caught.value.hint == "set `data.max_tokens = 64` or less, or use a base model with more positions"


def test_rotary_positions_have_no_end(storage, directory):
    check_positions(load(storage, evolve(MICRO, base=str(directory))).policy, 100_000)
