"""A team's own examples: one JSON object a line, checked line by line."""

import json

import pytest
from weighted_mtp_core.api import BuildContext, JsonlOptions, JsonlSource, WmtpError
from weighted_mtp_core.builtin.jsonl import build_jsonl
from weighted_mtp_core.cli import main

ROW = {
    "instruction": "Double a number.",
    "input": "",
    "output": "def f(n):\n    return 2 * n\n",
    "problem_id": "double",
    "is_correct": True,
    "metadata": {"level": 1},
}
TESTED = {
    **ROW,
    "tests": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "f",
}


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


def build(tmp_path, **options):
    context = BuildContext(seed=0, storage=tmp_path)
    return build_jsonl(JsonlOptions(**{key: str(value) for key, value in options.items()}), context)


def test_a_row_becomes_an_alpaca_prompt_and_a_labelled_response(tmp_path, write):
    example = build(tmp_path, train=write(ROW)).examples("train")[0]

    assert example.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nDouble a number.\n\n### Response:\n"
    )
    assert (example.response, example.reward, example.problem_id) == (ROW["output"], 1.0, "double")


def test_line_separators_inside_a_text_do_not_break_a_line(tmp_path, write):
    row = {**ROW, "output": "a\u2028b\x85c\n"}

    (example,) = build(tmp_path, train=write(json.dumps(row, ensure_ascii=False))).examples("train")

    assert example.response == "a\u2028b\x85c\n"


def test_an_input_has_a_place_of_its_own_in_the_prompt(tmp_path, write):
    example = build(tmp_path, train=write({**ROW, "input": "21"})).examples("train")[0]

    assert "### Input:\n21\n\n### Response:\n" in example.prompt
    assert "paired with an input" in example.prompt


def test_task_id_serves_for_problem_id(tmp_path, write):
    row = {key: value for key, value in ROW.items() if key != "problem_id"} | {"task_id": 7}

    assert build(tmp_path, train=write(row)).examples("train")[0].problem_id == "7"


def test_wrong_responses_have_no_reward_and_the_policy_does_not_imitate_them(tmp_path, write):
    data = build(tmp_path, train=write(ROW, {**ROW, "is_correct": False}))

    assert [example.reward for example in data.examples("train")] == [1.0, 0.0]
    assert len(data.policy_examples("train")) == 1


def test_every_bad_line_is_reported_with_its_number(tmp_path, write):
    path = write(
        ROW,
        "{not json",
        "[1]",
        {**ROW, "problem_id": None},
        {**ROW, "output": ""},
        {**ROW, "is_correct": "true"},
        "",
        {**ROW, "tests": "def check(candidate): pass"},
        {**ROW, "metadata": 3},
        {**ROW, "input": 4},
    )
    with pytest.raises(WmtpError) as caught:
        build(tmp_path, train=path)

    assert str(caught.value) == (
        f"{path}: 8 bad lines\n"
        "  line 2: not JSON: Expecting property name enclosed in double quotes at column 2\n"
        "  line 3: expected an object, got list\n"
        "  line 4: `problem_id` must be a string or a whole number, got null\n"
        "  line 5: needs `output`, a string that is not empty\n"
        "  line 6: needs `is_correct`, true or false\n"
        "  line 8: has `tests`, so it needs `entry_point`, the function that they call\n"
        "  line 9: `metadata` must be an object\n"
        "  line 10: `input` must be a string, got int"
    )


def test_after_twenty_bad_lines_the_rest_is_counted(tmp_path, write):
    with pytest.raises(WmtpError, match=r"25 bad lines[\s\S]*line 20: [^\n]*\n  and 5 more$"):
        build(tmp_path, train=write(*["{}"] * 25))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(WmtpError, match=r"there is no file `.*none\.jsonl`"):
        build(tmp_path, train=tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        ({"problem_id": 0.0}, "`problem_id` must be a string or a whole number, got 0.0"),
        ({"problem_id": None, "task_id": "t"}, "`problem_id` must be a string or a whole number, got null"),
        ({"task_id": True}, "`task_id` must be a string or a whole number, got true"),
        ({"problem_id": ""}, '`problem_id` must be a string or a whole number, got ""'),
    ],
)
def test_the_message_about_an_id_says_what_it_is(tmp_path, write, names, fault):
    row = {key: value for key, value in ROW.items() if key != "problem_id"} | names

    with pytest.raises(WmtpError) as caught:
        build(tmp_path, train=write(row))

    assert str(caught.value).endswith(f"line 1: {fault}")


