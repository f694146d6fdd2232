"""Where the coordinator's state is kept: SQLite in one file, or PostgreSQL when outgrown.

Goal
    The same behaviour on both, and nothing that was promised is lost by kill -9 of anything.
Plan
    A piece of work is a plain function of a connection; `read` and `write` run it in a transaction. On SQLite one
    thread does all writing, with BEGIN IMMEDIATE (a deferred read that turns into a write fails at once) and
    `synchronous=FULL`, because the answer to a request promises what it says; a whole transaction is one hop to that
    thread (ADR 20). On PostgreSQL rows are locked where two could meet: a transfer's row first, then its tasks, and
    last of all the counter of events.
Invariants
    - Events are numbered in the order in which they become visible, without gaps: the number is taken at the end of
      the transaction and its row is locked until the commit. So a reader who saw event n has missed none before.
    - Who waits is woken only after the commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

import msgspec
from sqlalchemy import Connection, Engine, Table, create_engine, event, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnection

from flowengine.api.events import EVENT_TYPES
from flowengine.coordinator.database.tables import events
from flowengine.errors import FlowError, TemporaryError, UsageError

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql

__all__ = [
    "Database",
    "EventRow",
    "PostgresDatabase",
    "SqliteDatabase",
    "Writing",
    "json_text",
    "open_database",
]

R = TypeVar("R")
T = TypeVar("T")

READERS: Final = 2
"""Threads (SQLite) or connections (PostgreSQL) that read."""
WRITERS: Final = 8
"""Connections that write at once, on PostgreSQL; on SQLite one thread does."""
BUSY_MS: Final = 10_000
TRIES: Final = 5
_FAILURES: Final = (DBAPIError, NoConnection, OSError, OverflowError, UnicodeEncodeError)
_AGAIN: Final = ("40001", "40P01", "55P03", "23505")
"""PostgreSQL's codes for serialization failure, deadlock, lock not available, unique violation (two made the same at
once): the same work, run again, may pass, or finds what the other made."""


def json_text(value: object) -> str:
    """JSON of a value, as it is kept in a text column."""
    return msgspec.json.encode(value).decode()


@dataclass(frozen=True, slots=True)
class EventRow:
    """An event as it was committed; `wake` names the sites whose agents it concerns."""

    seq: int
    at: float
    type: str
    transfer: str = ""
    site: str = ""
    user: str = ""
    tenant: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    wake: tuple[str, ...] = ()


class Writing:
    """A transaction that writes: its connection, the time it works with, and the events that it will leave behind."""

    def __init__(self, connection: Connection, now: float, kind: str) -> None:
        self.connection = connection
        self.now = now
        self.kind = kind
        self._events: list[EventRow] = []
        self.wake: set[str] = set()
        """Sites whose agents this concerns; told to them, and with the events to the other coordinators."""
        self.landed: set[str] = set()
        """Transfers of which something landed."""

    @property
    def locks_rows(self) -> bool:
        """Whether rows are to be locked: SQLite's writers are alone anyway."""
        return self.kind == "postgresql"

    def insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """An INSERT that can say what happens where the row is there already."""
        if self.kind == "sqlite":
            return sqlite.insert(table)
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)

    def emit(
        self,
        type_: str,
        *,
        transfer: str = "",
        site: str = "",
        user: str = "",
        tenant: str = "",
        wake: Iterable[str] = (),
        **data: Any,
    ) -> None:
        """Leave an event, numbered when the transaction ends."""
        assert type_ in EVENT_TYPES, type_  # nobody could ask for it
        self._events.append(
            EventRow(0, self.now, type_, transfer, site, user, tenant, data, tuple(sorted(set(wake))))
        )

    def count_up(self, name: str, by: int = 1, at_least: int = 0) -> int:
        """Raise a counter by `by`, or to `at_least` where that is higher; its new value. Locks it until the commit."""
        row = self.connection.execute(
            text(
                "UPDATE counters SET value = CASE WHEN value + :by > :least THEN value + :by ELSE :least END"
                " WHERE name = :name RETURNING value"
            ),
            {"by": by, "least": at_least, "name": name},
        ).scalar_one()
        return int(row)

    def number_events(self) -> list[EventRow]:
        """Write the events; nothing else may follow in this transaction."""
        if not self._events:
            return []
        first_event = self._events[0]
        self._events[0] = replace(first_event, wake=tuple(sorted(self.wake.union(first_event.wake))))
        last = self.count_up("event", len(self._events))
        first = last - len(self._events) + 1
        numbered = [replace(row, seq=first + index) for index, row in enumerate(self._events)]
        self.connection.execute(
            events.insert(),
            [
                {
                    "seq": e.seq,
                    "at": e.at,
                    "type": e.type,
                    "transfer": e.transfer,
                    "site": e.site,
                    "user": e.user,
                    "tenant": e.tenant,
                    "data": json_text(e.data),
                    "wake": json_text(e.wake),
                }
                for e in numbered
            ],
        )
        if self.locks_rows:
            self.connection.execute(text("SELECT pg_notify('flow_events', :seq)"), {"seq": str(last)})
        return numbered


