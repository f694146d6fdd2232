"""What happened, in the order in which it became visible."""

from __future__ import annotations

import msgspec
from sqlalchemy import Connection, func, or_, select

from flowengine.api.events import Event
from flowengine.coordinator.database.people import moment
from flowengine.coordinator.database.tables import AnyRow, events
from flowengine.coordinator.database.transactions import EventRow

__all__ = ["events_after", "last_event", "show_event"]


def _row(row: AnyRow) -> EventRow:
    return EventRow(
        seq=row.seq,
        at=row.at,
        type=row.type,
        transfer=row.transfer,
        site=row.site,
        user=row.user,
        tenant=row.tenant,
        data=msgspec.json.decode(row.data),
        wake=tuple(msgspec.json.decode(row.wake)),
    )


def events_after(
    connection: Connection,
    after: int,
    limit: int,
    transfer: str = "",
    site: str | None = None,
    types: tuple[str, ...] = (),
    tenant: str | None = None,
) -> list[EventRow]:
    """Events after the cursor that pass all filters.

    Args:
        types: beginnings of types.
        tenant: only events of transfers of this tenant.
    """
    query = select(events).where(events.c.seq > after).order_by(events.c.seq).limit(limit)
    if transfer:
        query = query.where(events.c.transfer == transfer)
    if site is not None:
        query = query.where(events.c.site == site)
    if types:
        query = query.where(or_(*(events.c.type.startswith(kind, autoescape=True) for kind in types)))
    if tenant is not None:
        query = query.where(events.c.tenant == tenant, events.c.transfer != "")
    return [_row(row) for row in connection.execute(query)]


def last_event(connection: Connection) -> int:
    """The cursor of the newest event; 0 before the first."""
    return int(connection.execute(select(func.coalesce(func.max(events.c.seq), 0))).scalar_one())


def show_event(row: EventRow) -> Event:
    """An event as the API shows it."""
    return Event(
        seq=row.seq,
        at=moment(row.at),
        type=row.type,
        transfer=row.transfer,
        site=row.site,
        user=row.user,
        data=row.data,
    )
