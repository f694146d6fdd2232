"""What the coordinator does by itself."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from sqlalchemy import create_engine, select

from flowengine.coordinator.database.migrate import prepare
from flowengine.coordinator.database.tables import certificates, landed, metadata, sites, tenants, transfers
from flowengine.coordinator.database.transactions import Writing, open_database
from flowengine.coordinator.housekeeping import prune
from flowengine.coordinator.service import Settings
from flowengine.coordinator.web.calls import AgentWho
from flowengine.coordinator.web.principals import check_agent
from flowengine.errors import AuthenticationError


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


@pytest.mark.slow
def test_only_the_owner_reads_the_database(tmp_path: Path) -> None:
    async def make() -> set[int]:
        database = open_database(f"sqlite:///{tmp_path}/state.sqlite", lambda: 0.0)
        await prepare(database)
        modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        await database.aclose()
        return modes

    before = os.umask(0o022)
    try:
        assert asyncio.run(make()) == {0o600}
    finally:
        os.umask(before)


def test_a_connection_does_not_outlive_its_certificate() -> None:
    who = AgentWho("a", "key", "serial")
    with create_engine("sqlite://").begin() as connection:
        metadata.create_all(connection)
        connection.execute(sites.insert().values(name="a", state="online", since=0.0, created=0.0))
        row = {"serial": "serial", "site": "a", "key_sha256": "key", "not_after": 1000.0}
        connection.execute(certificates.insert().values(**row))
        check_agent(connection, who, 1059.0)
        with pytest.raises(AuthenticationError) as raised:
            check_agent(connection, who, 1061.0)
        assert raised.value.reason == "certificate-expired"