class Database:
    """The coordinator's database; made for SQLite or PostgreSQL by `open_database`."""

    kind: Literal["sqlite", "postgresql"]

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.on_commit: Callable[[list[EventRow], set[str], set[str]], None] = lambda rows, wake, landed: None

    async def aclose(self) -> None:
        """Close all connections."""
        raise NotImplementedError

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in one transaction that sees one state of the database and changes nothing."""
        raise NotImplementedError

    async def write(self, work: Callable[[Writing], T]) -> T:
        """Run `work` in one transaction and commit; then wake who waits for what it changed.

        `work` may run several times (two coordinators met): it must have no effect but on the database.
        """
        raise NotImplementedError

    def _run(self, work: Callable[[Writing], T], connection: Connection) -> _Done[T]:
        writing = Writing(connection, self._clock(), self.kind)
        result = work(writing)
        return _Done(result, writing.number_events(), writing)

    def _committed(self, done: _Done[T]) -> T:
        if done.rows or done.writing.wake or done.writing.landed:
            self.on_commit(done.rows, done.writing.wake, done.writing.landed)
        return done.result


@dataclass(frozen=True, slots=True)
class _Done(Generic[T]):
    result: T
    rows: list[EventRow]
    writing: Writing


class SqliteDatabase(Database):
    """One file, for one coordinator process."""

    kind = "sqlite"

    def __init__(self, path: str, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.path = path
        self._engines = (_sqlite_engine(path, READERS, "BEGIN"), _sqlite_engine(path, 1, "BEGIN IMMEDIATE"))
        self._reading = ThreadPoolExecutor(READERS, "database-read")
        self._writing = ThreadPoolExecutor(1, "database-write")

    @property
    def engine(self) -> Engine:
        """The engine that writes; for migrations and backups."""
        return self._engines[1]

    async def aclose(self) -> None:
        self._reading.shutdown(wait=True)
        self._writing.shutdown(wait=True)
        for engine in self._engines:
            engine.dispose()

    async def read(self, work: Callable[[Connection], T]) -> T:
        def run() -> T:
            with self._engines[0].connect() as connection:
                return work(connection)

        return await self._in(self._reading, run)

    async def write(self, work: Callable[[Writing], T]) -> T:
        def run() -> _Done[T]:
            with self._engines[1].begin() as connection:
                return self._run(work, connection)

        return self._committed(await self._in(self._writing, run))

    async def _in(self, pool: ThreadPoolExecutor, run: Callable[[], R]) -> R:
        # Shielded: a request that is given up must not leave its transaction half watched.
        try:
            return await asyncio.shield(asyncio.get_running_loop().run_in_executor(pool, run))
        except _FAILURES as error:
            raise _database_error(error) from error


def _sqlite_engine(path: str, size: int, begin: str) -> Engine:
    engine = create_engine(f"sqlite:///{path}", pool_size=size, max_overflow=0)

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        with contextlib.suppress(PermissionError):  # another account's file: that one has chosen
            os.chmod(path, 0o600)  # before anything is in it; the files beside it get the same mode
        connection.isolation_level = None  # transactions begin below, not where the driver guesses
        for pragma in (
            f"busy_timeout={BUSY_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


class PostgresDatabase(Database):
    """A PostgreSQL database, for any number of coordinators."""

    kind = "postgresql"

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        from sqlalchemy.ext.asyncio import create_async_engine

        if importlib.util.find_spec("asyncpg") is None:
            raise UsageError(
                "the package asyncpg is missing, which speaks to PostgreSQL",
                hint="install flowengine with its extra: pip install '.[postgresql]' in the clone",
            )
        super().__init__(clock)
        self.url = "postgresql+asyncpg://" + url.partition("://")[2]
        self._readers = create_async_engine(self.url, pool_size=READERS * 2, max_overflow=0)
        self.engine = create_async_engine(
            self.url, pool_size=WRITERS + 2, max_overflow=0
        )  # and leader, listener

    async def aclose(self) -> None:
        await self._readers.dispose()
        await self.engine.dispose()

    async def read(self, work: Callable[[Connection], T]) -> T:
        return await self._again(lambda: self._read(work))

    async def _read(self, work: Callable[[Connection], T]) -> T:
        async with self._readers.connect() as connection:
            return await connection.run_sync(work)

    async def write(self, work: Callable[[Writing], T]) -> T:
        return self._committed(await self._again(lambda: self._write(work)))

    async def _write(self, work: Callable[[Writing], T]) -> _Done[T]:
        async with self.engine.begin() as connection:
            return await connection.run_sync(lambda c: self._run(work, c))

    async def _again(self, attempt: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """Run a transaction again where that is safe and may help."""
        for left in reversed(range(TRIES)):
            try:
                return await asyncio.shield(asyncio.ensure_future(attempt()))
            except _FAILURES as error:
                if not left or getattr(getattr(error, "orig", None), "sqlstate", None) not in _AGAIN:
                    raise _database_error(error) from error
        raise AssertionError("unreachable")


def open_database(url: str, clock: Callable[[], float]) -> SqliteDatabase | PostgresDatabase:
    """The database at a URL; nothing is touched yet.

    Args:
        url: `sqlite:///PATH` (three slashes and a relative path, four and an absolute one) or `postgresql://…`.
        clock: Unix seconds.
    """
    if url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
        return SqliteDatabase(os.path.abspath(url.removeprefix("sqlite:///")), clock)
    if url.startswith(("postgresql://", "postgres://")):
        return PostgresDatabase(url, clock)
    raise UsageError(
        f"--state {url!r} is no database", hint="write sqlite:///PATH or postgresql://USER@HOST/NAME"
    )


def _database_error(error: Exception) -> FlowError:
    state = str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")
    if isinstance(error, DataError | OverflowError | UnicodeEncodeError) or state.startswith("22"):
        return UsageError(
            "a value in the request cannot be kept: a number is out of range, or a text holds a NUL or half a character",
            hint="send whole numbers below 2^62 and texts in UTF-8 without NUL",
        )
    lines = str(getattr(error, "orig", error)).splitlines()
    return TemporaryError(
        f"the coordinator's database did not answer: {lines[0] if lines else type(error).__name__}",
        hint="try again; if it lasts, look at the database",
        reason="temporary",
    )
