"""One SQLite file of a site's own state: secret, versioned, and written by whole transactions.

Goal
    What a site must not forget (spent grants, held tasks, what landed under duties) is opened, written and complained
    about in one way.
Plan
    The write lock is taken first, so a transaction never fails half way for want of it. `synced` files survive a power
    cut with every committed transaction; others lose at most the last moment, and nothing when a process is killed.
Invariants
    - Nobody but the account can read the file.
    - A file of another version is never written to.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flowengine.errors import LocalError

__all__ = ["StateFile"]

_WAIT_S = 30.0
"""For another process that writes."""


class StateFile:
    """A database file. May be used from any thread; several processes may have it open.

    Args:
        path: of the file, whose folder is made where missing; ":memory:" for one that ends with the process.
        what: it is, for messages: "the journal".
        schema: statements that make what is missing.
        version: of the schema; kept in the file.
        synced: whether a committed transaction survives a power cut.
        if_unusable: what to do when it is damaged, or of another version.
        if_full: what to do when it cannot be written.

    Raises:
        LocalError: it cannot be used.
    """

    def __init__(
        self,
        path: str,
        what: str,
        schema: str,
        *,
        version: int = 1,
        synced: bool = True,
        if_unusable: str,
        if_full: str = "make room on the disk of the state folder",
    ) -> None:
        self.path = path
        self._what = what
        self._if_full = if_full
        self._lock = threading.Lock()
        try:
            if path != ":memory:":
                os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
                # Made before SQLite would: its log takes the mode of the file.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                os.chmod(path, 0o600)
            self._db = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(f"PRAGMA synchronous={'FULL' if synced else 'NORMAL'}")
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, version):
                raise LocalError(
                    f"{what}, {path}, was written by another version of flowengine (its format is {found}, not {version})",
                    hint=f"run that version of flowengine; otherwise {if_unusable}",
                )
            self._db.executescript(schema)
            self._db.execute(f"PRAGMA user_version={version}")
        except (sqlite3.Error, OSError) as error:
            raise LocalError(f"{what}, {path}, cannot be used: {error}", hint=if_unusable) from error

    def close(self) -> None:
        """Close the file; nothing is lost by not calling it."""
        with self._lock:
            self._db.close()

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction: committed at the end of the block, taken back when that raises.

        Raises:
            LocalError: it could not be written; nothing of the block is in the file.
        """
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:  # a full disk may have ended it already
                        self._db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise LocalError(
                    f"{self._what}, {self.path}, cannot be written: {error}", hint=self._if_full
                ) from error

    def rows(self, sql: str, *args: object) -> list[tuple[Any, ...]]:
        """What a query gives.

        Raises:
            LocalError: it could not be read.
        """
        with self._lock:
            try:
                return self._db.execute(sql, args).fetchall()
            except sqlite3.Error as error:
                raise LocalError(
                    f"{self._what}, {self.path}, cannot be read: {error}",
                    hint="look at the disk of the state folder",
                ) from error
