"""Counters over transfers: what is reserved becomes what moved, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sqlalchemy import func, select, update

from flowengine.coordinator.database.tables import ledger
from flowengine.coordinator.database.transactions import Writing

__all__ = ["RESERVED_S", "count_for_good", "settle_counts"]

RESERVED_S: Final = 400 * 86_400.0
"""How long a reservation may count at most; it ends with its transfer."""


def count_for_good(writing: Writing, task: str, size_bytes: int | None) -> None:
    """Something of a task has moved: what becomes of it afterwards gives nothing back.

    Args:
        size_bytes: how much in this attempt; None while that is not known.
    """
    mine = ledger.c.task == task
    final = update(ledger).where(mine, ledger.c.expires.is_not(None)).values(expires=None, at=writing.now)
    writing.connection.execute(final)
    if size_bytes is not None:
        less = func.coalesce(ledger.c.size_bytes, -1) < size_bytes
        writing.connection.execute(update(ledger).where(mine, less).values(size_bytes=size_bytes))


def settle_counts(writing: Writing, transfer: str, *, moved: Mapping[str, int | None]) -> None:
    """A transfer ended: what moved counts for good, what did not counts no more.

    Args:
        moved: bytes that came to the target, by task, None where nobody knows; without tasks of which nothing came.
    """
    for row in writing.connection.execute(select(ledger).where(ledger.c.transfer == transfer)).all():
        if row.task in moved:
            count_for_good(writing, row.task, moved[row.task])
        elif row.expires is not None:  # it stays, and counts for nothing, until the transfer is tried again
            mine = ledger.c.task == row.task
            writing.connection.execute(update(ledger).where(mine).values(expires=writing.now))
