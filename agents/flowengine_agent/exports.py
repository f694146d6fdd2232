"""This site's own count of what left it, beside the coordinator's: of the two the larger one holds.

Goal
    A coordinator that forgets, or lies about, what has been exported cannot make room under a threshold.
Plan
    One row per task that leaves here: reserved, durably, before the first byte, and for good once a session begins to
    send; a reservation that came to nothing ends by itself. The rules of windows and parties are `policy.ledger`'s. Each row is on this site's record too
    (evidence of kind "obligation"), which the site signs.
Invariants
    - Nothing leaves that is not reserved.
    - A row that became final is never removed.
"""

from __future__ import annotations

import threading
from typing import Final

import msgspec

from flowengine.policy.counting import counters
from flowengine.policy.ledger import Entry, Ledger, Movement
from flowengine.policy.model import PolicySet, Value
from flowengine.store.state_file import StateFile

__all__ = ["RESERVED_S", "Exports"]

RESERVED_S: Final = 600
"""How long a reservation counts whose session does not begin: twice as long as the release that goes with it holds."""
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS export (
    task TEXT PRIMARY KEY, controller TEXT NOT NULL, party TEXT NOT NULL, country TEXT, labels TEXT NOT NULL,
    persons INTEGER, size_bytes INTEGER, at INTEGER NOT NULL, expires INTEGER) WITHOUT ROWID;
"""


class Exports:
    """The count of one site. May be used from any thread.

    Args:
        path: of the database file.

    Raises:
        LocalError: it cannot be used.
    """

    def __init__(self, path: str) -> None:
        self._file = StateFile(
            path,
            "the count of what left this site",
            _SCHEMA,
            if_unusable="restore it: thresholds of policies are counted in it",
            if_full="make room on the disk of the state folder; nothing leaves without it",
        )
        self._lock = threading.Lock()
        self._ledger = Ledger(tuple(_entry(row) for row in self._file.rows("SELECT * FROM export")))

    def close(self) -> None:
        """Close the file; nothing is lost by not calling it."""
        self._file.close()

    def counters(self, policies: PolicySet, movement: Movement, now: int) -> dict[str, Value]:
        """All counters that the policies use, with a movement included."""
        return counters(policies, self._ledger, movement, now)

    def reserve(self, movement: Movement, now: int) -> None:
        """Count what is about to leave."""
        with self._lock:
            ledger = self._ledger.reserve(movement, now, now + RESERVED_S)
            self._keep(ledger, movement.transfer)

    def commit(self, task: str, now: int) -> None:
        """A session of a task begins to send: it counts for good, however much of it comes through."""
        with self._lock:
            found = next((entry for entry in self._ledger.entries if entry.movement.transfer == task), None)
            if found is None or found.expires is None:
                return
            ledger = Ledger((*self._ledger.release(task).entries, Entry(found.movement, now)))
            self._keep(ledger, task)

    def _keep(self, ledger: Ledger, task: str) -> None:
        entry = next((one for one in ledger.entries if one.movement.transfer == task), None)
        with self._file.write() as db:
            if entry is None:
                db.execute("DELETE FROM export WHERE task=?", (task,))
            else:
                db.execute("INSERT OR REPLACE INTO export VALUES (?,?,?,?,?,?,?,?,?)", _row(entry))
        self._ledger = ledger


def _row(entry: Entry) -> tuple[object, ...]:
    one = entry.movement
    labels = msgspec.json.encode(sorted(one.labels)).decode()
    return (
        one.transfer, one.controller, one.party, one.country, labels, one.persons, one.size_bytes, entry.at,
        entry.expires,
    )  # fmt: skip


def _entry(row: tuple[object, ...]) -> Entry:
    task, controller, party, country, labels, persons, size_bytes, at, expires = row
    movement = Movement(
        str(task),
        str(controller),
        str(party),
        None if country is None else str(country),
        frozenset(msgspec.json.decode(str(labels), type=list[str])),
        persons if isinstance(persons, int) else None,
        size_bytes if isinstance(size_bytes, int) else None,
    )
    assert isinstance(at, int)
    return Entry(movement, at, expires if isinstance(expires, int) else None)
