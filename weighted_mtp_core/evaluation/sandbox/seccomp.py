"""The seccomp filter of a candidate: an allow-list, written as BPF by hand so that no library is needed.

What an honest program has no business to call ends it with SIGSYS (so that the verdict is `violation`
whatever the program catches); what a library may probe for is answered with an error and does nothing.
Numbers: `arch/x86/entry/syscalls/syscall_64.tbl` and `include/uapi/asm-generic/unistd.h` of Linux.
"""

from __future__ import annotations

import errno
import platform
import struct

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}

# name: (x86_64, aarch64); -1 where the architecture does not have it.
_ALLOWED: dict[str, tuple[int, int]] = {
    "read": (0, 63),
    "write": (1, 64),
    "open": (2, -1),
    "close": (3, 57),
    "stat": (4, -1),
    "fstat": (5, 80),
    "lstat": (6, -1),
    "poll": (7, -1),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, -1),
    "pipe": (22, -1),
    "select": (23, -1),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "msync": (26, 227),
    "mincore": (27, 232),
    "madvise": (28, 233),
    "dup": (32, 23),
    "dup2": (33, -1),
    "pause": (34, -1),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "alarm": (37, -1),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "sendto": (44, 206),
    "recvfrom": (45, 207),
    "sendmsg": (46, 211),
    "recvmsg": (47, 212),
    "shutdown": (48, 210),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    "getsockopt": (55, 209),
    "exit": (60, 93),
    "uname": (63, 160),
    "flock": (73, 32),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "getdents": (78, -1),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "rename": (82, -1),
    "mkdir": (83, -1),
    "rmdir": (84, -1),
    "creat": (85, -1),
    "link": (86, -1),
    "unlink": (87, -1),
    "symlink": (88, -1),
    "readlink": (89, -1),
    "umask": (95, 166),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "getpgrp": (111, -1),
    "getgroups": (115, 158),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "getpriority": (140, 141),
    "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120),
    "arch_prctl": (158, -1),
    "sync_file_range": (277, 84),
    "gettid": (186, 178),
    "time": (201, -1),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "epoll_create": (213, -1),
    "getdents64": (217, 61),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "fadvise64": (221, 223),
    "timer_create": (222, 107),
    "timer_settime": (223, 110),
    "timer_gettime": (224, 108),
    "timer_getoverrun": (225, 109),
    "timer_delete": (226, 111),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "epoll_wait": (232, -1),
    "epoll_ctl": (233, 21),
    "openat": (257, 56),
    "mkdirat": (258, 34),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "epoll_pwait": (281, 22),
    "timerfd_create": (283, 85),
    "eventfd": (284, -1),
    "fallocate": (285, 47),
    "timerfd_settime": (286, 86),
    "timerfd_gettime": (287, 87),
    "eventfd2": (290, 19),
    "epoll_create1": (291, 20),
    "dup3": (292, 24),
    "pipe2": (293, 59),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "getcpu": (309, 168),
    "renameat2": (316, 276),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "copy_file_range": (326, 285),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "statx": (332, 291),
    "rseq": (334, 293),
    "close_range": (436, 436),
    "faccessat2": (439, 439),
    "epoll_pwait2": (441, 441),
}

# Ends the process: new processes, other processes, the network, the system.
_DEADLY: dict[str, tuple[int, int]] = {
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "socket": (41, 198),
    "connect": (42, 203),
    "accept": (43, 202),
    "bind": (49, 200),
    "listen": (50, 201),
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "semget": (64, 190),
    "semop": (65, 193),
    "msgget": (68, 186),
    "ptrace": (101, 117),
    "rt_sigqueueinfo": (129, 138),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "mount": (165, 40),
    "umount2": (166, 39),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, -1),
    "ioperm": (173, -1),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "quotactl": (179, 60),
    "tkill": (200, 130),
    "clock_settime": (227, 112),
    "mq_open": (240, 180),
    "kexec_load": (246, 104),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "accept4": (288, 242),
    "perf_event_open": (298, 241),
    "rt_tgsigqueueinfo": (297, 240),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "setns": (308, 268),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "finit_module": (313, 273),
    "kexec_file_load": (320, 294),
    "bpf": (321, 280),
    "execveat": (322, 281),
    "userfaultfd": (323, 282),
    "pidfd_send_signal": (424, 424),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "mount_setattr": (442, 442),
}

# Answered EPERM: they change what Landlock does not guard (modes, owners, times, others' limits).
_REFUSED: dict[str, tuple[int, int]] = {
    "truncate": (76, 45),
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "chown": (92, -1),
    "fchown": (93, 55),
    "lchown": (94, -1),
    "setuid": (105, 146),
    "setgid": (106, 144),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "setreuid": (113, 145),
    "setregid": (114, 143),
    "setgroups": (116, 159),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "utime": (132, -1),
    "mknod": (133, -1),
    "personality": (135, 92),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "mlock": (149, 228),
    "mlockall": (151, 230),
    "setrlimit": (160, 164),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "sched_setaffinity": (203, 122),
    "utimes": (235, -1),
    "ioprio_set": (251, 30),
    "inotify_add_watch": (254, 27),
    "mknodat": (259, 33),
    "fchownat": (260, 54),
    "futimesat": (261, -1),
    "fchmodat": (268, 53),
    "utimensat": (280, 88),
    "fanotify_init": (300, 262),
    "fchmodat2": (452, 452),
}

