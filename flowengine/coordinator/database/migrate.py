"""Bringing a database to this version's tables, at each start.

An empty database gets the tables as they are now; an older one is migrated by alembic, which is loaded only then. That both
make the same, tests hold on SQLite and on PostgreSQL. A coordinator lets a child do it: what alembic takes of memory
(13 MiB) is gone with that.
"""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

from flowengine.coordinator.database.tables import metadata
from flowengine.coordinator.database.transactions import PostgresDatabase, SqliteDatabase
from flowengine.errors import LocalError

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["HEAD", "alembic_config", "prepare", "prepare_apart"]

HEAD: Final = "0006"
"""The newest migration; a test holds it equal to what the folder has."""
_COUNTERS: Final = ("event", "fence", "epoch", "plan", "promise", "label", "evidence")
_LOCK: Final = 0x666C6F6D
_ALEMBIC_TABLE: Final = (
    "CREATE TABLE IF NOT EXISTS alembic_version "
    "(version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num))"
)
"""As alembic makes it, which finds its place there."""


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


def prepare_apart(database: Callable[[], SqliteDatabase | PostgresDatabase]) -> None:
    """`prepare`, in a child process; to be called before there are threads.

    Args:
        database: opens it; called in the child.

    Raises:
        LocalError: as `prepare`.
    """
    reading, writing = os.pipe()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _in_child(database, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if said:
        message, hint = msgspec.json.decode(said, type=tuple[str, str])
        raise LocalError(message, hint=hint)
    if status:
        raise LocalError(
            "the coordinator's database could not be prepared",
            hint="what happened is in the coordinator's log",
        )


def _in_child(database: Callable[[], SqliteDatabase | PostgresDatabase], errors: int) -> None:
    async def prepared() -> None:
        opened = database()
        try:
            await prepare(opened)
        finally:
            await opened.aclose()

    code = 1
    try:
        asyncio.run(prepared())
        code = 0
    except LocalError as error:
        os.write(errors, msgspec.json.encode((error.message, error.hint)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # nothing of the parent's may be taken apart here


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
    if not version:
        # Were there tables of these names, nobody would know whose: that is an error.
        metadata.create_all(connection, checkfirst=False)
        connection.execute(text(_ALEMBIC_TABLE))
        connection.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": HEAD})
    elif version != HEAD:
        from alembic import command

        command.upgrade(alembic_config(connection), "head")
    for name in _COUNTERS:
        connection.execute(
            text("INSERT INTO counters (name, value) VALUES (:name, 0) ON CONFLICT DO NOTHING"),
            {"name": name},
        )
