"""`data preview` shows what the first step of a run trains on, and trains nothing."""

import ast
import json
import re
from pathlib import Path

import pytest
from weighted_mtp_core.cli import main

SEEN_PLUGIN = """
    import json
    from pathlib import Path

    import torch
    from attrs import frozen
    from weighted_mtp_core.api import (
        Component, Critic, CriticLoss, Scores, Signal, WeightingStrategy, Weights, hookimpl
    )

    @frozen(kw_only=True)
    class Options:
        pass

    class ByLoss(WeightingStrategy):
        # Weights [B, T, K] that depend on the policy and on moving statistics; writes what step 0 gives.
        mean = 1.0

        def weigh(self, view):
            if view.training:
                self.mean = 0.5 * self.mean + 0.5 * float(view.token_loss_BTK.mean())
            weight_BTK = (self.mean + view.token_loss_BTK).where(view.target_BTK, 0.0)
            if view.training and view.step == 0:
                rows = {
                    "names": view.example_ids,
                    "ids": view.ids_BT.tolist(),
                    "document": view.document_BT.tolist(),
                    "weight": weight_BTK.tolist(),
                }
                Path("step_0.json").write_text(json.dumps(rows))
            return Weights(weight=weight_BTK)

    class Half(Critic):
        reads_policy = False

        def score(self, batch, hidden_BTH):
            return Scores(value_BT=batch.response_BT * 0.5)

    class Learnt(Half):
        trainable = True

    class Valued(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.value_BT * view.response_BT)

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(
            name="by_loss", summary="Losses.", options=Options, build=lambda options, context: ByLoss(),
            needs=frozenset({Signal.TOKEN_LOSS}),
        )
        yield Component(
            name="valued", summary="Values.", options=Options, build=lambda options, context: Valued(),
            needs=frozenset({Signal.VALUE}),
        )

    @hookimpl
    def wmtp_critics():
        for name, kind in (("half", Half), ("learnt", Learnt)):
            yield Component(
                name=name, summary="Values.", options=Options, provides=frozenset({Signal.VALUE}),
                build=lambda options, context, kind=kind: kind(),
            )
"""
FILES = ", ".join(f'{split} = "{split}.jsonl"' for split in ("train", "validation", "test"))
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ': ' + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
LINE = re.compile(r" *(\d+)  (yes|-) +(\S+(?: \S+)*)  +('.*'|\".*\")$")


def documents(text):
    """Return the tokens of each document of a printed preview: id, whether a target, weight, text."""
    found = {}
    for line in text.splitlines():
        if line.startswith("example "):
            tokens = found.setdefault(line.split()[1].removesuffix(":"), [])
        elif match := LINE.fullmatch(line):
            tokens.append((int(match[1]), match[2] == "yes", match[3], match[4]))
    return found


@pytest.fixture
def recipe(tmp_path, monkeypatch, install_plugin):
    """Write a recipe over some rows, with changes, into the current folder."""
    install_plugin("seen", SEEN_PLUGIN)
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"{i} + {i} = ", "response": f"{2 * i}, 답", "is_correct": bool(i % 4), "problem_id": i}
        for i in range(80)
    ]
    rows += [{**rows[1], "problem_id": f"long {i}", "response": "x y " * 99} for i in range(3)]
    for split in ("train", "validation", "test"):
        own = [{**row, "problem_id": f"{split} {row['problem_id']}"} for row in rows]
        Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))

    def write(**tables):
        settings = [
            'tracker = []\nrun = { name = "x" }',
            "model = { n_future = 3, micro = { hidden_size = 16, layers = 2, attention_heads = 2 } }",
            "train = { steps = 4, batch_size = 8, warmup_steps = 1 }",
            f'data = {{ use = "core.jsonl", max_tokens = 60, options = {{ {FILES} }} }}',
            'weighting = { use = "seen.by_loss" }',
        ]
        kept = [each for each in settings if each.split()[0] not in tables]
        text = "\n".join([*kept, *(f"{name} = {value}" for name, value in tables.items())])
        Path("recipe.toml").write_text(text)
        return "recipe.toml"

    return write


@pytest.fixture
def chat_recipe(recipe):
    """Write a recipe over chats of two turns, one in four with a system message."""

    def write():
        ready = recipe(
            data=f'{{ use = "core.chat", max_tokens = 60, options = {{ {FILES} }}, '
            f"chat_template = {json.dumps(TEMPLATE)} }}"
        )
        for split in ("train", "validation", "test"):
            rows = []
            for i in range(40):
                turns = [
                    ("user", f"{i}?"),
                    ("assistant", f"{i}, 답"),
                    ("user", "한 번 더"),
                    ("assistant", "y"),
                ]
                turns = [("system", "s")] * (i % 4 == 0) + turns
                messages = [{"role": role, "content": content} for role, content in turns]
                rows.append(json.dumps({"messages": messages, "problem_id": f"{split} {i}"}) + "\n")
            Path(f"{split}.jsonl").write_text("".join(rows))
        return ready

    return write


