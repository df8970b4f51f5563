"""Make batches like core's from documents with known signals: packed or one per row, with any padding.

The content of a document does not depend on its position, so a test can move documents and compare results.

Shape letters: B batch rows, T positions, L tokens of one document, K heads, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from attrs import frozen
from torch import Tensor, nn

from weighted_mtp_core.api import Batch, ModelContext, Signal, StepView

N_FUTURE = 3
VOCAB_SIZE = 32
EOS_ID = 1
_TEXTS = ("", "", *"0123456789 abcdefghijklmnopqrs")
"""The text of each token id of a stand-in for a tokenizer: one character, or no text for 0 and EOS."""
HIDDEN_SIZE = 16
_VALUES = ("value_BT", "log_value_BT")

Document = Mapping[str, Tensor]
"""One prompt with its response: tensors `[L, ...]`, keyed by the field names of `Batch` and `StepView`.

The scalar tensor with the key `number` identifies the document.
"""


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_document(number: int, *, prompt: int, response: int, reward: float, problem: int) -> Document:
    """Return a document of `prompt` prompt tokens and `response` response tokens; `number` is its seed."""
    generator = _seeded(number)
    length = prompt + response
    response_L = torch.arange(length) >= prompt
    ids_L = torch.randint(2, VOCAB_SIZE, (length,), generator=generator)
    value_L = torch.rand(length, generator=generator)
    reference_loss_L = 3 * torch.rand(length, generator=generator) * response_L
    target_LK = torch.zeros(length, N_FUTURE, dtype=torch.bool)
    for k in range(1, N_FUTURE + 1):
        target_LK[: max(length - k, 0), k - 1] = response_L[k:]
    return {
        "ids_BT": ids_L,
        "response_BT": response_L,
        "reward_BT": reward * response_L.float(),
        "group_BT": torch.full_like(ids_L, problem),
        "value_BT": value_L,
        "log_value_BT": value_L.log(),
        "problem_BT": torch.full_like(ids_L, 7 * problem + 1),
        "target_BTK": target_LK,
        "token_loss_BTK": 3 * torch.rand(length, N_FUTURE, generator=generator) * target_LK,
        "token_entropy_BTK": 3 * torch.rand(length, N_FUTURE, generator=generator) * target_LK,
        "reference_loss_BT": reference_loss_L,
        "number": torch.tensor(number),
        "given_BT": 2 * torch.rand(length, generator=generator) * response_L,
    }


FIRST = make_document(1, prompt=4, response=6, reward=1.0, problem=0)
SECOND = make_document(2, prompt=4, response=5, reward=0.0, problem=0)
THIRD = make_document(3, prompt=2, response=7, reward=1.0, problem=1)
FOURTH = make_document(4, prompt=3, response=4, reward=0.0, problem=1)
SINGLE_TOKEN = make_document(5, prompt=0, response=1, reward=1.0, problem=2)
NO_RESPONSE = make_document(6, prompt=5, response=0, reward=0.0, problem=3)


@frozen(kw_only=True, eq=False)
class Layout:
    """An arrangement of documents in the rows of a batch.

    Attributes:
        rows: The documents of each row, left to right.
        padding: Number of padding positions to the right of the longest row.
        filler: Seed of random token ids and values on padding; None sets these ids and values to 0.
    """

    rows: Sequence[Sequence[Document]]
    padding: int = 2
    filler: int | None = None

    def batch(self) -> Batch:
        """Return the documents as a batch like those that core creates."""
        ids_BT = self._lay("ids_BT")
        if self.filler is not None:
            ids_BT = torch.randint(2, VOCAB_SIZE, ids_BT.shape, generator=_seeded(self.filler))
        document_BT, position_BT = torch.full_like(ids_BT, -1), torch.zeros_like(ids_BT)
        for b, n, position, document in self._positions():
            document_BT[b, position] = n
            position_BT[b, position] = torch.arange(len(document["ids_BT"]))
        return Batch(
            ids_BT=self._lay("ids_BT", ids_BT),
            document_BT=document_BT,
            response_BT=self._lay("response_BT"),
            reward_BT=self._lay("reward_BT"),
            group_BT=self._lay("group_BT", torch.full_like(ids_BT, -1)),
            example_ids=tuple(f"row {b}" for b in range(len(self.rows))),
            position_BT=position_BT if any(len(row) > 1 for row in self.rows) else None,
            given_BT=self._lay("given_BT"),
            problem_BT=self._lay("problem_BT"),
        )

    def view(self, signals: Collection[Signal], *, step: int = 0, training: bool = True) -> StepView:
        """Return the view that a weighting receives if it needs `signals`."""
        batch = self.batch()
        known = {"reward_BT": batch.reward_BT, "group_BT": batch.group_BT, "given_BT": batch.given_BT}
        for name in (*_VALUES, "token_loss_BTK", "token_entropy_BTK", "reference_loss_BT"):
            known[name] = self._lay(name)
        if self.filler is not None:
            noise_BT = 50 * torch.randn(batch.ids_BT.shape, generator=_seeded(self.filler))
            known |= {name: self._lay(name, noise_BT.clone()) for name in _VALUES}
        needed = {signal.value for signal in signals}
        return StepView(
            ids_BT=batch.ids_BT,
            document_BT=batch.document_BT,
            response_BT=batch.response_BT,
            target_BTK=self._lay("target_BTK"),
            n_future=N_FUTURE,
            step=step,
            training=training,
            steps=10,
            example_ids=tuple(tuple(f"example {_number(each)}" for each in row) for row in self.rows),
            metadata=tuple(tuple({"score": _number(each) / 8} for each in row) for row in self.rows),
            **{name: tensor for name, tensor in known.items() if name.rpartition("_")[0] in needed},
        )

    def cut(self, tensor: Tensor) -> Iterator[Tensor]:
        """Yield each document's slice of a `[B, T, ...]` tensor, row by row."""
        for b, _, position, _ in self._positions():
            yield tensor[b, position]

    def _positions(self) -> Iterator[tuple[int, int, slice, Document]]:
        """Yield (row, index of the document in the row, its positions, document) for each document."""
        for b, row in enumerate(self.rows):
            start = 0
            for n, document in enumerate(row):
                end = start + len(document["ids_BT"])
                yield b, n, slice(start, end), document
                start = end

    def _lay(self, name: str, tensor: Tensor | None = None) -> Tensor:
        """Write the tensor `name` of every document into `tensor`, `[B, T, ...]`; the default is zeros."""
        if tensor is None:
            content = self.rows[0][0][name]
            width = max(sum(len(document["ids_BT"]) for document in row) for row in self.rows) + self.padding
            tensor = content.new_zeros(len(self.rows), width, *content.shape[1:])
        for b, _, position, document in self._positions():
            tensor[b, position] = document[name]
        return tensor


