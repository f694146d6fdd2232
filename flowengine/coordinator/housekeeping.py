"""What happens by itself, once a second: leases and agents that fell silent, waits by name, old rows.

Every coordinator hears what others did and wakes its own streams; only the leader changes anything. The leader is who
holds an advisory lock on PostgreSQL, and on SQLite the one process that there is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Connection, delete, func, select, text, update

from flowengine.coordinator.actions.feeding import end_feeds
from flowengine.coordinator.actions.unheard import end_unheard
from flowengine.coordinator.database.events import events_after
from flowengine.coordinator.database.tables import (
    events,
    idempotency,
    join_tokens,
    landed,
    link_history,
    looks,
    maintenance,
    paces,
    plans,
    sites,
    tasks,
    transfers,
    usage,
)
from flowengine.coordinator.database.transactions import PostgresDatabase, Writing
from flowengine.coordinator.database.transfers import lock_transfer, settle
from flowengine.coordinator.database.work import read_board, wake_beside
from flowengine.coordinator.planning.loop import Planner
from flowengine.coordinator.planning.prober import Prober
from flowengine.coordinator.rules.queue import waiting_for
from flowengine.coordinator.service import Service, Settings
from flowengine.coordinator.web.calls import log
from flowengine.errors import FlowError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection  # loads an object mapper, which SQLite does without

__all__ = ["Housekeeping"]

_LEADER_LOCK: Final = 0x666C6F78
_PRUNE_EVERY: Final = 600
_UNHEARD_EVERY: Final = 5
"""Rounds from one decision on what waits for agents that are cut off to the next."""
_BATCH: Final = 1000
_SIGN_EVERY_S: Final = 60.0
"""How often the coordinator signs for its chain of evidence, where it has grown."""


class Housekeeping:
    """The loop of one coordinator process."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database
        self._lock: AsyncConnection | None = None
        self._rounds = 0
        self._sign_at = 0.0
        self._last_tick = service.clock()

    async def run(self) -> None:
        """Until cancelled; a round that fails is logged and tried again."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._keep())
            group.create_task(Planner(self._service).run())
            group.create_task(Prober(self._service).run())

    async def _keep(self) -> None:
        try:
            while True:
                with _logged():
                    await self._round()
                await asyncio.sleep(self._service.settings.poll_s)
        finally:
            if self._lock is not None:
                await self._lock.close()

    async def _follow(self) -> None:
        """Read what other coordinators did: at their notice, and once a second whatever was noticed."""
        hub = self._service.hub
        listening: AsyncConnection | None = None
        try:
            while True:
                with _logged():
                    if listening is None and isinstance(self._db, PostgresDatabase):
                        listening = await self._listen(self._db)
                    hub.behind.clear()
                    await self._hear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._service.settings.poll_s):
                        await hub.behind.wait()
                if listening is not None and await _is_broken(listening):
                    await listening.close()
                    listening = None
        finally:
            if listening is not None:
                await listening.close()

    async def _listen(self, database: PostgresDatabase) -> AsyncConnection:
        """A connection on which PostgreSQL tells of other coordinators' commits; a hint that may get lost."""
        connection = await database.engine.connect()
        try:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            hub = self._service.hub

            def told(_connection: Any, _process: int, _channel: str, payload: str) -> None:
                if int(payload) > hub.last_seq:
                    hub.behind.set()

            await driver.add_listener("flow_events", told)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _round(self) -> None:
        service = self._service
        service.secrets.renew_server(service.clock())
        service.leader = await self._lead()
        if service.leader:
            await self._db.write(end_leases)
            await self._db.write(lambda w: mark_silent(w, service.settings.offline_s))
            await self._db.write(end_feeds)
            if self._rounds % _UNHEARD_EVERY == 0:
                await self._db.write(lambda w: end_unheard(w, service.decider, service.settings.offline_s))
            await self._db.write(name_waits)
            if self._rounds % _PRUNE_EVERY == 0:
                await self._db.write(lambda w: prune(w, service.settings))
            if service.clock() >= self._sign_at:
                self._sign_at = service.clock() + _SIGN_EVERY_S
                signer = service.secrets.signer(service.clock())
                await self._db.write(lambda w: service.chain.checkpoint(w, signer))
            self._rounds += 1
        now, before = service.clock(), self._last_tick
        self._last_tick = now
        for site in await self._db.read(lambda c: ready_drivers(c, before, now)):
            service.hub.wake_agent(site)

    async def _hear(self) -> None:
        hub = self._service.hub
        while True:
            rows = await self._db.read(partial(events_after, after=hub.last_seq, limit=_BATCH))
            hub.heard(rows)
            if len(rows) < _BATCH:
                return

    async def _lead(self) -> bool:
        """Whether this process leads; takes the lead where nobody has it."""
        if not isinstance(self._db, PostgresDatabase):
            return True
        if self._lock is not None:
            try:
                await self._lock.execute(text("SELECT 1"))
                return True
            except Exception:
                log.warning("lost the connection that held the leader's lock")
                await self._lock.invalidate()
                await self._lock.close()
                self._lock = None
        connection = await self._db.engine.connect()
        try:
            got = await connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": _LEADER_LOCK})
            if got.scalar_one():
                await connection.commit()
                self._lock = connection
                return True
        except BaseException:
            await connection.close()
            raise
        await connection.close()
        return False


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Log what fails and go on: the next round tries again."""
    try:
        yield
    except FlowError as error:
        log.warning("housekeeping: %s", error.message)
    except Exception:
        log.exception("housekeeping failed")


async def _is_broken(connection: AsyncConnection) -> bool:
    driver = (await connection.get_raw_connection()).driver_connection
    return driver is None or bool(driver.is_closed())


def prune(writing: Writing, settings: Settings) -> None:
    """Forget what is old: events, kept answers, looks, usage, and which objects landed in transfers that ended."""
    connection, now = writing.connection, writing.now
    connection.execute(delete(events).where(events.c.at < now - settings.keep_events_s))
    connection.execute(delete(idempotency).where(idempotency.c.created < now - settings.keep_keys_s))
    connection.execute(delete(looks).where(looks.c.expires < now - 60))
    connection.execute(delete(usage).where(usage.c.minute < int(now // 60) - 2 * 24 * 60))
    old = select(transfers.c.id).where(transfers.c.ended < now - settings.keep_events_s)
    connection.execute(delete(landed).where(landed.c.transfer.in_(old)))
    for table in (link_history, paces):
        connection.execute(delete(table).where(table.c.at < now - settings.keep_events_s))
    connection.execute(delete(maintenance).where(maintenance.c.ends < now - settings.keep_events_s))
    connection.execute(delete(plans).where(plans.c.expires < now, ~plans.c.id.in_(select(transfers.c.plan))))
    connection.execute(delete(join_tokens).where(join_tokens.c.expires < now - settings.keep_events_s))


def end_leases(writing: Writing) -> None:
    """End leases whose term is over: the tasks wait again."""
    connection, now = writing.connection, writing.now
    ended = connection.execute(
        select(tasks.c.id, tasks.c.transfer, tasks.c.fence)
        .where(tasks.c.state == "running", tasks.c.lease_until < now)
        .order_by(tasks.c.transfer)
    ).all()
    for found in ended:
        transfer = lock_transfer(writing, found.transfer)
        row: Any = connection.execute(
            update(tasks)
            .where(
                tasks.c.id == found.id,
                tasks.c.state == "running",
                tasks.c.fence == found.fence,
                tasks.c.lease_until < now,
            )
            # The holder stays named: until somebody else claims, it may take the task up again.
            .values(state="waiting", rate_bits_per_s=0.0, ready_at=0.0, reason="", message="")
            .returning(tasks.c.holder, tasks.c.source_site, tasks.c.target_site, tasks.c.tenant)
        ).first()
        if row is None:
            continue
        writing.emit(
            "task.expired",
            transfer=found.transfer,
            site=row.holder,
            user=transfer.user,
            tenant=transfer.tenant,
            task=found.id,
            fence=found.fence,
        )
        wake_beside(writing, (row.source_site, row.target_site), row.tenant)
        settle(writing, found.transfer)


def mark_silent(writing: Writing, offline_s: float) -> None:
    """Mark agents that fell silent."""
    connection, now = writing.connection, writing.now
    silent = (
        update(sites)
        .where(
            sites.c.state.in_(["online", "draining"]), func.coalesce(sites.c.last_seen, 0) < now - offline_s
        )
        .values(state="offline", since=now)
        .returning(sites.c.name)
    )
    for name in connection.execute(silent).scalars().all():
        writing.emit("site.offline", site=name)


def name_waits(writing: Writing) -> None:
    """Write down what each waiting task waits for and since when; suspend what waits long for agents."""
    connection, now = writing.connection, writing.now
    board = read_board(connection, now, None)
    changed: set[str] = set()
    known = {
        row.id: row
        for row in connection.execute(
            select(tasks.c.id, tasks.c.wait_name, tasks.c.wait_text, tasks.c.wait_since).where(
                tasks.c.state == "waiting"
            )
        )
    }
    for work in sorted(board.waiting, key=lambda work: work.transfer):
        row = known.get(work.id)
        if row is None:
            continue
        found = waiting_for(board, work)
        name, words, ends, since = found.name, found.text, found.ends_when, found.since or now
        if row.wait_name == name:
            since = row.wait_since
            if row.wait_text == words:
                if name == "agent-offline":
                    changed.add(work.transfer)
                continue
        connection.execute(
            update(tasks)
            .where(tasks.c.id == work.id, tasks.c.state == "waiting")
            .values(wait_name=name, wait_text=words, wait_ends=ends, wait_since=since)
        )
        changed.add(work.transfer)
    if not changed:
        return
    live = connection.execute(
        select(transfers.c.id).where(transfers.c.id.in_(changed)).order_by(transfers.c.id)
    ).scalars()
    for transfer in list(live):
        settle(writing, transfer)


def ready_drivers(connection: Connection, after: float, until: float) -> list[str]:
    """Who drives tasks whose pause after a failed attempt ended in a span of time."""
    query = (
        select(tasks.c.driver)
        .distinct()
        .where(tasks.c.state == "waiting", tasks.c.ready_at > after, tasks.c.ready_at <= until)
    )
    return list(connection.execute(query).scalars())
