"""GSM8K in its public formats: the final number decides, in whatever form it is written."""

import json
from decimal import Decimal
from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.api import BuildContext, WmtpError

from weighted_mtp_code_tasks.gsm8k import Gsm8kOptions, build_gsm8k
from weighted_mtp_code_tasks.gsm8k.numbers import cut_answer, final_number

SPLITS = ("train", "validation", "test")


def public(number):
    return {
        "question": f"Ann has {number} pens and buys 1,000 more. How many has she?",
        "answer": f"She has {number}+1000=<<{number}+1000={number + 1000}>>.\n#### {number + 1000:,}",
    }


MODELS = {
    "question": "Bob owes $5 and pays $3. What has he?",
    "ground_truth": "5-3=<<5-3=2>>2, and he owes it.\nA: -2",
    "solutions": [
        {"model": "6b", "correct": True, "solution": "He has 2 dollars.\nA: 2"},
        {"model": "175b", "correct": False, "solution": "He is in debt: 3 - 5 = -2.00\nA: $-2."},
        {"model": "175b", "correct": False, "solution": "Nobody knows."},
    ],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def build(folder, **options):
    return build_gsm8k(Gsm8kOptions(**options), BuildContext(seed=0, storage=folder / "storage"))


@pytest.fixture
def data(tmp_path):
    train = write(tmp_path / "train.jsonl", [public(n) for n in range(40)])
    test = write(tmp_path / "test.jsonl", [public(n) for n in range(100, 105)])
    return build(tmp_path, train=train, test=test, validation_share=0.25)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### $18", "18"),
        ("#### -$18.50", "-18.5"),
        ("#### $-18.50", "-18.5"),
        ("#### \u22127", "-7"),
        ("#### 40%", "40"),
        ("#### 18.", "18"),
        ("#### .5", "0.5"),
        ("#### **18** dollars (of 20)", "18"),
        ("first 3\n#### 4\nno, \n#### 5", "5"),
        ("It is 12, so the answer is 18.", "18"),
        ("A: 18\n", "18"),
        ("3-2", "2"),
        ("from 10 to 2", "2"),
        ("1, 2,3", "3"),
        ("9 apples\n####", "9"),
        ("#### 18\n\nQuestion: Ann has 3.\nAnswer: 3\n#### 3", "18"),
        ("the profit is \\boxed{70{,}000}", "70000"),
        ("so $70\\,000$", "70000"),
        ("#### \\$1{,}250", "1250"),
        ("It is \\boxed{18}, 3 more than 15.", "18"),
        ("it costs 70\u202f000 or 70\u00a0000", "70000"),
        ("####\u00a018\u00a0km", "18"),
        ("12 345", "345"),
        ("he pays Rs.50", "50"),
        ("he pays USD50", "50"),
        ("US$50", "50"),
        ("-\u20b950", "-50"),
        ("CO2", None),
        ("#### Step 1: cost\n80 + 50 = 130.\n#### Step 2: profit\n200 - 130 = 70.\nSo 70.", "70"),
        ("#### 1. Cost\nIt costs 130.\n#### 2. Profit\n70 is left, so 70.", "70"),
        ("#### Step 2: 200 - 130 = 70", "70"),
        ("#### Final Answer\nThe answer is 72 of 100", "72"),
        ("#### **Answer:** 5", "5"),
        ("#### She has 18 of 20", "18"),
        ("#### 18\n#### Note\nNo more.", "18"),
        ("####\n18", "18"),
        ("", None),
        ("no idea", None),
        ("9" * 5000, None),
    ],
)
def test_the_final_number_is_read_as_a_person_would(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))
    assert final_number(cut_answer(text)) == final_number(text)


@given(
    value=st.decimals(min_value=-(10**9), max_value=10**9, places=2),
    form=st.sampled_from(
        ["{:.2f}", "{:,.2f}", "${:,.2f}", "{:,.2f}%", "{:,.2f}.", "**{:.2f}**", " {:.2f} km"]
    ),
    before=st.sampled_from(["", "The 3 dogs\n", "1 + 1 = 2 "]),
    mark=st.sampled_from(["#### ", "A: ", "answer is "]),
)
def test_a_number_survives_every_way_of_writing_it(value, form, before, mark):
    assert final_number(before + mark + form.format(value)) == value