@pytest.mark.parametrize("packing", ["none", "documents"])
@pytest.mark.parametrize("kind", ["recipe", "chat_recipe"])
def test_it_agrees_with_step_0_of_the_run(request, capsys, packing, kind):
    ready = [request.getfixturevalue(kind)()]
    ready += ["--set", f"data.packing={packing}", "--set", "data.pack_tokens=64"]
    assert main(["run", *ready]) == 0
    seen = json.loads(Path("step_0.json").read_text())
    capsys.readouterr()

    assert main(["data", "preview", *ready, "-n", "99"]) == 0
    shown = documents(capsys.readouterr().out)

    expected = {
        name: [
            (token, weight_K)
            for t, token in enumerate(seen["ids"][b])
            if seen["document"][b][t] == n
            for weight_K in [_of_target(seen, b, t)]
        ]
        for b, names in enumerate(seen["names"])
        for n, name in enumerate(names)
    }
    assert list(shown) == list(expected)
    assert len(shown) >= 8
    for name, tokens in expected.items():
        assert [token for token, *_ in shown[name]] == [token for token, _ in tokens]
        for (_, is_target, weight, _), (_, weight_K) in zip(shown[name], tokens, strict=True):
            assert is_target == any(weight_K)
            if is_target:
                assert weight.split() == [f"{each:.4g}" if each else "-" for each in weight_K]


def _of_target(seen, b, t):
    """Return the weight of token t as the target of each head; 0 for heads of which it is no target."""
    return [
        seen["weight"][b][t - k][k - 1]
        if t >= k and seen["document"][b][t - k] == seen["document"][b][t]
        else 0
        for k in (1, 2, 3)
    ]


def test_the_texts_of_the_tokens_are_the_document(recipe, capsys):
    assert main(["data", "preview", recipe()]) == 0

    shown = documents(capsys.readouterr().out)
    assert len(shown) == 3
    for name, tokens in shown.items():
        row = json.loads(Path("train.jsonl").read_text().splitlines()[int(name.removeprefix("train/"))])
        text = "".join(ast.literal_eval(text) for *_, text in tokens)
        targets = "".join(ast.literal_eval(text) for _, is_target, _, text in tokens if is_target)
        assert text == f"{row['prompt']}{row['response']}<eos>"
        assert targets == f"{row['response']}<eos>"


def test_a_document_is_printed_as_text_before_its_tokens(recipe, capsys):
    Path("train.jsonl").write_text(json.dumps({"prompt": "a\n\n b", "response": "c\n"}) + "\n")
    for split in ("validation", "test"):
        Path(f"{split}.jsonl").write_text(json.dumps({"prompt": split, "response": "a"}) + "\n")

    assert main(["data", "preview", recipe(), "-n", "1"]) == 0

    (_, document) = capsys.readouterr().out.split("example train/0")
    assert document.splitlines()[1:5] == ["  | a", "  | ", "  |  bc", "  | <eos>"]
    assert document.splitlines()[5].split() == ["id", "target", "weight", "text"]


def test_it_counts_what_is_left_out_and_the_pairs_of_each_head(recipe, capsys):
    assert main(["data", "preview", recipe(), "-n", "99"]) == 0

    text = capsys.readouterr().out
    shown = documents(text)
    targets = sum(is_target for tokens in shown.values() for _, is_target, *_ in tokens)
    # 80 rows and 3 long ones; every fourth of the 80 is incorrect.
    left_out = "20 not among those that the policy imitates, 3 longer than 60 tokens"
    assert f"train       83 responses, 60 used; left out: {left_out}\n" in text
    assert "step 0      8 documents in 8 rows\n" in text
    assert (
        f"pairs       head 1: {targets}, head 2: {targets}, head 3: {targets}\n" in text
    )  # prompts are longer
    assert not Path("storage/runs").exists()


def test_a_critic_that_is_not_trained_gives_weights_and_another_none(recipe, capsys):
    ready = recipe(weighting='{ use = "seen.valued" }', critic='{ use = "seen.half" }')
    assert main(["data", "preview", ready]) == 0
    weights = {weight for tokens in documents(capsys.readouterr().out).values() for _, _, weight, _ in tokens}
    assert weights == {"-", "0.5"}

    trained = recipe(weighting='{ use = "seen.valued" }', critic='{ use = "seen.learnt" }')
    assert main(["data", "preview", trained]) == 0
    text = capsys.readouterr().out
    assert "unknown, because `seen.valued` needs a critic that is trained in stage 1" in text
    assert {weight for tokens in documents(text).values() for _, _, weight, _ in tokens} == {"-", "?"}


def test_a_page_shades_tokens_and_escapes_texts(recipe, capsys):
    Path("train.jsonl").write_text(json.dumps({"prompt": "<b>", "response": "a&b\nc"}) + "\n")
    for split in ("validation", "test"):
        Path(f"{split}.jsonl").write_text(json.dumps({"prompt": split, "response": "a"}) + "\n")

    assert main(["data", "preview", recipe(), "--html", "page.html"]) == 0

    assert capsys.readouterr().out == "page  page.html\n"
    page = Path("page.html").read_text(encoding="utf-8")
    assert "train/0" in page
    assert "--weight:1.00" in page
    assert "<b>" not in page
    assert "↵" in page
    assert re.search(r"(src|href)=\"(?!data:)", page) is None


@pytest.mark.parametrize("colour", [False, True])
def test_colours_are_for_terminals_only(recipe, capsys, monkeypatch, colour):
    if colour:
        monkeypatch.setenv("FORCE_COLOR", "1")

    assert main(["data", "preview", recipe()]) == 0

    assert ("\x1b[" in capsys.readouterr().out) == colour


def test_a_number_of_documents_below_one_is_refused(recipe, capsys):
    assert main(["data", "preview", recipe(), "-n", "0"]) == 2
    assert "`-n` must be at least 1, got 0" in capsys.readouterr().err
