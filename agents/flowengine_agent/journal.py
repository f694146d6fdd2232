"""What the agent must not forget when it is killed: tasks that it holds, and reports that were not taken yet.

One SQLite file. Rows are written before what they speak of is told to anybody: a report is journalled before it is
sent, an object that landed before it is reported, a claimed task before it runs. Killing the process loses none of
them; a power cut may lose the last moment. (Spent grants and fences are in `store.grants`, and synced.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgspec

from flowengine.api.agents import Report, TaskGrant
from flowengine.store.state_file import StateFile

__all__ = ["MAX_LANDED_IN_REPORT", "HeldTask", "Journal", "Pending"]

MAX_LANDED_IN_REPORT: Final = 1000
MAX_LANDED_BYTES: Final = 512 * 1024
"""Of their paths as JSON: a report stays well below what the coordinator takes as one body, 1 MiB."""
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS held (
    task TEXT PRIMARY KEY, fence INTEGER NOT NULL, granted BLOB NOT NULL, lease_until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS told (
    task TEXT NOT NULL, fence INTEGER NOT NULL, seq INTEGER NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (task, fence)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS landed (
    id INTEGER PRIMARY KEY, task TEXT NOT NULL, fence INTEGER NOT NULL, path TEXT NOT NULL, size_bytes INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS landed_task ON landed (task, fence, id);
CREATE TABLE IF NOT EXISTS outbox (
    id INTEGER PRIMARY KEY, task TEXT NOT NULL, fence INTEGER NOT NULL, seq INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS final (
    task TEXT NOT NULL, fence INTEGER NOT NULL, body BLOB NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (task, fence)) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class HeldTask:
    """A task that was claimed and not ended. `lease_until` is this host's clock, Unix seconds."""

    granted: TaskGrant
    lease_until: float


@dataclass(frozen=True)
class Pending:
    """A report that the coordinator has not taken yet."""

    id: int
    task: str
    fence: int
    report: Report


