"""Weights kept in a file a step, to be used again as they were.

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
    """Keeps the weights of each training step as a weighting gave them, with the tokens they belong to."""

    def __init__(self, inner: WeightingStrategy, *, folder: Path) -> None:
        super().__init__([inner])
        self._folder = folder

    def weigh(self, view: StepView) -> Weights:
        """Return the weights, having written them down."""
        weights = self._parts[0].weigh(view)
        if view.training:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = _file(self._folder, view.step)
            # Whole or not there; several processes write the same.
            temporary = file.with_suffix(f".{os.getpid()}")
            save_file({"weight": weights.weight.cpu().contiguous(), "ids": _tokens(view)}, temporary)
            temporary.replace(file)
        return weights


class Replay(WeightingStrategy):
    """Gives each step the weights that `Record` kept."""

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
            WmtpError: The step was not recorded, or had another batch.
        """
        file = _file(self._folder, view.step)
        try:
            kept = load_file(file)
            weight, ids_BT = kept["weight"], kept["ids"]
        except FileNotFoundError as error:
            raise WmtpError(
                f"the weights of step {view.step} were not recorded in `{self._folder}`",
                hint="train no longer than the run that recorded them",
            ) from error
        except (SafetensorError, KeyError) as error:
            raise WmtpError(f"`{file}` holds no recorded weights: {error}") from error
        if not torch.equal(ids_BT, _tokens(view)):
            raise WmtpError(
                f"the weights of step {view.step} in `{self._folder}` belong to another batch",
                hint="replay with the data, seed, batch size and tokenizer of the run that recorded them",
            )
        return Weights(weight=weight.to(view.ids_BT.device))


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.safetensors"


def _tokens(view: StepView) -> Tensor:
    """Return the batch's tokens, int32 `[B, T]`, -1 on padding."""
    return view.ids_BT.where(view.document_BT >= 0, -1).to("cpu", torch.int32).contiguous()