OTHER = {**ROW, "instruction": "Halve a number."}


@pytest.mark.parametrize(
    ("other", "name"),
    [(OTHER, "prompt"), ({**ROW, "input": "5"}, "prompt"), ({**TESTED, "entry_point": "g"}, "tests")],
)
def test_one_id_with_two_problems_names_both_places(tmp_path, write, other, name):
    first = write(ROW, TESTED, name="a.jsonl")
    path = write(ROW, TESTED, other, name="a.jsonl")
    with pytest.raises(WmtpError) as caught:
        JsonlSource(JsonlOptions(path=str(path)), BuildContext(seed=0, storage=tmp_path))

    assert str(caught.value).endswith(
        f"a.jsonl: 1 bad line\n  line 3: problem `double` has another `{name}` in `{first}` "
        f"line {2 if name == 'tests' else 1}; give each problem an id of its own"
    )


def test_one_id_with_two_problems_is_found_between_files(tmp_path, write):
    with pytest.raises(WmtpError, match=r"line 1: problem `double` has another `prompt` in `.*a` line 1"):
        build(tmp_path, train=write(ROW, name="a"), test=write(OTHER, name="b"))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"output": "\\ud83d"}', "`output` contains half a character, `\\ud83d` without its pair"),
        ('{"a": [1, {"b": "\\udc00x"}]}', "`a[1].b` contains half a character, `\\udc00` without its pair"),
        (
            '{"problem_id": ' + "9" * 5000 + "}",
            "contains an integer of more than 4300 digits: write it as a string",
        ),
        ('{"a": ' + "[" * 99999 + "]" * 99999 + "}", "nested too deeply"),
        ('{"output": "\udcff"}', "not UTF-8: byte 0xff at column 13"),
    ],
    ids=["surrogate", "nested surrogate", "huge", "deep", "byte"],
)
def test_what_python_cannot_represent_is_named_by_line(tmp_path, line, fault):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n", encoding="utf-8", errors="surrogateescape")

    with pytest.raises(WmtpError) as caught:
        build(tmp_path, train=path)

    assert f"1 bad line\n  line 2: {fault}" in str(caught.value)


def test_a_pair_of_surrogates_is_one_character(tmp_path, write):
    (example,) = build(tmp_path, train=write({**ROW, "output": "\U0001f600"})).examples("train")

    assert example.response == "\U0001f600"


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-8-sig")

    assert len(build(tmp_path, train=path).examples("train")) == 1


@pytest.mark.parametrize(
    "text", [json.dumps([ROW, ROW]), json.dumps([ROW], indent=1), json.dumps(ROW, indent=1)]
)
def test_json_that_is_not_one_object_a_line_is_named(tmp_path, write, text):
    with pytest.raises(WmtpError, match="is JSON, but not one object per line") as caught:
        build(tmp_path, train=write(text))

    assert caught.value.hint.startswith("jq -c ")


def test_another_encoding_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROW), encoding="utf-16")

    with pytest.raises(WmtpError, match=r"cannot read `.*data\.jsonl`: it is UTF-16"):
        build(tmp_path, train=path)


@pytest.mark.parametrize("both", [True, False])
def test_either_one_file_or_a_file_a_split(tmp_path, write, both):
    options = {"path": write(ROW), "train": write(ROW)} if both else {}

    with pytest.raises(WmtpError, match="name either one file"):
        build(tmp_path, **options)


def test_one_file_is_split_by_problem_whatever_else_is_in_it(tmp_path, write):
    rows = [{**ROW, "problem_id": f"p{i // 2}"} for i in range(400)]
    data = build(tmp_path, path=write(*rows))
    names = {s: {e.problem_id for e in data.examples(s)} for s in ("train", "validation", "test")}

    assert sum(map(len, names.values())) == 200
    assert 10 <= len(names["test"]) <= 30

    fewer = build(tmp_path, path=write(*rows[:100], name="fewer.jsonl"))

    assert {e.problem_id for e in fewer.examples("test")} <= names["test"]


def test_a_problem_in_two_files_is_an_error(tmp_path, write):
    with pytest.raises(WmtpError, match="problem `double` is in both `train` and `test`"):
        build(tmp_path, train=write(ROW, name="a"), test=write(ROW, name="b"))


def test_the_version_moves_with_one_byte(tmp_path, write):
    before = build(tmp_path, train=write(ROW)).version()
    after = build(tmp_path, train=write({**ROW, "output": ROW["output"] + " "})).version()

    assert before.sha256 != after.sha256
    assert build(tmp_path, train=write(ROW)).version() == before


