"""vLLM drafts with a `sequential` head of a Qwen2 model, and accepts as many drafts as this package predicts.

Shape letters: B rows, T positions, V vocabulary.
"""

from pathlib import Path

import pytest
import torch
from served_model import (
    VLLM,
    decoded_by_vllm,
    own_count,
    problems_of,
    trained_and_exported,
    with_random_tensors,
)
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

V, DRAFTS = 512, 3
SPECULATIVE = {"method": "mtp", "num_speculative_tokens": DRAFTS}

pytestmark = [
    pytest.mark.skipif(not VLLM.exists(), reason="`make test-serving` makes the environment of vLLM"),
    pytest.mark.timeout(1800),
]


def qwen2_base(path: Path, texts: list[str], *, tied: bool) -> None:
    """Write a Qwen2 model in the shape of `micro`, with random weights and a tokenizer of these texts."""
    empty = Qwen2Tokenizer(vocab={"<pad>": 0, "<eos>": 1}, merges=[], pad_token="<pad>", eos_token="<eos>")
    tokenizer = empty.train_new_from_iterator(texts, vocab_size=V)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=128**-0.5,
        tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def sequential(request, tmp_path_factory, storage):
    """A Qwen2 model that was trained with heads 2..4 from one layer, exported for vLLM."""
    folder = tmp_path_factory.mktemp("sequential")
    problems = [row["problem"] for row in problems_of(storage)]
    texts = [problem["prompt"] + problem["solution"] for problem in problems]
    qwen2_base(folder / "base", texts, tied=request.param)
    return trained_and_exported(
        "baseline.toml",
        folder,
        storage=storage,
        server="vllm",
        settings=[
            f'model.base="{folder / "base"}"',
            'model.heads={kind="sequential", shared=true, serve="vllm"}',
        ],
    )


def test_vllm_writes_our_texts_and_accepts_as_many_drafts_of_a_sequential_head(sequential, tmp_path):
    policy = sequential.policy

    def drafted(text, drafts):
        with torch.no_grad():
            ids_BT = torch.tensor([text])
            states = policy.each_head_states(policy.trunk_states(ids_BT), ids_BT=ids_BT, position_BT=None)
            return [policy.unembedding(state_BTH)[0].argmax(dim=-1).tolist() for state_BTH in states][1:]

    counted = own_count(sequential, drafted)
    found = decoded_by_vllm(sequential, SPECULATIVE)
    others = with_random_tensors(sequential, tmp_path / "others", "model.mtp_layers.0.input_proj.")
    random = decoded_by_vllm(others, SPECULATIVE)
    print(f"\nours: {counted.verified} passes, accepted {counted.accepted}")
    print(f"vLLM: {found.verified} passes, accepted {found.accepted} ({found.accepted_per_pass:.2f} a pass)")
    print(f"vLLM, random layer: {random.verified} passes, accepted {random.accepted}")

    assert found.tokens == random.tokens == counted.tokens
    assert found.verified == pytest.approx(counted.verified, rel=0.01)
    assert found.accepted == pytest.approx(counted.accepted, rel=0.01)
    assert found.accepted_per_pass >= 2.0
    assert random.accepted_per_pass < 0.3 * found.accepted_per_pass
