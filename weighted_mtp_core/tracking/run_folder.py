"""Create, lock and find run folders, `<runs>/<experiment>/<run name>/<run id>/`, with all files of a run."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attrs import define, field

from weighted_mtp_core.errors import WmtpError
from weighted_mtp_core.storage.atomic import atomic_write, unfinished_folder
from weighted_mtp_core.tracking.names import check_path_name

CHANGED = "changed"
"""Key in `run.json` of a resumed run, for a list of changed keys that affect the trained policy.

The list contains keys of the recipe, `distributions.<name>` for other code, and `data.sha256` for other data.
"""

_RUN_FILE = "run.json"
_LOCK_FILE = "lock"
_UNFINISHED = (".*", "checkpoints/.*", "checkpoints/*/.*", "delivery/.*", "evaluation/.*")
_ELSEWHERE = "choose another `run.output_dir`, for example: --set run.output_dir=/tmp/runs"
_HELD: set[Path] = set()
"""Real paths of the folders that this process has locked.

The process must not open and close the lock file of such a folder again, because this would release the lock.
"""


def new_run_id() -> str:
    """Return a unique id that sorts by time: `20261123-121856-4f1c9a`."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


@define(kw_only=True, eq=False)
class RunFolder:
    """A run folder, which `create` and `open` lock for this process until `close`.

    The lock is a POSIX record lock: the kernel always releases it when the process ends, and child processes
    do not inherit it.

    Attributes:
        path: The path of the folder; absolute after `create` and `open`.
    """

    path: Path
    _lock: int | None = field(default=None, alias="lock")

    @classmethod
    def create(
        cls,
        runs: Path,
        *,
        experiment: str,
        name: str,
        facts: Mapping[str, Any] | None = None,
        recipe_toml: str = "",
    ) -> RunFolder:
        """Create a new run folder below `runs`; it appears atomically and is locked.

        Args:
            runs: The folder of all runs.
            experiment: Name of the experiment.
            name: Name of the run.
            facts: Initial contents of `run.json`; if None, the folder gets no `run.json`, recipe or journal.
            recipe_toml: The resolved recipe.

        Raises:
            WmtpError: A name is not a valid folder name, or the folder cannot be created or locked.
        """
        check_path_name(experiment, what="an experiment")
        check_path_name(name, what="a run")
        path = (runs / experiment / name / new_run_id()).absolute()
        try:
            with unfinished_folder(path.with_name("new")) as folder:
                new = cls(path=folder)
                for subfolder in (new.checkpoints, new.log.parent):
                    subfolder.mkdir()
                if facts is not None:
                    atomic_write(new.recipe, recipe_toml)
                    new.journal.touch()
                    new.record(**facts)
                lock = _acquire(folder)  # before it is visible: a run without a lock has died
                folder.rename(path)
        except OSError as error:
            raise WmtpError(
                f"cannot make the run folder `{path}`: {error.strerror}", hint=_ELSEWHERE
            ) from error
        except WmtpError:
            _remove_empty(path.parent, up_to=runs)
            raise
        _HELD.discard(new.path.resolve())
        _HELD.add(path.resolve())
        return cls(path=path, lock=lock)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Lock an existing run folder, and delete unfinished files that a killed process left behind.

        Raises:
            WmtpError: The folder does not exist, is locked already, or is on a file system without locks.
        """
        path = path.absolute()
        if not path.is_dir():
            raise WmtpError(f"there is no run folder `{path}`")
        lock = _acquire(path)
        for pattern in _UNFINISHED:
            for left in list(path.glob(pattern)):
                left.unlink() if left.is_file() else shutil.rmtree(left)
        return cls(path=path, lock=lock)

    @property
    def run_id(self) -> str:
        """The id of the run, which is the name of the folder."""
        return self.path.name

    @property
    def recipe(self) -> Path:
        """The file of the resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def journal(self) -> Path:
        """The file of the journal."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        """The log file, which contains messages, warnings and log records."""
        return self.path / "logs" / "training.log"

    def delivery(self, tracker: str) -> Path:
        """Return the file that stores how much of the journal a tracker has received."""
        return self.path / "delivery" / f"{tracker}.json"

    def record(self, **facts: Any) -> None:
        """Merge facts into `run.json`, together with the id of this process and the name of the host."""
        facts = {**read_run(self.path), "pid": os.getpid(), "host": socket.gethostname(), **facts}
        atomic_write(self.path / _RUN_FILE, json.dumps(facts, indent=1) + "\n")

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
            _HELD.discard(self.path.resolve())


def read_run(path: Path) -> Mapping[str, Any]:
    """Return the contents of `run.json` in a run folder; empty if the file does not exist yet."""
    try:
        facts: Mapping[str, Any] = json.loads((path / _RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return facts


def is_held(path: Path) -> bool:
    """Return whether a running process, possibly this process, has locked a run folder.

    Raises:
        WmtpError: The file system of the folder does not support locks.
    """
    if path.resolve() in _HELD:
        return True
    descriptor = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        return not _try_lock(descriptor, path)
    finally:
        os.close(descriptor)


def find_runs(runs: Path) -> Iterator[Path]:
    """Yield every run folder in `runs` once, oldest first; symbolic links are followed.

    Hidden folders, such as unfinished ones, are left out.
    """
    found: dict[str, Path] = {}
    seen = set()
    for folder, subfolders, files in os.walk(runs, followlinks=True):
        real = os.path.realpath(folder)
        if _RUN_FILE in files:
            found.setdefault(real, Path(folder))
        if _RUN_FILE in files or real in seen:  # descend neither into runs nor into a circle of links
            subfolders.clear()
        seen.add(real)
    complete = (path for path in found.values() if not path.name.startswith("."))
    yield from sorted(complete, key=lambda path: path.name)


def find_run(runs: Path, text: str) -> Path:
    """Return the run folder with the path `text`, or the only run folder with `text` in its run id.

    Raises:
        WmtpError: No run, or more than one run, matches `text`.
    """
    if (Path(text) / "run.json").is_file():
        return Path(text).absolute()
    found = [path for path in find_runs(runs) if text in path.name]
    if len(found) == 1:
        return found[0].absolute()
    if found:
        raise WmtpError(
            f"`{text}` matches {len(found)} runs: {', '.join(f'`{path.name}`' for path in found[:5])}",
            hint="name one of them",
        )
    raise WmtpError(
        f"there is no run `{text}` in `{runs}`", hint="list them: python -m weighted_mtp_core track status"
    )


def _acquire(path: Path) -> int:
    if path.resolve() not in _HELD:
        descriptor = os.open(path / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if _try_lock(descriptor, path):
                _HELD.add(path.resolve())
                return descriptor
        except WmtpError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    holder = read_run(path)
    raise WmtpError(
        f"the run folder `{path}` is in use by process `{holder.get('pid', '?')}` "
        f"on `{holder.get('host', '?')}`",
        hint="wait until that run ends, or stop it",
    )


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise WmtpError(
            f"the file system of `{path.parent}` lacks locks ({error.strerror}), which a run needs",
            hint=f"mount it with locks (NFS 4, or lockd), or {_ELSEWHERE}",
        ) from error
    return True


def _remove_empty(folder: Path, *, up_to: Path) -> None:
    """Remove a folder if it is empty, and then its parent folders that are empty, below `up_to`."""
    with suppress(OSError):
        while folder != up_to.absolute():
            folder.rmdir()
            folder = folder.parent
