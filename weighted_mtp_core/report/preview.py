"""Shows what stage 2 trains on in its first step: tokens, targets, weights, and number of targets per head.

Nothing is trained. The policy, the batch and the weighting are the same as in step 0 of a run of the recipe.

Shape letters: B rows, T positions, K heads, L tokens of one document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from weighted_mtp_core.api import SPLITS, Critic, Split
from weighted_mtp_core.api.tensors import CRITIC_SIGNALS, align_weights, gather_by_target
from weighted_mtp_core.checkpointing.best_model import load_component
from weighted_mtp_core.data.batches import CollatedBatch
from weighted_mtp_core.data.token_texts import token_texts
from weighted_mtp_core.model.targets import batch_labels, target_mask
from weighted_mtp_core.plan import Plan
from weighted_mtp_core.report.token_report import Token
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS
from weighted_mtp_core.training.policy_learner import PolicyLearner
from weighted_mtp_core.training.prepare import Prepared, prepare


@frozen(kw_only=True)
class PreviewToken:
    """A token of a document.

    Attributes:
        id: Id of the token.
        text: The text that the token adds; it may be empty if the token ends inside a character.
        is_target: Whether a head learns to predict the token.
        weight_K: Weight of the token as a target of each head; None for a head that does not predict the
            token. The tuple is empty if the weights are unknown.
    """

    id: int
    text: str
    is_target: bool
    weight_K: tuple[float | None, ...]

    @property
    def weight(self) -> float | None:
        """Mean weight over the heads that predict the token; None if no head does or weights are unknown."""
        known = [weight for weight in self.weight_K if weight is not None]
        return sum(known) / len(known) if known else None

    def as_reported(self) -> Token:
        """Convert the token to the class of tokens that the report shades."""
        return Token(text=self.text, weight=self.weight, loss_K=(), is_target=self.is_target)


@frozen(kw_only=True)
class PreviewDocument:
    """A document of the batch: example id, tokens, and how many tokens each head learns to predict."""

    name: str
    tokens: tuple[PreviewToken, ...]
    pairs_K: tuple[int, ...]


@frozen(kw_only=True)
class Preview:
    """What the first step of stage 2 trains on.

    Attributes:
        facts: Lines about the data and the batch, as pairs (label, text).
        documents: The first documents of the batch.
        unweighed: The reason why there are no weights; empty if there are weights.
    """

    facts: tuple[tuple[str, str], ...]
    documents: tuple[PreviewDocument, ...]
    unweighed: str


@torch.no_grad()
def preview(plan: Plan, *, count: int, log: Callable[[str], None]) -> Preview:
    """Prepare a run, and describe the global batch of step 0 of stage 2.

    Args:
        plan: The plan of the run.
        count: Maximum number of documents to return.
        log: Receives the messages of stage 0.

    Raises:
        WmtpError: A run of this plan would fail before stage 2.
        RunFailedError: The weighting or the critic failed, or the weights are invalid.
    """
    torch.manual_seed(plan.recipe.run.seed)
    prepared = prepare(plan, log=log)
    prepared.tokenise()
    batch = prepared.policy_batches()(0)
    target_BTK = target_mask(batch_labels(batch, prepared.policy.n_future))
    weight_BTK, unweighed = _weights(prepared, batch, target_BTK)
    documents = _documents(prepared, batch, target_BTK, weight_BTK)
    pairs_K = target_BTK.sum(dim=(0, 1)).tolist()
    return Preview(
        facts=(
            *((split, _left_out(prepared, split)) for split in SPLITS),
            ("step 0", f"{sum(map(len, batch.names))} documents in {len(batch.ids_BT)} rows"),
            ("pairs", ", ".join(f"head {k}: {pairs}" for k, pairs in enumerate(pairs_K, start=1))),
            ("weights", unweighed or f"of `{plan.weighting.address}`"),
        ),
        documents=tuple(document for document, _ in zip(documents, range(count), strict=False)),
        unweighed=unweighed,
    )


def _left_out(prepared: Prepared, split: Split) -> str:
    """Return a text on how many responses of a split are used, and why other responses are left out."""
    tokens = prepared.policy_tokens(split)
    responses = len(prepared.source.examples(split))
    reasons = [
        (responses - tokens.examples, "not among those that the policy imitates"),
        (tokens.left_out, f"longer than {prepared.cache.max_tokens} tokens"),
    ]
    out = [f"{number} {reason}" for number, reason in reasons if number > 0]
    return f"{responses} responses, {len(tokens)} used" + (f"; left out: {', '.join(out)}" if out else "")


def _weights(prepared: Prepared, batch: CollatedBatch, target_BTK: Tensor) -> tuple[Tensor | None, str]:
    """Return the weights of step 0, `[B, T, K]` by source and head; or None, and the reason as text."""
    weighting, critic = prepared.plan.weighting, prepared.build_critic()
    if weighting.needs & {*CRITIC_SIGNALS} and not _is_ready(prepared, critic):
        return None, f"unknown, because `{weighting.address}` needs a critic that is trained in stage 1"
    learner = PolicyLearner.make(prepared, critic, best=Path(), distributed=SINGLE_PROCESS)
    weights = learner.weigh(batch, step=0, training=True)
    return align_weights(weights.weight, target_BTK), ""


def _is_ready(prepared: Prepared, critic: Critic | None) -> bool:
    """Return whether the critic can score without training; if the recipe names a checkpoint, load it."""
    table = prepared.plan.recipe.critic
    if critic is None or table is None:
        return False
    if table.checkpoint is not None:
        load_component(critic, Path(table.checkpoint))
        return True
    return not critic.trainable


def _documents(
    prepared: Prepared, batch: CollatedBatch, target_BTK: Tensor, weight_BTK: Tensor | None
) -> Iterator[PreviewDocument]:
    """Yield the documents of the batch, row by row."""
    by_target_BTK = gather_by_target(target_BTK.float(), target_BTK) > 0
    laid_BTK = None if weight_BTK is None else gather_by_target(weight_BTK, target_BTK)
    for b, names in enumerate(batch.names):
        for n, name in enumerate(names):
            inside_T = batch.document_BT[b] == n
            ids_L = batch.ids_BT[b, inside_T].tolist()
            is_target_LK = by_target_BTK[b, inside_T].tolist()
            weight_LK = [None] * len(ids_L) if laid_BTK is None else laid_BTK[b, inside_T].tolist()
            texts = token_texts(prepared.codec.tokenizer, ids_L)
            yield PreviewDocument(
                name=name,
                tokens=tuple(
                    PreviewToken(
                        id=id_, text=text, is_target=any(target_K), weight_K=_known(weight_K, target_K)
                    )
                    for id_, text, target_K, weight_K in zip(
                        ids_L, texts, is_target_LK, weight_LK, strict=True
                    )
                ),
                pairs_K=tuple(target_BTK[b, inside_T].sum(dim=0).tolist()),
            )


def _known(weight_K: list[float] | None, target_K: list[bool]) -> tuple[float | None, ...]:
    """Return the weight of each head that predicts a token, else None; empty if the weights are unknown."""
    if weight_K is None:
        return ()
    return tuple(weight if target else None for weight, target in zip(weight_K, target_K, strict=True))