JUDGING_PLUGIN = """
    from weighted_mtp_core.api import Component, JsonlOptions, JsonlSource, hookimpl

    @hookimpl
    def wmtp_data_sources():
        yield Component(
            name="jsonl", summary="Judges rows.", options=JsonlOptions,
            build=lambda options, context: JsonlSource(options, context),
        )
"""


def test_rows_with_tests_are_refused_and_a_source_that_reads_them_is_named(tmp_path, write, install_plugin):
    install_plugin("judging", JUDGING_PLUGIN)

    with pytest.raises(WmtpError) as caught:
        build(tmp_path, train=write(ROW | {"problem_id": "untested"}, TESTED))

    assert str(caught.value) == "problem `double` has `tests`, but this data source runs no programs"
    assert "`judging.jsonl`" in caught.value.hint
    assert caught.value.hint.endswith("reads the same rows; or remove `tests` from the rows")


def test_without_such_a_source_the_error_says_what_to_look_for(tmp_path, write, monkeypatch):
    monkeypatch.setattr("weighted_mtp_core.plugins.selection.same_name", lambda *_: ["core.jsonl"])

    with pytest.raises(WmtpError) as caught:
        build(tmp_path, train=write(TESTED))

    assert caught.value.hint == "use a plugin that judges such rows; or remove `tests` from the rows"


def test_empty_tests_are_none(tmp_path, write):
    data = build(tmp_path, train=write({**ROW, "tests": "", "entry_point": None}))

    assert len(data.examples("train")) == 1
    assert data.problems("train") == ()


def test_other_sources_can_use_the_rows(tmp_path, write):
    options = JsonlOptions(test=str(write(TESTED)))

    (row,) = JsonlSource(options, BuildContext(seed=0, storage=tmp_path)).rows("test")

    assert (row.tests, row.entry_point, row.response) == (TESTED["tests"], "f", TESTED["output"])


# ---------------------------------------------------------------------- plain rows and templates

NOT_SPANS = "`weights` must be a list of [start, end, weight]; start and end count characters"
PLAIN = {"prompt": "2 + 3 = ", "response": "5"}


def test_a_prompt_and_a_response_are_enough(tmp_path, write):
    (example,) = build(tmp_path, train=write(PLAIN)).examples("train")

    assert (example.prompt, example.response, example.reward) == ("2 + 3 = ", "5", 1.0)


def test_rows_with_one_prompt_are_one_problem_and_each_text_without_a_prompt_is_one(tmp_path, write):
    rows = [PLAIN, {**PLAIN, "response": "five"}, {"prompt": "", "response": "a"}]
    rows += [{"prompt": "", "response": "b"}]

    same, again, first, second = build(tmp_path, train=write(*rows)).examples("train")

    assert same.problem_id == again.problem_id
    assert len({same.problem_id, first.problem_id, second.problem_id}) == 3


def test_all_rows_of_one_prompt_are_in_one_split(tmp_path, write):
    rows = [{"prompt": f"{i // 4}", "response": f"{i}"} for i in range(400)]
    data = build(tmp_path, path=write(*rows))
    prompts = [{each.prompt for each in data.examples(split)} for split in ("train", "validation", "test")]

    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 100
    assert min(map(len, prompts)) > 0