_CLONE = (56, 220)
_KILL = (62, 129)
_TGKILL = (234, 131)
_SOCKETPAIR = (53, 199)
_FCNTL = (72, 25)
_IOCTL = (16, 29)
_PRCTL = (157, 167)
_PRLIMIT64 = (302, 261)

# CLONE_VM | CLONE_SIGHAND | CLONE_THREAD must be there, no CLONE_NEW* may.
_THREAD_FLAGS = 0x100 | 0x800 | 0x10000
_NAMESPACE_FLAGS = 0x7E020000
# dup, flags, record locks, F_DUPFD_CLOEXEC, F_GETPIPE_SZ: nothing that sends signals (F_SETOWN, F_NOTIFY).
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
_IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIO*
_PRCTL_OPTIONS = (15, 16)  # PR_SET_NAME, PR_GET_NAME
_UNIX_STREAM = (1, 1)  # AF_UNIX, SOCK_STREAM

_RET_ALLOW = 0x7FFF0000
_RET_KILL = 0x80000000  # SECCOMP_RET_KILL_PROCESS
_RET_ERRNO = 0x00050000

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_GREATER_EQUAL = 0x35
_RETURN = 0x06

_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def supported() -> bool:
    """Whether there is a filter for this architecture."""
    return platform.machine() in _AUDIT_ARCH


def build_filter(pid: int, machine: str) -> bytes:
    """Return the filter as an array of `struct sock_filter`.

    Args:
        pid: The candidate's own process id (as it sees it itself): the only one it may signal.
        machine: `platform.machine()`.
    """
    column = _COLUMN[machine]
    program: list[_Instruction] = [
        (_LOAD, 0, 0, 4),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _RET_KILL),
        (_LOAD, 0, 0, 0),
        (_JUMP_GREATER_EQUAL, 0, 1, 0x40000000),  # the x32 ABI
        (_RETURN, 0, 0, _RET_KILL),
    ]
    for table, action in (
        (_ALLOWED, _RET_ALLOW),
        (_REFUSED, _RET_ERRNO | errno.EPERM),
        (_DEADLY, _RET_KILL),
    ):
        for numbers in table.values():
            if numbers[column] >= 0:
                program += [(_JUMP_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, action)]
    for numbers, conditions in _conditional_rules(pid):
        program += [(_JUMP_EQUAL, 0, len(conditions), numbers[column]), *conditions]
    program.append((_RETURN, 0, 0, _RET_ERRNO | errno.ENOSYS))
    return b"".join(struct.pack("<HBBI", *each) for each in program)


def _conditional_rules(pid: int) -> list[tuple[tuple[int, int], list[_Instruction]]]:
    eperm = _RET_ERRNO | errno.EPERM
    family, kind = _UNIX_STREAM
    thread = [
        (_LOAD, 0, 0, _argument(0)),
        (_AND, 0, 0, _THREAD_FLAGS | _NAMESPACE_FLAGS),
        (_JUMP_EQUAL, 0, 1, _THREAD_FLAGS),
        (_RETURN, 0, 0, _RET_ALLOW),
        (_RETURN, 0, 0, _RET_KILL),
    ]
    # A stream pair (asyncio's) cannot be addressed elsewhere; a datagram one could reach any socket file.
    pair = [
        (_LOAD, 0, 0, _argument(0)),
        (_JUMP_EQUAL, 0, 4, family),
        (_LOAD, 0, 0, _argument(1)),
        (_AND, 0, 0, 0xF),
        (_JUMP_EQUAL, 0, 1, kind),
        (_RETURN, 0, 0, _RET_ALLOW),
        (_RETURN, 0, 0, _RET_KILL),
    ]
    # Reading its own limits is fine; with a new limit or another's pid it is not.
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
        (_CLONE, thread),
        (_SOCKETPAIR, pair),
        (_PRLIMIT64, limits),
        (_KILL, _one_of(0, (pid,), otherwise=_RET_KILL)),
        (_TGKILL, _one_of(0, (pid,), otherwise=_RET_KILL)),
        (_FCNTL, _one_of(1, _FCNTL_COMMANDS, otherwise=eperm)),
        (_IOCTL, _one_of(1, _IOCTL_COMMANDS, otherwise=_RET_ERRNO | errno.ENOTTY)),
        (_PRCTL, _one_of(0, _PRCTL_OPTIONS, otherwise=eperm)),
    ]


def _argument(index: int) -> int:
    """Return the offset of the low word of a system call's argument (both architectures are little-endian)."""
    return 16 + 8 * index


def _one_of(index: int, values: tuple[int, ...], *, otherwise: int) -> list[_Instruction]:
    """Allow the call if the low word of an argument is one of `values`; the kernel reads these as ints."""
    compare = [(_JUMP_EQUAL, len(values) - position, 0, value) for position, value in enumerate(values)]
    return [
        (_LOAD, 0, 0, _argument(index)),
        *compare,
        (_RETURN, 0, 0, otherwise),
        (_RETURN, 0, 0, _RET_ALLOW),
    ]
