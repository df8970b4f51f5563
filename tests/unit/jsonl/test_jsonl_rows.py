"""A row becomes an example with a prompt, a response and a problem; a faulty row is named."""

import pytest
from jsonl_source import PLAIN, ROW, build
from weighted_mtp_core.api import BuildContext, JsonlOptions, JsonlSource, WmtpError
from weighted_mtp_core.cli import main

TESTED = {
    **ROW,
    "tests": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "f",
}
OTHER = {**ROW, "instruction": "Halve a number."}


# ------------------------------------------------------------------ prompt and response


def test_a_row_becomes_an_alpaca_prompt_and_a_labelled_response(tmp_path, write):
    example = build(tmp_path, train=write(ROW)).examples("train")[0]

    assert example.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nDouble a number.\n\n### Response:\n"
    )
    assert (example.response, example.reward, example.problem_id) == (ROW["output"], 1.0, "double")


def test_an_input_has_a_place_of_its_own_in_the_prompt(tmp_path, write):
    example = build(tmp_path, train=write({**ROW, "input": "21"})).examples("train")[0]

    assert "### Input:\n21\n\n### Response:\n" in example.prompt
    assert "paired with an input" in example.prompt


def test_a_prompt_and_a_response_are_enough(tmp_path, write):
    (example,) = build(tmp_path, train=write(PLAIN)).examples("train")

    assert (example.prompt, example.response, example.reward) == ("2 + 3 = ", "5", 1.0)


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


def test_strings_and_numbers_of_the_metadata_reach_the_example(tmp_path, write):
    row = {**PLAIN, "metadata": {"level": 1, "by": "x", "nested": {"a": 1}, "none": None, "flag": True}}

    (example,) = build(tmp_path, train=write(row)).examples("train")

    assert example.metadata == {"level": 1, "by": "x"}


# ------------------------------------------------------------------ problems


def test_task_id_serves_for_problem_id(tmp_path, write):
    row = {key: value for key, value in ROW.items() if key != "problem_id"} | {"task_id": 7}

    assert build(tmp_path, train=write(row)).examples("train")[0].problem_id == "7"


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


def test_rows_with_one_prompt_are_one_problem_and_each_text_without_a_prompt_is_one(tmp_path, write):
    rows = [PLAIN, {**PLAIN, "response": "five"}, {"prompt": "", "response": "a"}]
    rows += [{"prompt": "", "response": "b"}]

    same, again, first, second = build(tmp_path, train=write(*rows)).examples("train")

    assert same.problem_id == again.problem_id
    assert len({same.problem_id, first.problem_id, second.problem_id}) == 3


# ------------------------------------------------------------------ templates


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


# ------------------------------------------------------------------ rows with tests


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
