"""transformers drafts with exported `sequential` heads, and accepts as many drafts as this package.

Shape letters: R rows, T positions, K heads, V vocabulary.
"""

import itertools
import json
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.export.mtp_layers import compare_with_transformers
from weighted_mtp_core.export.serving import serving_command
from weighted_mtp_core.export.transformers import write_export
from weighted_mtp_core.generation.generate import generate
from weighted_mtp_core.model.exported_model import ExportFacts
from weighted_mtp_core.model.load import load_policy, make_policy
from weighted_mtp_core.model.loss import weighted_mtp_loss
from weighted_mtp_core.model.targets import align_labels
from weighted_mtp_core.recipe.schema import HeadsTable, ModelTable

V, K, NEW = 40, 4, 24
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
PROMPTS = [[5, 9, 4, 31], [3, 3, 8, 1, 2, 39, 6], [20, 21, 22, 7, 30]]
FORMS = {
    "a module each": {},
    "one module": {"shared": True},
    "for vllm": {"shared": True, "serve": "vllm"},
}


def base_model(name, *, tied=True):
    shape = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    torch.manual_seed(1)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=3, n_head=2)),
    }[name]()
    for parameter in model.parameters():  # far from the initial scale, at which all positions are alike
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokenizer(name):
    """A tokenizer that transformers reads back as it is."""
    if name == "qwen2":
        vocabulary = {"<pad>": 0, "<eos>": 1, **{chr(95 + i): i for i in range(2, V)}}
        return Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<pad>", eos_token="<eos>")
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, V)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def trained(name, **form):
    """A policy whose heads 2..K have learned the texts that head 1 writes."""
    policy = make_policy(base_model(name), n_future=K, head_kind="sequential", **form)
    texts = generate(policy, PROMPTS, max_new_tokens=NEW + K, eos_id=-1).tokens
    policy.freeze_base()
    optimiser = torch.optim.Adam(policy.heads[1:].parameters(), lr=0.01)
    for _ in range(20):
        for prompt, new in zip(PROMPTS, texts, strict=True):
            ids_BT = torch.tensor([[*prompt, *new]])
            zero_BT = torch.zeros_like(ids_BT)
            labels_BTK = align_labels(ids_BT, document_BT=zero_BT, response_BT=zero_BT == 0, n_future=K)
            weighted_mtp_loss(
                policy,
                policy.trunk_states(ids_BT),
                labels_BTK=labels_BTK,
                weight_BTK=None,
                normaliser_K=torch.full((K,), float(ids_BT.shape[1])),
                head_share_K=torch.ones(K),
                ids_BT=ids_BT,
            )
        optimiser.step()
        optimiser.zero_grad()
    return policy.eval()


def exported(policy, path, *, serve=None):
    facts = ExportFacts(
        n_future=K,
        heads="sequential",
        run="r",
        recipe_sha256="0" * 64,
        base="b",
        data_sha256=None,
        shared=policy.heads_table.shared,
        serve=policy.heads_table.serve,
    )
    own = tokenizer(policy.config.model_type)
    write_export(policy, own, path, facts=facts, recipe=b"# the recipe\n", serve=serve)
    return path


