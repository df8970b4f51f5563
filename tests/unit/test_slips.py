"""What a run measures at known mistakes: places of tokens, weights, falls of a critic's values."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from weighted_mtp_core.api import Batch
from weighted_mtp_core.evaluation.evaluate import evaluate
from weighted_mtp_core.evaluation.finished_run import plan_of, prepare_finished
from weighted_mtp_core.metrics.slips import PLACES, numbers_of_responses, places_of, slip_metrics
from weighted_mtp_core.metrics.weights import share_between_responses
from weighted_mtp_core.recipe.schema import EvaluateTable
from weighted_mtp_core.tracking.display import Display
from weighted_mtp_core.tracking.run_history import read_history

BEFORE, AT, BEHIND, NOWHERE = 0, 1, 2, -1


def batch(document_BT, response_BT, reward_BT, given_BT):
    document_BT, response_BT = torch.tensor(document_BT), torch.tensor(response_BT).bool()
    return Batch(
        ids_BT=torch.zeros_like(document_BT),
        document_BT=document_BT,
        response_BT=response_BT,
        reward_BT=torch.tensor(reward_BT) * response_BT,
        group_BT=document_BT,
        given_BT=torch.tensor(given_BT) * response_BT,
    )


def test_tokens_are_before_at_or_behind_the_first_slip_of_an_incorrect_response():
    found = places_of(
        batch(
            [[0, 0, 0, 0, 0, 0, 1, 1, 1, -1]],
            [[0, 1, 1, 1, 1, 1, 0, 1, 1, 0]],
            [[0.0] * 10],
            [[1.0, 1.0, 0.5, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]],
        )
    )

    first, second = [NOWHERE, BEFORE, AT, BEHIND, AT, BEHIND], [NOWHERE, AT, BEHIND]
    assert found.tolist() == [[*first, *second, NOWHERE]]


def test_correct_responses_and_responses_without_a_slip_have_no_places():
    found = places_of(
        batch(
            [[0, 0, 0, 1, 1, 1]], [[0, 1, 1, 0, 1, 1]], [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]], [[1, 1, 0, 1, 1, 1]]
        )
    )

    assert set(found.flatten().tolist()) == {NOWHERE}


@given(lengths=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=3))
def test_documents_have_numbers_of_their_own(lengths):
    width = max(1, *map(sum, lengths))
    document_BT = torch.tensor(
        [
            [d for d, length in enumerate(row) for _ in range(length)] + [-1] * (width - sum(row))
            for row in lengths
        ]
    )
    number_BT = numbers_of_responses(document_BT)
    documents = {
        (b, int(document_BT[b, t])): int(number_BT[b, t]) for b, t in (document_BT >= 0).nonzero().tolist()
    }

    assert len(set(documents.values())) == len(documents)
    assert all(0 <= number < document_BT.numel() for number in documents.values())


def test_the_weight_at_each_place_is_a_mean_over_pairs():
    weight_N = torch.tensor([1.0, 3.0, 0.5, 2.0, 9.0])
    found = slip_metrics(weight_N, torch.tensor([BEFORE, BEFORE, AT, BEHIND, NOWHERE]))

    assert {name: float(value) for name, value in found.items()} == {
        "weight_before_slip": 2.0,
        "weight_at_slip": 0.5,
        "weight_behind_slip": 2.0,
    }


def test_a_place_without_pairs_has_no_mean_weight():
    found = slip_metrics(torch.tensor([1.0]), torch.tensor([AT]))

    assert [bool(found[f"weight_{name}"].isnan()) for name in PLACES] == [True, False, True]


def test_places_and_weights_are_found_without_waiting_for_the_device():
    class NothingIsRead(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert "local_scalar" not in str(function), "a tensor was turned into a number"
            assert "nonzero" not in str(function), "a shape depends on values"
            return function(*args, **(kwargs or {}))

    one = batch([[0, 0, 0, -1]], [[0, 1, 1, 0]], [[0.0] * 4], [[1.0, 1.0, 0.0, 0.0]])

    with NothingIsRead():
        places_N = places_of(one).flatten()
        slip_metrics(torch.ones(4), places_N)
        share_between_responses(torch.ones(4), numbers_of_responses(one.document_BT).flatten(), count=4)


# ------------------------------------------------------------------ in a run

PLUGIN = """
    import torch
    from attrs import frozen
    from weighted_mtp_core.api import (
        Component, Critic, DataSource, DatasetVersion, Example, Problem, Scores, Signal, Verdict, VerdictKind,
        WeightingStrategy, Weights, hookimpl,
    )

    @frozen(kw_only=True)
    class Options:
        pass

    @frozen(kw_only=True)
    class SumsOptions:
        imitate_all: bool = True

    class Sums(DataSource):
        # A wrong response slips at its second token, of six with EOS.
        oracle_weights = True

        def __init__(self, options):
            self.imitate_all = options.imitate_all

        def examples(self, split):
            return [
                Example(
                    example_id=f"{problem.problem_id}/{reward}", problem_id=problem.problem_id,
                    prompt=problem.prompt, response="a b c d e" if reward else "a X c d e", reward=reward,
                    spans=() if reward else ((2, 3, 0.25),),
                )
                for problem in self.problems(split) for reward in (1.0, 0.0)
            ]

        def policy_examples(self, split):
            return [each for each in self.examples(split) if self.imitate_all or each.reward]

        def problems(self, split):
            return [
                Problem(problem_id=f"{split}{n}", prompt=f"{n}?", entry_point="", tests="")
                for n in range(20)
            ]

        def verify(self, attempts):
            return [
                Verdict(kind=VerdictKind.PASSED if sum(text.encode()) % 2 else VerdictKind.WRONG)
                for _, text in attempts
            ]

        def version(self):
            return DatasetVersion(name="sums", version="1", sha256="5" * 64)

    class Sees(Critic):
        # 1 up to the slip of a response, 0.25 from there on.
        reads_policy = False

        def score(self, batch, hidden_BTH):
            slips_BT = (batch.given_BT < 1) & batch.response_BT
            fell_BT = slips_BT.cumsum(dim=1) > 0
            return Scores(value_BT=torch.where(fell_BT, 0.25, 1.0))

    class Given(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.given_BT)

    class Flat(WeightingStrategy):
        def weigh(self, view):
            return Weights(weight=view.response_BT.float())

    @hookimpl
    def wmtp_data_sources():
        yield Component(name="sums", summary="Sums.", options=SumsOptions, build=lambda o, c: Sums(o))

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(name="flat", summary="1.", options=Options, build=lambda o, c: Flat())
        yield Component(name="given", summary="Given.", options=Options, build=lambda o, c: Given(),
                        needs=frozenset({Signal.GIVEN}))

    @hookimpl
    def wmtp_critics():
        yield Component(name="sees", summary="Sees.", options=Options, build=lambda o, c: Sees(),
                        provides=frozenset({Signal.VALUE}))
