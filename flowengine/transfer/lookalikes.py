"""What lies at the target under other names and may be what is offered: by size, by name, by folders that moved.

Goal
    Content that was renamed, moved or copied is found again, also where no index remembers it; where there is none,
    having looked costs next to nothing.
Plan
    The files below the root are listed from the top down, only when an object comes that is not in place, and only as
    many as the new bytes so far are worth. A file is believed to be the same when chunks read from it have the ids
    that were offered. Where one was found, its neighbours are expected beside it.
Invariants
    - Nothing is looked at outside the root, and no link is followed.
    - Looking ends when it was in vain too often.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Final

from flowengine.chunking import CHUNK_BYTES, are_chunks, chunk_id, packed_size
from flowengine.manifest import Entry
from flowengine.store.filesystem import open_beneath
from flowengine.wire.paths import STAGING_NAME

__all__ = ["LEAST_OLD_BYTES", "Found", "Guess", "Lookalikes", "begins_with"]

_FIRST_ENTRIES: Final = 4096
_MOST_ENTRIES: Final = 500_000
_BYTES_AN_ENTRY: Final = 32 * 1024
"""So many new bytes are worth listing one more entry for: it takes a tenth of the time that sending them does."""
_FIRST_TRIES: Final = 64
_TRIES_WON: Final = 4
_MOST_TRIES: Final = 256
_CANDIDATES: Final = 32
_MOST_ABSENT: Final = 4096
_GUESSED_BYTES: Final = 4096
"""Below this a file of the same size and another name is more likely another file."""
_VERSION_BYTES: Final = 1024
"""Below this an object is not worth comparing with another version of it."""
LEAST_OLD_BYTES: Final = 512
"""Nor is a file that is smaller than this such a version."""
_MOST_GUESSED: Final = 1024
"""Files that are compared with one of the same name and have not been answered for; what comes of them is known a round trip
later."""
_OPEN: Final = os.O_RDONLY | os.O_NONBLOCK

Found = tuple[bytes, int]
"""(path below the root, size)"""
Guess = tuple[bytes, bytes, bytes]
"""(folder, name) of a small object, and the path of a file of which only the name says that it is another version"""


class Lookalikes:
    """Files of a target that may be what is offered. For use by the placer's thread.

    Args:
        is_new: whether a directory was made in this session, and so holds nothing that was there before.

    Attributes:
        entries: listed so far.
        moves: how often it became known that a folder moved.
    """

    def __init__(self, root_fd: int, is_new: Callable[[bytes], bool]) -> None:
        self._root_fd = root_fd
        self._is_new = is_new
        self._folders: deque[bytes] = deque([b""])
        self._new_bytes = 0
        self.entries = 0
        self.moves = 0
        self._tries = _FIRST_TRIES
        self._sizes: dict[int, list[bytes]] = {}
        self._names: dict[bytes, list[Found]] = {}
        self._moved: dict[bytes, bytes] = {}
        self._absent: set[bytes] = set()
        self._there = b""
        self._twins: dict[tuple[bytes, int], list[bytes]] = {}
        self._guesses = _FIRST_TRIES
        self._guessed = 0

    def expect(self, new_bytes: int) -> None:
        """So many more bytes are new: worth listing more for."""
        self._new_bytes += new_bytes

    def known(self) -> bool:
        """Whether anything is known that could be alike, after listing what the new bytes are worth."""
        allowed = min(_FIRST_ENTRIES + self._new_bytes // _BYTES_AN_ENTRY, _MOST_ENTRIES)
        while self._folders and self.entries < allowed:
            self._list(self._folders.popleft())
        return bool(self._sizes)

    def _list(self, folder: bytes) -> None:
        if folder and self._is_new(folder):
            return
        try:
            fd = open_beneath(self._root_fd, folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return
        prefix = folder + b"/" if folder else b""
        try:
            with os.scandir(fd) as listing:
                for item in listing:
                    self.entries += 1
                    name = os.fsencode(item.name)
                    if item.is_dir(follow_symlinks=False):
                        if name != STAGING_NAME:
                            self._folders.append(prefix + name)
                    elif item.is_file(follow_symlinks=False):
                        size = item.stat(follow_symlinks=False).st_size
                        if size:
                            path = prefix + name
                            self._sizes.setdefault(size, []).append(path)
                            self._twins.setdefault((name, size), []).append(path)
                            if size >= LEAST_OLD_BYTES:
                                self._names.setdefault(name, []).append((path, size))
        except OSError:
            return
        finally:
            os.close(fd)

    def may_hold(self, folder: bytes, names: Sequence[bytes], sizes: Sequence[int]) -> bool:
        """Whether what is known may be one of some small objects of a folder, or another version of one. Opens no file."""
        if self.before(folder) is not None:
            return True
        if self._tries > 0 and not self._sizes.keys().isdisjoint(sizes):
            for name, size in zip(names, sizes, strict=True):
                if (name, size) in self._twins or (size >= _GUESSED_BYTES and size in self._sizes):
                    return True
        if self._may_guess and not self._names.keys().isdisjoint(names):
            return any(
                size >= _VERSION_BYTES and name in self._names
                for name, size in zip(names, sizes, strict=True)
            )
        return False

    @property
    def _may_guess(self) -> bool:
        return self._guesses > 0 and self._guessed < _MOST_GUESSED

    # --- candidates ---------------------------------------------------------------------------------------------

    def beside(self, folder: bytes, name: bytes) -> Found | None:
        """The file of this name in the folder that `folder` was before it moved, as far as that is known."""
        old = self.before(folder)
        if old is None:
            return None
        path = old + b"/" + name if old else name
        size = self._size_of(path)
        return (path, size) if size else None

    def before(self, folder: bytes) -> bytes | None:
        """The folder that one was before it moved, as far as that is known and it is there."""
        if not self._moved:
            return None
        at, below = folder, []
        while at not in self._moved:
            if not at:
                return None
            at, _, last = at.rpartition(b"/")
            below.append(last)
        parts = [part for part in (self._moved[at], *reversed(below)) if part]
        paths: list[bytes] = [*accumulate(parts, lambda above, part: above + b"/" + part)]
        if not paths or paths[-1] == self._there:
            return paths[-1] if paths else b""
        if not self._absent.isdisjoint(paths):
            return None
        if not self._is_there(paths[-1]):
            if len(self._absent) >= _MOST_ABSENT:
                self._absent.clear()
            self._absent.add(next(path for path in paths if path == paths[-1] or not self._is_there(path)))
            return None
        self._there = paths[-1]
        return paths[-1]

    def _is_there(self, folder: bytes) -> bool:
        try:
            os.close(open_beneath(self._root_fd, folder, os.O_RDONLY | os.O_DIRECTORY))
        except OSError:
            return False
        return True

    def named(self, folder: bytes, entry: Entry) -> Found | None:
        """The file of the same name elsewhere whose folders and size are most alike."""
        found = self._names.get(entry.name, ())
        path = folder + b"/" + entry.name if folder else entry.name
        return max(
            (one for one in found[:_CANDIDATES] if one[0] != path),
            key=lambda one: (_shared(folder, one[0]), -abs(one[1] - entry.size)),
            default=None,
        )

    def sized(self, entry: Entry) -> list[bytes]:
        """Files of the same size; those of the same name first."""
        found = self._sizes.get(entry.size, [])[:_CANDIDATES]
        return sorted(found, key=lambda path: path.rpartition(b"/")[2] != entry.name)

    def near_size(self, entry: Entry, least_bytes: int) -> list[bytes]:
        """Files of another size, the nearest first."""
        sizes = sorted(
            (size for size in self._sizes if size >= least_bytes and size != entry.size),
            key=lambda size: abs(size - entry.size),
        )
        return [path for size in sizes[:_CANDIDATES] for path in self._sizes[size][:2]][:_CANDIDATES]

    # --- trying them --------------------------------------------------------------------------------------------

    def open(self, path: bytes) -> tuple[int, os.stat_result] | None:
        """A candidate, open for reading; None where it is not a file any more."""
        try:
            fd = open_beneath(self._root_fd, path, _OPEN)
        except OSError:
            return None
        st = os.fstat(fd)
        if stat.S_ISREG(st.st_mode):
            return fd, st
        os.close(fd)
        return None

    def content(self, folder: bytes, entry: Entry) -> bytes | None:
        """The bytes of a small object, where a file that is alike has just these; each was hashed."""
        if self._tries <= 0:
            return None
        beside = self.beside(folder, entry.name)
        if beside is not None:
            candidates = [beside[0]] if beside[1] == entry.size else []
        else:
            twins = self._twins.get((entry.name, entry.size), ())[:_CANDIDATES]
            candidates = sorted(twins, key=lambda path: -_shared(folder, path))[:2]
            if entry.size >= _GUESSED_BYTES:
                others = self._sizes.get(entry.size, ())[:2]
                candidates = [*candidates, *(path for path in others if path not in candidates)][:2]
        for path in candidates:
            data = self._read(path, entry.size)
            if data is not None and _is(data, entry.chunks):
                self.won(folder, entry.name, path)
                return data
            self._tries -= 1
        return None

    def like(self, folder: bytes, entry: Entry) -> Found | None:
        """A file that the object may be another version of."""
        return self.beside(folder, entry.name) or self.named(folder, entry)

    def version_of(self, folder: bytes, entry: Entry) -> tuple[Found, Guess | None] | None:
        """A file that a small object may be another version of; with a guess where only its name says so."""
        if entry.size < _VERSION_BYTES:
            return None
        beside = self.beside(folder, entry.name)
        if beside is not None:
            return (beside, None) if beside[1] >= LEAST_OLD_BYTES else None
        named = self.named(folder, entry) if self._may_guess else None
        return (named, (folder, entry.name, named[0])) if named is not None else None

    def guess(self) -> None:
        """A small object is about to be compared with what was guessed."""
        self._guessed += 1

    def judge(self, guess: Guess, *, right: bool) -> None:
        """What came of a guess."""
        self._guessed -= 1
        if right:
            self._guesses = min(self._guesses + _TRIES_WON, _MOST_TRIES)
            self.won(*guess)
        else:
            self._guesses -= 1

    def won(self, folder: bytes, name: bytes, path: bytes) -> None:
        """An object of a folder was found to be this file."""
        self._tries = min(self._tries + _TRIES_WON, _MOST_TRIES)
        old, _, old_name = path.rpartition(b"/")
        if old_name == name and old != folder:
            # Folders of the same name below moved with the one above that has another.
            while folder and old and folder.rpartition(b"/")[2] == old.rpartition(b"/")[2]:
                folder, old = folder.rpartition(b"/")[0], old.rpartition(b"/")[0]
            if self._moved.get(folder) != old:
                self._moved[folder] = old
                self.moves += 1

    def _read(self, path: bytes, size: int) -> bytes | None:
        opened = self.open(path)
        if opened is None:
            return None
        try:
            return os.pread(opened[0], size + 1, 0)
        except OSError:
            return None
        finally:
            os.close(opened[0])

    def _size_of(self, path: bytes) -> int:
        opened = self.open(path)
        if opened is None:
            return 0
        os.close(opened[0])
        return opened[1].st_size


def _shared(folder: bytes, path: bytes) -> int:
    """How many folders above a file have the same names as those of a folder, from the innermost on."""
    shared = 0
    for mine, other in zip(folder.split(b"/")[::-1], path.split(b"/")[-2::-1], strict=False):
        if mine != other:
            break
        shared += 1
    return shared


def begins_with(fd: int, one: bytes) -> bool:
    """Whether a file begins with this packed chunk."""
    length = int.from_bytes(one[:4], "little")
    try:
        return chunk_id(os.pread(fd, length, 0)) == one[4:CHUNK_BYTES]
    except OSError:
        return False


def _is(data: bytes, packed: bytes) -> bool:
    """Whether bytes are just these chunks."""
    return packed_size(packed) == len(data) and are_chunks(data, packed)
