"""What landed here under duties, and what is still owed for it: kept through every restart until it is settled.

Goal
    What a site took on when it let data land, it does, whoever dies meanwhile and whatever becomes of the coordinator.
Plan
    One row per task that lands here, with its duties, and the objects that landed. Its state moves one way:

    open       it lands, or was interrupted          kept     complete; duties (deletion, onward) go on
    marked     it must go: cause and words           hidden   in quarantine, nobody can read it
    purged     destroyed, certificate signed

    A task that ends with nothing owed is forgotten.
Invariants
    - The row is durable before the first byte lands; an object's row before the object is reported.
    - A state is written after what it says was done, and doing it again is harmless.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from flowengine.policy.duties import Clock, Terms, dump_duties, load_duties
from flowengine.policy.model import Duty
from flowengine.store.state_file import StateFile

__all__ = ["HIDDEN_AT_ONCE", "Cause", "Holding", "Holdings"]

HIDDEN_AT_ONCE: Final = 50_000
"""Objects that go to quarantine by one call: however many there are, no more are in memory. Each call counts what is there."""
Cause = Literal["policy-stopped", "delete-by", "delete-after", "cancelled", "operator"]
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS holding (
    task TEXT PRIMARY KEY, transfer TEXT NOT NULL, source TEXT NOT NULL, path TEXT NOT NULL, root TEXT NOT NULL,
    folder BLOB NOT NULL, labels TEXT NOT NULL, duties TEXT NOT NULL, policy_digest BLOB NOT NULL,
    begun INTEGER NOT NULL, proof BLOB NOT NULL DEFAULT x'', landed INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL DEFAULT 'open', cause TEXT NOT NULL DEFAULT '', why TEXT NOT NULL DEFAULT '',
    all_of_it INTEGER NOT NULL DEFAULT 1, due INTEGER NOT NULL DEFAULT 0, hidden INTEGER NOT NULL DEFAULT 0,
    objects INTEGER NOT NULL DEFAULT 0, size_bytes INTEGER NOT NULL DEFAULT 0, missing INTEGER NOT NULL DEFAULT 0,
    names TEXT NOT NULL DEFAULT '', certificate BLOB NOT NULL DEFAULT x'', told TEXT NOT NULL DEFAULT '',
    account TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS object (
    task TEXT NOT NULL, path BLOB NOT NULL, size_bytes INTEGER NOT NULL, PRIMARY KEY (task, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS clock (one INTEGER PRIMARY KEY, wall REAL NOT NULL, steady REAL NOT NULL, boot TEXT NOT NULL);
"""
_COLUMNS: Final = (
    "task, transfer, source, path, root, folder, labels, duties, policy_digest, begun, proof, landed, state, cause, why,"
    " all_of_it, due, hidden, objects, size_bytes, missing, names, certificate, told, account"
)


@dataclass(frozen=True, slots=True)
class Holding:
    """What one task brought here, and how far it is settled.

    Attributes:
        path: site path at which it lands, for people.
        root, folder: the offered root's name, and the folder below it that names of objects are relative to.
        labels, duties: with which it landed.
        proof: what it takes to decide on it again (grant and release), as its owner keeps it.
        landed: when it was complete; 0 while it is not.
        all_of_it: whether objects that landed go too, and not only what was under way.
        due: when it had to be gone; 0 where no date said so.
        hidden: since when it is in quarantine; 0 while it is not.
        told: the last state that the coordinator took note of.
        account: by which it landed; empty for the agent's own.
    """

    task: str
    transfer: str
    source: str
    path: str
    root: str
    folder: bytes
    labels: tuple[str, ...]
    duties: tuple[Duty, ...]
    policy_digest: bytes
    begun: int
    proof: bytes = b""
    landed: int = 0
    state: str = "open"
    cause: str = ""
    why: str = ""
    all_of_it: bool = True
    due: int = 0
    hidden: int = 0
    objects: int = 0
    size_bytes: int = 0
    missing: int = 0
    names: str = ""
    certificate: bytes = b""
    told: str = ""
    account: str = ""

    @property
    def terms(self) -> Terms:
        """Its duties, read."""
        return Terms.of(self.duties)


