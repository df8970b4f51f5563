"""The tokens in a report have the weights, values and losses that training uses."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast
from weighted_mtp_core.data.token_texts import token_texts
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.evaluation.finished_run import plan_of, prepare_finished
from weighted_mtp_core.report.shading import Shading, numbers
from weighted_mtp_core.report.token_measures import changes, choose_problems
from weighted_mtp_core.report.token_report import (
    ProblemTokens,
    Solution,
    Token,
    TokenReport,
    load_token_report,
    save_token_report,
)
from weighted_mtp_core.report.token_values import mean_over_heads, table_of_values
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS
from weighted_mtp_core.training.policy_learner import PolicyLearner

PLUGIN = """
    from attrs import frozen
    from weighted_mtp_core.api import (
        Component, Critic, DataSource, DatasetVersion, Example, Problem, Scores, Signal, Verdict, VerdictKind,
        WeightingStrategy, Weights, WmtpError, hookimpl,
    )

    @frozen(kw_only=True)
    class Options:
        pass

    class ByReward(WeightingStrategy):
        def weigh(self, view):
            assert view.value_BT is not None
            return Weights(weight=(1 + view.reward_BT) * view.response_BT)

    class OnlyItsSteps(WeightingStrategy):
        def weigh(self, view):
            if not view.training:
                raise WmtpError("step <2> was not recorded")
            return Weights(weight=view.response_BT.float())

    class Rising(Critic):
        reads_policy = False

        def score(self, batch, hidden_BTH):
            place_BT = (batch.document_BT >= 0).cumsum(dim=1)
            return Scores(value_BT=place_BT / 1024)

    class Sums(DataSource):
        def examples(self, split):
            problems = [problem.problem_id for problem in self.problems(split)]
            return [
                Example(
                    example_id=f"{each}/{reward}", problem_id=each, prompt=f"Add {each}.",
                    response=f"It is {number + reward}.", reward=reward,
                )
                for number, each in enumerate(problems) for reward in (1.0, 0.0)
            ]

        def problems(self, split):
            return [
                Problem(problem_id=f"{split} {number}", prompt="Add.", entry_point="f", tests="")
                for number in range(12)
            ]

        def verify(self, attempts):
            return [Verdict(kind=VerdictKind.WRONG) for _ in attempts]

        def version(self):
            return DatasetVersion(name="sums", version="1", sha256="0" * 64)

    @hookimpl
    def wmtp_data_sources():
        yield Component(name="sums", summary="Sums.", options=Options, build=lambda o, c: Sums())

    @hookimpl
    def wmtp_weighting_strategies():
        needs = frozenset({Signal.VALUE, Signal.REWARD})
        yield Component(
            name="by_reward", summary="1 + R.", options=Options, build=lambda o, c: ByReward(), needs=needs
        )

        yield Component(
            name="own", summary="Own steps.", options=Options, build=lambda o, c: OnlyItsSteps()
        )

    @hookimpl
    def wmtp_critics():
        yield Component(name="rising", summary="Rises.", options=Options, build=lambda o, c: Rising(),
                        provides=frozenset({Signal.VALUE}))
