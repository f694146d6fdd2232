"""What the kernel lets this process do: capabilities, account, and giving both up (prctl(2), capset(2), credentials(7)).

Only what the spawner of movers needs. Everything is checked after it was done: a process that could not give a right up
must not go on.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from typing import Final

import flowengine
from flowengine.errors import LocalError

__all__ = [
    "CAP_SETGID",
    "CAP_SETUID",
    "become",
    "capabilities_of",
    "end_with_parent",
    "keep_only",
    "lock_down",
]

CAP_SETGID: Final = 6
CAP_SETUID: Final = 7
_CAP_SETPCAP: Final = 8
_LAST_CAP: Final = 63

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_KEEPCAPS: Final = 8
_PR_SET_NAME: Final = 15
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_LINUX_CAPABILITY_VERSION_3: Final = 0x20080522

_libc: Final = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(ctypes.c_int(option), *padded) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl {option}: {os.strerror(error)}")


def capabilities_of(*sets: str) -> frozenset[int]:
    """Capabilities in some of this process's sets ("CapEff", "CapPrm", "CapInh", "CapAmb"); in any where none is named."""
    bits = 0
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in (sets or ("CapEff", "CapPrm", "CapInh", "CapAmb")):
                bits |= int(value, 16)
    return frozenset(number for number in range(64) if bits >> number & 1)


def keep_only(kept: Iterable[int]) -> None:
    """Give up all capabilities but these, for good: ambient, inheritable and, where that may be done, bounding too.

    Raises:
        LocalError: the kernel refused, or this process still has another one.
    """
    wanted = frozenset(kept)
    have = capabilities_of("CapPrm")
    if not wanted <= have:
        raise LocalError(f"this process lacks the capabilities {sorted(wanted - have)}", reason="local")
    if _CAP_SETPCAP in have:
        for number in range(_LAST_CAP):
            if number not in wanted:
                try:
                    _prctl(_PR_CAPBSET_DROP, number)
                except OSError:
                    break  # above the last that this kernel knows
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    data = (_Data * 2)()
    for number in wanted:
        data[number // 32].effective |= 1 << number % 32
        data[number // 32].permitted |= 1 << number % 32
    header = _Header(_LINUX_CAPABILITY_VERSION_3, 0)
    if _libc.capset(ctypes.byref(header), ctypes.byref(data)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "capset")
    if capabilities_of() != wanted:
        raise LocalError("capabilities could not be given up", hint="report this as a bug", reason="local")


def become(uid: int, gid: int, groups: Iterable[int], *, keep_capabilities: bool = False) -> None:
    """Be another account from now on, with no way back but the capabilities that are kept.

    Raises:
        OSError: this process may not.
        LocalError: it did not become that account whole.
    """
    if keep_capabilities:
        _prctl(_PR_SET_KEEPCAPS, 1)
    wanted = sorted({gid, *groups})
    os.setgroups(wanted)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid,) * 3 or os.getresgid() != (gid,) * 3 or sorted(os.getgroups()) != wanted:
        raise LocalError(f"this process did not become user id {uid}", hint="report this as a bug")
    try:
        for needed in (os.__file__, flowengine.__file__):
            os.stat(needed)
    except OSError as error:
        raise LocalError(
            f"user id {uid} may not read the program itself: {error.filename}: {error.strerror}",
            hint="install Python and flowengine where every mapped account may read them, as in /opt",
        ) from None


def lock_down(name: str) -> None:
    """Gain nothing by running a program, be seen into by no process of the same account, leave no core."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    buffer = ctypes.create_string_buffer(name.encode("ascii")[:15])
    _libc.prctl(ctypes.c_int(_PR_SET_NAME), buffer, 0, 0, 0)


def end_with_parent(parent: int) -> None:
    """Be killed when the parent ends; after the last change of account, which takes this back.

    Raises:
        SystemExit: it ended meanwhile.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)
