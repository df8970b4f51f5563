"""Documents with known signals, laid out in batches as core would: packed or one a row, with any padding.

What a document holds depends on the document alone, so a test can move it about and compare.

Shape letters: B batch rows, T positions, K heads, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from attrs import field, frozen
from torch import Tensor, nn

from weighted_mtp_core.api import Batch, ModelContext, Signal, StepView

N_FUTURE = 3
VOCAB_SIZE = 32
HIDDEN_SIZE = 16


@frozen(kw_only=True, eq=False)
class Document:
    """One prompt with its response, and everything that can be known about its tokens.

    Attributes:
        ids_T: Token ids.
        response_T: True on response tokens.
        reward: Of the response.
        problem: Number of the problem that the response answers.
        value_T: V_t on every token.
        token_loss_TK: The policy's cross-entropies, 0 where no target is.
        token_entropy_TK: The entropies of the policy's predictions, 0 where no target is.
        reference_loss_T: Of each response token, 0 elsewhere.
    """

    ids_T: Tensor
    response_T: Tensor
    reward: float
    problem: int
    value_T: Tensor
    token_loss_TK: Tensor
    token_entropy_TK: Tensor
    reference_loss_T: Tensor

    @property
    def target_TK(self) -> Tensor:
        """True where the token k places after t is a response token, k from 1."""
        length = len(self.ids_T)
        columns = []
        for k in range(1, N_FUTURE + 1):
            column_T = torch.zeros(length, dtype=torch.bool)
            column_T[: max(length - k, 0)] = self.response_T[k:]
            columns.append(column_T)
        return torch.stack(columns, dim=1)


def make_document(number: int, *, prompt: int, response: int, reward: float, problem: int) -> Document:
    """Return a document of so many prompt and response tokens; `number` seeds its content."""
    generator = torch.Generator().manual_seed(number)
    length = prompt + response
    response_T = torch.arange(length) >= prompt
    draft = Document(
        ids_T=torch.randint(2, VOCAB_SIZE, (length,), generator=generator),
        response_T=response_T,
        reward=reward,
        problem=problem,
        value_T=torch.rand(length, generator=generator),
        token_loss_TK=torch.empty(0),
        token_entropy_TK=torch.empty(0),
        reference_loss_T=3 * torch.rand(length, generator=generator) * response_T,
    )
    loss_TK = 3 * torch.rand(length, N_FUTURE, generator=generator) * draft.target_TK
    entropy_TK = 3 * torch.rand(length, N_FUTURE, generator=generator) * draft.target_TK
    return Document(
        ids_T=draft.ids_T,
        response_T=response_T,
        reward=reward,
        problem=problem,
        value_T=draft.value_T,
        token_loss_TK=loss_TK,
        token_entropy_TK=entropy_TK,
        reference_loss_T=draft.reference_loss_T,
    )


FIRST = make_document(1, prompt=4, response=6, reward=1.0, problem=0)
SECOND = make_document(2, prompt=4, response=5, reward=0.0, problem=0)
THIRD = make_document(3, prompt=2, response=7, reward=1.0, problem=1)
FOURTH = make_document(4, prompt=3, response=4, reward=0.0, problem=1)
SINGLE_TOKEN = make_document(5, prompt=0, response=1, reward=1.0, problem=2)
NO_RESPONSE = make_document(6, prompt=5, response=0, reward=0.0, problem=3)


@frozen(kw_only=True, eq=False)
class Layout:
    """Documents in rows.

    Attributes:
        rows: The documents of each row, left to right.
        padding: Positions to the right of the longest row.
        filler: Seeds what stands on padding where nothing is promised (ids and values); None for zeros.
    """

    rows: Sequence[Sequence[Document]]
    padding: int = 2
    filler: int | None = field(default=None)

    @property
    def width(self) -> int:
        """T."""
        longest = max(sum(len(document.ids_T) for document in row) for row in self.rows)
        return longest + self.padding

    def batch(self) -> Batch:
        """Return the batch; rows 2i and 2i + 1 are what their documents are."""
        shape = (len(self.rows), self.width)
        ids_BT = torch.zeros(shape, dtype=torch.long)
        if self.filler is not None:
            generator = torch.Generator().manual_seed(self.filler)
            ids_BT = torch.randint(2, VOCAB_SIZE, shape, generator=generator)
        return Batch(
            ids_BT=self._spread(ids_BT, lambda document, _: document.ids_T),
            document_BT=self._spread(
                torch.full(shape, -1), lambda document, n: torch.full_like(document.ids_T, n)
            ),
            response_BT=self._spread(
                torch.zeros(shape, dtype=torch.bool), lambda document, _: document.response_T
            ),
            reward_BT=self._spread(
                torch.zeros(shape), lambda document, _: document.reward * document.response_T.float()
            ),
            group_BT=self._spread(
                torch.full(shape, -1), lambda document, _: torch.full_like(document.ids_T, document.problem)
            ),
            example_ids=tuple(f"row {b}" for b in range(len(self.rows))),
        )

    def view(self, signals: Collection[Signal], *, step: int = 0, training: bool = True) -> StepView:
        """Return what a weighting that declared `signals` sees."""
        batch = self.batch()
        shape = batch.ids_BT.shape
        value_BT = torch.zeros(shape)
        if self.filler is not None:
            value_BT = 50 * torch.randn(shape, generator=torch.Generator().manual_seed(self.filler))
        pairs = (*shape, N_FUTURE)
        known: Mapping[Signal, Tensor] = {
            Signal.REWARD: batch.reward_BT,
            Signal.GROUP: batch.group_BT,
            Signal.VALUE: self._spread(value_BT, lambda document, _: document.value_T),
            Signal.TOKEN_LOSS: self._spread(torch.zeros(pairs), lambda document, _: document.token_loss_TK),
            Signal.TOKEN_ENTROPY: self._spread(
                torch.zeros(pairs), lambda document, _: document.token_entropy_TK
            ),
            Signal.REFERENCE_LOSS: self._spread(
                torch.zeros(shape), lambda document, _: document.reference_loss_T
            ),
        }
        return StepView(
            ids_BT=batch.ids_BT,
            document_BT=batch.document_BT,
            response_BT=batch.response_BT,
            target_BTK=self._spread(
                torch.zeros(pairs, dtype=torch.bool), lambda document, _: document.target_TK
            ),
            n_future=N_FUTURE,
            step=step,
            training=training,
            reward_BT=known[Signal.REWARD] if Signal.REWARD in signals else None,
            group_BT=known[Signal.GROUP] if Signal.GROUP in signals else None,
            value_BT=known[Signal.VALUE] if Signal.VALUE in signals else None,
            token_loss_BTK=known[Signal.TOKEN_LOSS] if Signal.TOKEN_LOSS in signals else None,
            token_entropy_BTK=known[Signal.TOKEN_ENTROPY] if Signal.TOKEN_ENTROPY in signals else None,
            reference_loss_BT=known[Signal.REFERENCE_LOSS] if Signal.REFERENCE_LOSS in signals else None,
        )

    def cut(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield the part of a `[B, T, ...]` tensor that belongs to each document, row by row."""
        for b, _, start, document in self._places():
            yield tensor[b, start : start + len(document.ids_T)]

    def _places(self) -> Iterator[tuple[int, int, int, Document]]:
        for b, row in enumerate(self.rows):
            start = 0
            for n, document in enumerate(row):
                yield b, n, start, document
                start += len(document.ids_T)

    def _spread(self, tensor: Tensor, content: Callable[[Document, int], Tensor]) -> Tensor:
        """Write each document's content to its place in `tensor`."""
        for b, n, start, document in self._places():
            tensor[b, start : start + len(document.ids_T)] = content(document, n)
        return tensor