@pytest.mark.parametrize(("reward", "learnt"), [(0.75, 1), (0.25, 0), (1, 1), (0, 0)])
def test_a_reward_serves_for_a_verdict(tmp_path, write, reward, learnt):
    data = build(tmp_path, train=write({**PLAIN, "reward": reward}))

    assert [example.reward for example in data.examples("train")] == [reward]
    assert len(data.policy_examples("train")) == learnt


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [
        (
            {},
            {"is_correct": False},
            "has a verdict (`is_correct` or `reward`), but `{first}` line 1 has none",
        ),
        ({"reward": 1}, {}, "has no verdict (`is_correct` or `reward`), but `{first}` line 1 has one"),
    ],
)
def test_a_verdict_on_some_rows_only_is_refused_also_between_files(tmp_path, write, first, second, fault):
    one = write(PLAIN | first, name="a")
    files = {"train": one, "test": write({"prompt": "q", "response": "r", **second}, name="b")}

    with pytest.raises(WmtpError) as caught:
        build(tmp_path, **files)

    expected = f"{fault.format(first=one)}: give a verdict to all rows or to none"
    assert str(caught.value).endswith(f"line 1: {expected}")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({**PLAIN, "correct": False}, "has `correct`: did you mean `is_correct`?"),
        ({**PLAIN, "passed": False}, "has `passed`: did you mean `is_correct`?"),
        ({**PLAIN, "isCorrect": False}, "has `isCorrect`: did you mean `is_correct`?"),
        ({**PLAIN, "rewards": 0.5}, "has `rewards`: did you mean `reward`?"),
        ({**PLAIN, "reward": 0.5, "is_correct": True}, "has both `is_correct` and `reward`: remove one"),
        ({**PLAIN, "reward": 1.5}, "`reward` must be a number from 0 to 1, got 1.5"),
        ({**PLAIN, "reward": True}, "`reward` must be a number from 0 to 1, got true"),
        ({**PLAIN, "reward": float("nan")}, "`reward` must be a number from 0 to 1, got NaN"),
        ({**PLAIN, "is_correct": None}, "needs `is_correct`, true or false"),
        ({**PLAIN, "output": "5"}, "has both `response` and `output`: remove one"),
        (
            {**PLAIN, "instruction": "Add."},
            "has both `prompt` and `instruction`: choose with `data.options.template`",
        ),
        ({**PLAIN, "prompt": 3}, "`prompt` must be a string, got int"),
        ({"response": "5"}, "needs `prompt` or `instruction`, a string that is not empty"),
        ({"prompt": "q"}, "needs `response` or `output`, a string that is not empty"),
    ],
)
def test_what_is_wrong_with_a_plain_row_is_named(tmp_path, write, row, fault):
    path = write(row)

    with pytest.raises(WmtpError) as caught:
        build(tmp_path, train=path)

    assert str(caught.value) == f"{path}: 1 bad line\n  line 1: {fault}"


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        (
            {"weight": -0.5},
            "`weight` -0.5 is negative: `loss.negative_weights = true` allows it",
        ),
        ({"weight": float("inf")}, "`weight` must be a finite number, got inf"),
        ({"weight": float("nan")}, "`weight` must be a finite number, got nan"),
        ({"weight": True}, "`weight` must be a finite number, got True"),
        ({"weight": None}, "`weight` must be a finite number, got None"),
        ({"Weight": 0.5}, "has `Weight`: did you mean `weight`?"),
        (
            {"weights": [[0, 1]]},
            NOT_SPANS,
        ),
        (
            {"weights": {"0": 1}},
            NOT_SPANS,
        ),
        (
            {"weights": [[0, 0.5, 1.0]]},
            NOT_SPANS,
        ),
        ({"weights": [[0, 2, 0.5]]}, "the span [0, 2, 0.5] is not within the 1 characters of the text"),
        ({"weights": [[0, 0, 0.5]]}, "the span [0, 0, 0.5] is not within the 1 characters of the text"),
        ({"weights": [[-1, 1, 2]]}, "the span [-1, 1, 2] is not within the 1 characters of the text"),
        (
            {"weights": [[0, 1, -1.0]]},
            "the weight of the span [0, 1, -1.0] is negative: `loss.negative_weights = true` allows it",
        ),
        (
            {"response": "abcd", "weights": [[2, 4, 0.5], [0, 3, 1]]},
            "the span [2, 4, 0.5] begins before the end of another one",
        ),
    ],
)
def test_what_is_wrong_with_a_weight_is_named_with_file_and_line(tmp_path, write, keys, fault):
    path = write(PLAIN, PLAIN | keys)

    with pytest.raises(WmtpError) as caught:
        build(tmp_path, train=path)

    assert str(caught.value) == f"{path}: 1 bad line\n  line 2: {fault}"


def test_weights_of_a_row_and_of_spans_become_those_of_the_example(tmp_path, write):
    rows = [PLAIN, {**PLAIN, "weight": 2}, {**PLAIN, "response": "abc", "weights": [[1, 3, 0.5]]}]
    examples = build(tmp_path, train=write(*rows)).examples("train")

    assert [(each.weight, each.spans, each.has_weights) for each in examples] == [
        (None, None, False),
        (2.0, None, True),
        (None, ((1, 3, 0.5),), True),
    ]


def test_strings_and_numbers_of_the_metadata_reach_the_example(tmp_path, write):
    row = {**PLAIN, "metadata": {"level": 1, "by": "x", "nested": {"a": 1}, "none": None, "flag": True}}

    (example,) = build(tmp_path, train=write(row)).examples("train")

    assert example.metadata == {"level": 1, "by": "x"}


