"""Base models: `micro`, a directory or a GGUF file; the same bytes or an error."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.model.load import load_policy
from weighted_mtp_core.recipe.schema import MicroTable, ModelTable
from weighted_mtp_core.runtime.device import device_type, resolve_device, resolve_dtype
from weighted_mtp_core.runtime.distributed import Distributed
from weighted_mtp_core.runtime.fsdp import shard
from weighted_mtp_core.runtime.sharding import mesh_of

MICRO = ModelTable(micro=MicroTable(vocab_size=300, hidden_size=16, layers=2, attention_heads=2), n_future=2)
TEXTS = ("def f(xs):\n    return sorted(xs)\n", "Sum 12 and 345. Héllo wörld ☃")


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


def load(storage, table=MICRO, *, texts=TEXTS, seed=1):
    return load_policy(table, storage=storage, texts=lambda: texts, seed=seed)


@pytest.fixture(scope="module")
def micro(storage):
    return load(storage)


def tensors(loaded):
    return loaded.policy.state_dict()


def test_a_micro_model_is_a_function_of_shape_texts_and_seed(storage, micro, tmp_path):
    elsewhere = load(tmp_path)

    assert elsewhere.base_name == micro.base_name
    assert all(torch.equal(tensor, tensors(micro)[name]) for name, tensor in tensors(elsewhere).items())
    names = {
        load(storage, seed=2).base_name,
        load(storage, texts=("other text",)).base_name,
        load(storage, evolve(MICRO, micro=evolve(MICRO.micro, layers=3))).base_name,
        micro.base_name,
    }
    assert len(names) == 4


def test_a_micro_model_is_made_once(storage, micro):
    (folder,) = (storage / "models_v2").glob(f"{micro.base_name}/model.safetensors")
    before = folder.stat().st_mtime_ns

    load(storage)

    assert folder.stat().st_mtime_ns == before


def test_making_a_model_does_not_change_the_random_generator(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    load(tmp_path)

    assert torch.equal(torch.rand(2), expected)


def test_a_changed_byte_of_a_stored_model_is_an_error_that_names_the_file(micro, storage, tmp_path):
    shutil.copytree(storage, tmp_path / "copy")
    path = tmp_path / "copy" / "models_v2" / micro.base_name / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(WmtpError, match=r"model\.safetensors` changed since it was written"):
        load(tmp_path / "copy")


@given(st.text())
def test_the_tokenizer_restores_every_text(micro, text):
    ids = micro.tokenizer(text, add_special_tokens=False)["input_ids"]

    assert micro.tokenizer.decode(ids) == text


def test_each_digit_is_a_token(micro):
    ids = micro.tokenizer("12345", add_special_tokens=False)["input_ids"]

    assert [micro.tokenizer.decode([token]) for token in ids] == ["1", "2", "3", "4", "5"]


def test_padding_is_not_the_end_of_a_response(micro):
    assert micro.tokenizer.eos_token_id is not None
    assert micro.tokenizer.pad_token_id != micro.tokenizer.eos_token_id


@pytest.fixture
def directory(micro, tmp_path):
    """A transformers directory of another model, with the micro tokenizer."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    path = tmp_path / "models" / "mine"
    LlamaForCausalLM(config).save_pretrained(path)
    micro.tokenizer.save_pretrained(path)
    return path


def test_a_transformers_directory_is_loaded_in_float32(directory, storage):
    loaded = load(storage, evolve(MICRO, base=str(directory)))
    original = LlamaForCausalLM.from_pretrained(directory)

    assert torch.equal(loaded.policy.unembedding.weight, original.lm_head.weight)
    assert {tensor.dtype for tensor in tensors(loaded).values()} == {torch.float32}


def test_a_model_in_storage_is_named_by_its_folder(directory, tmp_path):
    stored = tmp_path / "storage" / "models_v2" / "mine" / "1"
    shutil.copytree(directory, stored)

    assert load(tmp_path / "storage", evolve(MICRO, base="mine")).base_name == "mine/1"
    assert load(tmp_path / "storage", evolve(MICRO, base="mine/1")).base_name == "mine/1"

    shutil.copytree(directory, stored.with_name("2"))
    with pytest.raises(WmtpError, match="contains several versions: `1`, `2`") as caught:
        load(tmp_path / "storage", evolve(MICRO, base="mine"))
    assert 'model.base = "mine/2"' in caught.value.hint


@pytest.mark.parametrize("base", ["absent", "./absent", "/nowhere/absent"])
def test_a_missing_model_is_an_error(storage, base):
    with pytest.raises(WmtpError, match=f"there is no model `{base}`"):
        load(storage, evolve(MICRO, base=base))


def test_a_directory_without_a_model_is_an_error(tmp_path, storage):
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(WmtpError, match="cannot be loaded as a causal language model"):
        load(storage, evolve(MICRO, base=str(tmp_path)))


def test_a_tokenizer_without_eos_is_refused(directory, storage):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)

    with pytest.raises(WmtpError, match="has no EOS token"):
        load(storage, evolve(MICRO, base=str(directory)))


VOCABULARY = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "▁a", "ab"]


