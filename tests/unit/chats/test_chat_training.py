"""A policy trained on chats answers turns that it has not seen, and stops."""

from weighted_mtp_core.evaluation.finished_run import policy_loader
from weighted_mtp_core.generation.generate import generate

HELD_OUT = 20


def test_a_trained_model_answers_turns_it_has_not_seen_and_stops(run, chats):
    policy, codec = policy_loader(run(steps=150), overrides=[]).load(lambda _: None)
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
