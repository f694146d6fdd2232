"""Where the coordinator's state is kept: SQLite in one file, or PostgreSQL when outgrown.

Goal
    The same behaviour on both, and nothing that was promised is lost by kill -9 of anything.
Plan
    A piece of work is a plain function of a connection; `read` and `write` run it in a transaction. On SQLite all
    writers of the process take one lock and BEGIN IMMEDIATE (a deferred read that turns into a write fails at once);
    `synchronous=FULL`, because the answer to a request promises what it says. On PostgreSQL rows are locked where two
    could meet: a transfer's row first, then its tasks, and last of all the counter of events.
Invariants
    - Events are numbered in the order in which they become visible, without gaps: the number is taken at the end of
      the transaction and its row is locked until the commit. So a reader who saw event n has missed none before.
    - Who waits is woken only after the commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, TypeVar

import msgspec
from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from flowengine.coordinator.database.tables import counters, events
from flowengine.errors import LocalError, TemporaryError, UsageError

__all__ = ["Database", "EventRow", "Writing", "json_text"]

T = TypeVar("T")

READERS: Final = 4
WRITERS: Final = 8
"""Connections that write at once, on PostgreSQL; on SQLite there is one."""
BUSY_MS: Final = 10_000
TRIES: Final = 5
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
    """The coordinator's database.

    Args:
        url: `sqlite:///PATH` (three slashes and a relative path, four and an absolute one) or `postgresql://…`.
        clock: Unix seconds.
    """

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.kind: Literal["sqlite", "postgresql"]
        if url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
            self.kind = "sqlite"
            self.path = url.removeprefix("sqlite:///")
            self.url = url.replace("sqlite:///", "sqlite+aiosqlite:///", 1)
        elif url.startswith(("postgresql://", "postgres://")):
            self.kind = "postgresql"
            self.path = ""
            self.url = "postgresql+asyncpg://" + url.partition("://")[2]
        else:
            raise UsageError(
                f"--state {url!r} is no database", hint="write sqlite:///PATH or postgresql://USER@HOST/NAME"
            )
        self._readers: AsyncEngine = self._engine(READERS, immediate=False)
        self._writers: AsyncEngine = self._engine(1 if self.kind == "sqlite" else WRITERS, immediate=True)
        self._one_writer = asyncio.Lock()
        self.on_commit: Callable[[list[EventRow], set[str], set[str]], None] = lambda rows, wake, landed: None

    def _engine(self, size: int, immediate: bool) -> AsyncEngine:
        if self.kind == "postgresql":
            return create_async_engine(self.url, pool_size=size, max_overflow=0, pool_pre_ping=False)
        engine = create_async_engine(self.url, pool_size=size, max_overflow=0)

        @event.listens_for(engine.sync_engine, "connect")
        def connected(connection: Any, _record: Any) -> None:
            connection.isolation_level = None  # transactions begin below, not where the driver guesses
            cursor = connection.cursor()
            for pragma in (
                f"busy_timeout={BUSY_MS}",
                "journal_mode=WAL",
                "synchronous=FULL",
                "foreign_keys=ON",
            ):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        @event.listens_for(engine.sync_engine, "begin")
        def begun(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

        return engine

    @property
    def engine(self) -> AsyncEngine:
        """The engine that writes; for migrations and for what listens."""
        return self._writers

    async def aclose(self) -> None:
        """Close all connections."""
        await self._readers.dispose()
        await self._writers.dispose()

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in one transaction that sees one state of the database and changes nothing."""
        try:
            async with self._readers.connect() as connection:
                return await connection.run_sync(work)
        except (DBAPIError, OSError) as error:
            raise _database_error(error) from error

    async def write(self, work: Callable[[Writing], T]) -> T:
        """Run `work` in one transaction and commit; then wake who waits for what it changed.

        `work` may run several times (two coordinators met): it must have no effect but on the database.
        """
        if self.kind == "sqlite":
            async with self._one_writer:
                return await self._write(work)
        for left in reversed(range(TRIES)):
            try:
                return await self._write(work)
            except TemporaryError as error:
                if not left or getattr(error.__cause__, "orig", None) is None or not _again(error.__cause__):
                    raise
        raise AssertionError("unreachable")

    async def _write(self, work: Callable[[Writing], T]) -> T:
        def run(connection: Connection) -> tuple[T, list[EventRow], Writing]:
            writing = Writing(connection, self._clock(), self.kind)
            result = work(writing)
            return result, writing.number_events(), writing

        try:
            async with self._writers.begin() as connection:
                result, rows, writing = await connection.run_sync(run)
        except (DBAPIError, OSError) as error:
            raise _database_error(error) from error
        if rows or writing.wake or writing.landed:
            self.on_commit(rows, writing.wake, writing.landed)
        return result

    async def prepare(self) -> None:
        """Bring the tables to this version's form, and the counters into being."""
        from flowengine.coordinator.database.tables import metadata

        try:
            async with self._writers.begin() as connection:
                await connection.run_sync(metadata.create_all)
                for name in ("event", "fence", "epoch"):
                    await connection.execute(
                        text("INSERT INTO counters (name, value) VALUES (:name, 0) ON CONFLICT DO NOTHING"),
                        {"name": name},
                    )
        except (DBAPIError, OSError) as error:
            raise LocalError(
                f"cannot use the database {self.path or self.url.partition('@')[2]}: {error}",
                hint="check that it is there and that this account may write to it",
            ) from error

    async def ready(self) -> bool:
        """Whether the database answers."""
        try:
            await self.read(lambda connection: connection.execute(counters.select()).all())
        except TemporaryError:
            return False
        return True


def _again(error: BaseException | None) -> bool:
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state in _AGAIN


def _database_error(error: Exception) -> TemporaryError:
    what = str(getattr(error, "orig", error)).splitlines()[0] if str(error) else type(error).__name__
    return TemporaryError(
        f"the coordinator's database did not answer: {what}",
        hint="try again; if it lasts, look at the database",
        reason="temporary",
    )
