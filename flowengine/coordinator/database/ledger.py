"""Counters over transfers: what is reserved becomes what moved, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sqlalchemy import select, update

from flowengine.coordinator.database.tables import ledger
from flowengine.coordinator.database.transactions import Writing

__all__ = ["RESERVED_S", "settle_counts"]

RESERVED_S: Final = 400 * 86_400.0
"""How long a reservation may count at most; it ends with its transfer."""


def settle_counts(writing: Writing, transfer: str, *, moved: Mapping[str, int]) -> None:
    """A transfer ended: what moved counts for good, what did not counts no more.

    Args:
        moved: bytes that came to the target, by task.
    """
    rows = writing.connection.execute(select(ledger).where(ledger.c.transfer == transfer)).all()
    for row in rows:
        if row.expires is None:
            continue
        mine = ledger.c.task == row.task
        size_bytes = moved.get(row.task, 0)
        if size_bytes:
            values = {"expires": None, "at": writing.now, "size_bytes": size_bytes}
            writing.connection.execute(update(ledger).where(mine).values(**values))
        else:  # it stays, and counts for nothing, until the transfer is tried again
            writing.connection.execute(update(ledger).where(mine).values(expires=writing.now))
