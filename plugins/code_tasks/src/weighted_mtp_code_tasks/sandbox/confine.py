"""Confine processes by means of the kernel: namespaces, Landlock, seccomp, capabilities and resource limits.

If the kernel refuses a step, the function for this step raises ConfinementError (`limit`: OSError). System
calls go through ctypes, because this module also runs in an interpreter that has only the standard library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

from . import scratch, seccomp

OPEN_FILES = 64

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SIGKILL = 9
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_NAMESPACES = _CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
_INNER_ID = 1000

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE, _MOUNT_ATTR_RDONLY = -100, 0x8000, 1
_SYS_MOUNT_SETATTR = 442

_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
# Number of file-system rights by Landlock ABI: ABI 1 has 13, ABI 2 adds REFER, 3 TRUNCATE, 5 IOCTL_DEV.
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
# The bits permit writing, reading, listing, removing folders and files, making folders, files and symbolic
# links, moving and truncating.
_SCRATCH_RIGHTS = sum(1 << bit for bit in (1, 2, 3, 4, 5, 7, 8, 12, 13, 14))
_FILE_RIGHTS = sum(1 << bit for bit in (1, 2, 14))


class ConfinementError(Exception):
    """Raised if the kernel refuses to confine the process."""


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise ConfinementError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def _syscall(number: int, *arguments: int | ctypes.Array[ctypes.c_char] | None) -> int:
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return int(_libc.syscall(ctypes.c_long(number), *words))


def _bytes(content: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(content, len(content))


def die_with_parent() -> None:
    """Make the kernel kill this process when its parent process ends, for whatever reason."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")


_CAPABILITY_HEADER = _bytes(struct.pack("<Ii", 0x20080522, 0))  # _LINUX_CAPABILITY_VERSION_3, this process
_NO_CAPABILITIES = _bytes(bytes(24))


# --------------------------------------------------------------------------- namespaces


def enter_namespaces() -> None:
    """Move this process into new namespaces, and make all mounts private and read-only there.

    The new PID namespace applies only to processes that this process forks afterwards.

    Raises:
        ConfinementError: The kernel forbids user namespaces, as it does in many containers and in some
            distributions, or refuses the mounts.
    """
    uid, gid = os.getuid(), os.getgid()
    _checked(_libc.unshare(_NAMESPACES), "unshare")
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{_INNER_ID} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{_INNER_ID} {gid} 1")
    except OSError as error:
        raise ConfinementError(f"user namespace: {error}") from None
    _checked(_libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "private mounts")
    attributes = _bytes(struct.pack("<QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0))
    done = _syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, _bytes(b"/\0"), _AT_RECURSIVE, attributes, 32)
    _checked(done, "read-only mounts")


def mount_scratch(path: str) -> None:
    """Mount an empty tmpfs for at most `scratch.MAX_BYTES` bytes and `scratch.MAX_FILES` files on `path`."""
    options = f"size={scratch.MAX_BYTES},nr_inodes={scratch.MAX_FILES},mode=700".encode()
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _checked(_libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", flags, options), f"tmpfs on {path}")


def unmount_scratch(path: str) -> None:
    """Unmount the tmpfs from `path`, which deletes everything in it."""
    _checked(_libc.umount2(os.fsencode(path), _MNT_DETACH), f"umount {path}")


# --------------------------------------------------------------------------- landlock


def landlock_abi() -> int:
    """Return the kernel's Landlock ABI; 0 if the kernel does not support Landlock."""
    return max(0, _syscall(_SYS_LANDLOCK_CREATE, None, 0, 1))


def make_ruleset(readable: Sequence[int], writable: Sequence[int], *, folder: str) -> int:
    """Return the descriptor of a Landlock ruleset that permits reading and writing only what is given.

    As far as the kernel's Landlock ABI allows, the ruleset also forbids TCP, connections to abstract Unix
    sockets of processes outside, and signals to processes outside.

    Args:
        readable: Open `O_PATH` descriptors of files and folders that may be read, with all their content.
        writable: Open `O_PATH` descriptors of files that may be read and written (`/dev/null`).
        folder: The scratch folder, in which files and folders may be read, written, made and removed.

    Raises:
        ConfinementError: The kernel does not support Landlock or rejects the rules.
    """
    abi = landlock_abi()
    if abi < 1:
        raise ConfinementError("this kernel has no Landlock")
    handled = (1 << _RIGHTS_BY_ABI[min(abi, 5)]) - 1
    attributes = struct.pack("<QQQ", handled, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _checked(_syscall(_SYS_LANDLOCK_CREATE, _bytes(attributes), size, 0), "landlock ruleset")
    for descriptor in readable:
        lists = _READ_DIR if stat.S_ISDIR(os.fstat(descriptor).st_mode) else 0
        _allow(ruleset, descriptor, _READ_FILE | lists)
    for descriptor in writable:
        _allow(ruleset, descriptor, _FILE_RIGHTS & handled)
    own = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    _allow(ruleset, own, _SCRATCH_RIGHTS & handled)
    os.close(own)
    return ruleset


def restrict_files(ruleset: int) -> None:
    """Apply a Landlock ruleset to this process, irrevocably; call `forbid_new_privileges` first.

    Raises:
        ConfinementError: The kernel refuses the ruleset.
    """
    _checked(_syscall(_SYS_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")


def _allow(ruleset: int, descriptor: int, rights: int) -> None:
    rule = _bytes(struct.pack("<Qi", rights, descriptor))  # packed struct landlock_path_beneath_attr
    _checked(_syscall(_SYS_LANDLOCK_ADD, ruleset, 1, rule, 0), "landlock_add_rule")


# --------------------------------------------------------------------------- limits and privileges


def limit(*, cpu_seconds: float, memory_bytes: int) -> None:
    """Set the resource limits of this process.

    The worker enforces a lower CPU limit, so the CPU limit of this process matters only if the worker fails.
    """
    cpu = int(cpu_seconds) + 2
    for kind, wanted in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, scratch.MAX_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))


def forbid_new_privileges() -> None:
    """Disable setuid programs for this process and its children; Landlock and seccomp require this."""
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")


def drop_capabilities() -> None:
    """Give up all capabilities of this process; root keeps its user id but loses its privileges."""
    _checked(_libc.capset(_CAPABILITY_HEADER, _NO_CAPABILITIES), "capset")


class SystemCallFilter:
    """The seccomp filter of untrusted programs; it is built once, and each process inserts its own id."""

    _ANY_PID = 0x7EADBEEF

    def __init__(self) -> None:
        self._code = seccomp.build_filter(self._ANY_PID, platform.machine())

    def install(self) -> None:
        """Apply the filter to this process, irrevocably; call `forbid_new_privileges` first.

        Raises:
            ConfinementError: The kernel refuses the filter.
        """
        code = self._code.replace(struct.pack("<I", self._ANY_PID), struct.pack("<I", os.getpid()))
        buffer = _bytes(code)
        # The bytes are a `struct sock_fprog`: number of instructions as an unsigned short, then a pointer.
        program = _bytes(struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer)))
        _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0), "PR_SET_SECCOMP")
