"""The system call filter gives the answers that the tables prescribe; the tests interpret its code."""

from __future__ import annotations

import errno
import functools
import struct

import pytest

from weighted_mtp_code_tasks.sandbox import syscalls
from weighted_mtp_code_tasks.sandbox.seccomp import build_filter as build_anew

PID = 4321
build_filter = functools.cache(build_anew)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
CONDITIONAL = ("CLONE", "KILL", "TGKILL", "SOCKETPAIR", "FCNTL", "IOCTL", "PRCTL", "PRLIMIT64")


def run(code: bytes, number: int, architecture: int, *arguments: int) -> int:
    """Interpret classic BPF for one `struct seccomp_data` and return the filter's answer."""
    words = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, architecture, 0, *(each & (1 << 64) - 1 for each in words))
    program = list(struct.iter_unpack("<HBBI", code))
    accumulator = position = 0
    while True:
        operation, if_true, if_false, operand = program[position]
        position += 1
        match operation:
            case 0x20:
                accumulator = struct.unpack_from("<I", data, operand)[0]
            case 0x54:
                accumulator &= operand
            case 0x05:
                position += operand
            case 0x15:
                position += if_true if accumulator == operand else if_false
            case 0x35:
                position += if_true if accumulator >= operand else if_false
            case 0x06:
                return operand
            case _:
                raise AssertionError(operation)


@pytest.fixture(params=ARCHITECTURES)
def machine(request: pytest.FixtureRequest) -> str:
    return request.param


def answer(machine: str, numbers: tuple[int, int], *arguments: int) -> int:
    column, architecture = ARCHITECTURES[machine]
    return run(build_filter(PID, machine), numbers[column], architecture, *arguments)


def test_every_call_gets_the_answer_of_its_table_and_the_unknown_do_not_exist(machine: str) -> None:
    column, architecture = ARCHITECTURES[machine]
    code = build_filter(PID, machine)
    expected = {
        numbers[column]: result
        for table, result in (
            (syscalls.ALLOWED, ALLOW),
            (syscalls.REFUSED, ERRNO | errno.EPERM),
            (syscalls.DEADLY, KILL),
        )
        for numbers in table.values()
    }
    conditional = {getattr(syscalls, name)[column] for name in CONDITIONAL}
    numbers = set(range(700)) - conditional

    actual = {number: run(code, number, architecture) for number in numbers}

    assert actual == {number: expected.get(number, ERRNO | errno.ENOSYS) for number in numbers}


def test_no_number_stands_in_two_tables() -> None:
    tables = (syscalls.ALLOWED, syscalls.REFUSED, syscalls.DEADLY)
    for column in (0, 1):
        numbers = [each[column] for table in tables for each in table.values() if each[column] >= 0]
        numbers += [getattr(syscalls, name)[column] for name in CONDITIONAL]

        assert len(numbers) == len(set(numbers))


def test_another_architecture_or_abi_ends_the_process(machine: str) -> None:
    column, architecture = ARCHITECTURES[machine]
    code = build_filter(PID, machine)
    read = syscalls.ALLOWED["read"][column]

    assert run(code, read, 0x40000003) == KILL  # i386
    assert run(code, read | 0x40000000, architecture) == KILL  # x32


def test_threads_may_start_and_processes_may_not(machine: str) -> None:
    thread = 0x3D0F00  # what glibc asks for
    assert answer(machine, syscalls.CLONE, thread) == ALLOW
    assert answer(machine, syscalls.CLONE, 17) == KILL  # fork
    assert answer(machine, syscalls.CLONE, 0x4111) == KILL  # vfork
    assert answer(machine, syscalls.CLONE, thread | 0x10000000) == KILL  # CLONE_NEWUSER


def test_a_program_signals_itself_and_nobody_else(machine: str) -> None:
    for numbers in (syscalls.KILL, syscalls.TGKILL):
        assert answer(machine, numbers, PID, 9) == ALLOW
        for other in (0, 1, -1, -PID, PID + 1):
            assert answer(machine, numbers, other, 9) == KILL


def test_only_stream_pairs_of_sockets(machine: str) -> None:
    assert answer(machine, syscalls.SOCKETPAIR, 1, 1 | 0o2000000) == ALLOW  # SOCK_CLOEXEC
    assert answer(machine, syscalls.SOCKETPAIR, 1, 2) == KILL  # datagram
    assert answer(machine, syscalls.SOCKETPAIR, 2, 1) == KILL  # AF_INET


def test_limits_may_be_read_and_not_set(machine: str) -> None:
    refused = ERRNO | errno.EPERM
    assert answer(machine, syscalls.PRLIMIT64, 0, 7, 0, 0x7FFF) == ALLOW
    assert answer(machine, syscalls.PRLIMIT64, PID, 7, 0, 0x7FFF) == ALLOW
    assert answer(machine, syscalls.PRLIMIT64, 0, 7, 0x7FFF, 0) == refused
    assert answer(machine, syscalls.PRLIMIT64, 0, 7, 1 << 32, 0) == refused
    assert answer(machine, syscalls.PRLIMIT64, 1, 7, 0, 0x7FFF) == refused


@pytest.mark.parametrize(
    ("numbers", "command", "result"),
    [
        (syscalls.FCNTL, 3, ALLOW),  # F_GETFL
        (syscalls.FCNTL, 8, ERRNO | errno.EPERM),  # F_SETOWN
        (syscalls.FCNTL, 1026, ERRNO | errno.EPERM),  # F_NOTIFY
        (syscalls.IOCTL, 0x5401, ALLOW),  # TCGETS, which isatty asks
        (syscalls.IOCTL, 0x5412, ERRNO | errno.ENOTTY),  # TIOCSTI
    ],
)
def test_commands_are_allowed_one_by_one(
    machine: str, numbers: tuple[int, int], command: int, result: int
) -> None:
    assert answer(machine, numbers, 0, command) == result


def test_a_process_may_name_itself_and_nothing_more(machine: str) -> None:
    assert answer(machine, syscalls.PRCTL, 15) == ALLOW  # PR_SET_NAME
    assert answer(machine, syscalls.PRCTL, 1) == ERRNO | errno.EPERM  # PR_SET_PDEATHSIG
