"""The checkpoints of a run: written in the background, whole or not at all, and found again by their step."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Self

from attrs import define, field
from safetensors import SafetensorError

from weighted_mtp_core.checkpointing.snapshot import Snapshot
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.recipe.schema import CheckpointTable
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.storage.manifest import atomic_folder, files_of

STAGES = ("critic", "policy")
_NAME = re.compile(r"(critic|policy)-(\d{8})")
_SPARE_BYTES = 16 << 20  # beside the tensors: values, manifest, the journal that goes on


@define(kw_only=True, eq=False)
class Checkpoints:
    """Keeps a run's snapshots; one is written at a time, by a thread of its own.

    Attributes:
        folder: `checkpoints/` of the run folder.
        table: How often, and how many are kept.
        log: Tells the person and the log.
        distributed: The processes that train together. The first one writes what is whole.
    """

    folder: Path
    table: CheckpointTable
    log: Callable[[str], None]
    distributed: Distributed = SINGLE_PROCESS
    _writer: ThreadPoolExecutor = field(
        init=False, factory=lambda: ThreadPoolExecutor(1, "checkpoint", initializer=_step_back)
    )
    _writing: Future[None] | None = field(init=False, default=None)

    def due(self, step: int, steps: int) -> bool:
        """Say whether a snapshot is to be taken after this many of `steps` steps."""
        return step == steps or (self.table.every > 0 and step % self.table.every == 0)

    def save(self, snapshot: Snapshot) -> None:
        """Write a snapshot in the background; waits for the one before it.

        Raises:
            RunFailedError: The one before it could not be written.
        """
        self.wait()
        if self.distributed.is_rank_zero:
            self._writing = self._writer.submit(self._write, snapshot)
        elif snapshot.sharded:
            self._writing = self._writer.submit(snapshot.write_share, self.distributed)

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            RunFailedError: The last snapshot could not be written; those before it are untouched.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def newest(self) -> Snapshot | None:
        """Return the latest whole snapshot; damaged ones are named and put aside."""
        for path in reversed(self._paths()):
            try:
                return Snapshot.read(path)
            except WmtpError as error:
                if "newer than this one" in str(error):
                    raise
                self.log(f"WARNING: {error}; going back to the checkpoint before it")
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.shutdown(wait=True)

    def _paths(self) -> list[Path]:
        """Return the snapshots' folders, oldest first: by stage and step, never by the clock."""
        return [path for _, _, path in sorted(self._found())]

    def _found(self) -> Iterator[tuple[int, int, Path]]:
        for path in self.folder.iterdir():
            if match := _NAME.fullmatch(path.name):
                yield STAGES.index(match[1]), int(match[2]), path

    def _write(self, snapshot: Snapshot) -> None:
        path = self.folder / f"{snapshot.stage}-{snapshot.step:08d}"
        needed = snapshot.bytes + _SPARE_BYTES
        if shutil.disk_usage(self.folder).free < needed:
            raise self._failure(path, needed, "not enough space")
        try:
            with atomic_folder(path) as temporary:
                snapshot.write(temporary, self.distributed)
            _forget(path)
        except (OSError, SafetensorError) as error:
            raise self._failure(path, needed, str(error)) from error
        self._retire()

    def _failure(self, path: Path, needed: int, reason: str) -> RunFailedError:
        free = shutil.disk_usage(self.folder).free
        return RunFailedError(
            f"cannot write the checkpoint `{path}`: {reason}; it needs {_size(needed)}, {_size(free)} are "
            "free; the checkpoints before it are whole",
            hint=f"make room, then go on: run --resume {self.folder.parent.name}",
        )

    def _retire(self) -> None:
        """Delete what the recipe does not want to keep."""
        paths = self._paths()
        every = self.table.keep_every
        for path in paths[: -self.table.keep]:
            if every and int(path.name.rpartition("-")[2]) % every == 0:
                continue
            with suppress(FileNotFoundError):
                shutil.rmtree(path)


def _forget(path: Path) -> None:
    """Drop the copies of files that the system keeps in memory: the next ones would need fresh memory."""
    if sys.platform == "linux":
        for file in files_of(path):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _step_back() -> None:
    """Leave the processor to the thread that trains: there is time until the next checkpoint."""
    if sys.platform == "linux":  # elsewhere priorities belong to processes
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _size(count: int) -> str:
    """Write a number of bytes the way a person reads it."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
