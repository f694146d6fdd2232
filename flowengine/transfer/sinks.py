"""What is on its way into the target: directories, objects, and the offers whose chunks are still out.

A *sink* takes verified bytes. It belongs to one object of one directory, which is finished after the last of them.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from flowengine.chunking import CHUNK_BYTES
from flowengine.manifest import Entry
from flowengine.store.staging import StagedObject, Staging
from flowengine.transfer.basis import Basis
from flowengine.wire.messages import DirectoryEnd

__all__ = [
    "LargeObject",
    "Location",
    "RunOffer",
    "Sink",
    "SmallObject",
    "SmallOffer",
    "TargetDirectory",
    "Waiter",
]


class TargetDirectory:
    """One directory at the target while objects of it are on their way."""

    __slots__ = (
        "created", "end", "entries", "existing", "fd", "keys", "known", "last_name", "linked", "name", "offered", "open_names", "parent", "path",
        "rows", "unchanged_all",
    )  # fmt: skip

    def __init__(
        self, path: bytes, name: bytes, fd: int, parent: TargetDirectory | None, *, created: bool
    ) -> None:
        self.path = path
        self.name = name
        self.fd = fd
        self.parent = parent
        self.created = created
        self.existing: dict[bytes, os.stat_result] = {}
        self.known: dict[bytes, Entry] = {}
        self.open_names: set[bytes] = set()
        self.end: DirectoryEnd | None = None
        self.rows: list[tuple[bytes, os.stat_result, Entry]] = []
        self.offered: set[bytes] | None = None
        self.keys: dict[bytes, bytes] | None = None
        self.linked = False
        self.last_name = b""
        self.unchanged_all = True
        self.entries = 0

    def child(self, name: bytes) -> bytes:
        """The path of an entry, from the target's root."""
        return self.path + b"/" + name if self.path else name


class Sink:
    """Something that chunks are put into; complete when `remaining` is 0 and nothing more will be offered."""

    __slots__ = ("directory", "entry", "failed", "remaining", "sealed")

    def __init__(self, directory: TargetDirectory, entry: Entry, remaining: int) -> None:
        self.directory = directory
        self.entry = entry
        self.remaining = remaining
        self.sealed = True
        self.failed = False

    def put(self, offset: int, data: memoryview, packed: bytes) -> None:
        """Write verified bytes."""
        raise NotImplementedError


class SmallObject(Sink):
    """A small object of which chunks arrive apart. Its staging file is made by the first of them."""

    __slots__ = ("_lock", "fd", "staged", "staging")

    def __init__(self, directory: TargetDirectory, entry: Entry, staging: Staging) -> None:
        super().__init__(directory, entry, entry.size)
        self.staging = staging
        self.staged = staging.small_name()
        self.fd = -1
        self._lock = threading.Lock()

    def open(self) -> None:
        """Make the staging file, if it is not there yet."""
        with self._lock:
            if self.fd < 0:
                self.fd = os.open(
                    self.staged, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self.staging.fd
                )

    def put(self, offset: int, data: memoryview, packed: bytes) -> None:
        self.open()
        _write_all(self.fd, data, offset)


class LargeObject(Sink):
    """A large object in its staging file."""

    __slots__ = ("basis", "position", "same_until", "staged", "unsynced")

    def __init__(self, directory: TargetDirectory, entry: Entry) -> None:
        super().__init__(directory, entry, entry.size)
        self.sealed = False
        self.staged: StagedObject | None = None
        self.position = 0
        self.same_until: list[tuple[int, bytes]] = []
        self.unsynced = 0
        self.basis: Basis | None = None

    def put(self, offset: int, data: memoryview, packed: bytes) -> None:
        assert self.staged is not None
        _write_all(self.staged.fd, data, offset)
        self.staged.journal(offset, packed)
        self.unsynced += len(data)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = os.pwrite(fd, data, offset)
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


@dataclass(slots=True)
class RunOffer:
    """An offered run of a large object, as far as it is wanted."""

    target: LargeObject
    packed: bytes
    offsets: list[int]
    wanted: bytearray
    open: int


class SmallOffer:
    """An offered batch of small objects, as far as it is wanted."""

    __slots__ = ("directory", "entries", "first", "open", "owners", "sinks", "wanted")

    def __init__(self, directory: TargetDirectory, entries: list[Entry]) -> None:
        self.directory = directory
        self.entries = entries
        self.owners: list[int] = []
        self.first: list[int] = []
        for index, entry in enumerate(entries):
            self.first.append(len(self.owners))
            count = len(entry.chunks) // CHUNK_BYTES
            self.owners += [index] * count if count != 1 else (index,)
        self.wanted = bytearray(len(self.owners))
        self.open = 0
        self.sinks: dict[int, SmallObject] = {}


Waiter = tuple[Sink, int]
Location = tuple[bytes, str, int]
"""(final path, staging name, offset): where a chunk that arrived in this session can be read."""
