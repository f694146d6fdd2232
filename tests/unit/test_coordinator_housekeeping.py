"""What the coordinator does by itself."""

from __future__ import annotations

from sqlalchemy import create_engine, select

from flowengine.coordinator.database.tables import landed, metadata, tenants, transfers
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.housekeeping import prune
from flowengine.coordinator.service import Settings


def test_what_landed_is_forgotten_some_time_after_the_end() -> None:
    with create_engine("sqlite://").begin() as connection:
        metadata.create_all(connection)
        connection.execute(tenants.insert().values(name="x", weight=1.0))
        for name, ended in (("old", 100.0), ("new", 950.0), ("runs", None)):
            row = {
                "id": name,
                "state": "started",
                "user": "u",
                "tenant": "x",
                "source_site": "a",
                "ended": ended,
            }
            connection.execute(transfers.insert().values(**row))
            row = {"transfer": name, "seq": 1, "target": "b", "path": "p", "size_bytes": 1}
            connection.execute(landed.insert().values(**row))
        prune(Writing(connection, 1000.0, "sqlite"), Settings("", keep_events_s=100.0))
        assert set(connection.execute(select(landed.c.transfer)).scalars()) == {"new", "runs"}
