"""Runs a function in a forked process and stops it at each system call that changes a file system.

A seccomp filter passes exactly those calls to the parent, which traces it (ptrace), whether Python, numpy or the C
library makes them. At the n-th call the parent kills the process, or lets half of a write through and then kills it, or
makes the call fail with an error number, or sends a signal. A run costs a fork, not the start of an interpreter.
Works on Linux on x86-64 or AArch64; `unavailable` returns why it cannot work here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_LIBC.ptrace.restype = ctypes.c_long

_TRACEME, _CONT, _GETREGSET, _SETREGSET, _SYSCALL, _SETOPTIONS = 0, 7, 0x4204, 0x4205, 24, 0x4200
_O_TRACESECCOMP, _O_EXITKILL, _EVENT_SECCOMP = 0x80, 0x100000, 7
_NO_NEW_PRIVS, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_NT_PRSTATUS, _NT_ARM_SYSTEM_CALL = 1, 0x404
_FICLONE = 0x40049409

CALLS = {
    "x86_64": {
        "write": 1,
        "pwrite64": 18,
        "writev": 20,
        "pwritev": 296,
        "pwritev2": 328,
        "sendfile": 40,
        "splice": 275,
        "copy_file_range": 326,
        "fallocate": 285,
        "truncate": 76,
        "ftruncate": 77,
        "fsync": 74,
        "fdatasync": 75,
        "sync_file_range": 277,
        "sync": 162,
        "syncfs": 306,
        "msync": 26,
        "rename": 82,
        "renameat": 264,
        "renameat2": 316,
        "unlink": 87,
        "unlinkat": 263,
        "rmdir": 84,
        "mkdir": 83,
        "mkdirat": 258,
        "link": 86,
        "linkat": 265,
        "symlink": 88,
        "symlinkat": 266,
        "chmod": 90,
        "fchmod": 91,
        "fchmodat": 268,
        "fchmodat2": 452,
        "utimensat": 280,
        "setxattr": 188,
        "lsetxattr": 189,
        "fsetxattr": 190,
        "creat": 85,
    },
    "aarch64": {
        "write": 64,
        "pwrite64": 68,
        "writev": 66,
        "pwritev": 70,
        "pwritev2": 287,
        "sendfile": 71,
        "splice": 76,
        "copy_file_range": 285,
        "fallocate": 47,
        "truncate": 45,
        "ftruncate": 46,
        "fsync": 82,
        "fdatasync": 83,
        "sync_file_range": 84,
        "sync": 81,
        "syncfs": 267,
        "msync": 227,
        "renameat": 38,
        "renameat2": 276,
        "unlinkat": 35,
        "mkdirat": 34,
        "linkat": 37,
        "symlinkat": 36,
        "fchmod": 52,
        "fchmodat": 53,
        "fchmodat2": 452,
        "utimensat": 88,
        "setxattr": 5,
        "lsetxattr": 6,
        "fsetxattr": 7,
    },
}
"""System calls that write, sync, rename, remove, create or truncate. ``openat`` with O_CREAT and FICLONE are added."""
_OPENAT = {"x86_64": 257, "aarch64": 56}
_IOCTL = {"x86_64": 16, "aarch64": 29}
_LAYOUT = {"x86_64": (27, 15, 10, (14, 13, 12, 7, 8)), "aarch64": (34, 8, 0, (0, 1, 2, 3, 4))}
"""Machine -> number of registers, and those of the call's number, its result and its arguments."""

COUNTED = {"write": 2, "pwrite64": 2, "copy_file_range": 4, "sendfile": 3}
"""Calls that can do a part of their work -> the argument with its size."""
_BY_DESCRIPTOR = (
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "pwritev2",
    "sendfile",
    "ftruncate",
    "fsync",
    "fdatasync",
    "fchmod",
    "fallocate",
    "fsetxattr",
    "sync_file_range",
    "syncfs",
    "ioctl",
)

