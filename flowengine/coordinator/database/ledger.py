"""Counters over transfers: what is reserved becomes what moved, or nothing."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import delete, select, update

from flowengine.coordinator.database.tables import ledger
from flowengine.coordinator.database.transactions import Writing

__all__ = ["settle_counts"]


def settle_counts(writing: Writing, transfer: str, *, moved: Mapping[str, int]) -> None:
    """A transfer ended: what moved counts for good, what did not is forgotten.

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
        else:
            writing.connection.execute(delete(ledger).where(mine))
