"""Statistics of generation, on a policy that counts: token i + 1 follows token i for all heads."""

import functools

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.generation.generate import Generations, generate, sample_completions
from weighted_mtp_core.generation.samplers import token_logprobs
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.training.plugin_metrics import is_core_metric

V = 16


@functools.cache
def counting_policy():
    """Tokens are unit vectors, attention and MLP add nothing, and head k rotates the vector by k tokens."""
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=V,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=V,
        tie_word_embeddings=False,
    )
    base = LlamaForCausalLM(config)
    unit, step = torch.eye(V), torch.eye(V).roll(1, dims=0)  # step @ unit[i] is unit[i + 1]
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        base.model.embed_tokens.weight.copy_(unit)
        base.lm_head.weight.copy_(step)
    policy = make_policy(base, n_future=3, head_kind="medusa").eval()
    with torch.no_grad():
        for k in (2, 3):
            policy.heads[k - 1].linear.weight.copy_(3 * torch.matrix_power(step, k - 1))
    return policy


def write(prompts, **settings):
    return generate(
        counting_policy(),
        prompts,
        **{"max_new_tokens": 9, "eos_id": V - 1, "decoding": "self_speculative"} | settings,
    )


def test_a_text_ends_at_the_last_position_of_the_text_decoder_of_a_model_with_images():
    text = {"vocab_size": V, "hidden_size": V, "intermediate_size": V, "num_hidden_layers": 2, "head_dim": 8}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
    )
    policy = make_policy(Gemma3ForConditionalGeneration(config), n_future=3, head_kind="medusa")

    written = generate(policy, [[5] * 25], max_new_tokens=9, eos_id=-1)

    assert [len(each) for each in written.tokens] == [5]  # 32 positions, of which 2 are for drafts


@pytest.mark.parametrize("prompts", [[[]], [[], [5, 6]]])
def test_a_prompt_without_tokens_is_refused(prompts):
    """A row without tokens has no state, so its text would come from padding."""
    with pytest.raises(WmtpError, match="a prompt has no tokens"):
        write(prompts)


def test_accepted_drafts_give_one_token_per_head():
    written = write([[0]], max_new_tokens=7)

    assert written.tokens == ((1, 2, 3, 4, 5, 6, 7),)
    # The prompt's pass gives 1 token; two passes accept two drafts each and add one: 7 tokens in 3 passes.
    assert (written.emitted, written.passes, written.verified, written.accepted) == (7, 3, 2, (2, 2))
    assert written.tokens_per_forward == 7 / 3
    assert written.acceptance == (1.0, 1.0)
    assert written.acceptance_length == 3.0


def test_plain_decoding_needs_one_pass_per_token():
    written = write([[0]], max_new_tokens=7, decoding="plain")

    assert (written.tokens, written.finished) == (((1, 2, 3, 4, 5, 6, 7),), (False,))
    assert (written.emitted, written.passes, written.verified, written.accepted) == (7, 7, 6, ())
    assert (written.tokens_per_forward, written.acceptance_length) == (1.0, 1.0)


@pytest.mark.parametrize("eos_id", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("decoding", ["plain", "self_speculative"])
def test_eos_ends_a_text_anywhere_in_a_draft(eos_id, decoding):
    written = write([[0]], eos_id=eos_id, decoding=decoding)

    assert written.tokens == (tuple(range(1, eos_id)),)
    assert written.finished == (True,)
    assert written.emitted == eos_id


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("decoding", ["plain", "self_speculative"])
def test_the_limit_ends_a_text_anywhere_in_a_draft(limit, decoding):
    written = write([[0]], max_new_tokens=limit, decoding=decoding)

    assert written.tokens == (tuple(range(1, limit + 1)),)
    assert written.finished == (False,)
    assert written.emitted == limit


def test_drafts_after_the_end_of_a_text_do_not_count_as_accepted():
    written = write([[0]], eos_id=2)

    assert (written.emitted, written.passes, written.verified, written.accepted) == (2, 2, 1, (1, 0))


def test_rows_that_end_at_different_times_are_counted_row_by_row():
    written = write([[0], [13, 11], [12]], max_new_tokens=4)

    assert written.tokens == ((1, 2, 3, 4), (12, 13, 14), (13, 14))
    assert written.finished == (False, True, True)
    assert (written.emitted, written.passes, written.verified) == (4 + 4 + 3, 6, 3)


def test_progress_counts_finished_prompts():
    seen = []

    write([[0], [13], [12]], batch_size=2, on_done=seen.append)

    assert seen[-1] == 3
    assert seen == sorted(seen)


def test_acceptance_length_adds_the_acceptance_of_every_position_to_one():
    shares = (0.7617, 0.6158, 0.5125, 0.4243, 0.3640, 0.3094, 0.2722, 0.2365)
    written = Generations(
        tokens=(),
        finished=(),
        emitted=0,
        passes=0,
        verified=10_000,
        accepted=tuple(round(10_000 * share) for share in shares),
        seconds=1.0,
    )

    assert written.acceptance_length == pytest.approx(4.496, abs=5e-4)


def test_the_policys_training_mode_is_restored():
    policy = counting_policy()
    for training in (True, False):
        policy.train(training)
        write([[0]])

        assert policy.training is training

        token_logprobs(policy, [([0], [1])], batch_size=1)

        assert policy.training is training


class Characters:
    """A codec of letters: `a` is token 0, `b` is 1, ...; the last of the V tokens is EOS."""

    eos_id = V - 1

    def encode_prompts(self, texts):
        return [[ord(letter) - ord("a") for letter in text] for text in texts]

    def decode_completions(self, rows):
        return ["".join(chr(ord("a") + token) for token in new) for _, new in rows]


def completions(prompts, **settings):
    return sample_completions(
        counting_policy(),
        Characters(),
        [(f"p/{prompt}", prompt) for prompt in prompts],
        **{
            "samples": 1,
            "temperature": 0.0,
            "seed": 0,
            "max_new_tokens": 3,
            "decoding": "self_speculative",
            "batch_size": 4,
        }
        | settings,
    )


def test_completions_are_grouped_by_prompt():
    sampled = completions(["a", "kl"], samples=2)

    assert sampled.completions == (("bcd", "bcd"), ("mno", "mno"))


def test_samples_of_a_prompt_do_not_depend_on_other_prompts():
    alone = completions(["c"], samples=3, temperature=3.0)
    among = completions(["a", "c", "abc"], samples=3, temperature=3.0)

    assert len(set(alone.completions[0])) > 1
    assert among.completions[1] == alone.completions[0]


def test_metrics_number_positions_by_head_from_2():
    generations = Generations(
        tokens=((1, 2), (1,)),
        finished=(True, False),
        emitted=30,
        passes=20,
        verified=10,
        accepted=(6, 3),
        seconds=2.0,
    )

    assert generations.metrics() == {
        "tokens_per_forward": 1.5,
        "finished_share": 0.5,
        "acceptance_position_2": 0.6,
        "acceptance_position_3": 0.3,
        "acceptance_length": pytest.approx(1.9),
    }
    assert generations.timings() == {"generated_tokens_per_second": 15.0}
    assert all(is_core_metric(name) for name in (*generations.metrics(), *generations.timings()))
