"""A critic's scores, computed once and then read from a memory-mapped table.

In stage 2 a critic that does not read the policy returns the same score for a token at every step, because
its parameters are frozen. So each document is scored once, in the first batch that contains it, with exactly
the scores that this batch gets without the cache. Later epochs, and later runs with the same critic, data and
batches, read the scores from the table. If a document were scored in another batch, its scores could differ
by 1e-6, because sums would be computed in another order.

Shape letters: B rows, T positions, N tokens of the token set, D documents.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import attrs
import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from weighted_mtp_core.api import Batch, Critic, Scores
from weighted_mtp_core.checkpointing.resume import fingerprint
from weighted_mtp_core.data.array_files import drop_pages, mapped
from weighted_mtp_core.data.batches import CollatedBatch, StepBatches, split_rows
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.plugins.selection import SelectedComponent
from weighted_mtp_core.plugins.source_identity import source_identity
from weighted_mtp_core.runtime.device import Compute, to_device
from weighted_mtp_core.runtime.state_digest import state_sha256
from weighted_mtp_core.storage.atomic import delete_abandoned, unfinished_folder
from weighted_mtp_core.storage.manifest import MANIFEST, atomic_folder
from weighted_mtp_core.storage.verify_once import verify_once
from weighted_mtp_core.training.critic_scores import checked

_FORMAT = 2  # increase it when the scores stored for the same key would change
_FIELDS = tuple(each.name for each in attrs.fields(Scores))
Floats = NDArray[np.float32]


class CachedCritic(Critic):
    """Wraps a critic that does not read the policy, and caches its scores; the score of padding is 0.

    Args:
        critic: The critic, which must no longer be trained.
        batches: The batches of stage 2; only documents of their token set can be scored.
        accumulation: Maximum number of parts in which a batch is scored.
        folder: The folder of the complete table, which is read if it exists; otherwise the folder is written
            as soon as all documents are scored.

    Raises:
        WmtpError: A file in `folder` was changed, removed or added after it was written.
    """

    trainable = False
    reads_policy = False

    def __init__(self, critic: Critic, batches: StepBatches, *, accumulation: int, folder: Path) -> None:
        self._critic = critic
        self._batches = batches
        self._accumulation = accumulation
        self._folder = folder
        self._table: dict[str, Floats] = {}
        self._scored_D = np.zeros(len(batches.tokens), dtype=np.bool_)
        self._unfinished: Path | None = None
        delete_abandoned(folder)
        if (folder / MANIFEST).is_file():
            verify_once(folder)
            self._open()

    @torch.no_grad()
    def score(self, batch: Batch, hidden_BTH: Tensor | None) -> Scores:
        """Return each token's scores from the table; missing scores are computed first.

        Raises:
            WmtpError: The batch is not a `CollatedBatch`, so it was not made from the token set of stage 2.
            RunFailedError: The critic returned a score that is not float32.
        """
        del hidden_BTH
        if not isinstance(batch, CollatedBatch):
            raise WmtpError("the score cache needs batches made from the token set of stage 2")
        real_BT = batch.token_BT >= 0
        documents = _documents(batch, self._batches.tokens.start_D1)
        lacking = documents[~self._scored_D[documents]]
        if len(lacking):
            for step in np.unique(self._first_step_D[lacking]):
                self._score(int(step))
            if self._scored_D.all():
                self._publish()
        found = {
            name: to_device(np.where(real_BT, values_N[batch.token_BT], np.float32(0)), batch.ids_BT.device)
            for name, values_N in self._table.items()
        }
        for values_N in self._table.values():
            drop_pages(values_N)
        return Scores(**found)

    @cached_property
    def _first_step_D(self) -> NDArray[np.int64]:
        return self._batches.first_steps()

    def _score(self, step: int) -> None:
        """Score the documents of one step of the first epoch."""
        batch = self._batches(step)
        for part in split_rows(batch, self._accumulation):
            real_BT = part.token_BT >= 0
            scores = checked(self._critic.score(part, None))
            for name in _FIELDS:
                if (value_BT := getattr(scores, name)) is not None:
                    self._column(name)[part.token_BT[real_BT]] = value_BT.cpu().numpy()[real_BT]
        self._scored_D[_documents(batch, self._batches.tokens.start_D1)] = True

    def _column(self, name: str) -> Floats:
        """Return the table's column for a kind of score; create the column if it does not exist."""
        if name not in self._table:
            if self._unfinished is None:
                with ExitStack() as opened:
                    self._unfinished = opened.enter_context(unfinished_folder(self._folder))
                    weakref.finalize(self, opened.pop_all().close)
            # The table is on disk from the start, because the scores of a corpus may be larger than memory.
            file, shape = self._unfinished / f"{name}.npy", (len(self._batches.tokens.ids_N),)
            self._table[name] = open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        return self._table[name]

    def _publish(self) -> None:
        """Move the complete table to its folder, in which later runs find it."""
        assert self._unfinished is not None
        for values_N in self._table.values():
            assert isinstance(values_N, np.memmap)
            values_N.flush()
        with atomic_folder(self._folder) as folder:
            for file in self._unfinished.iterdir():
                file.rename(folder / file.name)
        self._open()

    def _open(self) -> None:
        self._table = {file.stem: mapped(file) for file in sorted(self._folder.glob("*.npy"))}
        self._scored_D[:] = True


def scores_key(
    critic: Critic,
    chosen: SelectedComponent,
    *,
    inputs: Sequence[str],
    batches: StepBatches,
    accumulation: int,
    compute: Compute,
) -> str:
    """Return the SHA-256 of everything that a critic's scores depend on.

    Args:
        critic: The critic, in the state in which it scores.
        chosen: The critic's component, with its address, source and options.
        inputs: The SHA-256 of the weights, and the configuration, of each frozen model that core gave the
            critic.
        batches: The batches of stage 2.
        accumulation: Maximum number of parts in which a batch is scored.
        compute: The device and the precision with which the scores are computed.
    """
    depends = {
        "format": _FORMAT,
        "critic": [chosen.address, source_identity(chosen.plugins), chosen.plain_options()],
        "state": state_sha256(critic.state_dict()),
        "given": list(inputs),
        "tokens": batches.tokens.sha256,
        "batches": {**batches.order, "accumulation": accumulation},
        "precision": compute.precision,
        "machine": fingerprint(),
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def _documents(batch: CollatedBatch, start_D1: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the numbers of the documents in a batch."""
    token_N = batch.token_BT[batch.token_BT >= 0]
    return np.unique(np.searchsorted(start_D1, token_N, side="right") - 1)
