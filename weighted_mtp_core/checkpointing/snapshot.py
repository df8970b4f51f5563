"""What a training needs to go on as if it had never stopped, taken between two steps, and its files.

A snapshot lies in a folder of its own, `<stage>-<step>`: tensors as safetensors, with a file for each process
where they are split over processes; plain values as JSON; the best state so far, a hard link, so it costs
nothing; and a manifest. Reading one runs no code.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import weighted_mtp_core
from weighted_mtp_core.checkpointing.shards import Shards, write_shards
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed, like, on_host
from weighted_mtp_core.storage.manifest import verify_manifest

FORMAT = 1
"""Raise it when snapshots change so that this release cannot read older ones."""

_TENSORS, _SHARDS, _VALUES, _BEST = "state.safetensors", "shards", "state.json", "best"


@frozen(kw_only=True, eq=False)
class Snapshot:
    """A training between two steps.

    Attributes:
        stage: `critic` or `policy`.
        step: How many steps are done.
        tensors: By dotted name: `learner.*`, `optimiser.*`, `rng.*`; copies, on the CPU. Those of a snapshot
            that was read are whole; where files are split, a tensor is read when it is asked for.
        values: What is no tensor; plain JSON.
        best: The file or folder with the best state when it was taken.
    """

    stage: str
    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    best: Path

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def sharded(self) -> bool:
        """Whether some tensors are split over the processes, so that all of them must write."""
        return any(isinstance(tensor, DTensor) for tensor in self.tensors.values())

    def part(self, prefix: str) -> Mapping[str, Any]:
        """Return the tensors below a dotted prefix and the values that go with them."""
        return ChainMap(dict(self.values.get(prefix, {})), below(self.tensors, prefix))  # type: ignore[arg-type]

    def write_share(self, distributed: Distributed) -> None:
        """Write what this process holds of it, to where the first process is writing it."""
        write_shards(self.tensors, None, distributed)

    def write(self, folder: Path, distributed: Distributed = SINGLE_PROCESS) -> None:
        """Write it into an empty folder, together with what the other processes write of it."""
        if self.sharded:
            write_shards(self.tensors, folder / _SHARDS, distributed)
        else:
            save_file(dict(self.tensors), folder / _TENSORS)
        head = {
            "format": FORMAT,
            "core": weighted_mtp_core.__version__,
            "stage": self.stage,
            "step": self.step,
        }
        text = json.dumps({**head, "values": self.values}, sort_keys=True)
        (folder / _VALUES).write_text(text + "\n", encoding="utf-8")
        _link(self.best, folder / _BEST / self.best.name)

    @classmethod
    def read(cls, folder: Path) -> Snapshot:
        """Read a snapshot whose every byte is what was written.

        Raises:
            WmtpError: A file changed, is missing, or comes from a newer release.
        """
        verify_manifest(folder)
        try:
            head = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
            if head["format"] > FORMAT:
                raise WmtpError(
                    f"checkpoint `{folder}` was written by weighted-mtp-core {head['core']}, "
                    f"which is newer than this one ({weighted_mtp_core.__version__})",
                    hint=f"pip install 'weighted-mtp-core>={head['core']}'",
                )
            return cls(
                stage=head["stage"],
                step=head["step"],
                tensors=_read_tensors(folder),
                values=head["values"],
                best=next((folder / _BEST).iterdir()),
            )
        except (OSError, ValueError, KeyError, TypeError, StopIteration, SafetensorError) as error:
            raise WmtpError(f"checkpoint `{folder}` cannot be read: {error}") from error

    def restore_best(self, path: Path) -> None:
        """Put the best state back to where training keeps it."""
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        _link(self.best, path)


def _read_tensors(folder: Path) -> Mapping[str, Tensor]:
    return Shards(folder / _SHARDS) if (folder / _SHARDS).is_dir() else load_file(folder / _TENSORS)


def _link(source: Path, target: Path) -> None:
    """Give a file, or the files of a folder, a second name; copy where the file system has no links."""
    if source.is_dir():
        for file in sorted(source.iterdir()):
            _link(file, target / file.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class _Below(Mapping[str, Any]):
    """What a mapping holds below a prefix, read from it when it is asked for."""

    def __init__(self, state: Mapping[str, Any], start: str) -> None:
        self._state, self._start = state, start

    def __getitem__(self, name: str) -> Any:
        return self._state[self._start + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._start) for name in self._state if name.startswith(self._start))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def below(state: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """Return what a state holds below a dotted prefix, without the prefix."""
    return _Below(state, f"{prefix}.")


def split_state(
    state: Mapping[str, Any], prefix: str, *, over: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return copies of a state's tensors under dotted names, sharded as they are, and its plain values.

    Args:
        state: The state.
        prefix: Of the names.
        over: Earlier copies by their dotted names; those that fit are overwritten.
    """
    found = {f"{prefix}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
    tensors = {name: on_host(value, over.get(name)) for name, value in found.items()}
    return tensors, {name: value for name, value in state.items() if not isinstance(value, Tensor)}


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and kept buffers, each once, however many names share it."""
    kept = module.state_dict(keep_vars=True)
    unique = {id(tensor): name for name, tensor in reversed(kept.items())}
    return {name: tensor for name, tensor in kept.items() if unique[id(tensor)] == name}


@torch.no_grad()
def load_module_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `module_state`'s result back into the same module.

    Raises:
        WmtpError: The state is of another module.
    """
    own = module_state(module)
    if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
        raise WmtpError(
            "the checkpoint holds another model than the recipe describes",
            hint="use the recipe of the run that wrote it (its `recipe.toml`)",
        )
    for name, tensor in own.items():
        tensor.copy_(like(tensor, state[name]))


def optimiser_state(
    optimiser: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
) -> dict[str, Tensor]:
    """Return an optimiser's moments as `<parameter number>.<name>`; rates and decay come from the recipe."""
    return {
        f"{number}.{name}": tensor
        for number, parameter in enumerate(parameters)
        for name, tensor in optimiser.state[parameter].items()
    }


def load_optimiser_state(
    optimiser: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restore `optimiser_state`'s result; of several processes all must ask together."""
    for key in sorted(tensors):  # files may be listed in another order to each process
        tensor = tensors[key]
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        own = tensor if tensor.shape != parameter.shape else like(parameter, tensor.to(parameter.device))
        optimiser.state[parameter][name] = own


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of every global random generator: tensors and plain values."""
    tensors = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one is meant
    values = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    return tensors, values


def restore_random_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Restore `random_state`'s result."""
    torch.set_rng_state(tensors["rng.torch"])
    cuda = [tensors[name] for name in sorted(tensors) if name.startswith("rng.cuda.")]
    if cuda and torch.cuda.device_count() == len(cuda):
        torch.cuda.set_rng_state_all(cuda)
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
