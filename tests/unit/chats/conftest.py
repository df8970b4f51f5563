"""Chats to test with: 200 conversations, templates of several families, a tokenizer for them."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from weighted_mtp_core.api import Example
from weighted_mtp_core.cli import main
from weighted_mtp_core.data.texts import TextCodec
from weighted_mtp_core.data.tokens import open_tokens, tokenise

SMILE = "\N{SLIGHTLY SMILING FACE}"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>"]
TEMPLATES = {
    # ChatML, with and without marks; the turn's end is part of the marked text.
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}MARK{{ m.content }}"
        "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}"
        "{{ '<|im_end|>' }}END{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Like Llama 3's: BOS in the template, contents without blanks at their ends, tools in front.
    "headers": (
        "{{ bos_token }}{% if tools %}"
        "{{ '<|header|>tools<|/header|>' + (tools | tojson) + '<|eot|>' }}{% endif %}"
        "{% for m in messages %}{{ '<|header|>' + m.role + '<|/header|>\n\n' }}"
        "{% if m.role == 'assistant' %}MARK{{ m.content | trim }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|eot|>' }}END"
        "{% else %}{{ m.content | trim + '<|eot|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
    ),
    # Like Mistral's: instructions in brackets, EOS after each answer.
    "brackets": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}MARK{{ ' ' + m.content + eos_token }}END"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    # Like Qwen 3's: thoughts of earlier turns are dropped.
    "thinking": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
# The assistant's answer to each word. So the chats can be learned, and their texts are awkward for templates.
REPLIES = {
    "hello": "hi there",
    "서울은": f"수도 {SMILE}",
    "수도": "서울, 한국",
    SMILE: f"{SMILE}{SMILE}",
    "x\ny": "y\nx",
    "  two": "2  2",
    "é": "è",
    "how are you?": "fine.",
}


@pytest.fixture(scope="session")
def _backend():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["assistant user system hello there, how are you? 서울은 수도"] * 3, trainer)
    return backend


@pytest.fixture
def tokenizer(_backend):
    """Return a tokenizer with the template of a family, which may mark the turns; `change` is (old, new)."""

    def tokenizer(family, *, marks=False, change=("", "")):
        template = TEMPLATES.get(family)
        if template is not None:
            begin, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
            template = template.replace("MARK", begin).replace("END", end)
            template = template.replace(*change) if change[0] else template
        eos = "</s>" if family == "brackets" else "<|im_end|>"
        return PreTrainedTokenizerFast(
            tokenizer_object=_backend,
            bos_token="<s>",
            eos_token=eos,
            additional_special_tokens=[each for each in SPECIAL if each not in ("<s>", eos)],
            chat_template=template,
        )

    return tokenizer


@pytest.fixture(scope="session")
def chats():
    """200 chats of three turns each; two have tool calls."""
    choose = random.Random(0)
    made = []
    for i in range(200):
        messages = [{"role": "system", "content": "Be kind."}] if i % 3 == 0 else []
        for turn in range(3):
            *before, word = choose.choices(list(REPLIES), k=2)
            messages += [
                {"role": "user", "content": f"{turn}: {before[0]} {word}"},
                {"role": "assistant", "content": REPLIES[word]},
            ]
        if i in (10, 20):
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
            messages[-1:] = [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "content": "It is 2."},
            ]
        made.append(messages)
    return made


@pytest.fixture
def tokens(tmp_path):
    """Tokenise chats into a new folder."""

    def tokens(chosen, used, *, train_on="all", **keys):
        folder = tmp_path / f"tokens{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        examples = [
            Example(
                example_id=f"c{number}",
                problem_id=f"c{number}",
                prompt="p",
                response="r",
                reward=1.0,
                messages=tuple(each),
                **keys,
            )
            for number, each in enumerate(chosen)
        ]
        tokenise(examples, TextCodec(used), max_tokens=2000, folder=folder, train_on=train_on)
        return open_tokens(folder, sha256="")

    return tokens


@pytest.fixture
def documents(tokens):
    """Tokenise chats; return ids and targets of each document."""

    def documents(*args, **keys):
        made = tokens(*args, **keys)
        return [
            (made.ids_N[start:end].tolist(), made.target_N[start:end].tolist())
            for start, end in itertools.pairwise(made.start_D1.tolist())
        ]

    return documents


@pytest.fixture
def learned():
    """Return the texts of the runs of targets of a document."""

    def learned(used, document):
        ids, targets = document
        runs = re.finditer("1+", "".join(str(int(each)) for each in targets))
        return [used.decode(ids[run.start() : run.end()]) for run in runs]

    return learned


# For the tokenizer of a micro model, which has no control tokens but EOS.
MICRO_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A: ' + m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}"
    "{% else %}{{ m.role[0] + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)


@pytest.fixture
def recipe(chats, tmp_path, monkeypatch, install_plugin, flat_plugin):
    """Write a recipe for a micro model: 160 chats are for training, 20 for validation, 20 for the test."""
    install_plugin("flat", flat_plugin)
    monkeypatch.chdir(tmp_path)
    for name, part in (("train", slice(-40)), ("validation", slice(-40, -20)), ("test", slice(-20, None))):
        rows = [{"messages": messages, "problem_id": f"{name} {i}"} for i, messages in enumerate(chats[part])]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe(*, steps):
        Path("recipe.toml").write_text(
            'tracker = []\nrun.name = "x"\nweighting.use = "flat"\ndata.use = "core.chat"\n'
            'data.options = { train = "train.jsonl", validation = "validation.jsonl", test = "test.jsonl" }\n'
            f"data.chat_template = {json.dumps(MICRO_TEMPLATE)}\n"
            "model.n_future = 2\nmodel.micro = { hidden_size = 64, layers = 2, vocab_size = 400 }\n"
            f"train = {{ steps = {steps}, batch_size = 16, learning_rate = 3e-3 }}\n"
        )
        return "recipe.toml"

    return recipe


@pytest.fixture
def run(recipe):
    """Run the recipe and return the run's folder."""

    def run(*, steps):
        assert main(["run", recipe(steps=steps)]) == 0
        (folder,) = (file.parent for file in Path("storage/runs").rglob("run.json"))
        return folder

    return run
