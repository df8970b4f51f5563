"""Stage 1 ends with a judgement on validation responses that did not choose the checkpoint."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from weighted_mtp_core.data.halves import documents_of
from weighted_mtp_core.data.tokens import TokenSet
from weighted_mtp_core.testing.pytest_plugin import TINY

PLUGIN = """
    import torch
    from attrs import frozen
    from weighted_mtp_core.api import (
        Component, Critic, CriticLoss, DataSource, DatasetVersion, Example, Scores, Signal,
        WeightingStrategy, Weights, hookimpl,
    )

    @frozen(kw_only=True)
    class Options:
        pass

    @frozen(kw_only=True)
    class Known:
        problems: tuple[int, ...]
        trainable: bool = True

    @frozen(kw_only=True)
    class Count:
        problems: int

    class Remembers(Critic):
        # Gives the right value to responses to the problems that it knows, and 0.5 to all others.
        reads_policy = False

        def __init__(self, options):
            self.known = set(options.problems)
            self.trainable = options.trainable
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def score(self, batch, hidden_BTH):
            known_B = torch.tensor([int(name.split("/")[1]) in self.known for name in batch.example_ids])
            return Scores(value_BT=torch.where(known_B[:, None], batch.reward_BT, 0.5))

        def loss(self, batch, hidden_BTH):
            return CriticLoss(loss=(self.weight - 1).square())

        def parameters(self):
            return [self.weight] if self.trainable else []

        def state_dict(self):
            return {"weight": self.weight}

        def load_state_dict(self, state):
            self.weight.data.copy_(state["weight"])

    class Sums(DataSource):
        def __init__(self, options):
            self.count = options.problems

        def examples(self, split):
            return [
                Example(
                    example_id=f"{split}/{number}/{reward}", problem_id=f"{split} {number}",
                    prompt=f"Add {number}.", response=f"It is {number + reward}.", reward=reward,
                )
                for number in range(self.count) for reward in (1.0, 0.0)
            ]

        def problems(self, split):
            return []

        def verify(self, attempts):
            return []

        def version(self):
            return DatasetVersion(name="sums", version=str(self.count), sha256=f"{self.count:064x}")

    class Flat(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.response_BT.float())

    @hookimpl
    def wmtp_data_sources():
        yield Component(name="sums", summary="Sums.", options=Count, build=lambda o, c: Sums(o))

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(name="flat", summary="1.", options=Options, build=lambda o, c: Flat())

    @hookimpl
    def wmtp_critics():
        yield Component(name="remembers", summary="Remembers.", options=Known,
                        build=lambda o, c: Remembers(o), provides=frozenset({Signal.VALUE}))
"""


def halves(problems):
    """Return the problems that choose the checkpoint, and those that judge it."""
    tokens = TokenSet(
        ids_N=np.zeros(2 * problems, dtype=np.int32),
        start_D1=np.arange(2 * problems + 1),
        prompt_D=np.zeros(2 * problems, dtype=np.int32),
        reward_D=np.tile(np.float32([1, 0]), problems),
        problem_D=np.repeat(np.arange(problems), 2),
        example_ids=(),
    )
    return [set(tokens.problem_D[documents_of(half, tokens)].tolist()) for half in ("choosing", "judging")]


@pytest.fixture
def run(install_plugin, tmp_path, monkeypatch, wmtp_cli):
    """Return a function that runs a recipe with a critic that knows some problems; returns the exit code."""
    install_plugin("shown", PLUGIN)
    monkeypatch.chdir(tmp_path)

    def execute(*, problems, known, trainable=True, examples=200, **critic):
        table = {
            "use": "shown.remembers",
            "options": {"problems": sorted(known), "trainable": trainable},
            "train": {**TINY["train"], "validate_every": 1, "validation_examples": examples},
        }
        recipe = {
            **TINY,
            "data": {"use": "shown.sums", "options": {"problems": problems}},
            "weighting": {"use": "shown.flat"},
            "critic": {**table, **critic},
        }
        Path("recipe.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
        return wmtp_cli("run", "recipe.toml")

    return execute


def aucs():
    """Return (step, AUC) of the critic's points in the journal of the only run."""
    (journal,) = Path("storage/runs").rglob("metrics.jsonl")
    lines = map(json.loads, journal.read_text(encoding="utf-8").splitlines())
    return [
        (line["step"], line["metrics"]["critic_auc"])
        for line in lines
        if line["kind"] == "metrics" and "critic_auc" in line["metrics"]
    ]