def test_keys_that_only_sound_like_a_verdict_are_allowed(tmp_path, write):
    row = {**PLAIN, "score": 1, "record": 2, "word": "w", "label": "x", "forward": True}

    assert len(build(tmp_path, train=write(row)).examples("train")) == 1


def test_a_template_lays_out_the_prompt_from_any_keys_of_the_rows(tmp_path, write):
    row = {"question": "2 + 3?", "hint": "{small}", "response": "5"}
    template = "Q: {question} ({hint}) {{as is}}\nA: "

    (example,) = build(tmp_path, train=write(row), template=template).examples("train")

    assert example.prompt == "Q: 2 + 3? ({small}) {as is}\nA: "


def test_a_template_replaces_the_alpaca_layout(tmp_path, write):
    (example,) = build(tmp_path, train=write(ROW), template="{instruction}\n").examples("train")

    assert example.prompt == "Double a number.\n"


def test_a_row_without_a_key_of_the_template_is_named(tmp_path, write):
    path = write({**PLAIN, "question": "q"}, PLAIN, {**PLAIN, "question": 3})

    with pytest.raises(WmtpError) as caught:
        build(tmp_path, train=path, template="{question}")

    assert str(caught.value) == (
        f"{path}: 2 bad lines\n"
        "  line 2: needs `question`, a string, for `data.options.template`\n"
        "  line 3: needs `question`, a string, for `data.options.template`"
    )


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{", "cannot be read: "),
        ("no key", "must name a key of the rows in braces, such as `{prompt}`"),
        ("{}", "must contain names of keys in braces, such as `{prompt}`, got `{}`"),
        ("{prompt.__class__}", "got `{prompt.__class__}`"),
        ("{prompt:>9}", "got `{prompt:>9}`"),
        ("{prompt!r}", "got `{prompt!r}`"),
        ("{prompt}{response}", "must not contain `{response}`: the prompt would give the answer away"),
        ("{prompt}{is_correct}", "must not contain `{is_correct}`: the prompt would give the answer away"),
    ],
)
def test_a_template_that_cannot_be_meant_is_refused(template, fault):
    with pytest.raises(ValueError, match=r"must|cannot be read") as caught:
        JsonlOptions(train="rows.jsonl", template=template)

    assert fault in str(caught.value)


def test_the_recipe_s_line_with_a_bad_template_is_named(tmp_path, capsys, install_plugin):
    install_plugin("example")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[run]\nname = "x"\n[weighting]\nuse = "example.flat"\n[data]\nuse = "core.jsonl"\n'
        'options = { train = "a.jsonl", template = "none" }\n'
    )

    assert main(["check", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "line 7, data.options.template: must name a key of the rows in braces" in error


CONSTANT_CRITIC = """
    from attrs import frozen
    from weighted_mtp_core.api import Component, Critic, Scores, Signal, WeightingStrategy, Weights, hookimpl

    @frozen(kw_only=True)
    class Options:
        pass

    class Half(Critic):
        reads_policy = False

        def score(self, batch, hidden_BTH):
            return Scores(value_BT=batch.response_BT * 0.5)

    class Valued(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.value_BT * view.response_BT)

    @hookimpl
    def wmtp_critics():
        yield Component(
            name="half", summary="Half.", options=Options, build=lambda options, context: Half(),
            provides=frozenset({Signal.VALUE}),
        )

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(
            name="valued", summary="Values.", options=Options, build=lambda options, context: Valued(),
            needs=frozenset({Signal.VALUE}),
        )
"""


def test_a_critic_of_values_refuses_rows_without_verdicts_before_anything_is_trained(
    tmp_path, write, install_plugin, capsys
):
    install_plugin("half", CONSTANT_CRITIC)
    write(*({"prompt": f"{i} + 1 = ", "response": f"{i + 1}"} for i in range(100)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'tracker = []\n[run]\nname = "x"\nstorage = "{tmp_path}/storage"\n'
        '[weighting]\nuse = "half"\n[critic]\nuse = "half"\n'
        '[data]\nuse = "core.jsonl"\noptions.path = "'
        f'{tmp_path}/data.jsonl"\n'
        "[model.micro]\nhidden_size = 16\nlayers = 2\nattention_heads = 2\n"
    )

    assert main(["run", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "critic `half.half` learns from correct and incorrect responses, but all" in error
    assert "responses of the split `train` are correct" in error
    assert not list(tmp_path.rglob("best_model.pt"))
