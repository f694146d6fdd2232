"""System calls that Python lacks or that need care: syncfs, renameat2, copies inside the kernel, safe opening."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from functools import cache
from typing import Final

from flowengine.errors import FlowError, LocalError, TemporaryError
from flowengine.units import show_path

__all__ = [
    "READ_FILE",
    "READ_FOLDER",
    "boot_id",
    "copy_range",
    "exchange",
    "folds_names",
    "gives_modes",
    "libc",
    "local_error",
    "open_beneath",
    "process_umask",
    "raise_descriptor_limit",
    "start_writeback",
    "sync_filesystem",
]

READ_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""How a file is opened that was one when it was listed: no link is followed, and a pipe in its place holds nobody up."""
READ_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
"""How a folder is opened: one, and no link to one."""

_RENAME_EXCHANGE: Final = 2
_SYNC_FILE_RANGE_WRITE: Final = 2
_COPY_BYTES: Final = 1 << 20
_umask_lock = threading.Lock()


@cache
def libc() -> ctypes.CDLL:
    """The C library, for system calls that Python has no function for."""
    return ctypes.CDLL(None, use_errno=True)


def sync_filesystem(fd: int) -> None:
    """Make all that was written to the file system of `fd` durable (syncfs(2)).

    Raises:
        OSError: the file system reported a write error since it was last asked.
    """
    if libc().syncfs(fd):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def start_writeback(fd: int, offset: int, size_bytes: int) -> None:
    """Let the system begin to write a part of a file to its disk, and do not wait for it (sync_file_range(2)).

    What is to be made durable sooner or later goes evenly then: left until a sync, it comes at once and holds up those
    that go on writing to the file. It is a hint: where the file system does not know it, nothing happens.
    """
    begin = getattr(libc(), "sync_file_range", None)
    if begin is not None:
        begin(fd, ctypes.c_int64(offset), ctypes.c_int64(size_bytes), _SYNC_FILE_RANGE_WRITE)


def exchange(a: bytes, b: bytes) -> None:
    """Swap two paths of one file system in one step (renameat2(2) with RENAME_EXCHANGE).

    Raises:
        OSError: EINVAL where the file system cannot, EXDEV or EBUSY for mount points.
    """
    if libc().renameat2(-100, a, -100, b, _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), a)


def copy_range(
    source_fd: int, source_offset: int, target_fd: int, target_offset: int, size_bytes: int
) -> None:
    """Copy bytes between two files, by reference or inside the kernel where the file system can.

    Raises:
        OSError: as the system says; EIO when the source is too short.
    """
    done = 0
    while done < size_bytes:
        try:
            got = os.copy_file_range(
                source_fd, target_fd, size_bytes - done, source_offset + done, target_offset + done
            )
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            data = os.pread(source_fd, min(_COPY_BYTES, size_bytes - done), source_offset + done)
            got = os.pwrite(target_fd, data, target_offset + done) if data else 0
        if got == 0:
            raise OSError(errno.EIO, "the file copied from is shorter than it was")
        done += got


def open_beneath(root_fd: int, path: bytes, flags: int, mode: int = 0o600) -> int:
    """Open `path` below `root_fd`, following no link in any component.

    Raises:
        OSError: ELOOP or ENOTDIR where a component is a link.
    """
    parts = path.split(b"/") if path else [b"."]
    fd = os.dup(root_fd)
    try:
        for part in parts[:-1]:
            below = os.open(part, READ_FOLDER, dir_fd=fd)
            os.close(fd)
            fd = below
        return os.open(parts[-1], flags | os.O_NOFOLLOW, mode, dir_fd=fd)
    finally:
        os.close(fd)


@cache
def boot_id() -> bytes:
    """Names this run of the kernel: what was written under the same id is still there, synced or not."""
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return file.read().strip()
    return b""


def process_umask() -> int:
    """The bits that are taken from the modes of what this process makes.

    Read from where the kernel shows it: `umask(2)` tells it only by setting another, and what other threads make in that
    moment would get that one, for good.
    """
    try:
        with open("/proc/self/status", "rb") as status:
            for line in status:
                if line.startswith(b"Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass
    with _umask_lock:
        umask = os.umask(0o077)
        os.umask(umask)
    return umask


def raise_descriptor_limit() -> None:
    """Let this process open as many files as the system allows it (at most 65,536)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def local_error(error: OSError, what: str, path: bytes) -> FlowError:
    """An operating system error with its place, cause and next step."""
    where = show_path(path)
    cause = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TemporaryError(
            f"{what} {where}: {cause}",
            hint="make room (or raise the quota) and run the same command again: it continues, nothing that landed is lost",
            reason="disk-full",
        )
    if error.errno == errno.EROFS:
        return LocalError(
            f"{what} {where}: the file system is read-only", hint="mount it writable or choose another target"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return LocalError(
            f"{what} {where}: {cause}",
            hint="the account that runs this needs the right to do that",
            reason="permission",
        )
    return LocalError(f"{what} {where}: {cause}", reason="local")


def gives_modes(folder_fd: int) -> bool:
    """Whether files can be given any mode once they are made; makes one in a folder for a moment."""
    probe = "s.probe-mode"
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=folder_fd)
        try:
            os.fchmod(fd, 0o666)
            return os.fstat(fd).st_mode & 0o777 == 0o666
        finally:
            os.close(fd)
            os.unlink(probe, dir_fd=folder_fd)
    except OSError:
        return False


def folds_names(folder_fd: int) -> bool:
    """Whether a file system takes names of another case or Unicode form for the same; makes a file in a folder for a moment."""
    probe, others = "s.probe-\u00e9", ("S.PROBE-\u00c9", "s.probe-e\u0301")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=folder_fd))
        try:
            for other in others:
                with contextlib.suppress(FileNotFoundError):
                    os.stat(other, dir_fd=folder_fd)
                    return True
            return False
        finally:
            os.unlink(probe, dir_fd=folder_fd)
    except OSError:
        return True  # a file system that refuses such names is not one to be trusted with them
