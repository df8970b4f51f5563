"""Whole runs on data with a known signal: one token decides the reward, or none does."""

import json
import random
import re
from collections import defaultdict

import pytest

WORD = "abcdefgh"


def write(folder, *, decides, problems):
    """Write responses of eight random letters and one mark, `!` or `?`.

    Args:
        folder: Folder for `train.jsonl`, `validation.jsonl` and `test.jsonl`.
        decides: Whether the mark decides if the response is correct; otherwise, the mark is random.
        problems: Number of problems in train and validation; each has a correct and an incorrect response.
    """
    chance = random.Random(0)
    for split, count in {**problems, "test": 2}.items():
        rows = []
        for number in range(count):
            for right in (True, False):
                letters = chance.choices(WORD, k=8)
                mark = right if decides else chance.random() < 0.5
                letters.insert(chance.randrange(9), "!" if mark else "?")
                row = {
                    "problem_id": f"{split}/{number}",
                    "instruction": "Write.",
                    "output": " ".join(letters),
                }
                rows.append(json.dumps({**row, "is_correct": right}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))


def recipe(folder, *, steps, validation):
    return {
        "model": {
            "n_future": 2,
            "micro": {"vocab_size": 512, "hidden_size": 16, "layers": 2, "attention_heads": 2},
        },
        "data": {
            "use": "core.jsonl",
            "options": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")},
        },
        "weighting": {"use": "verifiable.td_error"},
        "critic": {
            "use": "verifiable.value_head",
            "options": {"hidden_size": 32, "heads": 2, "layers": 2, "lm_loss_weight": 0.0},
            "allow_uninformative_critic": False,
            "train": {
                "steps": steps,
                "batch_size": 32,
                "learning_rate": 5e-3,
                "validate_every": steps,
                "validation_examples": validation,
            },
        },
    }


@pytest.mark.slow
def test_one_token_that_decides_is_found_and_carries_the_largest_td_error(tmp_path, wmtp_tiny_run):
    write(tmp_path, decides=True, problems={"train": 3200, "validation": 50})

    run = wmtp_tiny_run(recipe(tmp_path, steps=200, validation=100))

    assert run.metrics["critic_auc"] > 0.99
    assert run.metrics["critic_auc_low"] > 0.99
    assert run.metrics["critic_length_only_auc"] < 0.6
    responses = defaultdict(list)
    table = (run.folder / "evaluation" / "token_values.jsonl").read_text(encoding="utf-8")
    for line in map(json.loads, table.splitlines()):
        responses[line["example"]].append(line)
    at_the_mark = [
        max(tokens, key=lambda token: abs(token["change"]))["token"].strip() in {"!", "?"}
        for tokens in responses.values()
    ]
    assert len(at_the_mark) == 100
    assert sum(at_the_mark) / len(at_the_mark) > 0.95


@pytest.mark.slow
def test_without_a_signal_the_run_stops_before_the_policy_with_an_explanation(
    tmp_path, wmtp_tiny_run, capsys
):
    write(tmp_path, decides=False, problems={"train": 200, "validation": 800})

    with pytest.raises(AssertionError, match="the run failed"):
        wmtp_tiny_run(recipe(tmp_path, steps=30, validation=800))

    said = capsys.readouterr()
    (numbers,) = re.findall(
        r"critic `verifiable.value_head` is no better than a constant: "
        r"AUC ([\d.]+), 95 % interval \[([\d.]+), ([\d.]+)\]",
        said.err,
    )
    auc, low, high = map(float, numbers)
    assert abs(auc - 0.5) < 0.05
    assert low <= 0.5 <= high
    assert "set `critic.allow_uninformative_critic = true`" in said.err
    assert "policy: " not in said.out  # stage 2 never began
