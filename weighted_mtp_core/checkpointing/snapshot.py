"""Snapshots: the state of a stage after a completed step, from which a run continues with the same result.

A snapshot is a folder `<stage>-<step>`. A snapshot contains the tensors as safetensors (one file per process
for sharded tensors), the plain values as JSON, the best state so far, and a manifest. The best state is
hard-linked, which takes no disk space, or copied if the file system has no hard links. Reading a snapshot
executes no code from its files. `manager.py` decides when snapshots are written and which snapshots are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from weighted_mtp_core import __version__
from weighted_mtp_core.checkpointing.shards import Shards, write_shards
from weighted_mtp_core.checkpointing.state import WithPrefix
from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.storage.manifest import verify_manifest

FORMAT = 3
"""Format number of snapshots, which increases when the content changes; other formats are refused."""

_TENSORS, _SHARDS, _VALUES, _BEST = "state.safetensors", "shards", "state.json", "best"


class OtherFormatError(WmtpError):
    """A snapshot is intact, but was written by another release in another format."""


@frozen(kw_only=True, eq=False)
class Snapshot:
    """The state of a stage after a completed step.

    Attributes:
        stage: `critic` or `policy`.
        step: Number of completed steps.
        tensors: Tensors in main memory, keyed by dotted names `learner.*`, `optimiser.*` and `rng.*`. If a
            snapshot was read from sharded files, each tensor is read and assembled on access.
        values: All other parts of the state, as plain JSON values.
        best: The file or folder with the best state of the stage so far.
    """

    stage: str
    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    best: Path

    @property
    def bytes(self) -> int:
        """Size of all tensors together, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def sharded(self) -> bool:
        """Whether tensors are sharded over the processes, so that each process writes a file."""
        return any(isinstance(tensor, DTensor) for tensor in self.tensors.values())

    def part(self, prefix: str) -> Mapping[str, Any]:
        """Return the tensors and plain values below a prefix, such as `learner`, named without the prefix."""
        return ChainMap(dict(self.values.get(prefix, {})), WithPrefix(self.tensors, prefix))  # type: ignore[arg-type]

    def write_share(self, distributed: Distributed) -> None:
        """Write the shards of this process; called in all processes but the first if `sharded`.

        Raises:
            OSError: A process could not write its shards.
        """
        write_shards(self.tensors, None, distributed)

    def write(self, folder: Path, distributed: Distributed = SINGLE_PROCESS) -> None:
        """Write the snapshot into an empty folder; called in the first process only.

        Raises:
            OSError, SafetensorError: A file, or the shards of some process, could not be written.
        """
        if self.sharded:
            write_shards(self.tensors, folder / _SHARDS, distributed)
        else:
            save_file(dict(self.tensors), folder / _TENSORS)
        content = {
            "format": FORMAT,
            "core": __version__,
            "stage": self.stage,
            "step": self.step,
            "values": self.values,
        }
        (folder / _VALUES).write_text(json.dumps(content, sort_keys=True) + "\n", encoding="utf-8")
        _link(self.best, folder / _BEST / self.best.name)

    @classmethod
    def read(cls, folder: Path) -> Snapshot:
        """Read a snapshot from its folder, and check every file against the manifest.

        Raises:
            OtherFormatError: Another release wrote the snapshot in another format.
            WmtpError: A file was changed, was added, is missing or cannot be read.
        """
        verify_manifest(folder)
        try:
            content = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise _other_format(folder, content["format"], content["core"])
            return cls(
                stage=content["stage"],
                step=content["step"],
                tensors=_read_tensors(folder),
                values=content["values"],
                best=next((folder / _BEST).iterdir()),
            )
        except (OSError, ValueError, KeyError, TypeError, StopIteration, SafetensorError) as error:
            raise WmtpError(f"checkpoint `{folder}` cannot be read: {error}") from error

    def restore_best(self, path: Path) -> None:
        """Replace the file or folder `path` with the best state in the snapshot."""
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        _link(self.best, path)


def _other_format(folder: Path, written: int, core: str) -> OtherFormatError:
    if written > FORMAT:
        return OtherFormatError(
            f"checkpoint `{folder}` was written by weighted-mtp-core {core}, "
            f"which is newer than this one ({__version__})",
            hint=f"pip install 'weighted-mtp-core>={core}'",
        )
    return OtherFormatError(
        f"checkpoint `{folder}` was written by an earlier release, in format {written}; "
        f"this one reads format {FORMAT}",
        hint="start a new run, or finish this one with the release that wrote it",
    )


def _read_tensors(folder: Path) -> Mapping[str, Tensor]:
    return Shards(folder / _SHARDS) if (folder / _SHARDS).is_dir() else load_file(folder / _TENSORS)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or the files of a folder; copy the files if the file system has no hard links."""
    if source.is_dir():
        for file in sorted(source.iterdir()):
            _link(file, target / file.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
