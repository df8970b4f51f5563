"""Heads 2..K are written in the form with which a server drafts, and other kinds are refused."""

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.export.serving import refuse_unserved, serving_command, write_medusa
from weighted_mtp_core.export.transformers import language_model
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.recipe.schema import HeadsTable

V, H, K = 40, 16, 4
PLAIN = "without `--serve`, the exported directory is an ordinary model for every server"


def policy(*, tied):
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    made = make_policy(LlamaForCausalLM(config), n_future=K, head_kind="medusa").eval()
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("tied", [True, False])
def test_the_draft_model_of_vllm_computes_the_heads(tied, tmp_path):
    own = policy(tied=tied)
    language_model(own).save_pretrained(tmp_path)
    write_medusa(own, tmp_path)
    ids_BT = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(1))

    # As vLLM's `Medusa` reads the files: a block of one linear layer per head, one matrix for all.
    tensors = load_file(tmp_path / "medusa" / "model.safetensors")
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tmp_path)
        state_BTH = base.model(input_ids=ids_BT).last_hidden_state
        for number in range(K - 1):
            product_BTH = state_BTH @ tensors[f"blocks.{number}.layers.0.weight"].T
            drafts_BTH = state_BTH + torch.nn.functional.silu(product_BTH)
            logits_BTV = drafts_BTH @ tensors["lm_heads.0.weight"].T

            expected_BTV = own.logits(number + 2, own.trunk_states(ids_BT))
            torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-5, atol=1e-5)

    assert len(tensors) == K


def test_the_draft_model_of_vllm_has_its_config(tmp_path):
    write_medusa(policy(tied=True), tmp_path)

    assert json.loads((tmp_path / "medusa" / "config.json").read_text()) == {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": H,
        "vocab_size": V,
        "truncated_vocab_size": V,
        "num_heads": K - 1,
        "num_hidden_layers": 1,
        "original_lm_head": True,
        "medusa_fc_bias": False,
        "dtype": "float32",
    }


def test_an_unembedding_with_a_bias_cannot_draft_in_vllm(tmp_path):
    config = GPTJConfig(vocab_size=V, n_embd=H, n_layer=2, n_head=2, rotary_dim=4)
    biased = make_policy(GPTJForCausalLM(config), n_future=2, head_kind="medusa")

    with pytest.raises(WmtpError, match="has a bias, which vLLM does not apply to drafts"):
        write_medusa(biased, tmp_path)


@pytest.mark.parametrize(
    ("server", "kind", "takes", "others"),
    [
        ("vllm", "parallel", "it takes `medusa`, `sequential`", ""),
        (
            "sglang",
            "medusa",
            "it takes no kind of heads that is trained here",
            "`medusa` heads are served by `vllm`; ",
        ),
        ("transformers", "parallel", "it takes `sequential`", ""),
        ("transformers", "medusa", "it takes `sequential`", "`medusa` heads are served by `vllm`; "),
    ],
)
def test_a_kind_of_heads_that_a_server_does_not_take_is_an_error(server, kind, takes, others):
    with pytest.raises(WmtpError) as caught:
        refuse_unserved(server, heads=HeadsTable(kind=kind), n_future=K)

    assert str(caught.value) == f"`{server}` cannot draft with `{kind}` heads: {takes}"
    assert caught.value.hint == others + PLAIN


@pytest.mark.parametrize(
    ("heads", "server", "message", "mend"),
    [
        (
            {"shared": True, "serve": "vllm"},
            "transformers",
            "these `sequential` heads were trained for `vllm`, so `transformers` would draft badly",
            'export with `--serve vllm`, or train with `model.heads.serve = "transformers"`',
        ),
        (
            {"init": "base"},
            "transformers",
            "`--serve` is for heads that do not come from the base model",
            "export without `--serve`: the layers keep the names that the base model gives them",
        ),
    ],
)
def test_sequential_heads_that_a_server_would_compute_differently_are_an_error(heads, server, message, mend):
    with pytest.raises(WmtpError) as caught:
        refuse_unserved(server, heads=HeadsTable(kind="sequential", **heads), n_future=K)

    assert (str(caught.value), caught.value.hint) == (message, mend)


def test_vllm_drafts_all_tokens_with_the_layer_in_the_model_itself(tmp_path):
    command = serving_command(tmp_path, server="vllm", kind="sequential", dtype=torch.float32, n_future=K)

    draft = shlex.split(command)[-1]
    assert json.loads(draft) == {"method": "mtp", "num_speculative_tokens": K - 1}


def test_one_head_cannot_draft():
    with pytest.raises(WmtpError) as caught:
        refuse_unserved("vllm", heads=HeadsTable(kind="medusa"), n_future=1)

    assert (str(caught.value), caught.value.hint) == (
        "the policy has one head, so nothing drafts in `vllm`",
        PLAIN,
    )


def test_the_command_that_serves_is_for_a_shell(tmp_path):
    path = tmp_path / "my model"
    command = serving_command(path, server="vllm", kind="medusa", dtype=torch.bfloat16, n_future=K)

    *words, draft = shlex.split(command)
    expected = ["vllm", "serve", str(tmp_path / "my model"), "--dtype", "bfloat16", "--speculative-config"]
    assert words == expected
    assert json.loads(draft) == {
        "method": "medusa",
        "model": str(tmp_path / "my model" / "medusa"),
        "num_speculative_tokens": K - 1,
    }
