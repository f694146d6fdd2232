"""What an agent remembers of grants: the highest fence of each task, and which tasks ended here.

Goal
    A grant that was superseded or used up is refused, also after a crash and by whichever process asks.
Plan
    One SQLite file, one row a task. What is admitted or spent is committed, and synced, before the answer is given
    (`synchronous=FULL`). Rows outlive the longest grant, then they are pruned.
Invariants
    - A task's fence never falls. `spent` is never taken back for the fence it was said of.
"""

from __future__ import annotations

import sqlite3
from types import TracebackType
from typing import Final, Protocol

from flowengine.errors import AuthenticationError
from flowengine.store.state_file import StateFile
from flowengine.trust.grant import MAX_VALID_S

__all__ = ["GrantLedger"]

_KEEP_S: Final = 2 * MAX_VALID_S
"""Rows are kept for so long: no grant of their fence is valid any more then, however the clocks differ."""
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS task (
    task TEXT PRIMARY KEY, fence INTEGER NOT NULL, spent INTEGER NOT NULL, until INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS task_until ON task (until);
CREATE TABLE IF NOT EXISTS high (one INTEGER PRIMARY KEY CHECK (one = 1), fence INTEGER NOT NULL);
INSERT OR IGNORE INTO high VALUES (1, 0);
"""


class Fenced(Protocol):
    """A grant of either kind, as far as the ledger goes."""

    @property
    def task(self) -> str:
        """What it is for."""

    @property
    def fence(self) -> int:
        """The claim that it belongs to."""

    @property
    def expires(self) -> int:
        """Until when it is good, in Unix seconds."""

    @property
    def shown(self) -> str:
        """What it is for, for messages."""


class GrantLedger:
    """A site's memory of grants; safe to use from any thread, and by several processes.

    Args:
        path: of the file; ":memory:" for one that ends with the process.
    """

    def __init__(self, path: str) -> None:
        self._file = StateFile(
            path,
            "the grant ledger",
            _SCHEMA,
            if_unusable="do not replace it by an empty one while grants are valid: wait a day, or enrol the site anew, "
            "then remove it",
        )

    def __enter__(self) -> GrantLedger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; everything that was answered is in it already."""
        self._file.close()

    def standing(self, task: str) -> tuple[int, bool]:
        """Highest fence seen of a task (0 for none), and whether the task ended here under it."""
        rows = self._file.rows("SELECT fence, spent FROM task WHERE task = ?", task)
        return (int(rows[0][0]), bool(rows[0][1])) if rows else (0, False)

    def admit(self, grant: Fenced) -> None:
        """Remember a grant's fence before anything is done under it.

        Raises:
            AuthenticationError: a higher fence was seen meanwhile ("grant-superseded"), or the task ended here under this
                one ("grant-replayed").
        """
        with self._file.write() as db:
            row = db.execute("SELECT fence, spent, until FROM task WHERE task = ?", (grant.task,)).fetchone()
            fence, spent, until = row or (0, 0, 0)
            if grant.fence < fence:
                raise AuthenticationError(
                    f"the grant for {grant.shown} was superseded by fence {fence}", reason="grant-superseded"
                )
            if grant.fence == fence and spent:
                raise AuthenticationError(
                    f"the grant for {grant.shown} was used up: its task ended here", reason="grant-replayed"
                )
            if (
                grant.fence != fence or grant.expires > until
            ):  # else shown again: nothing to write, nothing to sync
                _put(db, grant, spent=False)

    def spend(self, grant: Fenced) -> None:
        """The task ended here under this grant's fence: no grant of that fence lets anybody in again."""
        with self._file.write() as db:
            row = db.execute("SELECT fence FROM task WHERE task = ?", (grant.task,)).fetchone()
            if row is None or row[0] <= grant.fence:
                _put(db, grant, spent=True)

    def highest_fence(self) -> int:
        """Highest fence ever seen of any task: what a heartbeat tells the coordinator."""
        return int(self._file.rows("SELECT fence FROM high")[0][0])

    def prune(self, now: float) -> int:
        """Forget tasks whose grants ended long ago; gives how many. Call it now and then."""
        with self._file.write() as db:
            return db.execute("DELETE FROM task WHERE until < ?", (int(now) - _KEEP_S,)).rowcount


def _put(db: sqlite3.Connection, grant: Fenced, *, spent: bool) -> None:
    db.execute(
        "INSERT INTO task VALUES (?, ?, ?, ?) ON CONFLICT (task) DO UPDATE SET fence = excluded.fence, "
        "spent = excluded.spent, until = max(until, excluded.until)",
        (grant.task, grant.fence, spent, grant.expires),
    )
    db.execute("UPDATE high SET fence = max(fence, ?)", (grant.fence,))
