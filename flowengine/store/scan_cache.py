"""Remembers the chunk list of what was read, so that an unchanged object is not opened again.

One SQLite file per chunking profile in the user's state directory. It is a cache: whatever in it is stale, broken or
unreadable is dropped and found anew; losing it costs time and nothing else, so it is never synced to disk.

An entry is believed when device, inode, size, mtime_ns and ctime_ns are all as they were *and* the object was read at
least `RACY_NS` after its last change (a later change then shows in ctime); the scanner sees to that.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from flowengine.chunking import CHUNK_BYTES, packed_size
from flowengine.errors import LocalError
from flowengine.store.many import AnyStat

__all__ = [
    "BLESSED",
    "PROVISIONAL",
    "DirectoryPart",
    "Identity",
    "ScanCache",
    "known_runs",
    "state_directory",
]

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS directory (
    dev INTEGER NOT NULL, ino INTEGER NOT NULL, seq INTEGER NOT NULL, stats BLOB NOT NULL, entries BLOB NOT NULL,
    PRIMARY KEY (dev, ino, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS piece (
    dev INTEGER NOT NULL, ino INTEGER NOT NULL, offset INTEGER NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, chunks BLOB NOT NULL,
    PRIMARY KEY (dev, ino, offset)) WITHOUT ROWID;
"""
_VERSION: Final = 1
PROVISIONAL: Final = -1
"""Stands for a ctime that is not known yet: the object does not stand under its name."""
BLESSED: Final = -2
"""Stands for a ctime that is about to change by our own doing (`store.atomic`)."""
_COMMIT_S: Final = 0.25
_COMMIT_BYTES: Final = 4 << 20
"""What is written waits at most so long, and is at most so much: a transaction per directory costs more than it."""
_RUN_CHUNKS: Final = 4096
"""Chunks of an object that are offered at once where they are known without reading; half of what an offer may hold."""
_MOST_OURS: Final = 100_000
"""So many folders are remembered as written here, in some 15 MB; from then on each is asked for."""
_PARTIAL: Final = 1 << 32
"""Sequence numbers from here on are parts of a directory whose scan has not come to its end."""
_ASK_MANY: Final = """
SELECT ino, min(stats), min(entries) FROM directory WHERE dev=? AND ino IN
(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) GROUP BY ino HAVING count(*) = 1 AND min(seq) = 0
"""
_MANY: Final = _ASK_MANY.count("?") - 1
"""Directories that one statement asks for."""


_Key: TypeAlias = tuple[int, int]
_Sqlite: TypeAlias = tuple[int | bytes, ...]


