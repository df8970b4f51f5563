"""vLLM drafts with a `sequential` head of a Qwen2 model: as many drafts are accepted as by our own count.

The head learns the texts that the model writes, which has random weights.

Shape letters: B rows, T positions, K heads, V vocabulary.
"""

import pytest
import torch
from served_model import NEW_TOKENS, VLLM, ServedModel, decoded_by_vllm, own_count
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from weighted_mtp_core.export.transformers import write_export
from weighted_mtp_core.generation.generate import generate
from weighted_mtp_core.model.exported_model import ExportFacts
from weighted_mtp_core.model.load import make_policy
from weighted_mtp_core.model.loss import weighted_mtp_loss
from weighted_mtp_core.model.targets import align_labels

V, K, PROMPTS = 96, 4, 12

pytestmark = [
    pytest.mark.skipif(not VLLM.exists(), reason="`make test-serving` makes the environment of vLLM"),
    pytest.mark.timeout(1800),
]


def policy_of(seed, *, tied):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():  # far from the initial scale, at which all positions are alike
        torch.nn.init.normal_(parameter, std=0.3)
    policy = make_policy(model, n_future=K, head_kind="sequential", shared=True, serve="vllm")
    policy.freeze_base()
    return policy


def learn(policy, prompts, texts):
    """Train heads 2..K on texts."""
    optimiser = torch.optim.Adam(policy.heads[1:].parameters(), lr=3e-3)
    for _ in range(25):
        for prompt, new in zip(prompts, texts, strict=True):
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
    policy.eval()


def exported(policy, path, prompts):
    facts = ExportFacts(
        n_future=K,
        heads="sequential",
        run="r",
        recipe_sha256="0" * 64,
        base="b",
        data_sha256=None,
        shared=True,
        serve="vllm",
    )
    vocabulary = {"<pad>": 0, "<eos>": 1, **{chr(40 + i): i for i in range(2, V)}}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], pad_token="<pad>", eos_token="<eos>")
    write_export(policy, tokenizer, path, facts=facts, recipe=b"", serve="vllm")
    return ServedModel(path=path, command="", policy=policy, prompts=prompts, eos_id=1)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_vllm_writes_our_texts_and_accepts_as_many_drafts_of_a_sequential_head(tied, tmp_path):
    policy = policy_of(0, tied=tied)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, V, (6,), generator=generator).tolist() for _ in range(PROMPTS)]
    texts = generate(policy, prompts, max_new_tokens=NEW_TOKENS + K, eos_id=-1).tokens
    untrained = exported(policy, tmp_path / "untrained", prompts)
    without = decoded_by_vllm(untrained, {"method": "mtp", "num_speculative_tokens": K - 1})
    learn(policy, prompts, texts)
    model = exported(policy, tmp_path / "trained", prompts)

    def drafted(text, drafts):
        with torch.no_grad():
            ids_BT = torch.tensor([text])
            states = policy.each_head_states(policy.trunk_states(ids_BT), ids_BT=ids_BT, position_BT=None)
            return [policy.unembedding(state_BTH)[0].argmax(dim=-1).tolist() for state_BTH in states][1:]

    counted = own_count(model, drafted)
    found = decoded_by_vllm(model, {"method": "mtp", "num_speculative_tokens": K - 1})
    print(f"\nvLLM: {found.verified} passes, accepted {found.accepted}; untrained: {without.accepted}")
    print(f"ours: {counted.verified} passes, accepted {counted.accepted}")

    assert found.tokens == without.tokens == counted.tokens
    assert found.verified == pytest.approx(counted.verified, rel=0.01)
    assert found.accepted == pytest.approx(counted.accepted, rel=0.01)
    assert without.accepted_per_pass < 0.3 * found.accepted_per_pass
