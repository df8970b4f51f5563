"""What a weighting is given: a view that maps between targets and pairs; texts, examples, metadata."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weighted_mtp_core.api import ModelContext, StepView, WmtpError
from weighted_mtp_core.model.targets import align_labels, target_mask


def view(document, response, *, n_future):
    document_BT = torch.tensor([document])
    response_BT = torch.tensor([response], dtype=torch.bool)
    ids_BT = torch.zeros_like(document_BT)
    labels_BTK = align_labels(ids_BT, document_BT=document_BT, response_BT=response_BT, n_future=n_future)
    return StepView(
        ids_BT=ids_BT,
        document_BT=document_BT,
        response_BT=response_BT,
        target_BTK=target_mask(labels_BTK),
        n_future=n_future,
        step=0,
        training=True,
    )


# A document of a prompt token and two response tokens; another of one prompt and one response token.
TWO = view([0, 0, 0, 1, 1], [0, 1, 1, 0, 1], n_future=2)


def test_what_belongs_to_targets_is_laid_onto_pairs():
    pairs_BTK = TWO.to_pairs(torch.tensor([[10.0, 11.0, 12.0, 13.0, 14.0]]))

    assert pairs_BTK.tolist() == [[[11, 12], [12, 0], [0, 0], [14, 0], [0, 0]]]


def test_what_belongs_to_pairs_is_laid_onto_targets():
    pairs_BTK = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, 9.0]]])

    # Token 1 is predicted by head 1 from 0; token 2 by head 1 from 1 and by head 2 from 0; token 4 from 3.
    assert TWO.to_targets(pairs_BTK).tolist() == [[[0, 0], [1, 0], [3, 2], [0, 0], [7, 0]]]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_there_and_back_keeps_what_counts(tokens, n_future, seed):
    tokens = sorted(tokens, key=lambda token: token[0])
    seen = view([document for document, _ in tokens], [answer for _, answer in tokens], n_future=n_future)
    x_BT = torch.rand(1, len(tokens), generator=torch.Generator().manual_seed(seed))

    back_BTK = seen.to_targets(seen.to_pairs(x_BT))
    reached_BTK = seen.to_targets(seen.target_BTK.float()) > 0

    assert torch.equal(back_BTK, x_BT[:, :, None].expand_as(back_BTK).where(reached_BTK, 0.0))


READING_PLUGIN = """
    import torch
    from attrs import frozen
    from weighted_mtp_core.api import Component, WeightingStrategy, Weights, hookimpl

    @frozen(kw_only=True)
    class Options:
        pass

    class Reading(WeightingStrategy):
        def __init__(self, model):
            self.model = model

        def weigh(self, view):
            score_B = torch.tensor([row[0]["score"] for row in view.metadata])
            for ids_T, response_T, (name,), (metadata,) in zip(
                view.ids_BT, view.response_BT, view.example_ids, view.metadata, strict=True
            ):
                text = self.model.decode(ids_T[response_T].tolist())
                assert text == metadata["answer"], (text, metadata)
                assert ids_T[response_T][-1] == self.model.eos_id
                assert self.model.encode(text) == ids_T[response_T][:-1].tolist()
                assert name.startswith(("train/", "validation/"))
            weight_BT = score_B[:, None] * view.response_BT
            return Weights(weight=weight_BT, metrics={"done": view.step / view.steps})

    @hookimpl
    def wmtp_weighting_strategies():
        yield Component(
            name="reading", summary="Reads.", options=Options,
            build=lambda options, context: Reading(context.model),
        )
"""


def test_a_weighting_of_a_run_gets_texts_examples_and_metadata(tmp_path, install_plugin, wmtp_tiny_run):
    install_plugin("reading", READING_PLUGIN)
    answers = [f"{i} ist {i * i} \N{SLIGHTLY SMILING FACE}" for i in range(60)]
    rows = [
        {"prompt": f"Nr. {i}: ", "response": each, "metadata": {"answer": each, "score": 0.5}}
        for i, each in enumerate(answers)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    run = wmtp_tiny_run(
        {
            "data": {"use": "core.jsonl", "options": {"path": str(tmp_path / "rows.jsonl")}},
            "weighting": {"use": "reading"},
        }
    )

    assert run.metrics["weight_mean"] == 0.5
    assert 0 < run.metrics["done"] < 1


@pytest.mark.parametrize("name", ["encode", "decode", "eos_id"])
def test_a_context_without_a_tokenizer_is_an_error_and_no_wrong_id(name):
    model = ModelContext(
        n_future=1, hidden_size=1, vocab_size=1, device=torch.device("cpu"), frozen_trunk=lambda: None
    )

    with pytest.raises(WmtpError, match="this context has no tokenizer"):
        model.eos_id if name == "eos_id" else getattr(model, name)("text")
