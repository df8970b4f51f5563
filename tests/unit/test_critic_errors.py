"""A critic that fails during a run ends the run, and the message names its plugin."""

import json
from pathlib import Path

import pytest
import tomli_w
from weighted_mtp_core.testing.pytest_plugin import TINY

PLUGIN = """
    import torch
    from attrs import frozen
    from weighted_mtp_core.api import (
        Component, Critic, CriticLoss, Scores, Signal, WeightingStrategy, Weights, hookimpl,
    )

    @frozen(kw_only=True)
    class Nothing:
        pass

    @frozen(kw_only=True)
    class Where:
        method: str
        trainable: bool = False
        reads_policy: bool = False
        scores: bool = True

    class Fails(Critic):
        def __init__(self, options):
            self.method = options.method
            self.scores = options.scores
            self.trainable = options.trainable
            self.reads_policy = options.reads_policy
            self.cacheable = True
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def begin_step(self, step, *, steps):
            self.fail("begin_step")

        def score(self, batch, hidden_BTH):
            self.fail("score")
            if not self.scores:
                return Scores()
            return Scores(value_BT=batch.reward_BT, reference_loss_BT=batch.reward_BT)

        def loss(self, batch, hidden_BTH):
            self.fail("loss")
            return CriticLoss(loss=self.weight.square())

        def fail(self, method):
            if method == self.method:
                raise LookupError("no value for token 7")

        def parameters(self):
            return [self.weight] if self.trainable else []

        def state_dict(self):
            return {"weight": self.weight}

        def load_state_dict(self, state):
            self.weight.data.copy_(state["weight"])

    class Ones(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.response_BT.float())

    @hookimpl
    def wmtp_critics():
        for signal in (Signal.VALUE, Signal.REFERENCE_LOSS):
            yield Component(name=signal.value, summary="Fails.", options=Where,
                            build=lambda o, c: Fails(o), provides=frozenset({signal}))

    @hookimpl
    def wmtp_weighting_strategies():
        for signal in (Signal.VALUE, Signal.REFERENCE_LOSS):
            yield Component(name=signal.value, summary="1.", options=Nothing,
                            build=lambda o, c: Ones(), needs=frozenset({signal}))
"""


@pytest.fixture
def run(install_plugin, tmp_path, monkeypatch, wmtp_cli):
    """Return a function that executes a run with a critic that fails, and returns the exit code."""
    install_plugin("mine", PLUGIN)
    monkeypatch.chdir(tmp_path)

    def execute(signal, **options):
        rows = [
            json.dumps({"prompt": f"{number} ", "response": "yes" if passed else "no", "is_correct": passed})
            for number in range(40)
            for passed in (True, False)
        ]
        Path("rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
        recipe = {
            **TINY,
            "data": {"use": "core.jsonl", "options": {"path": "rows.jsonl"}},
            "weighting": {"use": f"mine.{signal}"},
            "critic": {
                "use": f"mine.{signal}",
                "options": options,
                "train": TINY["train"],
                "allow_uninformative_critic": True,
            },
        }
        Path("recipe.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
        return wmtp_cli("run", "recipe.toml")

    return execute


@pytest.mark.parametrize(
    ("signal", "method", "settings"),
    [
        ("value", "begin_step", {"trainable": True}),
        ("value", "loss", {"trainable": True}),
        ("value", "score", {"trainable": True}),  # in a validation of stage 1
        ("reference_loss", "score", {}),  # in stage 2, for the score cache
        ("reference_loss", "score", {"reads_policy": True}),  # in stage 2, without a cache
    ],
)
def test_a_critic_that_fails_ends_the_run_with_its_name(run, capsys, signal, method, settings):
    code = run(signal, method=method, **settings)

    assert code == 1
    error = capsys.readouterr().err
    cause = "LookupError: no value for token 7"
    assert f"critic `mine.{signal}` of plugin `mine` (wmtp-mine 0.3.0) failed: {cause}" in error


@pytest.mark.parametrize("reads_policy", [False, True])
def test_a_critic_without_scores_ends_the_run(run, capsys, reads_policy):
    code = run("reference_loss", method="none", scores=False, reads_policy=reads_policy)

    assert code == 1
    assert "failed: `score` returned no scores: all fields are None" in capsys.readouterr().err
