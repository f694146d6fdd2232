"""The coordinator's tables: made at once in an empty database or migrated from the first form, they are the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from flowengine.coordinator.database.migrate import HEAD, alembic_config, prepare
from flowengine.coordinator.database.transactions import PostgresDatabase, open_database
from flowengine.errors import LocalError

pytestmark = pytest.mark.slow


def form(connection: Connection) -> dict[str, Any]:
    """Of each table all that a database tells of it, and the version that alembic finds."""
    seen = inspect(connection)

    def sorted_(found: Any) -> list[Any]:
        return sorted(found, key=str)

    tables = {
        table: {
            "columns": [
                (one["name"], str(one["type"]), one["nullable"], one["default"])
                for one in seen.get_columns(table)
            ],
            "primary key": seen.get_pk_constraint(table),
            "indexes": sorted_(seen.get_indexes(table)),
            "unique": sorted_(seen.get_unique_constraints(table)),
            "foreign keys": sorted_(seen.get_foreign_keys(table)),
            "checks": sorted_(seen.get_check_constraints(table)),
        }
        for table in seen.get_table_names()
    }
    return {"": MigrationContext.configure(connection).get_current_revision()} | tables


async def made(url: str, before: Callable[[Connection], None] = lambda connection: None) -> dict[str, Any]:
    """The form of a database that a coordinator prepared, after `before` was done to it; prepared again it stays."""
    database = open_database(url, lambda: 0.0)
    try:
        if isinstance(database, PostgresDatabase):
            async with database.engine.begin() as connection:
                await connection.run_sync(before)
        else:
            with database.engine.begin() as opened:
                before(opened)
        await prepare(database)
        first = await database.read(form)
        await prepare(database)
        assert await database.read(form) == first
    finally:
        await database.aclose()
    return first


def migrated_to(version: str) -> Callable[[Connection], None]:
    return lambda connection: command.upgrade(alembic_config(connection), version)


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    if request.param == "postgresql":
        make: Callable[[], str] = request.getfixturevalue("postgres_server")
        return make
    numbers = iter(range(9))
    return lambda: f"sqlite:///{tmp_path}/{next(numbers)}.sqlite"


@pytest.mark.asyncio
async def test_tables_made_at_once_are_those_of_the_migrations(new_url: Callable[[], str]) -> None:
    at_once = await made(new_url())
    assert at_once[""] == HEAD
    assert len(at_once) > 10
    for version in ("0001", HEAD):
        assert await made(new_url(), migrated_to(version)) == at_once


@pytest.mark.asyncio
async def test_a_database_with_tables_of_somebody_else_is_left_as_it_is(new_url: Callable[[], str]) -> None:
    url = new_url()

    def theirs(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE transfers (number INTEGER)"))

    with pytest.raises(LocalError, match="transfers"):
        await made(url, theirs)
    database = open_database(url, lambda: 0.0)
    try:
        assert await database.read(lambda connection: inspect(connection).get_table_names()) == ["transfers"]
    finally:
        await database.aclose()


@pytest.mark.asyncio
async def test_several_that_start_at_once_on_an_empty_database_make_it_once(
    postgres_server: Callable[[], str],
) -> None:
    url = postgres_server()
    databases = [open_database(url, lambda: 0.0) for _ in range(4)]
    try:
        await asyncio.gather(*[prepare(database) for database in databases])
        assert (await databases[0].read(form))[""] == HEAD
    finally:
        for database in databases:
            await database.aclose()


@pytest.mark.asyncio
async def test_an_empty_note_of_the_version_is_no_hindrance(new_url: Callable[[], str]) -> None:
    def noted(connection: Connection) -> None:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))

    assert (await made(new_url(), noted))[""] == HEAD