class Identity(NamedTuple):
    """What an object's bytes are believed by."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, st: AnyStat) -> Identity:
        """The identity that a stat shows."""
        return cls(st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


class DirectoryPart(NamedTuple):
    """Some entries of one directory: `stats` proves them (see store.scan), `entries` is their encoding."""

    stats: bytes
    entries: bytes


def state_directory() -> str:
    """Where caches and journals of this user live: $FLOW_STATE_DIR, else $XDG_STATE_HOME/flowengine; made 0700."""
    path = os.environ.get("FLOW_STATE_DIR") or os.path.join(
        os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "flowengine"
    )
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as error:
        raise LocalError(
            f"cannot make the state folder {path}: {error.strerror}",
            hint="set $FLOW_STATE_DIR to a folder that this account can write to",
        ) from None
    return path


class ScanCache:
    """The cache of one profile. For use by one thread; several processes may share the file.

    Every method swallows database errors: a cache that cannot be used is an empty cache. What is written reaches the
    file some time later, many rows at once; `flush` is called where the work ends.
    """

    def __init__(self, profile_name: str, directory: str | None = None) -> None:
        self._path = os.path.join(directory or state_directory(), f"scan-{profile_name}.sqlite")
        self._broken = False
        self._waiting: list[tuple[str, list[_Sqlite]]] = []
        self._waiting_keys: set[_Key] = set()
        # Folders that are to be replaced, behind what waits else.
        self._replaced: dict[_Key, list[DirectoryPart]] = {}
        self._waiting_bytes = 0
        self._committed = time.monotonic()
        self._ours: set[_Key] | None = None
        self._version, self._looked = 0, 0.0
        try:
            self._db = self._open()
        except sqlite3.DatabaseError:
            self._drop()

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=10, isolation_level=None, check_same_thread=False)
        os.chmod(self._path, 0o600)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=OFF")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, _VERSION):
            raise sqlite3.DatabaseError("written by another version")
        if version != _VERSION:  # or each that opens it would have written to it
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version={_VERSION}")
        self._version = _data_version(db)
        self._ours = set() if db.execute("SELECT 1 FROM directory LIMIT 1").fetchone() is None else None
        return db

    def _drop(self) -> None:
        """Start again from nothing; give up caching when even that fails."""
        with contextlib.suppress(OSError):
            for suffix in ("", "-wal", "-shm"):
                if os.path.exists(self._path + suffix):
                    os.unlink(self._path + suffix)
        try:
            self._db = self._open()
        except sqlite3.Error:
            self._broken = True

    def _is_ours(self, key: _Key) -> bool:
        """Whether what is known of a folder can be none but what was written here: then a question can be spared.

        What others wrote a moment ago may be missed, which costs reading it again.
        """
        now = time.monotonic()
        if self._ours is not None and now - self._looked > _COMMIT_S:
            self._looked = now
            with contextlib.suppress(sqlite3.Error):
                if _data_version(self._db) != self._version or len(self._ours) > _MOST_OURS:
                    self._ours = None
        return self._ours is not None and key not in self._ours

    def _settle(self, keys: Iterable[_Key]) -> None:
        """Write what waits, where some of it is about one of these inodes."""
        if not self._waiting_keys.isdisjoint(keys):
            self.flush()

    def _query(self, sql: str, args: tuple[int, ...]) -> list[tuple[Any, ...]]:
        if self._broken:
            return []
        try:
            return self._db.execute(sql, args).fetchall()
        except sqlite3.OperationalError:
            return []
        except sqlite3.DatabaseError:
            self._drop()
            return []

    def _write(self, key: _Key, statements: Iterable[tuple[str, list[_Sqlite]]]) -> None:
        """Keep statements about one inode for the next transaction."""
        if key in self._replaced:
            self.flush()
        for sql, rows in statements:
            self._waiting.append((sql, rows))
            self._waiting_bytes += sum(
                [len(value) for row in rows for value in row if isinstance(value, bytes)]
            )
        self._wrote(key)

    def _wrote(self, key: _Key) -> None:
        if self._broken:
            self._waiting.clear()
            self._replaced.clear()
            return
        self._waiting_keys.add(key)
        if self._waiting_bytes >= _COMMIT_BYTES or time.monotonic() - self._committed >= _COMMIT_S:
            self.flush()

    def flush(self) -> None:
        """Write what waits, in one transaction."""
        statements, self._waiting = self._waiting, []
        replaced, self._replaced = self._replaced, {}
        self._waiting_keys.clear()
        self._waiting_bytes = 0
        self._committed = time.monotonic()
        if self._broken or not (statements or replaced):
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            for sql, rows in statements:
                self._db.executemany(sql, rows)
            self._db.executemany("DELETE FROM directory WHERE dev=? AND ino=?", replaced)
            self._db.executemany(
                "INSERT INTO directory VALUES (?,?,?,?,?)",
                [(*key, n, *part) for key, parts in replaced.items() for n, part in enumerate(parts)],
            )
            self._db.execute("COMMIT")
        except sqlite3.OperationalError:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
        except sqlite3.DatabaseError:
            self._drop()

    def directory(self, dev: int, ino: int) -> list[DirectoryPart]:
        """The parts known of a directory, finished ones first."""
        key = _s(dev), _s(ino)
        if self._is_ours(key):
            return []
        self._settle([key])
        rows = self._query("SELECT stats, entries FROM directory WHERE dev=? AND ino=? ORDER BY seq", key)
        return [DirectoryPart(bytes(stats), bytes(entries)) for stats, entries in rows]

    def whole_directories(self, dev: int, inos: Sequence[int]) -> dict[int, DirectoryPart]:
        """What is known of those of some directories that were scanned or filled to their end, by inode."""
        asked = {_s(ino): ino for ino in inos}
        keys = [(_s(dev), ino) for ino in asked]
        wanted = [ino for key, ino in zip(keys, asked, strict=True) if not self._is_ours(key)]
        self._settle(keys)
        found: dict[int, DirectoryPart] = {}
        for start in range(0, len(wanted), _MANY):
            some = wanted[start : start + _MANY]
            some += some[-1:] * (_MANY - len(some))  # so it is one statement, whatever their number
            for ino, stats, entries in self._query(_ASK_MANY, (_s(dev), *some)):
                found[asked[ino]] = DirectoryPart(bytes(stats), bytes(entries))
        return found

    def save_directory(self, dev: int, ino: int, parts: list[DirectoryPart]) -> None:
        """Replace all that is known of a directory."""
        key = _s(dev), _s(ino)
        self._replaced[key] = parts
        self._waiting_bytes += sum([len(part.stats) + len(part.entries) for part in parts])
        if self._ours is not None:
            self._ours.add(key)
        self._wrote(key)

    def add_directory_part(self, dev: int, ino: int, number: int, part: DirectoryPart) -> None:
        """Keep a part of a directory that is still being scanned or filled."""
        row = (_s(dev), _s(ino), _PARTIAL + number, *part)
        if self._ours is not None:
            self._ours.add(row[:2])
        self._write(row[:2], [("INSERT OR REPLACE INTO directory VALUES (?,?,?,?,?)", [row])])

    def pieces(self, identity: Identity) -> list[tuple[int, bytes]]:
        """(offset, packed chunks) of a large object, contiguous from 0, as far as they are known."""
        key = _s(identity.dev), _s(identity.ino)
        self._settle([key])
        rows = self._query(
            "SELECT offset, size, mtime_ns, ctime_ns, chunks FROM piece WHERE dev=? AND ino=? ORDER BY offset",
            key,
        )
        found: list[tuple[int, bytes]] = []
        for offset, size, mtime_ns, ctime_ns, chunks in rows:
            if (size, mtime_ns, ctime_ns) != identity[2:]:
                break
            found.append((int(offset), bytes(chunks)))
        return found

    def add_pieces(
        self, identity: Identity, pieces: list[tuple[int, bytes]], *, replace: bool = False
    ) -> None:
        """Keep pieces of a large object; with `replace` those of an older state go first."""
        d, i = _s(identity.dev), _s(identity.ino)
        statements: list[tuple[str, list[_Sqlite]]] = []
        if replace:
            statements.append(("DELETE FROM piece WHERE dev=? AND ino=?", [(d, i)]))
        rows: list[_Sqlite] = [(d, i, offset, *identity[2:], chunks) for offset, chunks in pieces]
        statements.append(("INSERT OR REPLACE INTO piece VALUES (?,?,?,?,?,?,?)", rows))
        self._write((d, i), statements)
        if identity.ctime_ns == PROVISIONAL:
            self.flush()  # another connection settles them once the object stands under its name

    def settle_pieces(self, identity: Identity, was_ctime_ns: int = PROVISIONAL) -> None:
        """Give pieces that were kept under a provisional (or other known) ctime their present identity.

        Only rows of the same inode, size and mtime: what an older file left under the inode stays dead.
        """
        d, i = _s(identity.dev), _s(identity.ino)
        row = (identity.ctime_ns, d, i, identity.size, identity.mtime_ns, was_ctime_ns)
        self._write(
            (d, i),
            [
                (
                    "UPDATE piece SET ctime_ns=? WHERE dev=? AND ino=? AND size=? AND mtime_ns=? AND ctime_ns=?",
                    [row],
                )
            ],
        )

    def close(self) -> None:
        """Write what waits and close the database."""
        self.flush()
        if not self._broken:
            self._db.close()


def known_runs(pieces: list[tuple[int, bytes]], size_bytes: int) -> Iterator[bytes]:
    """What is known of an object from its start, in few runs: what is offered again is answered run by run."""
    run: list[bytes] = []
    count = done = 0
    for offset, packed in pieces:
        if offset != done or done >= size_bytes:
            break
        if run and count + len(packed) // CHUNK_BYTES > _RUN_CHUNKS:
            yield b"".join(run)
            run, count = [], 0
        run.append(packed)
        count += len(packed) // CHUNK_BYTES
        done += packed_size(packed)
    if run:
        yield b"".join(run)


def _data_version(db: sqlite3.Connection) -> int:
    """A number that changes when another connection has written."""
    return int(db.execute("PRAGMA data_version").fetchone()[0])


def _s(value: int) -> int:
    """An unsigned 64-bit number (inode, device) as SQLite's signed integer."""
    return value - (1 << 64) if value >= 1 << 63 else value
