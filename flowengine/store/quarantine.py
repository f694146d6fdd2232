"""Quarantine: what may not stay where it landed, out of everybody's sight until it is destroyed for good.

Goal
    Data that a site may not keep stops being readable at once, and what was destroyed can be told exactly.
Plan
    `ROOT/.flow-staging/quarantine/NAME`, mode 0700, on the same file system as what it takes: each object is renamed
    into it as a numbered file, a staging folder as a whole. `purge` unlinks, syncs, and counts what it removed.
Invariants
    - Nothing is followed: every step below the root is taken without links.
    - Both steps may be killed at any point and run again; what was taken stays taken.
    - Nothing that is offered as a source, listed or published lies in it (`.flow-staging` is left out everywhere).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from flowengine.errors import LocalError, UsageError
from flowengine.store.filesystem import READ_FOLDER, local_error, open_beneath
from flowengine.wire.paths import STAGING_NAME

__all__ = ["NameDigest", "Purged", "Quarantine", "Taken", "next_name"]

_FOLDER: Final = b"quarantine"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class Taken:
    """What a quarantine took: objects that had landed, with their bytes; paths that were not there any more; whether a
    staging folder was taken.
    """

    objects: int = 0
    size_bytes: int = 0
    missing: int = 0
    staging: bool = False


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge removed: files, those under way included, and the bytes written of what was under way."""

    files: int = 0
    staged_bytes: int = 0


class NameDigest:
    """SHA-256 over the (path, size) of objects, in order of their paths, so that a certificate names them without telling them.

    >>> some, all = NameDigest(), NameDigest()
    >>> some.add([(b"a", 1)]), some.add([(b"b", 2)]), all.add([(b"a", 1), (b"b", 2)])
    (None, None, None)
    >>> some.hex() == all.hex()
    True
    """

    def __init__(self) -> None:
        self._digest = sha256()
        self._last = b""
        self.objects = 0

    def add(self, rows: Iterable[tuple[bytes, int]]) -> None:
        """The next ones."""
        for path, size in rows:
            assert path > self._last, "in order of their paths"
            self._digest.update(b"%d:%s:%d\n" % (len(path), path, size))
            self._last = path
            self.objects += 1

    def hex(self) -> str:
        """Of those so far."""
        return self._digest.hexdigest()


def next_name(name: bytes) -> bytes:
    """Under which name, beside a folder, its next version is put together that is published at once."""
    return b"." + name + b".flow-next"