def test_a_critic_that_is_right_only_where_it_was_chosen_is_refused(run, capsys):
    choosing, _ = halves(40)

    assert run(problems=40, known=choosing) == 1
    assert (
        "critic `shown.remembers` is no better than a constant: AUC 0.500, 95 % interval [0.500, 0.500], "
        "on held-out responses (a constant has 0.5, length alone "
    ) in capsys.readouterr().err
    assert aucs() == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 0.5)]


def test_the_judgement_is_printed_and_is_the_last_value_of_each_metric(run, capsys):
    _, judging = halves(40)

    assert run(problems=40, known=judging) == 0
    assert re.search(r"^critic +AUC 1\.000 \[1\.000, 1\.000\]", capsys.readouterr().out, re.MULTILINE)
    assert aucs() == [(0, 0.5), (1, 0.5), (2, 0.5), (3, 1.0)]


def test_a_frozen_critic_is_judged_on_the_same_responses(run):
    _, judging = halves(40)

    assert run(problems=40, known=judging, trainable=False) == 0
    assert aucs() == [(0, 1.0)]


def test_a_loaded_critic_is_judged_on_the_same_responses(run, tmp_path):
    _, judging = halves(40)
    assert run(problems=40, known=judging) == 0
    (checkpoint,) = tmp_path.glob("storage/runs/**/checkpoints/critic")
    kept = checkpoint.rename(tmp_path / "kept")
    (tmp_path / "storage" / "runs").rename(tmp_path / "earlier")

    assert run(problems=40, known=judging, checkpoint=str(kept)) == 0
    assert aucs() == [(0, 1.0)]


def test_too_few_problems_to_judge_are_refused_before_training(run, capsys):
    assert run(problems=11, known=range(11)) == 2
    assert capsys.readouterr().err.endswith(
        "error: the split `validation` has too few problems to tell a critic from a constant: 5 with a "
        "correct response and 5 with an incorrect one in the half for judging, and 6 of each are needed\n"
        "hint: add problems to the split, or set `critic.allow_uninformative_critic = true`\n"
    )
    assert aucs() == []


def test_twelve_problems_are_enough(run):
    assert run(problems=12, known=range(12)) == 0


def test_too_few_validation_examples_are_refused_with_that_mend(run, capsys):
    assert run(problems=40, known=range(40), examples=4) == 2
    assert (
        "hint: raise `critic.train.validation_examples`, or set `critic.allow_uninformative_critic = true`"
    ) in capsys.readouterr().err


def test_with_too_few_problems_an_allowed_critic_is_a_warning_and_called_uninformative(run, capsys):
    assert run(problems=4, known=range(4), allow_uninformative_critic=True) == 0

    said = capsys.readouterr().out
    assert (
        "WARNING: the split `validation` has too few problems to tell a critic from a constant: 2 with"
        in said
    )
    assert (
        "WARNING: critic `shown.remembers` cannot be told from a constant with so few problems: AUC 1.000"
    ) in said
    assert "UNINFORMATIVE: AUC 1.000" in said


def test_one_problem_cannot_both_choose_and_judge(run, capsys):
    assert run(problems=1, known=(), allow_uninformative_critic=True) == 2
    assert (
        "error: the split `validation` has too few problems: 0 with a correct response and 0 with an "
        "incorrect one in the half for judging, and a critic cannot be measured without both\n"
        "hint: add problems to the split\n"
    ) in capsys.readouterr().err
