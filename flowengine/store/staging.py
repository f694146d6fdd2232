"""Where objects stand until they are complete: staging files beside the target, and the journal of what is in them.

Goal
    Whatever kills the process or the machine, what was verified and written is found again and not sent again.
Plan
    A folder `.flow-staging` in the target's root, on the same file system as what will be published from it. A large
    object is a staging file named by its path's hash, with a journal beside it: a header, then one record per run of
    chunks that were verified and written, with marks at which everything before is synced. Runs of small objects stand in a
    few folders in it, by turns: threads that make files in one folder wait for each other in the kernel, and spin meanwhile.
Invariants
    - A chunk is journalled after it was written, never before.
    - After a restart under the same boot id the page cache still has what was written: the journal is believed.
      Under another one, what stands behind the last sync mark is hashed again before it is believed.
    - One process at a time: the folder's lock file is locked (flock) for as long as it is used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Iterator
from typing import Final

import msgspec
from blake3 import blake3

from flowengine.chunking import CHUNK_BYTES, chunk_id
from flowengine.errors import TemporaryError
from flowengine.store.filesystem import READ_FOLDER, boot_id, local_error
from flowengine.store.page_cache import WriteTrail
from flowengine.store.runs import part_of, staging_name, staging_number
from flowengine.units import show_path
from flowengine.wire.paths import STAGING_NAME

__all__ = ["StagedObject", "Staging"]

_RECORD: Final = struct.Struct("<QI")
_MARK: Final = 0xFFFF_FFFF
_FORMAT: Final = 2
_CHECK_BYTES: Final = 4


class _Header(msgspec.Struct, array_like=True):
    format: int
    boot_id: bytes
    path: bytes
    size: int


def _record(offset: int, packed: bytes) -> bytes:
    """Chunks that lie one behind the other from `offset` on."""
    body = _RECORD.pack(offset, len(packed) // CHUNK_BYTES) + packed
    return body + blake3(body).digest(_CHECK_BYTES)


def _mark(covered: int) -> bytes:
    """What stands before `covered` in the journal is durable."""
    body = _RECORD.pack(covered, _MARK)
    return body + blake3(body).digest(_CHECK_BYTES)


def _records(data: bytes, at: int) -> Iterator[tuple[int, int, int, bytes]]:
    """(where it begins, where it ends, offset, packed chunks or nothing for a mark) of each whole record."""
    while at + _RECORD.size + _CHECK_BYTES <= len(data):
        offset, count = _RECORD.unpack_from(data, at)
        end = at + _RECORD.size + (0 if count == _MARK else count * CHUNK_BYTES)
        if data[end : end + _CHECK_BYTES] != blake3(data[at:end]).digest(_CHECK_BYTES):
            return  # the tail of a write that was cut off
        yield at, end + _CHECK_BYTES, offset, data[at + _RECORD.size : end]
        at = end + _CHECK_BYTES


class StagedObject:
    """One large object on its way in.

    Attributes:
        fd: of the staging file, read-write, already of the object's size.
        name: of the staging file in the staging folder.
        have: offset → (length, id) of chunks that are known to be in place from an earlier session.
        trail: of what is written, where that is not to stay in the system's cache.
    """

    def __init__(self, folder_fd: int, name: str, path: bytes, size_bytes: int) -> None:
        self.name = name
        self.path = path
        self.size_bytes = size_bytes
        self._folder_fd = folder_fd
        self.fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder_fd)
        self.have: dict[int, tuple[int, bytes]] = {}
        self.trail: WriteTrail | None = None
        try:
            self._journal = os.open(
                f"{name}.j", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600, dir_fd=folder_fd
            )
            try:
                if not self._load():
                    self._start()
            except BaseException:
                os.close(self._journal)
                raise
        except BaseException:
            os.close(self.fd)
            raise

    def _start(self) -> None:
        self.have.clear()
        os.ftruncate(self._journal, 0)  # first: a journal must never speak of bytes that are gone
        os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, self.size_bytes)
        header = msgspec.msgpack.encode(_Header(_FORMAT, boot_id(), self.path, self.size_bytes))
        os.write(self._journal, struct.pack("<I", len(header)) + header)

    def _load(self) -> bool:
        """Read the journal; False when there is none for just this object."""
        data = os.pread(self._journal, os.fstat(self._journal).st_size, 0)
        if len(data) < 4 or os.fstat(self.fd).st_size != self.size_bytes:
            return False
        end = 4 + struct.unpack_from("<I", data)[0]
        try:
            header = msgspec.msgpack.decode(data[4:end], type=_Header)
        except msgspec.DecodeError:
            return False
        if (header.format, header.path, header.size) != (_FORMAT, self.path, self.size_bytes):
            return False
        doubtful: list[tuple[int, int, int, bytes]] = []
        good = end
        for at, after, offset, packed in _records(data, end):
            good = after
            if packed:
                for chunk in range(0, len(packed), CHUNK_BYTES):
                    length = int.from_bytes(packed[chunk : chunk + 4], "little")
                    doubtful.append((at, offset, length, packed[chunk + 4 : chunk + CHUNK_BYTES]))
                    offset += length
            else:
                # The mark vouches for what was journalled before its sync *began*: `offset` says how far.
                self.have.update({o: (n, i) for place, o, n, i in doubtful if place < offset})
                doubtful = [row for row in doubtful if row[0] >= offset]
        os.ftruncate(self._journal, good)
        rest = {offset: (length, identity) for _, offset, length, identity in doubtful}
        if header.boot_id == boot_id() and header.boot_id:
            self.have.update(rest)
        else:
            self._rehash(rest)
            self._rewrite()
        # With nothing believed the file starts empty again: what lies in it would pass for a hole otherwise.
        return bool(self.have)

    def _rehash(self, doubtful: dict[int, tuple[int, bytes]]) -> None:
        for offset, (length, identity) in doubtful.items():
            if chunk_id(os.pread(self.fd, length, offset)) == identity:
                self.have[offset] = (length, identity)

    def _rewrite(self) -> None:
        """Begin the journal anew under this boot with what is believed."""
        os.fsync(self.fd)
        header = msgspec.msgpack.encode(_Header(_FORMAT, boot_id(), self.path, self.size_bytes))
        rows = b"".join(
            [
                _record(offset, length.to_bytes(4, "little") + identity)
                for offset, (length, identity) in self.have.items()
            ]
        )
        head = struct.pack("<I", len(header)) + header
        new = f"{self.name}.n"
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW
        fd = os.open(new, flags, 0o600, dir_fd=self._folder_fd)
        os.write(fd, head + rows + _mark(len(head) + len(rows)))
        os.fsync(fd)
        os.rename(new, f"{self.name}.j", src_dir_fd=self._folder_fd, dst_dir_fd=self._folder_fd)
        os.close(self._journal)
        self._journal = fd

    def journal(self, offset: int, packed: bytes) -> None:
        """Chunks from `offset` on, packed, were verified and written. One append; safe from any thread."""
        os.write(self._journal, _record(offset, packed))

    def sync(self) -> None:
        """Make what was written durable and mark the journal so."""
        # Lanes go on while this runs: only what is journalled now is sure to be in the sync that follows.
        covered = os.fstat(self._journal).st_size
        os.fdatasync(self.fd)
        os.write(self._journal, _mark(covered))
        os.fdatasync(self._journal)

    def close(self) -> None:
        """Close both files; they stay for the next session."""
        if self.trail is not None:
            self.trail.end()
        os.close(self.fd)
        os.close(self._journal)

    def forget_journal(self) -> None:
        """Remove the journal, once the object was published under its own name."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.name}.j", dir_fd=self._folder_fd)

    def discard(self) -> None:
        """Remove staging file and journal."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self._folder_fd)
        self.forget_journal()


_PARTS: Final = ("r.0", "r.1", "r.2", "r.3")
"""Folders for runs of small objects. A lane is seldom at the one that another is at, or the publisher."""


class Staging:
    """The staging folder of one target root, locked for this process."""

    def __init__(self, root_fd: int, root_path: bytes) -> None:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(STAGING_NAME, 0o700, dir_fd=root_fd)
            self.fd = os.open(STAGING_NAME, READ_FOLDER, dir_fd=root_fd)
        except OSError as error:
            raise local_error(error, "cannot make the staging folder in", root_path) from error
        self._root_fd = root_fd
        self._root_path = root_path
        self._next_number = 1
        self._parts: list[int] = []
        self._part = 0
        self._numbers_lock = threading.Lock()
        self._locks: list[int] = []
        try:
            self._lock(
                os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=self.fd),
                fcntl.LOCK_EX,
                root_path,
            )
            if not os.fstat(self._locks[0]).st_nlink:
                raise FileNotFoundError
            os.ftruncate(self._locks[0], 0)
            os.pwrite(self._locks[0], f"process {os.getpid()}".encode(), 0)
            # A transfer to a folder above would write here as well: one of the two waits.
            above = os.path.dirname(os.path.realpath(root_path))
            while True:
                self.check_not_written(above)
                if above in (b"/", b""):
                    break
                above = os.path.dirname(above)
        except FileNotFoundError:
            self._unlock()
            os.close(self.fd)
            raise TemporaryError(
                f"another transfer to {show_path(root_path)} has just taken its staging folder away",
                hint="run the same command again",
                reason="busy",
            ) from None
        except OSError as error:
            self._unlock()
            os.close(self.fd)
            raise local_error(error, "cannot lock the staging folder in", root_path) from error
        except BaseException:
            self._unlock()
            os.close(self.fd)
            raise
        try:
            self._sweep()
            for name in _PARTS:
                self._parts.append(_make_part(name, self.fd))
        except OSError as error:
            for part in self._parts:
                os.close(part)
            self._unlock()
            os.close(self.fd)
            raise local_error(error, "cannot make the parts of .flow-staging in", root_path) from error

    def _lock(self, fd: int, how: int, path: bytes) -> None:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 200, 0).decode(errors="replace") or "another process"
            os.close(fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise TemporaryError(
                f"another transfer writes to {show_path(path)} now ({holder})",
                hint="wait for it to end",
                reason="busy",
            ) from None
        self._locks.append(fd)

    def _unlock(self) -> None:
        for fd in self._locks:
            os.close(fd)
        self._locks = []

    def check_not_written(self, path: bytes) -> None:
        """Hold off transfers to another folder, above or below, for as long as this staging is open.

        Raises:
            TemporaryError: one is under way (reason "busy").
        """
        try:
            fd = os.open(os.path.join(path, STAGING_NAME, b"lock"), os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return  # nobody has ever staged there, or it is not ours to see
        self._lock(fd, fcntl.LOCK_SH, path)

    def _sweep(self) -> None:
        """Remove small staging files of earlier sessions: they were never journalled."""
        for name in os.listdir(self.fd):
            if name.startswith(("s.", "r.")):
                _remove(name, self.fd)

    def small_name(self) -> str:
        """A fresh name for the staging file of a small object that comes by itself; safe from any thread."""
        with self._numbers_lock:
            number, self._next_number = self._next_number, self._next_number + 1
        return f"s.{number:x}"

    def run_numbers(self, count: int) -> int:
        """The first of so many numbers for the staging files of a run, all in one part; safe from any thread."""
        with self._numbers_lock:
            self._part = (self._part + 1) % len(_PARTS)
            first, self._next_number = self._next_number, self._next_number + count
        return staging_number(self._part, first)

    def part(self, number: int) -> int:
        """The folder, open, that the staging file of a number is in."""
        return self._parts[part_of(number)]

    def find(self, staged: str | int) -> tuple[str, int]:
        """What a small object's staging file is called, and the open folder that it is in.

        Args:
            staged: its name, or its number.
        """
        return (staged, self.fd) if isinstance(staged, str) else (staging_name(staged), self.part(staged))

    def open_object(self, path: bytes, size_bytes: int, attempt: int = 0) -> StagedObject:
        """The staging file of a large object, with what an earlier session left in it.

        Args:
            attempt: how many times the object was begun and given up in this session. Each gets a file of its own:
                a lane may still be writing to the one before.
        """
        suffix = f".{attempt}" if attempt else ""
        return StagedObject(self.fd, f"l.{blake3(path).hexdigest(16)}{suffix}", path, size_bytes)

    def close(self, *, remove: bool) -> None:
        """Unlock; with `remove` (everything was published), or when nothing waits in it, take the folder away."""
        for name, part in zip(_PARTS, self._parts, strict=True):
            os.close(part)
            with contextlib.suppress(OSError):  # what was not placed is swept by the next session
                os.rmdir(name, dir_fd=self.fd)
        if remove or os.listdir(self.fd) == ["lock"]:
            for name in os.listdir(self.fd):
                _remove(name, self.fd)
            with contextlib.suppress(OSError):
                st = os.fstat(self._root_fd)
                os.rmdir(STAGING_NAME, dir_fd=self._root_fd)
                os.utime(
                    self._root_fd, ns=(st.st_atime_ns, st.st_mtime_ns)
                )  # the root's own time has landed already
        self._unlock()
        os.close(self.fd)


def _remove(name: str, folder: int) -> None:
    """Remove a staging file, or a part with the files in it; as far as that can be had."""
    with contextlib.suppress(OSError):
        try:
            os.unlink(name, dir_fd=folder)
            return
        except OSError as error:
            # Linux says the one of a folder, POSIX the other. What else stands here is not this module's.
            if error.errno not in (errno.EISDIR, errno.EPERM) or not name.startswith("r."):
                return
        part = os.open(name, READ_FOLDER, dir_fd=folder)
        try:
            for file in os.listdir(part):
                with contextlib.suppress(OSError):
                    os.unlink(file, dir_fd=part)
        finally:
            os.close(part)
        os.rmdir(name, dir_fd=folder)


def _make_part(name: str, folder: int) -> int:
    """A part, open. What else stands in its place is left alone, and set aside."""
    try:
        os.mkdir(name, 0o700, dir_fd=folder)
    except FileExistsError:
        os.rename(name, f"r.stuck-{os.urandom(4).hex()}", src_dir_fd=folder, dst_dir_fd=folder)
        os.mkdir(name, 0o700, dir_fd=folder)
    return os.open(name, READ_FOLDER, dir_fd=folder)