def drafted_by_transformers(path):
    """Return the texts up to the last pass, and for each draft the number of passes that accept it."""
    model = AutoModelForCausalLM.from_pretrained(path)
    model._keys_to_ignore_on_load_unexpected = [r"^mtp\."]
    texts, accepted = [], [0] * (K - 1)
    for prompt in PROMPTS:
        starts = []
        watched = model.register_forward_pre_hook(
            lambda _, __, given, starts=starts: starts.append(int(given["position_ids"][0, 0])),
            with_kwargs=True,
        )
        ids = model.generate(
            torch.tensor([prompt]), use_mtp=True, max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        watched.remove()
        texts.append(tuple(ids[0, len(prompt) : starts[-1] + 1].tolist()))
        for start, end in itertools.pairwise(starts[1:]):
            accepted = [count + (place < end - start - 1) for place, count in enumerate(accepted)]
    return texts, accepted


def own_drafts(policy, lengths):
    """Return the same as `drafted_by_transformers`, for this package's texts of these lengths."""
    written = [
        generate(policy, [prompt], max_new_tokens=length, eos_id=-1, decoding="self_speculative")
        for prompt, length in zip(PROMPTS, lengths, strict=True)
    ]
    accepted = [sum(each.accepted[place] for each in written) for place in range(K - 1)]
    return [each.tokens[0] for each in written], accepted


@pytest.fixture(scope="module", params=[("llama", "a module each"), ("qwen2", "one module")], ids=str)
def drafting(request, tmp_path_factory):
    name, form = request.param
    policy = trained(name, **FORMS[form])
    path = exported(policy, tmp_path_factory.mktemp(name) / "out", serve="transformers")
    return policy, path


def test_transformers_writes_our_texts_and_accepts_as_many_drafts(drafting):
    policy, path = drafting

    texts, accepted = drafted_by_transformers(path)

    assert (texts, accepted) == own_drafts(policy, map(len, texts))
    assert accepted[-1] >= 5  # by chance, it is one in V ** 3 = 64,000 passes


def test_layers_that_were_not_trained_for_this_model_have_far_fewer_drafts_accepted(drafting):
    policy, path = drafting
    _, accepted = drafted_by_transformers(path)
    file = path / "model.safetensors"
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    others = {
        name: torch.randn(tensor.shape, generator=generator) if name.startswith("mtp.") else tensor
        for name, tensor in load(whole).items()
    }
    file.unlink()  # not overwritten: an earlier model may still read the file
    save_file(others, file, metadata={"format": "pt"})

    texts, fewer = drafted_by_transformers(path)
    file.unlink()
    file.write_bytes(whole)

    assert texts == own_drafts(policy, map(len, texts))[0]
    assert sum(fewer) < 0.3 * sum(accepted)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("form", FORMS)
def test_the_files_hold_the_layers_that_the_server_reads(form, tied, tmp_path):
    serve = FORMS[form].get("serve", "transformers")
    policy = make_policy(
        base_model("qwen2", tied=tied), n_future=K, head_kind="sequential", **FORMS[form]
    ).eval()

    path = exported(policy, tmp_path / "out", serve=serve)

    names, config = (
        set(load((path / "model.safetensors").read_bytes())),
        json.loads((path / "config.json").read_text()),
    )
    plain = set(base_model("qwen2").state_dict()) - ({"lm_head.weight"} if tied else set())
    layer = {name.removeprefix("model.layers.2.") for name in plain if name.startswith("model.layers.2.")}
    if serve == "vllm":
        own = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
        layers = {f"model.mtp_layers.0.{name}" for name in (*layer, *(f"{name}.weight" for name in own))}
        assert (config["architectures"], config["num_nextn_predict_layers"]) == (["MiMoForCausalLM"], 1)
    else:
        own = ("enorm", "hnorm", "eh_proj", "post_norm")
        layers = {
            f"mtp.layers.{depth}.{name}"
            for depth in range(K - 1)
            for name in (*(f"mtp_block.{name}" for name in layer), *(f"{name}.weight" for name in own))
        }
        assert (config["num_mtp_layers"], config["mtp_layer_types"]) == (K - 1, ["full_attention"] * (K - 1))
    assert names == plain | layers
    assert config["model_type"] == "qwen2"


@pytest.mark.parametrize("form", ["a module each", "for vllm"])
def test_every_head_is_read_again_from_a_directory_for_a_server(form, tmp_path):
    policy = make_policy(base_model("qwen2"), n_future=K, head_kind="sequential", **FORMS[form]).eval()
    path = exported(policy, tmp_path / "out", serve=FORMS[form].get("serve", "transformers"))
    table = ModelTable(base=str(path), n_future=K, heads=HeadsTable(kind="sequential", **FORMS[form]))

    loaded = load_policy(table, storage=tmp_path, texts=tuple, seed=1)

    assert loaded.unused is None
    found = {name: tensor.tolist() for name, tensor in loaded.policy.eval().state_dict().items()}
    assert found == {name: tensor.tolist() for name, tensor in policy.state_dict().items()}


def test_a_model_whose_layers_transformers_cannot_run_is_an_error(tmp_path):
    policy = make_policy(base_model("gpt2"), n_future=K, head_kind="sequential").eval()

    with pytest.raises(
        WmtpError, match="transformers cannot draft with the heads of a `gpt2` model"
    ) as caught:
        exported(policy, tmp_path / "out", serve="transformers")

    assert caught.value.hint.startswith('set `model.heads.kind = "medusa"`')
    assert not (tmp_path / "out").exists()


def test_a_failed_comparison_restores_the_mode_of_the_policy(tmp_path):
    fewer = make_policy(base_model("llama"), n_future=K, head_kind="sequential").eval()
    path = exported(fewer, tmp_path / "out", serve="transformers")
    policy = make_policy(base_model("llama"), n_future=K + 1, head_kind="sequential").train()

    with pytest.raises(WmtpError, match="transformers cannot draft with the heads of a `llama` model"):
        compare_with_transformers(policy, path)

    assert policy.training


@pytest.mark.parametrize("k", [2, K])
def test_a_head_that_differs_in_numbers_that_are_not_finite_is_an_error(tmp_path, k):
    policy = make_policy(base_model("llama"), n_future=K, head_kind="sequential").eval()
    path = exported(policy, tmp_path / "out", serve="transformers")
    with torch.no_grad():
        next(policy.heads[k - 1].parameters()).fill_(torch.nan)

    with pytest.raises(WmtpError, match=r"computes the heads of a `llama` model differently .*nan"):
        compare_with_transformers(policy, path)


def test_heads_for_vllm_need_a_model_that_vllm_drafts_with(tmp_path):
    base_model("llama").save_pretrained(tmp_path / "base")
    tokenizer("llama").save_pretrained(tmp_path / "base")
    table = ModelTable(
        base=str(tmp_path / "base"), n_future=K, heads=HeadsTable(kind="sequential", **FORMS["for vllm"])
    )

    with pytest.raises(WmtpError, match=r"of `qwen2` models only, and `.*base` is a `llama` model"):
        load_policy(table, storage=tmp_path, texts=tuple, seed=1)


def test_the_printed_program_drafts_in_transformers(tmp_path):
    policy = make_policy(base_model("llama"), n_future=K, head_kind="sequential").eval()
    path = exported(policy, tmp_path / "out", serve="transformers")
    command = serving_command(path, server="transformers", kind="sequential", dtype=torch.float32, n_future=K)
    _, option, program = shlex.split(command)

    done = subprocess.run(
        [sys.executable, option, program.replace("'PROMPT'", "'w5 w9 w4'").replace("=128", "=6")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    (new,) = generate(policy, [[5, 9, 4]], max_new_tokens=6, eos_id=1).tokens
    assert [word for word in done.stdout.split() if word.startswith("w")][3:] == [
        f"w{token}" for token in new
    ]