class Holdings:
    """The account of a site. May be used from any thread.

    Args:
        path: of the database file.

    Raises:
        LocalError: it cannot be used.
    """

    def __init__(self, path: str) -> None:
        self._file = StateFile(
            path,
            "the account of what landed here",
            _SCHEMA,
            if_unusable="restore it: what is owed for data that landed here stands in it",
            if_full="make room on the disk of the state folder; nothing lands without it",
        )

    def close(self) -> None:
        """Close the file; nothing is lost by not calling it."""
        self._file.close()

    def _read(self, where: str, *args: object) -> list[Holding]:
        return [_holding(row) for row in self._file.rows(f"SELECT {_COLUMNS} FROM holding {where}", *args)]  # noqa: S608

    # --- what lands ---------------------------------------------------------------------------------------------

    def begin(self, holding: Holding) -> None:
        """Something is about to land; one of the same task goes on, with the duties of now."""
        row = (
            holding.task, holding.transfer, holding.source, holding.path, holding.root, holding.folder,
            _json(holding.labels), _json(dump_duties(holding.duties)), holding.policy_digest, holding.begun,
            holding.proof, holding.account,
        )  # fmt: skip
        with self._file.write() as db:
            db.execute(
                "INSERT INTO holding (task, transfer, source, path, root, folder, labels, duties, policy_digest, begun,"
                " proof, account) VALUES (?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (task) DO UPDATE SET labels=excluded.labels,"
                " duties=excluded.duties, policy_digest=excluded.policy_digest, proof=excluded.proof, account=excluded.account,"
                " state=CASE WHEN state IN ('open','kept','purged') THEN 'open' ELSE state END,"
                " told=CASE WHEN state='purged' THEN '' ELSE told END",
                row,
            )

    def add_objects(self, task: str, rows: Iterable[tuple[bytes, int]], wrong: str = "") -> None:
        """Objects of a task are durable under their names.

        Args:
            wrong: why they may not stay, nor all that had landed before: it is marked at once with them, so that no death
                in between leaves them on account as if nothing were wrong.
        """
        with self._file.write() as db:
            db.executemany(
                "INSERT OR REPLACE INTO object VALUES (?,?,?)", ((task, path, size) for path, size in rows)
            )
            if wrong:
                _mark(db, task, "policy-stopped", wrong, all_of_it=True)

    def complete(self, task: str, landed: int) -> None:
        """All of it landed: forgotten where nothing is owed, kept otherwise."""
        holding = self.find(task)
        if holding is None or holding.state != "open":
            return
        with self._file.write() as db:
            if holding.terms.binds_what_landed:
                db.execute("UPDATE holding SET state='kept', landed=? WHERE task=?", (landed, task))
            else:
                db.execute("DELETE FROM object WHERE task=?", (task,))
                db.execute("DELETE FROM holding WHERE task=?", (task,))

    # --- what must go -------------------------------------------------------------------------------------------

    def mark(self, task: str, cause: Cause, why: str, *, all_of_it: bool, due: int = 0) -> bool:
        """It must go; False where there is nothing, or it was marked before."""
        with self._file.write() as db:
            return _mark(db, task, cause, why, all_of_it=all_of_it, due=due)

    def hidden(self, task: str, at: int, objects: int, size_bytes: int, missing: int, names: str) -> None:
        """It is in quarantine."""
        with self._file.write() as db:
            db.execute(
                "UPDATE holding SET state='hidden', hidden=CASE WHEN hidden=0 THEN ? ELSE hidden END,"
                " objects=?, size_bytes=?, missing=?, names=? WHERE task=? AND state='marked'",
                (at, objects, size_bytes, missing, names, task),
            )

    def purged(self, task: str, certificate: bytes) -> None:
        """It is destroyed, and this is the certificate of it."""
        with self._file.write() as db:
            db.execute("UPDATE holding SET state='purged', certificate=? WHERE task=?", (certificate, task))
            db.execute("DELETE FROM object WHERE task=?", (task,))

    def told(self, task: str, state: str) -> None:
        """The coordinator took note of a state."""
        with self._file.write() as db:
            db.execute("UPDATE holding SET told=? WHERE task=?", (state, task))

    # --- what is asked ------------------------------------------------------------------------------------------

    def find(self, task: str) -> Holding | None:
        """What a task brought, if anything is owed for it."""
        return next(iter(self._read("WHERE task=?", task)), None)

    def in_state(self, *states: str) -> list[Holding]:
        """Those in one of some states, oldest first."""
        marks = ",".join("?" * len(states))
        return self._read(f"WHERE state IN ({marks}) ORDER BY begun, task", *states)

    def untold(self) -> list[Holding]:
        """Those in quarantine or destroyed, of which the coordinator does not know yet."""
        return self._read("WHERE state IN ('hidden','purged') AND told<>state ORDER BY begun, task")

    def to_hide(self, holding: Holding, at_once: int = HIDDEN_AT_ONCE) -> Iterator[list[tuple[bytes, int]]]:
        """(path, size) of what a task landed and no later one did at the same place, by path; some at a time.

        For what a later task landed as well, the duties of that one hold now.
        """
        after = b""
        while rows := self._file.rows(
            "SELECT path, size_bytes FROM object WHERE task=? AND path>? AND NOT EXISTS ("
            "SELECT 1 FROM holding h JOIN object o ON o.task=h.task AND o.path=object.path WHERE h.root=? AND h.folder=?"
            " AND h.task<>? AND (h.begun, h.task) > (?, ?) AND h.state IN ('open','kept')"
            ") ORDER BY path LIMIT ?",
            holding.task,
            after,
            holding.root,
            holding.folder,
            holding.task,
            holding.begun,
            holding.task,
            at_once,
        ):
            yield rows
            after = rows[-1][0]

    def covering(self, root: str, path: bytes) -> list[Holding]:
        """What landed below a root at a path, above it or below it, and is still here."""
        wanted = path + b"/" if path else b""
        return [
            holding
            for holding in self.in_state("open", "kept", "marked")
            if holding.root == root
            and (
                wanted.startswith(holding.folder + b"/" if holding.folder else b"")
                or (holding.folder + b"/").startswith(wanted)
            )
        ]

    # --- the clock ----------------------------------------------------------------------------------------------

    def clock(self) -> Clock | None:
        """The last reading that was agreed; None before the first."""
        rows = self._file.rows("SELECT wall, steady, boot FROM clock")
        return Clock(*rows[0]) if rows else None

    def set_clock(self, clock: Clock) -> None:
        """Remember a reading that was agreed."""
        with self._file.write() as db:
            db.execute(
                "INSERT OR REPLACE INTO clock VALUES (1,?,?,?)", (clock.wall, clock.steady, clock.boot)
            )


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _holding(row: tuple[Any, ...]) -> Holding:
    found = dict(zip(Holding.__dataclass_fields__, row, strict=True))
    found["labels"] = tuple(msgspec.json.decode(found["labels"]))
    found["duties"] = load_duties(msgspec.json.decode(found["duties"]))
    found["all_of_it"] = bool(found["all_of_it"])
    return Holding(**found)


def _mark(
    db: sqlite3.Connection, task: str, cause: Cause, why: str, *, all_of_it: bool, due: int = 0
) -> bool:
    done = db.execute(
        "UPDATE holding SET state='marked', cause=?, why=?, all_of_it=?, due=?"
        " WHERE task=? AND state IN ('open','kept')",
        (cause, why, all_of_it, due, task),
    )
    return done.rowcount == 1