"""


@pytest.fixture
def run(wmtp_tiny_run, install_plugin):
    install_plugin("shown", PLUGIN)
    return wmtp_tiny_run(
        {
            "data": {"use": "shown.sums"},
            "weighting": {"use": "shown.by_reward"},
            "critic": {"use": "shown.rising", "allow_uninformative_critic": True, "train": {}},
        }
    ).folder


def test_a_run_keeps_what_its_page_shows_of_tokens(run):
    report = load_token_report(run)
    prepared = prepare_finished(run, plan_of(run), log=lambda _: None)

    for problem in report.problems:
        right, wrong = problem.solutions
        assert (right.reward, wrong.reward) == (1.0, 0.0)
        assert {token.weight for token in right.tokens} == {2.0}
        assert {token.weight for token in wrong.tokens} == {1.0}
        for solution in problem.solutions:
            check_solution(prepared, problem.prompt, solution)


def test_a_run_with_a_critic_keeps_a_table_of_values_and_weights(run):
    lines = [
        json.loads(line) for line in (run / "evaluation" / "token_values.jsonl").read_text().splitlines()
    ]
    examples = {example.example_id: example for example in prepared_source(run).examples("validation")}
    by_example = {}
    for line in lines:
        by_example.setdefault(line["example"], []).append(line)

    assert len(by_example) == 2 * 4  # `validation_examples` of the tiny run, from each half
    for name, tokens in by_example.items():
        example = examples[name]
        assert "".join(token["token"] for token in tokens).startswith(example.response)
        assert {token["reward"] for token in tokens} == {example.reward}
        assert {token["weight"] for token in tokens} == {1 + example.reward}
        assert [token["position"] for token in tokens] == list(range(len(tokens)))
        rises = [token["change"] for token in tokens[:-1]]
        assert rises == pytest.approx([1 / 1024] * len(rises), rel=1e-3)
        assert tokens[-1]["change"] == pytest.approx(
            example.reward - tokens[-1]["value"] + 1 / 1024, abs=1e-4
        )


def test_the_critic_scores_each_batch_of_the_table_once(run):
    prepared = prepare_finished(run, plan_of(run), log=lambda _: None)
    critic, scored = prepared.build_critic(), []
    compute = critic.score
    critic.score = lambda batch, hidden_BTH: scored.append(batch) or compute(batch, hidden_BTH)
    learner = PolicyLearner.make(prepared, critic, best=run / "unused.pt", distributed=SINGLE_PROCESS)
    batches = list(prepared.policy_validation())

    table = table_of_values(prepared, learner, critic=critic, batches=batches)

    assert table.count("\n") == sum(int(batch.response_BT.sum()) for batch in batches)
    assert [batch.example_ids for batch in scored] == [batch.example_ids for batch in batches]


def test_the_weight_of_a_token_is_the_mean_over_the_heads_that_predict_it():
    # Four tokens, the last three a response; head 2 has no source for the first of them.
    target_BTK = torch.tensor([[[True, True], [True, True], [True, False], [False, False]]])
    weight_BTK = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 0.0], [0.0, 0.0]]])

    found_BT = mean_over_heads(weight_BTK, target_BTK)

    torch.testing.assert_close(found_BT, torch.tensor([[math.nan, 1.0, 6.0, 11.5]]), equal_nan=True)


def test_the_page_of_a_run_finds_what_the_stages_measured(run):
    html = (run / "report.html").read_text()

    titles = ("Drafts that were kept, by head", "Verdicts on what the policy wrote", "Training loss")
    for title in (*titles, "Held-out loss of each head", "How even the weights are"):
        assert f'aria-label="{title}"' in html


def test_a_weighting_that_refuses_other_batches_costs_the_page_its_weights_and_no_run(
    wmtp_tiny_run, install_plugin
):
    install_plugin("shown", PLUGIN)
    run = wmtp_tiny_run({"weighting": {"use": "shown.own"}}).folder

    assert {token.weight for token in load_token_report(run).problems[0].solutions[0].tokens} == {None}
    assert "step &lt;2&gt; was not recorded" in (run / "report.html").read_text()
    assert "WARNING: the page shows no weights" in (run / "logs" / "training.log").read_text()


def prepared_source(run):
    return prepare_finished(run, plan_of(run), log=lambda _: None).source


def check_solution(prepared, prompt, solution):
    """Compare losses with one forward pass over the text, and values with the positions of the tokens."""
    tokenizer, policy = prepared.codec.tokenizer, prepared.policy
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response = "".join(token.text for token in solution.tokens).removesuffix(tokenizer.eos_token)
    ids = [*before, *tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert len(ids) == len(before) + len(solution.tokens)
    policy.eval()
    with torch.no_grad():
        hidden_BTH = policy.trunk_states(torch.tensor([ids]))
        expected_KTV = [policy.logits(k, hidden_BTH)[0].log_softmax(-1) for k in (1, 2)]
    for t, token in enumerate(solution.tokens, start=len(before)):
        for k, found in enumerate(token.loss_K, start=1):
            assert found == pytest.approx(-float(expected_KTV[k - 1][t - k, ids[t]]), rel=1e-3, abs=1e-5)
        assert token.value == pytest.approx((t + 1) / 1024, rel=1e-4)
        rise = 1 / 1024 if t + 1 < len(ids) else solution.reward - t / 1024
        assert token.change == pytest.approx(rise, rel=1e-3)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=20), st.integers(1, 19), st.floats(0, 1))
def test_td_errors_add_up_to_the_reward_less_the_value_of_the_prompt(values, prompt, reward):
    prompt = min(prompt, len(values) - 1)
    places = np.arange(prompt, len(values))

    found = changes(np.array(values), places, reward)

    assert np.isnan(found[:prompt]).all()
    assert found[prompt:].sum() == pytest.approx(reward - values[prompt - 1])
    assert found[prompt:-1] == pytest.approx(np.diff(values)[prompt - 1 : -1])


def test_the_first_token_of_a_text_without_prompt_has_no_td_error():
    found = changes(np.array([0.5, 0.25]), np.array([0, 1]), 1.0)

    assert math.isnan(found[0])
    assert found[1] == 0.5


def token_set(problems, rewards):
    count = len(problems)
    return TokenSet(
        ids_N=np.zeros(count, dtype=np.uint16),
        start_D1=np.arange(count + 1),
        prompt_D=np.zeros(count, dtype=np.int32),
        reward_D=np.array(rewards, dtype=np.float32),
        problem_D=np.array(problems),
        example_ids=[str(d) for d in range(count)],
    )


def test_problems_with_a_right_and_a_wrong_response_come_first_the_right_one_first():
    tokens = token_set([0, 1, 1, 1, 0, 2, 2], [1, 0, 0, 1, 1, 0, 1])

    assert choose_problems(tokens, at_most=9) == [(3, 1), (6, 5), (0,)]
    assert choose_problems(tokens, at_most=1) == [(3, 1)]


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes and a few merges: most characters beyond ASCII take several tokens."""
    bytes_and_merges = ByteLevelBPETokenizer()
    bytes_and_merges.train_from_iterator(["def f(x):\n    return x + 1\n" * 20], vocab_size=290)
    return PreTrainedTokenizerFast(tokenizer_object=bytes_and_merges._tokenizer)


