"""Negative weights: component and recipe must both allow them; otherwise, a message names their origin."""

import json
from pathlib import Path

import pytest
import torch
from weighted_mtp_core.api import WmtpError
from weighted_mtp_core.cli import main
from weighted_mtp_core.plan import make_plan

PLUGIN = """
    import attrs
    from attrs import frozen
    from weighted_mtp_core.api import (
        Component, DatasetVersion, DataSource, Example, Signal, WeightingChoice, WeightingStrategy, Weights,
        hookimpl,
    )

    @frozen(kw_only=True)
    class Options:
        pass

    @frozen(kw_only=True)
    class Wrapping:
        of: tuple[WeightingChoice, ...]

    class Given(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.given_BT)

    class Flat(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.response_BT.float())

    class Careless(DataSource):
        # Gives negative weights whatever the context says.
        def examples(self, split):
            return [
                Example(
                    example_id=f"{split} {i}", problem_id=f"{split} {i}", prompt="a", response="b",
                    reward=1.0, weight=-0.5 if i == 3 else 1.0,
                )
                for i in range(8)
            ]

        def version(self):
            return DatasetVersion(name="careless", version="1", sha256="0" * 64)

    def wrap(options, context):
        return context.build_weighting(options.of[0])

    @hookimpl
    def wmtp_weighting_strategies():
        given = Component(
            name="given", summary="", options=Options, build=lambda options, context: Given(),
            needs=frozenset({Signal.GIVEN}), negative_weights=True,
        )
        yield given
        yield attrs.evolve(given, name="positive", negative_weights=False)
        yield Component(name="flat", summary="", options=Options, build=lambda options, context: Flat())
        yield Component(name="wrap", summary="", options=Wrapping, build=wrap, negative_weights=True)
        yield Component(name="unaware", summary="", options=Wrapping, build=wrap)

    @hookimpl
    def wmtp_data_sources():
        yield Component(
            name="careless", summary="", options=Options, build=lambda options, context: Careless()
        )
"""
WORDS = ["one", "two", "red", "sky"]


@pytest.fixture
def recipe(tmp_path, monkeypatch, install_plugin):
    """Write a recipe of a tiny run over rows; each problem has one response to learn and one to avoid."""
    install_plugin("signs", PLUGIN)
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"{i % 4}: ", "response": word, "problem_id": i, "weight": -0.2 if word == "sky" else 1}
        for i in range(40)
        for word in (WORDS[i % 3], "sky")
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("recipe.toml").write_text(
        'tracker = []\nrun.name = "x"\nweighting.use = "signs.given"\ndata.use = "core.jsonl"\n'
        'data.options.path = "rows.jsonl"\nmodel.n_future = 2\n'
        "model.micro = { hidden_size = 16, layers = 2, attention_heads = 2, vocab_size = 300 }\n"
        "train = { steps = 30, batch_size = 16, learning_rate = 3e-3, validate_every = 30 }\n"
    )

    def write(*settings):
        return ["recipe.toml", *(word for each in settings for word in ("--set", each))]

    return write


def test_without_permission_a_run_stops_and_names_row_and_file(recipe, capsys):
    assert main(["run", *recipe()]) == 2

    error = capsys.readouterr().err
    assert "rows.jsonl: 40 bad lines\n" in error
    assert "  line 2: `weight` -0.2 is negative: `loss.negative_weights = true` allows it\n" in error
    assert not list(Path("storage").rglob("best_model*"))


def test_with_permission_the_tokens_of_a_negative_weight_become_less_likely(recipe, tmp_path):
    from weighted_mtp_core.checkpointing.best_model import load_model
    from weighted_mtp_core.training.prepare import prepare

    assert main(["run", *recipe("loss.negative_weights=true")]) == 0
    trained = next(Path("storage/runs").rglob("best_model.pt"))
    plan = make_plan(Path("recipe.toml"), overrides=["loss.negative_weights=true"])
    prepared = prepare(plan, log=lambda _: None)

    before = _surprises(prepared)
    load_model(prepared.policy, trained)
    after = _surprises(prepared)

    assert after["sky"] > before["sky"]
    assert all(after[word] < before[word] for word in WORDS[:3])


def _surprises(prepared):
    """Return the cross-entropy of each response, summed over its tokens, after a prompt of the data."""
    found = {}
    prepared.policy.eval()
    for number, word in enumerate(WORDS):
        prompt = prepared.codec.encode_prompts([f"{number % 3}: "])[0]
        ids = torch.tensor([[*prompt, *prepared.codec.encode_part(word)]])
        with torch.no_grad():
            states = prepared.policy.trunk_states(ids)
            logits = prepared.policy.unembedding(prepared.policy.head_states(1, states))
        log_p = logits[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]
        found[word] = -float(log_p[len(prompt) - 1 :].sum())
    return found


def test_a_recipe_cannot_allow_them_for_a_weighting_that_does_not_declare_them(recipe, capsys):
    assert main(["check", *recipe("loss.negative_weights=true", "weighting.use=signs.flat")]) == 2

    assert (
        "loss.negative_weights: weighting `signs.flat` does not declare that its weights can be negative"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("outer", "inner", "allowed"),
    [
        ("wrap", ["given"], True),
        ("wrap", ["flat", "given"], True),
        ("wrap", ["flat"], False),
        ("unaware", ["given"], False),
    ],
)
def test_a_wrapping_weighting_declares_them_together_with_one_that_it_wraps(recipe, outer, inner, allowed):
    recipe()
    wrapped = ", ".join(f'{{ use = "signs.{each}" }}' for each in inner)
    table = f'weighting={{ use = "signs.{outer}", options = {{ of = [{wrapped}] }} }}'

    assert make_plan(Path("recipe.toml"), overrides=[table]).weighting.negative_weights == allowed


def test_weights_that_the_weighting_does_not_read_may_be_negative(recipe, capsys):
    assert main(["run", *recipe("weighting.use=signs.flat", "train.steps=1")]) == 0

    assert "the data give weights, which weighting `signs.flat` does not read" in capsys.readouterr().out


def test_a_data_source_that_does_not_check_is_caught(recipe, capsys):
    data = 'data={ use = "signs.careless" }'
    assert main(["run", *recipe(data)]) == 2

    assert (
        "example `train 3` of `signs.careless` has negative weights, which the recipe does not allow"
        in capsys.readouterr().err
    )


def test_a_weighting_that_does_not_declare_them_stops_the_run(recipe):
    from weighted_mtp_core.training.weight_checks import ValueCheck

    check = ValueCheck(label="weighting `w`")
    check.note(torch.tensor([-1.0]))
    with pytest.raises(WmtpError) as caught:
        check.raise_if_bad()

    assert caught.value.hint == (
        "that needs `negative_weights` in both the component and the recipe: `loss.negative_weights = true`"
    )


def test_a_preview_shows_them(recipe, capsys):
    assert main(["data", "preview", *recipe("loss.negative_weights=true"), "-n", "16"]) == 0

    assert " -0.2 " in capsys.readouterr().out