class Journal:
    """The agent's memory. May be used from any thread.

    Args:
        path: of the database file.

    Raises:
        LocalError: the file cannot be used.
    """

    def __init__(self, path: str) -> None:
        self._file = StateFile(
            path,
            "the journal",
            _SCHEMA,
            synced=False,
            if_unusable="move the file away after its tasks have ended",
        )

    # --- tasks --------------------------------------------------------------------------------------------------

    def hold(self, granted: TaskGrant, lease_until: float) -> None:
        """A task was claimed, or got a new grant."""
        row = (granted.task, granted.fence, msgspec.json.encode(granted), lease_until)
        with self._file.write() as db:
            db.execute("INSERT OR REPLACE INTO held VALUES (?,?,?,?)", row)

    def extend(self, task: str, fence: int, lease_until: float) -> None:
        """The coordinator took a report: the lease runs on."""
        with self._file.write() as db:
            db.execute("UPDATE held SET lease_until=? WHERE task=? AND fence=?", (lease_until, task, fence))

    def let_go(self, task: str, fence: int) -> None:
        """The task ended here."""
        with self._file.write() as db:
            db.execute("DELETE FROM held WHERE task=? AND fence=?", (task, fence))

    def held(self) -> list[HeldTask]:
        """What was held when the process ended before."""
        rows = self._file.rows("SELECT granted, lease_until FROM held ORDER BY task")
        found = []
        for granted, lease_until in rows:
            try:
                found.append(HeldTask(msgspec.json.decode(granted, type=TaskGrant), lease_until))
            except msgspec.DecodeError:
                continue  # written by another version: its lease will end
        return found

    # --- reports ------------------------------------------------------------------------------------------------

    def add_landed(self, task: str, fence: int, rows: Iterable[tuple[str, int]]) -> None:
        """Objects are durable under their names; they go out with the next reports."""
        with self._file.write() as db:
            db.executemany(
                "INSERT INTO landed (task, fence, path, size_bytes) VALUES (?,?,?,?)",
                [(task, fence, path, size) for path, size in rows],
            )

    def next_landed(self, task: str, fence: int) -> list[tuple[int, str, int]]:
        """(id, path, size) of the oldest objects that no report has carried yet: as many as one report takes."""
        rows = self._file.rows(
            "SELECT id, path, size_bytes FROM landed WHERE task=? AND fence=? ORDER BY id LIMIT ?",
            task,
            fence,
            MAX_LANDED_IN_REPORT,
        )
        found: list[tuple[int, str, int]] = []
        size = 0
        for number, path, size_bytes in rows:
            size += len(msgspec.json.encode(path))
            if found and size > MAX_LANDED_BYTES:
                break
            found.append((number, path, size_bytes))
        return found

    def has_landed(self, task: str, fence: int, after: int) -> bool:
        """Whether objects landed behind this id that no report has carried yet."""
        sql = "SELECT 1 FROM landed WHERE task=? AND fence=? AND id>? LIMIT 1"
        return bool(self._file.rows(sql, task, fence, after))

    def last_seq(self, task: str, fence: int) -> int:
        """The number of the last report on the task's fence."""
        rows = self._file.rows("SELECT seq FROM told WHERE task=? AND fence=?", task, fence)
        return int(rows[0][0]) if rows else 0

    def file_report(self, task: str, report: Report, now: float, last_landed: int) -> Pending:
        """Journal a report before it is sent; the landed objects up to the id `last_landed` went into it."""
        body = msgspec.json.encode(report)
        with self._file.write() as db:
            db.execute("INSERT OR REPLACE INTO told VALUES (?,?,?,?)", (task, report.fence, report.seq, now))
            db.execute(
                "DELETE FROM landed WHERE task=? AND fence=? AND id<=?", (task, report.fence, last_landed)
            )
            cursor = db.execute(
                "INSERT INTO outbox (task, fence, seq, body) VALUES (?,?,?,?)",
                (task, report.fence, report.seq, body),
            )
            assert cursor.lastrowid is not None
            return Pending(cursor.lastrowid, task, report.fence, report)

    def pending(self, task: str, fence: int) -> list[Pending]:
        """Reports on a task's fence that were not taken yet, oldest first."""
        rows = self._file.rows(
            "SELECT id, body FROM outbox WHERE task=? AND fence=? ORDER BY id", task, fence
        )
        found = []
        for number, body in rows:
            try:
                found.append(Pending(number, task, fence, msgspec.json.decode(body, type=Report)))
            except msgspec.DecodeError:
                self.taken(number)  # written by another version
        return found

    def conclude(self, task: str, report: Report, now: float) -> None:
        """The task ended here: journal its last report (without its number) and hold the task no more."""
        with self._file.write() as db:
            db.execute(
                "INSERT OR REPLACE INTO final VALUES (?,?,?,?)",
                (task, report.fence, msgspec.json.encode(report), now),
            )
            db.execute("DELETE FROM held WHERE task=? AND fence=?", (task, report.fence))

    def conclusion(self, task: str, fence: int) -> Report | None:
        """The last report of a task's fence, where it ended and the coordinator does not know yet."""
        rows = self._file.rows("SELECT body FROM final WHERE task=? AND fence=?", task, fence)
        return msgspec.json.decode(rows[0][0], type=Report) if rows else None

    def told(self, task: str, fence: int) -> None:
        """The coordinator knows that the task ended here, or does not want to."""
        with self._file.write() as db:
            db.execute("DELETE FROM final WHERE task=? AND fence=?", (task, fence))
            db.execute("DELETE FROM outbox WHERE task=? AND fence=?", (task, fence))

    def untold(self) -> list[tuple[str, int]]:
        """(task, fence) of which the coordinator has not heard everything."""
        rows = self._file.rows(
            "SELECT task, fence FROM final UNION SELECT task, fence FROM outbox ORDER BY 1, 2"
        )
        return [(row[0], row[1]) for row in rows]

    def adopt_landed(self, task: str, fence: int) -> None:
        """What landed under an earlier fence of the task, and was never told, is told under this one."""
        with self._file.write() as db:
            db.execute("UPDATE landed SET fence=? WHERE task=? AND fence<?", (fence, task, fence))

    def put_back(self, pending: Pending) -> None:
        """A report was refused because of its fence: what landed is told under the next one, if there is one."""
        report = pending.report
        with self._file.write() as db:
            db.executemany(
                "INSERT INTO landed (task, fence, path, size_bytes) VALUES (?,?,?,?)",
                [(pending.task, pending.fence, item.path, item.size_bytes) for item in report.landed],
            )
            db.execute("DELETE FROM outbox WHERE id=?", (pending.id,))

    def taken(self, number: int) -> None:
        """The coordinator has taken (or refused for good) a pending report."""
        with self._file.write() as db:
            db.execute("DELETE FROM outbox WHERE id=?", (number,))

    def forget_old(self, before: float) -> None:
        """Drop what is left of fences that nobody has reported on since `before`."""
        with self._file.write() as db:
            db.execute("DELETE FROM final WHERE at<?", (before,))
            db.execute("DELETE FROM told WHERE at<?", (before,))
            for table in ("landed", "outbox"):
                db.execute(
                    f"DELETE FROM {table} WHERE fence<? AND NOT EXISTS "  # noqa: S608 - names of our own
                    f"(SELECT 1 FROM told WHERE told.task={table}.task)",
                    (int(before * 1_000_000),),
                )

    def close(self) -> None:
        """Close the file; nothing is lost by not calling it."""
        self._file.close()