DONE, RAISED, INTERRUPTED, BROKEN = 0, 3, 4, 5
"""Exit codes of the child: it finished, raised an allowed error, was interrupted, or none of these."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        calls: The calls seen, "name path".
        code: The exit code, or minus the signal that ended it.
        error: The exception, if there was one.
    """

    calls: tuple[str, ...]
    code: int
    error: str


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th call.

    Attributes:
        at: Number of the call, from 1; 0 for none.
        kind: "kill", "tear" (half of a write, then kill), "errno" or "signal".
        number: The error number or signal number.
        ever: Later calls with these names fail too.
    """

    at: int = 0
    kind: str = "kill"
    number: int = 0
    ever: tuple[str, ...] = ()


@cache
def unavailable() -> str | None:
    """Why processes cannot be traced here; None if they can."""
    if platform.system() != "Linux" or platform.machine() not in CALLS:
        return f"no tracer for {platform.system()} on {platform.machine()}"
    try:
        outcome = run(lambda: os.close(os.open(os.devnull, os.O_WRONLY | os.O_CREAT)), ())
    except OSError as error:
        return f"no process can be traced here: {error}"
    return None if outcome.code == DONE and len(outcome.calls) == 1 else f"tracing does not work here: {outcome}"


def run(function: Callable[[], None], allowed: tuple[type[BaseException], ...], fault: Fault | None = None) -> Outcome:
    """Run a function in a forked process, with a fault.

    Args:
        function: The function.
        allowed: Exceptions that it may raise.
        fault: The fault, if any.
    """
    shared = mmap.mmap(-1, 1 << 16)
    pid = os.fork()
    if pid == 0:
        os._exit(_child(function, allowed, shared))
    try:
        return _watch(pid, fault or Fault(), shared)
    finally:
        shared.close()


def _child(function: Callable[[], None], allowed: tuple[type[BaseException], ...], shared: mmap.mmap) -> int:
    try:
        if _LIBC.ptrace(_TRACEME, 0, None, None) != 0:
            return BROKEN
        sys.dont_write_bytecode = True  # a module imported here first would be written in one run and not in the next
        os.kill(os.getpid(), signal.SIGSTOP)
        _install_filter()
        function()
    except KeyboardInterrupt:
        return INTERRUPTED
    except allowed as error:
        shared.write(f"{type(error).__name__}: {error}".encode()[:60000])
        return RAISED
    except BaseException:
        shared.write(traceback.format_exc().encode()[-60000:])
        return BROKEN
    return DONE


def _install_filter() -> None:
    machine = platform.machine()
    numbers = sorted(CALLS[machine].values())
    code: list[tuple[int, int, int, int]] = [(0x20, 0, 0, 0)]  # the call's number
    rest = 6  # instructions between the list of numbers and ALLOW
    code += [(0x15, len(numbers) - place + rest, 0, number) for place, number in enumerate(numbers)]
    code += [
        (0x15, 0, 2, _OPENAT[machine]),
        (0x20, 0, 0, 32),
        (0x45, 4, 3, os.O_CREAT),
        (0x15, 0, 2, _IOCTL[machine]),
        (0x20, 0, 0, 24),
        (0x15, 1, 0, _FICLONE),
        (0x06, 0, 0, 0x7FFF0000),
        (0x06, 0, 0, 0x7FF00000),
    ]
    program = b"".join(struct.pack("HBBI", *line) for line in code)
    buffer = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer)))
    _LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    if _LIBC.prctl(_SET_SECCOMP, _MODE_FILTER, header, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if _LIBC.ptrace(request, pid, address, data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


def _watch(pid: int, fault: Fault, shared: mmap.mmap) -> Outcome:
    calls: list[str] = []
    torn = False
    _, status = os.waitpid(pid, 0)
    if os.WIFSTOPPED(status):
        _ptrace(_SETOPTIONS, pid, 0, _O_TRACESECCOMP | _O_EXITKILL)
        _ptrace(_CONT, pid)
        _, status = os.waitpid(pid, 0)
    while os.WIFSTOPPED(status):
        forward, resume, killed = 0, _CONT, False
        if status >> 8 == signal.SIGTRAP | _EVENT_SECCOMP << 8:
            registers = _registers(pid)
            calls.append(_describe(pid, registers))
            if len(calls) == fault.at:
                if fault.kind == "kill":
                    os.kill(pid, signal.SIGKILL)
                    killed = True
                elif fault.kind == "signal":
                    os.kill(pid, fault.number)
                elif fault.kind == "errno":
                    _fail(pid, registers, fault.number)
                else:
                    _halve(pid, registers, calls[-1].partition(" ")[0])
                    torn, resume = True, _SYSCALL
            elif 0 < fault.at < len(calls) and calls[-1].partition(" ")[0] in fault.ever:
                _fail(pid, registers, fault.number)
        elif torn:
            os.kill(pid, signal.SIGKILL)
            killed = True
        else:
            forward = os.WSTOPSIG(status)
        if not killed:
            _ptrace(resume, pid, 0, forward)
        _, status = os.waitpid(pid, 0)
    text = shared[:].rstrip(b"\0").decode(errors="replace")
    return Outcome(tuple(calls), os.waitstatus_to_exitcode(status), text)


class _IOVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _registers(pid: int) -> ctypes.Array[ctypes.c_uint64]:
    registers = (ctypes.c_uint64 * _LAYOUT[platform.machine()][0])()
    vector = _IOVector(ctypes.addressof(registers), ctypes.sizeof(registers))
    _ptrace(_GETREGSET, pid, _NT_PRSTATUS, ctypes.addressof(vector))
    return registers


def _set_registers(pid: int, registers: ctypes.Array[ctypes.c_uint64]) -> None:
    vector = _IOVector(ctypes.addressof(registers), ctypes.sizeof(registers))
    _ptrace(_SETREGSET, pid, _NT_PRSTATUS, ctypes.addressof(vector))


def _fail(pid: int, registers: ctypes.Array[ctypes.c_uint64], number: int) -> None:
    """Skip the call and make it return an error."""
    _, call, result, _ = _LAYOUT[platform.machine()]
    registers[result] = (1 << 64) - number
    if platform.machine() == "x86_64":
        registers[call] = (1 << 64) - 1
        _set_registers(pid, registers)
        return
    _set_registers(pid, registers)
    none = ctypes.c_int(-1)
    vector = _IOVector(ctypes.addressof(none), ctypes.sizeof(none))
    _ptrace(_SETREGSET, pid, _NT_ARM_SYSTEM_CALL, ctypes.addressof(vector))


def _halve(pid: int, registers: ctypes.Array[ctypes.c_uint64], name: str) -> None:
    place = _LAYOUT[platform.machine()][3][COUNTED[name]]
    registers[place] = max(1, registers[place] // 2)
    _set_registers(pid, registers)


def _describe(pid: int, registers: ctypes.Array[ctypes.c_uint64]) -> str:
    """The call's name and the file that it concerns."""
    machine = platform.machine()
    _, call, _, arguments = _LAYOUT[machine]
    names = {number: name for name, number in CALLS[machine].items()}
    name = names.get(registers[call], "openat" if registers[call] == _OPENAT[machine] else "ioctl")
    values = [registers[place] for place in arguments]
    try:
        if name in (*_BY_DESCRIPTOR, "copy_file_range"):
            number = values[2] if name == "copy_file_range" else values[0]
            return f"{name} {os.readlink(f'/proc/{pid}/fd/{number}')}"
        second = {"rename": 1, "renameat": 3, "renameat2": 3, "link": 1, "linkat": 3, "symlink": 1, "symlinkat": 2}
        place = second.get(name, 1 if name.endswith("at") or name.endswith("at2") else 0)
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(values[place])
            return f"{name} {memory.read(512).partition(bytes(1))[0].decode(errors='replace')}"
    except OSError:
        return f"{name} ?"