"""


@pytest.fixture
def run(wmtp_install_plugin, wmtp_tiny_run):
    """Run a weighting on responses with slips, with a critic that sees them."""
    wmtp_install_plugin("slips", PLUGIN)
    evaluation = {"problems": 0, "max_new_tokens": 4, "second_temperature": 1.0}
    train = {"steps": 2, "batch_size": 40, "warmup_steps": 1, "validation_examples": 40, "log_every": 1}
    return lambda weighting, **options: wmtp_tiny_run(
        {
            "weighting": {"use": f"slips.{weighting}"},
            "data": {"use": "slips.sums", "options": options},
            "critic": {"use": "slips.sees"},
            "evaluate": evaluation,
            "train": train,
        }
    )


def test_a_run_with_an_oracle_measures_weights_and_values_at_slips_and_is_marked(run):
    found = run("given")
    page = (found.folder / "report.html").read_text(encoding="utf-8")

    assert read_history(found.folder).tags["wmtp.oracle"] == "true"
    assert "they use knowledge that real data do not have" in page
    assert found.metrics["weight_before_slip"] == found.metrics["weight_behind_slip"] == 1.0
    assert found.metrics["weight_at_slip"] == 0.25
    assert found.metrics["critic_falls_at_slip"] == 1.0
    assert found.metrics["critic_constant_falls_at_slip"] == pytest.approx(1 / 6)
    assert [found.metrics[f"critic_auc{part}"] for part in ("", "_half", "_quarter")] == [1.0] * 3
    assert [found.metrics[f"critic_training_auc{part}"] for part in ("", "_half", "_quarter")] == [1.0] * 3
    for title in ("Weights around known mistakes", "largest fall of the value at a known mistake"):
        assert title in page
    for title in ("AUC after 25 % of the response", "AUC on training responses"):
        assert title in page


def test_pass_at_k_at_the_second_temperature_is_that_of_an_evaluation_at_this_temperature(run):
    found = run("flat")
    prepared = prepare_finished(found.folder, plan_of(found.folder), log=print)
    alone = EvaluateTable(problems=0, max_new_tokens=4, temperature=1.0)
    with Display() as display:
        again = evaluate(prepared, alone, display=display, folder=found.folder / "again")

    assert "wmtp.oracle" not in read_history(found.folder).tags
    assert found.metrics["weight_at_slip"] == 1.0
    assert found.metrics["weight_between_responses"] == 0.0
    assert found.metrics["pass_at_1_at_temperature_1"] == again.metrics["pass_at_1"]


def test_without_incorrect_responses_to_imitate_no_weights_at_slips_are_measured(run):
    found = run("flat", imitate_all=False)

    assert not [name for name in found.metrics if name.endswith("_slip") and name.startswith("weight")]
    assert found.metrics["critic_falls_at_slip"] == 1.0
