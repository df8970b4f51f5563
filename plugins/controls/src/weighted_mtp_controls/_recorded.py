"""Two weightings: `Record` saves the weights of each training step, and `Replay` reads them in another run.

Shape letters: B batch rows, T positions, K heads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights, WmtpError

from weighted_mtp_controls._wrapper import Wrapper

_NOTHING = torch.zeros(16, dtype=torch.uint8)
"""The hash of the previous step's weights in the first step, which has no previous step."""


class Record(Wrapper):
    """Saves the weights of each training step together with the tokens of the batch.

    Each file also contains a hash of the weights of the previous step, so that `Replay` does not mix the
    weights of two runs that were recorded under the same name.
    """

    def __init__(self, of: WeightingStrategy, *, folder: Path) -> None:
        super().__init__([of])
        self._folder = folder
        self._previous = _NOTHING

    def weigh(self, view: StepView) -> Weights:
        """Save and return the wrapped weights."""
        weights = self._wrapped[0].weigh(view)
        if view.training:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = _file(self._folder, view.step)
            # Several processes may write this file; the rename is atomic, so the file is never incomplete.
            temporary = file.with_suffix(f".{os.getpid()}")
            weight = weights.weight.cpu().contiguous()
            saved = {"weight": weight, "ids": _masked_ids(view), "previous": self._previous}
            save_file(saved, temporary)
            temporary.replace(file)
            self._previous = _hash(weight)
        return weights

    def state_dict(self) -> dict[str, Any]:
        """Return the hash of the last recorded weights (zeros if none) and the wrapped weighting's state."""
        return {**super().state_dict(), "previous": self._previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the hash, and the state of the wrapped weighting.

        Raises:
            WmtpError: The wrapped weighting refuses its state, or a key of the state is unknown.
        """
        self._previous = state.get("previous", _NOTHING).cpu()
        super().load_state_dict({key: value for key, value in state.items() if key != "previous"})


class Replay(WeightingStrategy):
    """Returns at each step the weights that `Record` saved at this step."""

    def __init__(self, *, folder: Path) -> None:
        if not folder.is_dir():
            raise WmtpError(
                f"there are no recorded weights in `{folder}`",
                hint="record them with `controls.record` and the same `name` first",
            )
        self._folder = folder
        self._last = -1, _NOTHING  # the last step that was read, and the hash of its weights

    def weigh(self, view: StepView) -> Weights:
        """Return the recorded weights of this step.

        Raises:
            WmtpError: The weights of this step or of the previous step were not recorded; the weights of this
                step belong to another batch; another run recorded the weights of the previous step; or a file
                is malformed.
        """
        step, saved = view.step, self._read(view.step)
        if not torch.equal(saved["ids"], _masked_ids(view)):
            raise WmtpError(
                f"the weights of step {step} in `{self._folder}` belong to another batch",
                hint="replay with the data, seed, batch size and tokenizer of the run that recorded them",
            )
        if step and self._last[0] != step - 1:
            self._last = step - 1, _hash(self._read(step - 1)["weight"])
        if step and not torch.equal(saved["previous"], self._last[1]):
            raise WmtpError(
                f"two runs recorded the weights of the steps {step - 1} and {step} in `{self._folder}`",
                hint="record them again, with a `name` that no other run uses",
            )
        self._last = step, _hash(saved["weight"])
        return Weights(weight=saved["weight"].to(view.ids_BT.device))

    def _read(self, step: int) -> Mapping[str, Tensor]:
        file = _file(self._folder, step)
        try:
            saved = load_file(file)
            return {name: saved[name] for name in ("weight", "ids", "previous")}
        except FileNotFoundError as error:
            raise WmtpError(
                f"the weights of step {step} were not recorded in `{self._folder}`",
                hint="train no longer than the run that recorded them",
            ) from error
        except (SafetensorError, KeyError) as error:
            raise WmtpError(f"`{file}` holds no recorded weights: {error}") from error


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def _masked_ids(view: StepView) -> Tensor:
    """Return the token ids of the batch on the CPU, int32 `[B, T]`; -1 on padding."""
    return view.ids_BT.where(view.document_BT >= 0, -1).to("cpu", torch.int32).contiguous()


def _hash(weight: Tensor) -> Tensor:
    """Return a hash of weights on the CPU, uint8 `[16]`."""
    digest = hashlib.blake2b(weight.numpy().tobytes(), digest_size=16).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)
