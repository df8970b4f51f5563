"""A report and a preview show whole conversations, with the assistant's turns as targets."""

import ast
import re

from weighted_mtp_core.cli import main
from weighted_mtp_core.evaluation.finished_run import policy_loader
from weighted_mtp_core.report.token_report import load_token_report


def test_the_report_shows_whole_conversations(run, chats):
    folder = run(steps=1)
    _, codec = policy_loader(folder, overrides=[]).load(lambda _: None)
    texts = {
        codec.tokenizer.apply_chat_template(messages, tokenize=False): messages for messages in chats[-40:-20]
    }

    report = load_token_report(folder)

    assert len(report.problems) == 6
    for problem in report.problems:
        (solution,) = problem.solutions
        shown = problem.prompt + "".join(token.text for token in solution.tokens)
        messages = texts[shown]
        learned = "".join(token.text for token in solution.tokens if token.is_target)
        own = [message["content"] for message in messages if message["role"] == "assistant"]
        assert learned == "".join(f"{content}<eos>" for content in own)
        for token in solution.tokens:
            assert (token.weight is None) == (not token.is_target)
            assert {loss is None for loss in token.loss_K} == {not token.is_target}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Grey text is not learned" in page
    assert '"t prompt ' in page


def test_a_preview_shows_a_whole_conversation_and_its_targets(recipe, chats, capsys):
    assert main(["data", "preview", recipe(steps=1), "-n", "1"]) == 0

    text = capsys.readouterr().out
    number = int(re.search(r"^example train/(\d+):", text, flags=re.MULTILINE)[1])
    shown = "\n".join(line.removeprefix("  | ") for line in text.splitlines() if line.startswith("  | "))
    rows = re.findall(r"^ *\d+  (yes|-) +(\S+)  +('.*'|\".*\")$", text, flags=re.MULTILINE)
    tokens = [(is_target == "yes", weight, ast.literal_eval(part)) for is_target, weight, part in rows]
    assert shown == "".join(part for _, _, part in tokens)
    assert all(message["content"] in shown for message in chats[number])
    own = [message["content"] for message in chats[number] if message["role"] == "assistant"]
    assert "".join(part for is_target, _, part in tokens if is_target) == "".join(
        f"{content}<eos>" for content in own
    )
    assert {(is_target, weight) for is_target, weight, _ in tokens} == {(True, "1"), (False, "-")}