PACKED = Layout(rows=[[FIRST, FOURTH], [THIRD, SECOND]])
APART = Layout(rows=[[FIRST], [FOURTH], [THIRD], [SECOND]])
PAIRS = Layout(rows=[[FIRST], [SECOND], [THIRD], [FOURTH]])


def trunk_states(batch: Batch) -> Tensor:
    """Return states `[B, T, H]` of a stand-in for the policy's trunk: causal, apart by document, float32.

    A state is the token's embedding plus the mean of all embeddings up to it in its document.
    """
    generator = torch.Generator().manual_seed(0)
    token_VH, mean_VH = torch.randn(2, VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    length = batch.ids_BT.shape[1]
    sees_BTT = (batch.document_BT[:, :, None] == batch.document_BT[:, None, :]) & torch.ones(
        length, length, dtype=torch.bool
    ).tril()
    share_BTT = sees_BTT / sees_BTT.sum(dim=-1, keepdim=True)
    states_BTH: Tensor = token_VH[batch.ids_BT] + share_BTT @ mean_VH[batch.ids_BT]
    return states_BTH


class TrainableTrunk(nn.Module):
    """A stand-in for a trunk that a component trains: it begins as `trunk_states`."""

    hidden_size = HIDDEN_SIZE

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.eye(HIDDEN_SIZE))
        with torch.random.fork_rng(devices=[]):  # a layer is drawn from the global generator
            self.mean = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE, bias=False)
        nn.init.eye_(self.mean.weight)

    def forward(self, batch: Batch) -> Tensor:
        """Return states `[B, T, H]`, with gradients."""
        states_BTH = trunk_states(batch)
        mixed_BTH: Tensor = 0.5 * (states_BTH @ self.token + self.mean(states_BTH))
        return mixed_BTH


def next_token_losses(batch: Batch) -> Tensor:
    """Return losses `[B, T]` of a stand-in for a frozen language model, 0 off response tokens."""
    state_BTH = trunk_states(batch)
    generator = torch.Generator().manual_seed(1)
    log_p_BTV = torch.log_softmax(
        state_BTH @ torch.randn(HIDDEN_SIZE, VOCAB_SIZE, generator=generator), dim=-1
    )
    loss_BT = torch.zeros_like(batch.reward_BT)
    loss_BT[:, 1:] = -log_p_BTV[:, :-1].gather(-1, batch.ids_BT[:, 1:, None]).squeeze(-1)
    follows_BT = torch.zeros_like(batch.response_BT)
    follows_BT[:, 1:] = batch.document_BT[:, 1:] == batch.document_BT[:, :-1]
    return loss_BT.where(batch.response_BT & follows_BT, 0.0)


def model_context() -> ModelContext:
    """Return the stand-in's side of a `BuildContext`."""
    return ModelContext(
        n_future=N_FUTURE,
        hidden_size=HIDDEN_SIZE,
        vocab_size=VOCAB_SIZE,
        device=torch.device("cpu"),
        frozen_trunk=lambda: trunk_states,
        frozen_losses=lambda _: next_token_losses,
        trainable_trunk=lambda _: TrainableTrunk(),
    )
