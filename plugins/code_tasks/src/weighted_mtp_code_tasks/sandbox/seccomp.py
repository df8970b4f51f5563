"""The seccomp filter of untrusted programs: a list of allowed system calls, as handwritten BPF instructions.

A system call that no honest program needs ends the process with SIGSYS. The verdict is then `violation`,
whatever exceptions the program catches. A forbidden system call that libraries may try returns an error and
has no effect; the same holds for a system call that `syscalls` does not contain.
"""

from __future__ import annotations

import errno
import platform
import struct

from . import syscalls
from .syscalls import Numbers

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}


# CLONE_VM | CLONE_SIGHAND | CLONE_THREAD must be set; none of the flags CLONE_NEW* may be set.
_THREAD_FLAGS = 0x100 | 0x800 | 0x10000
_NAMESPACE_FLAGS = 0x7E020000
# Commands for dup, flags and record locks, F_DUPFD_CLOEXEC and F_GETPIPE_SZ, but none that can send signals
# (F_SETOWN, F_NOTIFY).
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIO*
_PRCTL_OPTIONS = (15, 16)  # PR_SET_NAME, PR_GET_NAME
_UNIX_STREAM = (1, 1)  # AF_UNIX, SOCK_STREAM

_RET_ALLOW = 0x7FFF0000
_RET_KILL = 0x80000000  # SECCOMP_RET_KILL_PROCESS
_RET_ERRNO = 0x00050000

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP = 0x05  # BPF_JMP | BPF_JA
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_GREATER_EQUAL = 0x35
_RETURN = 0x06

_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def supported() -> bool:
    """Return whether there is a filter for the architecture of this machine."""
    return platform.machine() in _AUDIT_ARCH


def build_filter(pid: int, machine: str) -> bytes:
    """Return the filter as an array of `struct sock_filter`.

    The number of the system call is found in a binary tree. A linear list would cost a millisecond per
    program, because the kernel runs each new filter once for every number, to record which calls are always
    allowed.

    Args:
        pid: Process id of the program in its own namespace; the program may send signals only to itself.
        machine: Name of the architecture, as from `platform.machine()`.
    """
    program: list[_Instruction] = [
        (_LOAD, 0, 0, 4),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _RET_KILL),
        (_LOAD, 0, 0, 0),
        (_JUMP_GREATER_EQUAL, 0, 1, 0x40000000),  # the x32 ABI
        (_RETURN, 0, 0, _RET_KILL),
        *_tree(_runs(_answers(pid, _COLUMN[machine]))),
    ]
    return b"".join(struct.pack("<HBBI", *each) for each in program)


def _answers(pid: int, column: int) -> dict[int, list[_Instruction]]:
    """Return the instructions of the filter for each known number of a system call."""
    answers: dict[int, list[_Instruction]] = {}
    for table, action in (
        (syscalls.ALLOWED, _RET_ALLOW),
        (syscalls.REFUSED, _RET_ERRNO | errno.EPERM),
        (syscalls.DEADLY, _RET_KILL),
    ):
        answers |= {numbers[column]: [(_RETURN, 0, 0, action)] for numbers in table.values()}
    answers |= {numbers[column]: conditions for numbers, conditions in _conditional_rules(pid)}
    answers.pop(-1, None)
    return answers


def _runs(answers: dict[int, list[_Instruction]]) -> list[tuple[int, list[_Instruction]]]:
    """Return pairs (first number, instructions), one for each range of numbers with equal instructions."""
    unknown = [(_RETURN, 0, 0, _RET_ERRNO | errno.ENOSYS)]
    runs: list[tuple[int, list[_Instruction]]] = []
    for number in range(max(answers) + 2):
        answer = answers.get(number, unknown)
        if not runs or runs[-1][1] != answer:
            runs.append((number, answer))
    return runs


def _tree(runs: list[tuple[int, list[_Instruction]]]) -> list[_Instruction]:
    if len(runs) == 1:
        return runs[0][1]
    middle = len(runs) // 2
    below, above = _tree(runs[:middle]), _tree(runs[middle:])
    # A conditional jump skips at most 255 instructions; an unconditional jump can skip any number.
    return [
        (_JUMP_GREATER_EQUAL, 0, 1, runs[middle][0]),
        (_JUMP, 0, 0, len(below)),
        *below,
        *above,
    ]


def _conditional_rules(pid: int) -> list[tuple[Numbers, list[_Instruction]]]:
    eperm = _RET_ERRNO | errno.EPERM
    family, kind = _UNIX_STREAM
    thread = [
        (_LOAD, 0, 0, _argument(0)),
        (_AND, 0, 0, _THREAD_FLAGS | _NAMESPACE_FLAGS),
        (_JUMP_EQUAL, 0, 1, _THREAD_FLAGS),
        (_RETURN, 0, 0, _RET_ALLOW),
        (_RETURN, 0, 0, _RET_KILL),
    ]
    # Stream sockets of a pair, as in asyncio, can send only to each other; a datagram socket of a pair could
    # send to any socket file.
    pair = [
        (_LOAD, 0, 0, _argument(0)),
        (_JUMP_EQUAL, 0, 4, family),
        (_LOAD, 0, 0, _argument(1)),
        (_AND, 0, 0, 0xF),
        (_JUMP_EQUAL, 0, 1, kind),
        (_RETURN, 0, 0, _RET_ALLOW),
        (_RETURN, 0, 0, _RET_KILL),
    ]
    # A program may read its own limits, but may not set limits or read those of another process.
    limits = [
        (_LOAD, 0, 0, _argument(2)),
        (_JUMP_EQUAL, 0, 6, 0),
        (_LOAD, 0, 0, _argument(2) + 4),
        (_JUMP_EQUAL, 0, 4, 0),
        (_LOAD, 0, 0, _argument(0)),
        (_JUMP_EQUAL, 1, 0, 0),
        (_JUMP_EQUAL, 0, 1, pid),
        (_RETURN, 0, 0, _RET_ALLOW),
        (_RETURN, 0, 0, eperm),
    ]
    return [
        (syscalls.CLONE, thread),
        (syscalls.SOCKETPAIR, pair),
        (syscalls.PRLIMIT64, limits),
        (syscalls.KILL, _one_of(0, (pid,), otherwise=_RET_KILL)),
        (syscalls.TGKILL, _one_of(0, (pid,), otherwise=_RET_KILL)),
        (syscalls.FCNTL, _one_of(1, _FCNTL_COMMANDS, otherwise=eperm)),
        (syscalls.IOCTL, _one_of(1, _IOCTL_COMMANDS, otherwise=_RET_ERRNO | errno.ENOTTY)),
        (syscalls.PRCTL, _one_of(0, _PRCTL_OPTIONS, otherwise=eperm)),
    ]


def _argument(index: int) -> int:
    """Return the offset of the low 32 bits of an argument; both architectures are little-endian."""
    return 16 + 8 * index


def _one_of(index: int, values: tuple[int, ...], *, otherwise: int) -> list[_Instruction]:
    """Return instructions that allow the call if an argument is one of `values`.

    Only the low 32 bits of the argument are compared, because the kernel reads it as an int.
    """
    compare = [(_JUMP_EQUAL, len(values) - position, 0, value) for position, value in enumerate(values)]
    return [
        (_LOAD, 0, 0, _argument(index)),
        *compare,
        (_RETURN, 0, 0, otherwise),
        (_RETURN, 0, 0, _RET_ALLOW),
    ]