@given(st.text(max_size=40))
def test_texts_of_tokens_add_up_to_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    texts = token_texts(tokenizer, ids)

    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them(tokenizer):
    assert token_texts(tokenizer, tokenizer("xπy")["input_ids"]) == ["x", "", "π", "y"]


def token(**known):
    return Token(**{"text": "x", "weight": 1.0, "loss_K": (0.5,), **known})


def report_of(*tokens):
    return TokenReport(
        step=1,
        rows=1,
        problems=(ProblemTokens(prompt="p", solutions=(Solution(name="s", reward=1.0, tokens=tokens),)),),
    )


def test_what_is_saved_is_what_is_read(tmp_path):
    report = report_of(
        token(weight=None, loss_K=(None, 0.25)), token(value=0.5, change=-0.125, weight_K=(1.0, None))
    )
    save_token_report(report, tmp_path)

    assert load_token_report(tmp_path) == report


def test_without_a_critic_there_is_no_switch_for_values():
    assert [each.key for each in Shading.of(report_of(token())).scales] == ["weight", "loss1"]


def test_shades_are_shares_of_the_largest():
    first, second = token(weight=2.0, value=0.5), token(weight=0.5, value=0.25)
    shading = Shading.of(report_of(first, second))

    assert shading.style(first) == "--weight:1.00;--value:0.50;--loss1:1.00"
    assert shading.style(second) == "--weight:0.25;--value:0.25;--loss1:1.00"


def test_negative_weights_are_shaded_by_size_and_marked():
    up, down, none = token(weight=0.5), token(weight=-1.0), token(weight=0.0)
    shading = Shading.of(report_of(up, down, none))
    (scale, *_) = shading.scales

    assert (scale.low, scale.high, scale.signed) == ("-1", "1", True)
    assert [scale.shade(each) for each in (up, down, none)] == [0.5, 1.0, 0.0]
    assert [shading.mark(each) for each in (up, down, none)] == ["", "negative", ""]


def test_falls_are_told_from_rises_by_a_mark_and_the_reward_at_the_end_does_not_pale_them():
    moves = [0.0] * 7 + [0.25, -0.125, 0.25, -0.75]
    tokens = [token(change=move) for move in moves]
    shading = Shading.of(report_of(*tokens))
    up, down, _, last = tokens[-4:]

    assert "--change:1.00" in shading.style(up)
    assert "--change:0.50" in shading.style(down)
    assert "--change:1.00" in shading.style(last)
    assert [shading.mark(each) for each in (up, down, last)] == ["up", "down", "down"]
    assert shading.mark(tokens[0]) == ""
    assert "TD error -0.750" in numbers(last)
