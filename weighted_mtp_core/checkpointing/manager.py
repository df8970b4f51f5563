"""Decides when snapshots are written, which snapshots are kept, and from which snapshot a run resumes.

A background thread writes snapshots, so that training continues in the meantime. Each snapshot is on disk
either completely or not at all. `snapshot.py` defines the content and the files of a snapshot.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from attrs import define, field
from safetensors import SafetensorError

from weighted_mtp_core.checkpointing.snapshot import OtherFormatError, Snapshot
from weighted_mtp_core.errors import RunFailedError, WmtpError
from weighted_mtp_core.recipe.schema import CheckpointTable
from weighted_mtp_core.runtime.distributed import SINGLE_PROCESS, Distributed
from weighted_mtp_core.storage.manifest import atomic_folder, files_of

STAGES = ("critic", "policy")
_NAME = re.compile(r"(critic|policy)-(\d{8})")
_SPARE_BYTES = 16 << 20  # for values, manifest and the growth of the journal while a snapshot is written


@define(kw_only=True, eq=False)
class Checkpoints:
    """Context manager for the snapshots of a run; on exit, it waits until the last snapshot is written.

    Attributes:
        folder: The folder `checkpoints/` of the run folder.
        table: How often snapshots are taken, and how many snapshots are kept.
        log: Called with messages for the user.
        distributed: The processes that train together. Each process writes its shards; the first process
            writes everything else.
    """

    folder: Path
    table: CheckpointTable
    log: Callable[[str], None]
    distributed: Distributed = SINGLE_PROCESS
    _writer: ThreadPoolExecutor = field(
        init=False, factory=lambda: ThreadPoolExecutor(1, "checkpoint", initializer=_lower_priority)
    )
    _writing: Future[None] | None = field(init=False, default=None)

    def due(self, step: int, steps: int) -> bool:
        """Return whether a snapshot is due after `step` completed steps of a stage with `steps` steps."""
        return step == steps or (self.table.every > 0 and step % self.table.every == 0)

    def save(self, snapshot: Snapshot) -> None:
        """Wait until the previous snapshot is written, then write a snapshot in the background.

        Raises:
            RunFailedError: The previous snapshot could not be written.
        """
        self.wait()
        if self.distributed.is_rank_zero:
            self._writing = self._writer.submit(self._write, snapshot)
        elif snapshot.sharded:
            self._writing = self._writer.submit(self._write_share, snapshot)

    def wait(self) -> None:
        """Wait until every snapshot is on disk.

        Raises:
            RunFailedError: The last snapshot could not be written; earlier snapshots are intact.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def newest(self) -> Snapshot | None:
        """Return the latest intact snapshot, or None; rename damaged snapshots after it to `*.damaged`.

        Raises:
            OtherFormatError: The latest intact snapshot was written by another release in another format.
        """
        for path in reversed(self._paths()):
            try:
                return Snapshot.read(path)
            except OtherFormatError:
                raise
            except WmtpError as error:
                self.log(f"WARNING: {error}; going back to the checkpoint before it")
                damaged = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(damaged, ignore_errors=True)
                path.rename(damaged)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.shutdown(wait=True)

    def _paths(self) -> list[Path]:
        """Return the folders of the snapshots in the order of stage and step, not of file times."""
        return [self.folder / f"{stage}-{step:08d}" for stage, step in steps_of_snapshots(self.folder)]

    @contextmanager
    def writing(self, path: Path, *, needed: int | None = None) -> Iterator[None]:
        """Convert OSError and SafetensorError in the block into an error with a hint on continuing the run.

        Args:
            path: The file or folder that the block writes, in `folder`.
            needed: The number of bytes that the block will write, if known.

        Raises:
            RunFailedError: The block cannot write `path`, or `needed` bytes are not free.
        """
        free = shutil.disk_usage(self.folder).free
        try:
            if needed is not None and free < needed:
                raise OSError("not enough space")  # noqa: TRY301 - reported like errors of the block
            yield
        except (OSError, SafetensorError) as error:
            needs = "" if needed is None else f"it needs {_size(needed)}, "
            raise RunFailedError(
                f"cannot write the checkpoint `{path}`: {error}; {needs}{_size(free)} are free; the "
                "checkpoints before it are whole",
                hint="free space or repair the storage, then continue: "
                f"run RECIPE --resume {self.folder.parent.name}",
            ) from error

    def _write(self, snapshot: Snapshot) -> None:
        path = self._path(snapshot)
        with self.writing(path, needed=snapshot.bytes + _SPARE_BYTES):
            with atomic_folder(path) as temporary:
                snapshot.write(temporary, self.distributed)
            _drop_file_cache(path)
        self._delete_old()

    def _write_share(self, snapshot: Snapshot) -> None:
        with self.writing(self._path(snapshot)):
            snapshot.write_share(self.distributed)

    def _path(self, snapshot: Snapshot) -> Path:
        return self.folder / f"{snapshot.stage}-{snapshot.step:08d}"

    def _delete_old(self) -> None:
        """Delete the snapshots that need not be kept according to the recipe."""
        every = self.table.keep_every
        for path in self._paths()[: -self.table.keep]:
            if every and int(path.name.rpartition("-")[2]) % every == 0:
                continue
            with suppress(FileNotFoundError):
                shutil.rmtree(path)


def steps_of_snapshots(folder: Path) -> list[tuple[str, int]]:
    """Return the stage and the step of each snapshot in a folder, in the order of stage and step."""
    matches = [match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(
        ((match[1], int(match[2])) for match in matches), key=lambda found: (STAGES.index(found[0]), found[1])
    )


def _drop_file_cache(path: Path) -> None:
    """On Linux, drop the files of a folder from the system's cache, to free memory for the next copies."""
    if sys.platform == "linux":
        for file in files_of(path):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _lower_priority() -> None:
    """On Linux, lower the priority of this thread, so that the training thread has precedence."""
    if sys.platform == "linux":  # elsewhere, `PRIO_PROCESS` cannot name a single thread
        thread = threading.get_native_id()
        own = os.getpriority(os.PRIO_PROCESS, thread)  # under `nice -n 15`, 10 would need privileges
        os.setpriority(os.PRIO_PROCESS, thread, max(10, own))


def _size(count: int) -> str:
    """Return a number of bytes as text, in GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