class Quarantine:
    """One named quarantine below an offered root.

    Args:
        root_fd: of the offered root.
        name: of letters, digits, dots and dashes: the task's.
    """

    def __init__(self, root_fd: int, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} cannot name a quarantine", hint="use letters, digits, dots and dashes"
            )
        self._root_fd = root_fd
        self._name = os.fsencode(name)

    @property
    def path(self) -> str:
        """Where it is, below the root."""
        return os.fsdecode(STAGING_NAME + b"/" + _FOLDER + b"/" + self._name)

    def _open(self, *, make: bool) -> int:
        """Its folder's descriptor; -1 where it is not there."""
        fd = os.dup(self._root_fd)
        try:
            for part in (STAGING_NAME, _FOLDER, self._name):
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o700, dir_fd=fd)
                below = os.open(part, READ_FOLDER, dir_fd=fd)
                os.close(fd)
                fd = below
            return fd
        except FileNotFoundError:
            os.close(fd)
            return -1
        except OSError as error:
            os.close(fd)
            raise local_error(error, "cannot use the quarantine", self._name) from error

    def exists(self) -> bool:
        """Whether anything is in quarantine under this name."""
        fd = self._open(make=False)
        if fd < 0:
            return False
        os.close(fd)
        return True

    def contents(self) -> tuple[int, int]:
        """How many objects are in it, and their bytes."""
        fd = self._open(make=False)
        if fd < 0:
            return 0, 0
        try:
            found = [
                os.stat(name, dir_fd=fd, follow_symlinks=False)
                for name in os.listdir(fd)
                if name.startswith("o.")
            ]
            return len(found), sum(st.st_size for st in found if stat.S_ISREG(st.st_mode))
        finally:
            os.close(fd)

    def take(self, folder: bytes, paths: Iterable[bytes], *, staging: bool) -> Taken:
        """Move objects out of their visible place; blocks until that is durable.

        Args:
            folder: below the root, what `paths` are relative to.
            paths: of objects; those that are gone, or are no longer files or links, are counted as missing.
            staging: whether the folder's own staging goes too. Nobody may be writing to the folder.

        Raises:
            LocalError: the file system refused; what was taken so far stays taken, and the same call goes on.
        """
        fd = self._open(make=True)
        objects = size_bytes = missing = 0
        touched: set[bytes] = set()
        try:
            number = self._next_number(fd)
            for path in paths:
                size = self._take_one(fd, folder, path, b"o.%d" % number)
                if size is None:
                    missing += 1
                    continue
                number += 1
                objects += 1
                size_bytes += size
                touched.add(path.rpartition(b"/")[0])
            took_staging = staging and self._take_staging(fd, folder)
            self._tidy(folder, touched)
            os.fsync(fd)
        except OSError as error:
            raise local_error(error, "cannot move into quarantine what landed in", folder or b".") from error
        finally:
            os.close(fd)
        return Taken(objects, size_bytes, missing, took_staging)

    def take_sibling(self, folder_fd: int, name: bytes) -> None:
        """Move what stands under a name of another folder of the same file system in, as something under way."""
        fd = self._open(make=True)
        try:
            if _rename_free(name, folder_fd, b"staging", fd):
                os.fsync(folder_fd)
                os.fsync(fd)
        except OSError as error:
            raise local_error(error, "cannot move into quarantine", name) from error
        finally:
            os.close(fd)

    @staticmethod
    def _next_number(fd: int) -> int:
        numbers = [int(name[2:]) for name in os.listdir(fd) if name.startswith("o.") and name[2:].isdigit()]
        return max(numbers, default=0) + 1

    def _take_one(self, fd: int, folder: bytes, path: bytes, as_name: bytes) -> int | None:
        parent, _, name = _join(folder, path).rpartition(b"/")
        try:
            there = open_beneath(self._root_fd, parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise
        try:
            st = os.stat(name, dir_fd=there, follow_symlinks=False)
            if stat.S_ISDIR(st.st_mode):
                return None
            os.rename(name, as_name, src_dir_fd=there, dst_dir_fd=fd)
            os.fsync(there)
            return st.st_size if stat.S_ISREG(st.st_mode) else 0
        except FileNotFoundError:
            return None
        finally:
            os.close(there)

    def _take_staging(self, fd: int, folder: bytes) -> bool:
        """Move what is being put together: the folder's staging, and the sibling of a version published at once."""
        taken = False
        parent, _, name = folder.rpartition(b"/")
        places = [(folder, STAGING_NAME)]
        if name:
            places.append((parent, next_name(name)))
        for where, what in places:
            try:
                there = open_beneath(self._root_fd, where, os.O_RDONLY | os.O_DIRECTORY)
            except OSError:
                continue
            try:
                if os.path.samestat(os.fstat(there), os.fstat(self._root_fd)) and what == STAGING_NAME:
                    taken = self._take_root_staging(fd, there) or taken
                else:
                    taken = _rename_free(what, there, b"staging", fd) or taken
                os.fsync(there)
            finally:
                os.close(there)
        return taken

    @staticmethod
    def _take_root_staging(fd: int, root_fd: int) -> bool:
        """The root's own staging holds the quarantine as well: take what is beside it."""
        staging = os.open(STAGING_NAME, READ_FOLDER, dir_fd=root_fd)
        try:
            names = [name for name in os.listdir(staging) if name not in ("lock", os.fsdecode(_FOLDER))]
            for name in names:
                _rename_free(os.fsencode(name), staging, b"staging-" + os.fsencode(name), fd)
            return bool(names)
        finally:
            os.close(staging)

    def _tidy(self, folder: bytes, touched: set[bytes]) -> None:
        """Remove folders that are empty now, up to the transfer's own."""
        for path in sorted(touched, key=lambda path: path.count(b"/"), reverse=True):
            while path:
                parent, _, name = _join(folder, path).rpartition(b"/")
                try:
                    there = open_beneath(self._root_fd, parent, os.O_RDONLY | os.O_DIRECTORY)
                except OSError:
                    break
                try:
                    os.rmdir(name, dir_fd=there)
                except OSError:
                    break
                finally:
                    os.close(there)
                path = path.rpartition(b"/")[0]

    def purge(self) -> Purged:
        """Destroy what is in it; blocks until that is durable.

        Unlinks: blocks of a disk are given back, not overwritten.

        Raises:
            LocalError: the file system refused; the same call goes on.
        """
        fd = self._open(make=False)
        if fd < 0:
            return Purged()
        try:
            files, staged_bytes = _empty(fd, top=True)
            os.fsync(fd)
        except OSError as error:
            raise LocalError(
                f"cannot destroy what is in quarantine as {os.fsdecode(self._name)}: {error.strerror}",
                hint="it is tried again; look at the disk and the folder's permissions",
            ) from error
        finally:
            os.close(fd)
        above = open_beneath(self._root_fd, STAGING_NAME + b"/" + _FOLDER, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.rmdir(self._name, dir_fd=above)
            os.fsync(above)
        finally:
            os.close(above)
        for parent, name in ((STAGING_NAME, _FOLDER), (b"", STAGING_NAME)):
            with contextlib.suppress(OSError):
                there = open_beneath(self._root_fd, parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.rmdir(name, dir_fd=there)
                finally:
                    os.close(there)
        return Purged(files, staged_bytes)


def _join(folder: bytes, path: bytes) -> bytes:
    return folder + b"/" + path if folder and path else folder or path


def _rename_free(name: bytes, from_fd: int, as_name: bytes, to_fd: int) -> bool:
    """Rename, under a name of its own where an earlier try took some already; False where nothing is there."""
    taken = set(map(os.fsencode, os.listdir(to_fd)))
    free, number = as_name, 1
    while free in taken:
        free, number = b"%s.%d" % (as_name, number), number + 1
    try:
        os.rename(name, free, src_dir_fd=from_fd, dst_dir_fd=to_fd)
    except FileNotFoundError:
        return False
    return True


def _data_bytes(name: bytes, folder_fd: int) -> int:
    """Bytes of a file that were written; a staging file has its whole size from the start, and holes."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder_fd)
    found = at = 0
    try:
        while True:
            begin = os.lseek(fd, at, os.SEEK_DATA)
            at = os.lseek(fd, begin, os.SEEK_HOLE)
            found += at - begin
    except OSError:  # no data behind this
        return found
    finally:
        os.close(fd)


def _empty(fd: int, *, top: bool = False) -> tuple[int, int]:
    """Remove all below a folder; how many files went, and the bytes written of those that are no object."""
    files = staged_bytes = 0
    for name in map(os.fsencode, os.listdir(fd)):
        st = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if not stat.S_ISDIR(st.st_mode):
            if stat.S_ISREG(st.st_mode) and not (top and name.startswith(b"o.")):
                staged_bytes += _data_bytes(name, fd)
            os.unlink(name, dir_fd=fd)
            files += 1
            continue
        os.chmod(name, 0o700, dir_fd=fd)
        below = os.open(name, READ_FOLDER, dir_fd=fd)
        try:
            more = _empty(below)
        finally:
            os.close(below)
        os.rmdir(name, dir_fd=fd)
        files, staged_bytes = files + more[0], staged_bytes + more[1]
    return files, staged_bytes
