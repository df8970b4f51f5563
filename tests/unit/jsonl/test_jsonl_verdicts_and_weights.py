"""Verdicts, rewards and weights of rows reach the examples; what cannot be meant is refused."""

import pytest
from jsonl_source import PLAIN, ROW, build
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.cli import main

# ------------------------------------------------------------------ verdicts and rewards


def test_wrong_responses_have_no_reward_and_the_policy_does_not_imitate_them(tmp_path, write):
    data = build(tmp_path, train=write(ROW, {**ROW, "is_correct": False}))

    assert [example.reward for example in data.examples("train")] == [1.0, 0.0]
    assert len(data.policy_examples("train")) == 1


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


def test_keys_that_only_sound_like_a_verdict_are_allowed(tmp_path, write):
    row = {**PLAIN, "score": 1, "record": 2, "word": "w", "label": "x", "forward": True}

    assert len(build(tmp_path, train=write(row)).examples("train")) == 1


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


# ------------------------------------------------------------------ weights


NOT_SPANS = "`weights` must be a list of [start, end, weight]; start and end count characters"


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