@pytest.fixture
def gguf_file(tmp_path):
    """A small Llama as a GGUF file in F32, and the model that it holds."""
    import gguf

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(VOCABULARY)
    writer.add_token_scores([0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0])
    writer.add_token_types([2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in gguf_tensors(model):
        writer.add_tensor(name, np.ascontiguousarray(tensor.detach().numpy(), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def gguf_tensors(model):
    """Return a Llama's tensors under llama.cpp's names; llama.cpp stores rotary halves interleaved."""
    body = model.model
    yield "token_embd.weight", body.embed_tokens.weight
    yield "output_norm.weight", body.norm.weight
    yield "output.weight", model.lm_head.weight
    for i, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield f"blk.{i}.attn_q.weight", interleaved(attention.q_proj.weight, heads=2)
        yield f"blk.{i}.attn_k.weight", interleaved(attention.k_proj.weight, heads=1)
        yield f"blk.{i}.attn_v.weight", attention.v_proj.weight
        yield f"blk.{i}.attn_output.weight", attention.o_proj.weight
        yield f"blk.{i}.ffn_gate.weight", mlp.gate_proj.weight
        yield f"blk.{i}.ffn_up.weight", mlp.up_proj.weight
        yield f"blk.{i}.ffn_down.weight", mlp.down_proj.weight
        yield f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight
        yield f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight


def interleaved(weight, *, heads):
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def test_a_gguf_file_is_converted_once_and_gives_its_own_model(gguf_file, tmp_path):
    path, model = gguf_file
    storage = tmp_path / "storage"

    loaded = load(storage, evolve(MICRO, base=str(path)))

    ids_BT = torch.tensor([[1, 260, 263, 261]])
    with torch.no_grad():
        logits = loaded.policy.logits(1, loaded.policy.trunk_states(ids_BT))
        torch.testing.assert_close(logits, model(input_ids=ids_BT).logits, rtol=1e-4, atol=1e-4)
    assert loaded.tokenizer.eos_token_id == 2
    (converted,) = (storage / "models_v2" / "small").iterdir()
    before = (converted / "model.safetensors").stat().st_mtime_ns
    again = load(storage, evolve(MICRO, base=str(path)))
    assert again.base_name == loaded.base_name
    assert (converted / "model.safetensors").stat().st_mtime_ns == before


def test_an_adapter_beside_a_gguf_file_is_refused(gguf_file, tmp_path):
    """transformers would apply the adapter to the model of the file."""
    from peft import LoraConfig, get_peft_model

    path, model = gguf_file
    model.config.save_pretrained(tmp_path)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)

    with pytest.raises(WmtpError, match=r"contains an adapter, `adapter_config\.json`"):
        load(tmp_path / "storage", evolve(MICRO, base=str(path)))

    assert not list((tmp_path / "storage" / "models_v2").glob("small/*"))


def test_a_missing_gguf_file_is_an_error(storage):
    with pytest.raises(WmtpError, match=r"there is no file `absent\.gguf`"):
        load(storage, evolve(MICRO, base="absent.gguf"))


def test_a_missing_device_is_an_error_that_names_the_setting():
    with pytest.raises(WmtpError, match="there is no device `cuda:99` here") as caught:
        resolve_device("cuda:99")
    with pytest.raises(WmtpError, match="there is no device `abacus` here"):
        resolve_device("abacus")

    assert 'model.device = "auto"' in caught.value.hint


def test_the_default_dtype_follows_the_device():
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_dtype("auto", torch.device("mps")) is torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.fixture(params=[(7, 5), (8, 0), (9, 0)], ids=str)
def gpu(request, monkeypatch):
    """A CUDA device of this capability, as torch reports it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda *, including_emulation: including_emulation or request.param >= (8, 0),
    )
    return request.param


def test_bfloat16_is_for_gpus_that_compute_in_it(gpu):
    device = torch.device("cuda")
    if gpu >= (8, 0):
        assert resolve_dtype("auto", device) is resolve_dtype("bfloat16", device) is torch.bfloat16
        return

    assert resolve_dtype("auto", device) is resolve_dtype("float32", device) is torch.float32
    with pytest.raises(WmtpError, match="the device `cuda` does not compute in bfloat16") as caught:
        resolve_dtype("bfloat16", device)
    assert 'set `model.dtype = "float32"`' in caught.value.hint


def test_bfloat16_on_an_apple_gpu_is_refused():
    with pytest.raises(WmtpError, match="the device `mps` does not compute in bfloat16"):
        resolve_dtype("bfloat16", torch.device("mps"))


@pytest.mark.parametrize(("cuda", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_or_the_cpu_also_where_there_is_an_apple_gpu(monkeypatch, cuda, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)

    assert device_type("auto") == expected
    assert device_type("mps") == "mps"


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_several_processes_on_one_device_are_an_error(monkeypatch, name):
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(WmtpError, match=f"`model.device = {name}` is one device, but 2 processes train"):
        Distributed.init(name)


def test_one_process_may_have_any_device(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    assert Distributed.init("cuda:1").is_single_process


def test_sharded_modules_lie_where_they_are_whatever_else_the_machine_has(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    layer = torch.nn.Linear(2, 2)
    try:
        shard([layer], mesh_of(Distributed(rank=0, size=1), layer.weight.device))

        assert layer.weight.device_mesh.device_type == "cpu"
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("own", "expected"), [({}, "1"), ({"PYTORCH_ENABLE_MPS_FALLBACK": "0"}, "0")])
def test_the_fallback_from_mps_to_the_cpu_is_set_before_torch_is_imported(own, expected):
    name = "PYTORCH_ENABLE_MPS_FALLBACK"
    environment = {key: value for key, value in os.environ.items() if key != name} | own
    program = f"import os, sys, weighted_mtp_core; print(os.environ['{name}'], 'torch' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )

    assert done.stdout == f"{expected} False\n"
