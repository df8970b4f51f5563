"""transformers drafts with the `sequential` heads of an exported model as this package does."""

import itertools

import pytest
import torch
from served_model import NEW_TOKENS, Drafting, trained_and_exported, with_random_tensors
from transformers import AutoModelForCausalLM
from weighted_mtp_core.generation.generate import generate

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def sequential(tmp_path_factory, storage):
    """The micro model of configs/baseline.toml with `sequential` heads, exported for transformers."""
    return trained_and_exported(
        "baseline.toml",
        tmp_path_factory.mktemp("sequential"),
        storage=storage,
        server="transformers",
        settings=['model.heads={kind="sequential"}'],
    )


def decoded_by_transformers(model, path):
    """Let transformers write the texts; the last pass of each text is not counted, as it may be cut."""
    loaded = AutoModelForCausalLM.from_pretrained(path)
    loaded._keys_to_ignore_on_load_unexpected = [r"^mtp\."]
    starts = []
    loaded.register_forward_pre_hook(
        lambda _, __, given: starts.append(int(given["position_ids"][0, 0])), with_kwargs=True
    )
    texts, verified, accepted = [], 0, [0] * (model.policy.n_future - 1)
    for prompt in model.prompts:
        starts.clear()
        ids = loaded.generate(
            torch.tensor([prompt]),
            use_mtp=True,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=model.eos_id,
            pad_token_id=model.eos_id,
        )
        texts.append(ids[0, len(prompt) : starts[-1] + 1].tolist())
        for start, end in itertools.pairwise(starts[1:]):
            verified += 1
            accepted = [count + (place < end - start - 1) for place, count in enumerate(accepted)]
    return Drafting(tokens=texts, verified=verified, accepted=accepted)


def decoded_by_ourselves(model, lengths):
    """Write texts of these lengths self-speculatively."""
    written = [
        generate(model.policy, [prompt], max_new_tokens=length, eos_id=-1, decoding="self_speculative")
        for prompt, length in zip(model.prompts, lengths, strict=True)
    ]
    accepted = [sum(each.accepted[place] for each in written) for place in range(model.policy.n_future - 1)]
    return Drafting(
        tokens=[list(each.tokens[0]) for each in written],
        verified=sum(each.verified for each in written),
        accepted=accepted,
    )


def test_transformers_writes_our_texts_and_accepts_as_many_drafts(sequential, tmp_path):
    found = decoded_by_transformers(sequential, sequential.path)
    counted = decoded_by_ourselves(sequential, map(len, found.tokens))
    others = with_random_tensors(sequential, tmp_path / "others", "mtp.layers.")
    random = decoded_by_transformers(sequential, others.path)
    print(f"\nours: {counted.verified} passes, accepted {counted.accepted}")
    print(f"transformers: {found.verified} passes, accepted {found.accepted}, {found.accepted_per_pass:.2f}")
    print(f"transformers, random layers: {random.verified} passes, accepted {random.accepted}")

    assert found.tokens == counted.tokens
    assert found.verified == pytest.approx(counted.verified, rel=0.01)
    assert found.accepted == pytest.approx(counted.accepted, rel=0.01)
    assert found.accepted_per_pass >= 2.0
    assert random.accepted_per_pass < 0.3 * found.accepted_per_pass
