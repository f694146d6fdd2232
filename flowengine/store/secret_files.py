"""Files that hold secrets: written whole or not at all, readable by their owner alone, refused where others can read them."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Final

from flowengine.errors import FlowError, LocalError, NotFound

__all__ = ["make_secret_folder", "read_secret", "write_secret"]

MAX_SECRET_FILE_BYTES: Final = 1 << 20


def write_secret(path: str, data: bytes, *, replace: bool = True) -> None:
    """Write a secret durably and in one step, with mode 0600 from its first byte on.

    Args:
        path: where; its folder must exist.
        data: all of it.
        replace: whether a file of that name may be replaced.

    Raises:
        LocalError: the system refused, or the file exists and may not be replaced.
    """
    folder, name = os.path.split(os.path.abspath(path))
    part = f"{path}.{os.getpid()}.part"
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            os.fchmod(fd, 0o600)  # whatever the umask
            file.write(data)
            file.flush()
            os.fsync(fd)
        if replace:
            os.replace(part, path)
        else:
            os.link(part, path)
            os.unlink(part)
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder_fd)
        finally:
            os.close(folder_fd)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise _refused(error, f"cannot write the secret file {name} in", os.fsencode(folder)) from None


def read_secret(path: str) -> bytes:
    """What is in a secret file, or comes by a pipe (of a password manager: a shell's `<(…)`); that is read to its end.

    Raises:
        NotFound: there is none.
        LocalError: it cannot be read, is neither file nor pipe, is too large, a pipe that nobody has written to, or others
            than its owner can read or write it.
    """
    try:
        # A pipe without a writer holds nobody up.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            st = os.fstat(fd)
            piped = stat.S_ISFIFO(st.st_mode)
            if not piped and not stat.S_ISREG(st.st_mode):
                raise LocalError(f"{path} is no file", hint="name the file that holds the secret")
            if st.st_mode & 0o077:
                raise LocalError(
                    f"{path} holds a secret and others can read it (mode {stat.S_IMODE(st.st_mode):04o})",
                    hint=f"chmod 600 {path}; take a new secret where somebody else may have read this one",
                )
            os.set_blocking(fd, True)
            data = file.read(MAX_SECRET_FILE_BYTES + 1)
            if piped and not data:
                raise LocalError(
                    f"{path} is a pipe, and nothing came by it",
                    hint="let what writes the secret run first; a pipe gives it once",
                )
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except OSError as error:
        raise _refused(error, "cannot read the secret file", os.fsencode(path)) from None
    if len(data) > MAX_SECRET_FILE_BYTES:
        raise LocalError(f"{path} is too large to be a secret", hint="name the file that holds the secret")
    return data


def make_secret_folder(path: str) -> None:
    """Make a folder (0700) for secrets where there is none, parents too.

    Raises:
        LocalError: it cannot be made, or others can write into one that exists.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _refused(error, "cannot make the folder", os.fsencode(path)) from None
    if mode & 0o022:
        raise LocalError(f"{path} is to hold secrets and others can write into it", hint=f"chmod 700 {path}")


def _refused(error: OSError, what: str, path: bytes) -> FlowError:
    from flowengine.store.filesystem import (
        local_error,  # takes ctypes, which a shell's completion need not wait for
    )

    return local_error(error, what, path)