def _number(document: Document) -> int:
    return int(document["number"])


def encode(text: str) -> list[int]:
    """Return the token ids of a text that consists of digits, spaces and letters from a to s."""
    return [_TEXTS.index(letter, EOS_ID + 1) for letter in text]


def decode(ids: Sequence[int]) -> str:
    """Return the text of a sequence of token ids."""
    return "".join(_TEXTS[int(each)] for each in ids)


PACKED = Layout(rows=[[FIRST, FOURTH], [THIRD, SECOND]])
APART = Layout(rows=[[FIRST], [FOURTH], [THIRD], [SECOND]])
PAIRS = Layout(rows=[[FIRST], [SECOND], [THIRD], [FOURTH]])
OTHER = Layout(rows=[[FIRST], [FOURTH]])
EMPTY = Layout(rows=[[NO_RESPONSE], [NO_RESPONSE]])
SINGLE = Layout(rows=[[SINGLE_TOKEN]], padding=0)


def trunk_states(batch: Batch) -> Tensor:
    """Return float32 states `[B, T, H]` of a stand-in for the policy's trunk.

    The state of a token is its embedding plus a mean. The mean is taken over the document's tokens up to and
    including this token, with embeddings from a second table.
    """
    generator = _seeded(0)
    token_VH, mean_VH = torch.randn(2, VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    length = batch.ids_BT.shape[1]
    sees_BTT = (batch.document_BT[:, :, None] == batch.document_BT[:, None, :]) & torch.ones(
        length, length, dtype=torch.bool
    ).tril()
    share_BTT = sees_BTT / sees_BTT.sum(dim=-1, keepdim=True)
    states_BTH: Tensor = token_VH[batch.ids_BT] + share_BTT @ mean_VH[batch.ids_BT]
    return states_BTH


class TrainableTrunk(nn.Module):
    """A stand-in for a trainable trunk, which returns the same states as `trunk_states` before training."""

    hidden_size = HIDDEN_SIZE

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.eye(HIDDEN_SIZE))
        with torch.random.fork_rng(devices=[]):  # because layers are initialised from the global generator
            self.mean = nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE, bias=False)
        nn.init.eye_(self.mean.weight)

    def forward(self, batch: Batch) -> Tensor:
        """Return states `[B, T, H]`, with gradients."""
        states_BTH = trunk_states(batch)
        mixed_BTH: Tensor = 0.5 * (states_BTH @ self.token + self.mean(states_BTH))
        return mixed_BTH.float()


def next_token_losses(batch: Batch) -> Tensor:
    """Return losses `[B, T]` of a stand-in for a frozen language model, 0 except on response tokens."""
    return _losses(batch, trunk_states(batch))


class TrainableLosses(TrainableTrunk):
    """A stand-in for a trainable language model, equal to `next_token_losses` before training."""

    def forward(self, batch: Batch) -> Tensor:
        """Return losses `[B, T]`, with gradients."""
        return _losses(batch, super().forward(batch))


def _losses(batch: Batch, state_BTH: Tensor) -> Tensor:
    generator = _seeded(1)
    logits_BTV = state_BTH @ torch.randn(HIDDEN_SIZE, VOCAB_SIZE, generator=generator)
    log_p_BTV = torch.log_softmax(logits_BTV.float(), dim=-1)
    loss_BT = torch.zeros_like(batch.reward_BT)
    row_N, column_N = batch.target_positions()
    loss_N = -log_p_BTV[row_N, column_N - 1, batch.ids_BT[row_N, column_N]]
    return loss_BT.index_put((row_N, column_N), loss_N)


def model_context() -> ModelContext:
    """Return the stand-in for the policy that a `BuildContext` contains."""
    return ModelContext(
        n_future=N_FUTURE,
        hidden_size=HIDDEN_SIZE,
        vocab_size=VOCAB_SIZE,
        device=torch.device("cpu"),
        frozen_trunk=lambda: trunk_states,
        frozen_losses=lambda _: next_token_losses,
        trainable_losses=TrainableLosses,
        trainable_trunk=lambda _: TrainableTrunk(),
        encode=encode,
        decode=decode,
        eos_id=EOS_ID,
    )
