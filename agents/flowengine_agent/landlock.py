"""Confinement by the kernel: a process that cannot open what lies outside some folders, nor dial anywhere (landlock(7)).

Path by path the code reaches nothing else anyway; this holds where a bug in what reads a peer's messages does not.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from typing import Final

__all__ = ["LEAST_VERSION", "confine", "version"]

LEAST_VERSION: Final = 2
"""Before it (Linux 5.19) nothing can be renamed from one folder into another, and nothing would land."""
_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_ASK_VERSION: Final = 1
_PATH_BENEATH: Final = 1

_READ: Final = 1 << 2 | 1 << 3  # files, folders
_WRITE: Final = sum(
    1 << bit for bit in (1, 4, 5, 7, 8, 10, 12)
)  # write, remove, make folders, files, pipes, links
_EXECUTE: Final = 1 << 0
_DEVICES: Final = 1 << 6 | 1 << 9 | 1 << 11  # character devices, sockets, block devices
_REFER: Final = 1 << 13
_TRUNCATE: Final = 1 << 14
_TCP: Final = 1 << 0 | 1 << 1  # bind, connect
_SCOPES: Final = 1 << 0 | 1 << 1  # abstract sockets, signals

_libc: Final = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """What this kernel offers; 0 for nothing."""
    found = int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_ASK_VERSION)))
    return max(0, found)


def confine(read: Iterable[str], write: Iterable[str]) -> bool:
    """Let this thread and what it starts open nothing but what lies below these paths, for good; for one thread alone.

    Paths that are not there, or not to be reached by this account, are left out. What is open stays so. Needs
    `no_new_privs`.

    Args:
        read: what may be read below.
        write: what may be read and changed below.

    Returns:
        Whether it holds: False where the kernel does not offer it.

    Raises:
        OSError: the kernel offers it, and refused.
    """
    offered = version()
    if offered < LEAST_VERSION:
        return False
    changes = _WRITE | _REFER | (_TRUNCATE if offered >= 3 else 0)
    handled = struct.pack("=Q", _READ | _EXECUTE | _DEVICES | changes)
    if offered >= 4:
        handled += struct.pack("=Q", _TCP)
    if offered >= 6:
        handled += struct.pack("=Q", _SCOPES)
    rules = _checked(
        _libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), ctypes.c_uint32(0))
    )
    try:
        for paths, allowed in ((read, _READ), (write, _READ | changes)):
            for path in paths:
                _allow(rules, path, allowed)
        _checked(_libc.syscall(_RESTRICT_SELF, ctypes.c_int(rules), ctypes.c_uint32(0)))
    finally:
        os.close(rules)
    return True


def _allow(rules: int, path: str, allowed: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):
            allowed &= 1 << 1 | 1 << 2 | _TRUNCATE  # what can be done to a file
        rule = struct.pack("=Qi", allowed, fd)
        _checked(
            _libc.syscall(
                _ADD_RULE, ctypes.c_int(rules), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint32(0)
            )
        )
    finally:
        os.close(fd)


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"landlock: {os.strerror(error)}")
    return result
