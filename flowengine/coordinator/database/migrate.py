"""Bringing a database to this version's tables, at each start; alembic is loaded only when there is something to do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

from flowengine.coordinator.database.transactions import PostgresDatabase, SqliteDatabase
from flowengine.errors import LocalError

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["HEAD", "alembic_config", "prepare"]

HEAD: Final = "0005"
"""The newest migration; a test holds it equal to what the folder has."""
_COUNTERS: Final = ("event", "fence", "epoch", "plan", "promise", "label", "evidence")
_LOCK: Final = 0x666C6F6D


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's configuration: the migrations of this package."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", os.path.join(os.path.dirname(__file__), "migrations"))
    config.attributes["connection"] = connection
    return config


async def prepare(database: SqliteDatabase | PostgresDatabase) -> None:
    """Make the tables, or bring older ones to this version's form.

    Raises:
        LocalError: the database cannot be used, or was made by a newer version.
    """
    try:
        if isinstance(database, PostgresDatabase):
            async with database.engine.begin() as connection:
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
                await connection.run_sync(_upgrade)
        else:
            with database.engine.begin() as opened:
                _upgrade(opened)
    except (DBAPIError, OSError) as error:
        raise LocalError(
            f"cannot use the coordinator's database: {getattr(error, 'orig', error)}",
            hint="check that it is there, and that this account may write to it",
        ) from error


def _version(connection: Connection) -> str:
    if not inspect(connection).has_table("alembic_version"):
        return ""
    return str(connection.execute(text("SELECT version_num FROM alembic_version")).scalar() or "")


def _upgrade(connection: Connection) -> None:
    version = _version(connection)
    if version > HEAD:
        raise LocalError(
            f"the database has the form {version} of a newer version; this one knows {HEAD}",
            hint="update flowengine, or restore a backup from before the update",
        )
    if version != HEAD:
        from alembic import command

        command.upgrade(alembic_config(connection), "head")
    for name in _COUNTERS:
        connection.execute(
            text("INSERT INTO counters (name, value) VALUES (:name, 0) ON CONFLICT DO NOTHING"),
            {"name": name},
        )
