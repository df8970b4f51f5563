"""A policy trained on chats answers turns that it has not seen, and stops."""

import json
from pathlib import Path

import pytest
from weighted_mtp_core.cli import main
from weighted_mtp_core.evaluation.finished_run import policy_loader
from weighted_mtp_core.generation.generate import generate

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' + m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}"
    "{% else %}{{ m.role[0] + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
FLAT_PLUGIN = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, WeightingStrategy, Weights, hookimpl

    @frozen(kw_only=True)
    class Options:
        pass

    class Flat(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.response_BT.float())

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(
            name="flat", summary="Flat.", options=Options, build=lambda options, context: Flat(),
        )
"""
HELD_OUT = 20


@pytest.fixture
def trained(chats, tmp_path, monkeypatch, install_plugin):
    """Train on all but the last 40 chats; 20 of these are for the test; return the policy and its codec."""
    install_plugin("flat", FLAT_PLUGIN)
    monkeypatch.chdir(tmp_path)
    for name, chosen in (
        ("train", chats[: -2 * HELD_OUT]),
        ("validation", chats[-2 * HELD_OUT : -HELD_OUT]),
        ("test", chats[-HELD_OUT:]),
    ):
        rows = [{"messages": messages, "problem_id": f"{name} {i}"} for i, messages in enumerate(chosen)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("recipe.toml").write_text(
        'tracker = []\nrun.name = "x"\nweighting.use = "flat"\ndata.use = "core.chat"\n'
        'data.options = { train = "train.jsonl", validation = "validation.jsonl", test = "test.jsonl" }\n'
        f"data.chat_template = {json.dumps(TEMPLATE)}\n"
        "model.n_future = 2\nmodel.micro = { hidden_size = 64, layers = 2, vocab_size = 400 }\n"
        "train = { steps = 150, batch_size = 16, learning_rate = 3e-3, validate_every = 75 }\n"
    )
    assert main(["run", "recipe.toml"]) == 0
    (folder,) = (file.parent for file in Path("storage/runs").rglob("run.json"))
    return policy_loader(folder, overrides=[]).load(lambda _: None)


def test_a_trained_model_answers_turns_it_has_not_seen_and_stops(trained, chats):
    policy, codec = trained
    asked, answers = [], []
    for messages in chats[-HELD_OUT:]:
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                text = codec.tokenizer.apply_chat_template(
                    messages[:i], tokenize=False, add_generation_prompt=True
                )
                asked.append(codec.encode_chat([(text, None)])[0])
                answers.append(message["content"])

    found = generate(policy, asked, max_new_tokens=30, eos_id=codec.eos_id)

    texts = codec.decode_completions(list(zip(asked, found.tokens, strict=True)))
    right = [text == answer for text, answer in zip(texts, answers, strict=True)]
    assert len(right) == 3 * HELD_OUT
    assert all(found.finished)
    assert sum(right) >= 0.95 * len(right)
