"""Two weightings: `Record` saves the weights of each step in a file, and `Replay` reads them in another run.

Shape letters: B batch rows, T positions, K heads.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from weighted_mtp_core.api import StepView, WeightingStrategy, Weights, WmtpError

from weighted_mtp_controls._wrapper import Wrapper


class Record(Wrapper):
    """Saves the weights of each training step together with the tokens of the batch."""

    def __init__(self, of: WeightingStrategy, *, folder: Path) -> None:
        super().__init__([of])
        self._folder = folder

    def weigh(self, view: StepView) -> Weights:
        """Save and return the wrapped weights."""
        weights = self._wrapped[0].weigh(view)
        if view.training:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = _file(self._folder, view.step)
            # Several processes may write this file; the rename is atomic, so the file is never incomplete.
            temporary = file.with_suffix(f".{os.getpid()}")
            save_file({"weight": weights.weight.cpu().contiguous(), "ids": _masked_ids(view)}, temporary)
            temporary.replace(file)
        return weights


class Replay(WeightingStrategy):
    """Returns at each step the weights that `Record` saved at this step."""

    def __init__(self, *, folder: Path) -> None:
        if not folder.is_dir():
            raise WmtpError(
                f"there are no recorded weights in `{folder}`",
                hint="record them with `controls.record` and the same `name` first",
            )
        self._folder = folder

    def weigh(self, view: StepView) -> Weights:
        """Return the recorded weights of this step.

        Raises:
            WmtpError: The weights of this step were not recorded or belong to another batch, or the file is
                malformed.
        """
        file = _file(self._folder, view.step)
        try:
            saved = load_file(file)
            weight, ids_BT = saved["weight"], saved["ids"]
        except FileNotFoundError as error:
            raise WmtpError(
                f"the weights of step {view.step} were not recorded in `{self._folder}`",
                hint="train no longer than the run that recorded them",
            ) from error
        except (SafetensorError, KeyError) as error:
            raise WmtpError(f"`{file}` holds no recorded weights: {error}") from error
        if not torch.equal(ids_BT, _masked_ids(view)):
            raise WmtpError(
                f"the weights of step {view.step} in `{self._folder}` belong to another batch",
                hint="replay with the data, seed, batch size and tokenizer of the run that recorded them",
            )
        return Weights(weight=weight.to(view.ids_BT.device))


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def _masked_ids(view: StepView) -> Tensor:
    """Return the token ids of the batch on the CPU, int32 `[B, T]`; -1 on padding."""
    return view.ids_BT.where(view.document_BT >= 0, -1).to("cpu", torch.int32).contiguous()