@given(
    st.text()
    | st.lists(
        st.sampled_from(["####", " ", "\n", "Step", "1", "2.", "x", "Question:", "\\boxed{", "}"])
    ).map("".join)
)
def test_no_text_breaks_it_and_a_label_is_what_evaluation_finds(text):
    cut = cut_answer(text)

    assert final_number(cut) == final_number(text)
    assert cut_answer(cut) == cut


def test_the_public_test_file_tests_and_a_share_of_train_validates(data):
    counts = [len(data.problems(split)) for split in SPLITS]

    assert counts[2] == 5
    assert sum(counts) == 45
    assert 2 <= counts[1] <= 20


def test_model_solutions_are_judged_whatever_their_file_says(tmp_path):
    data = build(tmp_path, path=write(tmp_path / "models.jsonl", [MODELS]), validation_share=0, test_share=0)

    assert [example.reward for example in data.examples("train")] == [1.0, 0.0, 1.0, 0.0]


def test_a_completion_ends_with_its_answer(data):
    (problem, *_) = data.problems("test")
    right = problem.solution.rstrip().rpartition(" ")[2]
    texts = [f"So.\n#### {right}\n\nQuestion: What is 1?\nAnswer:\n#### 1", f"It is {right}.\n\nQuestion: 1?"]
    completions = [data.completion(problem, text) for text in texts]

    assert completions == [f"So.\n#### {right}\n", f"It is {right}."]
    assert all(verdict.passed for verdict in data.verify([(problem, text) for text in completions]))


def test_a_wrong_number_says_what_was_expected(data):
    (problem, *_) = data.problems("test")
    wrong, none = data.verify([(problem, "#### 7"), (problem, "who knows")])

    assert wrong.detail == f"expected {problem.tests}, got 7"
    assert none.detail == "there is no number"


def test_an_answer_without_a_number_is_a_bad_record(tmp_path):
    path = write(tmp_path / "bad.jsonl", [public(1), {"question": "Why?", "answer": "Because."}])
    with pytest.raises(WmtpError, match="1 bad line\n  line 2: the answer has no number"):
        build(tmp_path, path=path)


def test_all_records_of_a_question_count(tmp_path):
    question, answer = "How many?", "#### 2"
    rows = [
        {"question": question, "ground_truth": answer, "solutions": [{"solution": text}]}
        for text in ("2", "two, no, 3", "2")
    ]
    data = build(tmp_path, path=write(tmp_path / "a.jsonl", rows), validation_share=0, test_share=0)

    assert [(e.response, e.reward) for e in data.examples("train")] == [
        ("#### 2\n", 1.0),
        ("2\n", 1.0),
        ("two, no, 3\n", 0.0),
    ]


def test_a_question_with_two_answers_names_both_places(tmp_path):
    rows = [{"question": "How many?", "answer": f"#### {n}"} for n in (2, 3)]
    with pytest.raises(WmtpError, match=r"line 2: problem `gsm8k/\w+` has another `answer` in `.*` line 1"):
        build(tmp_path, path=write(tmp_path / "a.jsonl", rows))


def test_one_public_file_without_the_other_is_refused(tmp_path):
    with pytest.raises(WmtpError, match="name both public files"):
        build(tmp_path, train="train.jsonl")


def test_the_hub_needs_a_package_or_files(tmp_path):
    if find_spec("datasets") is not None:
        pytest.skip("the package `datasets` is installed")
    with pytest.raises(WmtpError, match="fetched from the hub, which needs the package `datasets`"):
        build(tmp_path)


def test_the_models_of_the_paper_are_judged_as_it_did(shared_data, tmp_path):
    path = shared_data / "gsm8k_model_solutions.jsonl"
    data = build(tmp_path, path=str(path))
    labels = {(e.problem_id, e.response): e.reward for split in SPLITS for e in data.examples(split)}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = {problem.prompt: problem.problem_id for split in SPLITS for problem in data.problems(split)}
    same = [
        labels[names[f"Question: {row['question'].strip()}\nAnswer:\n"], each["solution"].strip() + "\n"]
        == each["correct"]
        for row in rows
        for each in row["solutions"]
        if each["solution"].strip()
    ]

    assert len(rows) == 1319
    assert sum(same) >= 0.995 * len(same)
