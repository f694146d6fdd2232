"""Queue and leases in the database: what the rules look at, and what they decided."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Final

from sqlalchemy import BindParameter, Connection, Select, bindparam, case, func, or_, select, text

from flowengine.coordinator.database.catalogue import decode_addresses
from flowengine.coordinator.database.people import day_minute
from flowengine.coordinator.database.tables import AnyRow, sites, tasks, tenants, transfers, usage
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.planning.stored import read_task_plans
from flowengine.coordinator.rules.feeding import Feeder
from flowengine.coordinator.rules.queue import Board, Place, Share, Work

__all__ = [
    "WINDOW_S",
    "add_usage",
    "claim_rows",
    "lock_for_claims",
    "read_board",
    "read_feeders",
    "wake_beside",
]

WINDOW_S: Final = 600
"""What was served longer ago does not count in a tenant's share."""
CANDIDATES: Final = 200
"""Tasks of one tenant and class that one claim looks at; those behind wait for the next."""
_CLAIM_LOCK: Final = 0x666C6F77
"""PostgreSQL's advisory lock that claims take, so that bounds hold over several coordinators."""


def task_work(row: AnyRow) -> Work:
    """A task's row as the queue sees it."""
    return Work(
        id=row.id,
        seq=row.seq,
        transfer=row.transfer,
        tenant=row.tenant,
        priority=row.priority,
        source_site=row.source_site,
        source_path=row.source_path,
        target_site=row.target_site,
        target_path=row.target_path,
        driver=row.driver,
        writes=row.mode != "verify",
        paused=row.paused,
        ready_at=row.ready_at,
        last_reason=row.reason,
        fed_by=row.fed_by,
    )


_WORK_COLUMNS: Final = (
    tasks.c.id,
    tasks.c.seq,
    tasks.c.transfer,
    tasks.c.tenant,
    tasks.c.priority,
    tasks.c.source_site,
    tasks.c.source_path,
    tasks.c.target_site,
    tasks.c.target_path,
    tasks.c.driver,
    tasks.c.mode,
    tasks.c.paused,
    tasks.c.ready_at,
    tasks.c.reason,
    tasks.c.state,
    tasks.c.fed_by,
)


def lock_for_claims(writing: Writing) -> None:
    """Be the only one who claims until the commit."""
    if writing.locks_rows:
        writing.connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _CLAIM_LOCK})


_NAMES: Final[BindParameter[Any]] = bindparam("names", expanding=True)


def _candidates_query(one_driver: bool) -> Select[Any]:
    rank = func.row_number().over(
        partition_by=(tasks.c.tenant, tasks.c.priority, tasks.c.driver), order_by=tasks.c.seq
    )
    query = select(*_WORK_COLUMNS, rank.label("rank")).where(tasks.c.state == "waiting")
    if one_driver:
        query = query.where(tasks.c.driver == bindparam("driver"))
    ranked = query.subquery()
    return select(ranked).where(ranked.c.rank <= CANDIDATES).order_by(ranked.c.seq)


# Built once: to build and to key them costs as much as to run them.
_ALL_CANDIDATES: Final = _candidates_query(False)
_CANDIDATES_OF: Final = _candidates_query(True)
_OLDER_WRITERS: Final = select(*_WORK_COLUMNS).where(
    tasks.c.state == "waiting",
    tasks.c.target_site.in_(_NAMES),
    tasks.c.seq < bindparam("newest"),
    ~tasks.c.paused,
)
_RUNNING_THERE: Final = select(*_WORK_COLUMNS).where(
    tasks.c.state == "running", or_(tasks.c.target_site.in_(_NAMES), tasks.c.source_site.in_(_NAMES))
)
_PLACES: Final = select(
    sites.c.name,
    sites.c.state,
    sites.c.since,
    sites.c.max_tasks,
    sites.c.addresses,
    sites.c.last_seen,
    sites.c.draining,
).where(sites.c.name.in_(_NAMES))
_RUNNING_OF: Final = (
    select(tasks.c.tenant, func.count())
    .where(tasks.c.state == "running", tasks.c.tenant.in_(_NAMES))
    .group_by(tasks.c.tenant)
)
_RECENT: Final = usage.c.minute > bindparam("since")
_USED: Final = (
    select(
        usage.c.tenant,
        func.sum(case((_RECENT, usage.c.size_bytes), else_=0)).label("size_bytes"),
        func.sum(case((_RECENT, usage.c.tasks), else_=0)).label("tasks"),
        func.sum(case((usage.c.minute >= bindparam("today"), usage.c.size_bytes), else_=0)).label("today"),
    )
    .where(usage.c.tenant.in_(_NAMES), usage.c.minute >= bindparam("first"))
    .group_by(usage.c.tenant)
)
_FEEDERS: Final = select(
    tasks.c.id,
    tasks.c.target_site,
    tasks.c.target_path,
    tasks.c.state,
    tasks.c.fence,
    tasks.c.wait_name,
    tasks.c.wait_since,
).where(tasks.c.id.in_(_NAMES), tasks.c.state != "done")
_TENANTS: Final = select(tenants).where(tenants.c.name.in_(_NAMES))


def read_board(connection: Connection, now: float, driver: str | None) -> Board:
    """What the queue's rules need to decide for one driver, or (None) for all.

    Older waiting tasks that write at the sites in question are on it too: they come first where paths overlap.
    """
    if driver is None:
        rows = connection.execute(_ALL_CANDIDATES)
    else:
        rows = connection.execute(_CANDIDATES_OF, {"driver": driver})
    waiting = [task_work(row) for row in rows]
    if not waiting:
        return Board(now=now, waiting=[], running=[], places={}, shares={})
    names = sorted({name for work in waiting for name in (work.source_site, work.target_site)})
    if driver is not None:
        known = {work.id for work in waiting}
        older = connection.execute(_OLDER_WRITERS, {"names": names, "newest": waiting[-1].seq})
        waiting += [task_work(row) for row in older if row.id not in known]
    running = [task_work(row) for row in connection.execute(_RUNNING_THERE, {"names": names})]
    board = Board(
        now=now,
        waiting=waiting,
        running=running,
        places=_places(connection, names, running),
        shares=_shares(connection, now, sorted({work.tenant for work in waiting})),
        feeders=read_feeders(connection, {work.fed_by for work in waiting if work.fed_by}),
    )
    meeting = [work.id for work in waiting if board.meets(work)]
    if meeting:
        planned = read_task_plans(connection, meeting)
        board.routed = frozenset(task for task, told in planned.items() if told.plan.routes)
    return board


def read_feeders(connection: Connection, names: Collection[str]) -> dict[str, Feeder]:
    """Those of some tasks that are not done."""
    if not names:
        return {}
    rows = connection.execute(_FEEDERS, {"names": sorted(names)})
    return {
        row.id: Feeder(
            row.id,
            row.target_site,
            row.target_path,
            row.state,
            row.fence > 0,
            row.wait_name,
            row.wait_since,
        )
        for row in rows
    }


def _places(connection: Connection, names: list[str], running: list[Work]) -> dict[str, Place]:
    found = {
        row.name: Place(
            row.name,
            row.state,
            row.since,
            row.max_tasks,
            outbound=row.last_seen is not None and not decode_addresses(row.addresses),
            stopping=not row.draining,
        )
        for row in connection.execute(_PLACES, {"names": names})
    }
    for work in running:
        for name in {work.source_site, work.target_site}:
            if name in found:
                found[name].running += 1
    return found


def _shares(connection: Connection, now: float, names: list[str]) -> dict[str, Share]:
    running = {row[0]: row[1] for row in connection.execute(_RUNNING_OF, {"names": names})}
    today, since = day_minute(now), int((now - WINDOW_S) // 60)
    moments = {"today": today, "since": since, "first": min(today, since)}
    used = {row.tenant: row for row in connection.execute(_USED, {"names": names} | moments)}
    shares = {}
    for row in connection.execute(_TENANTS, {"names": names}):
        mine = used.get(row.name)
        left = None
        if row.max_bytes_per_day is not None:
            left = row.max_bytes_per_day - (int(mine.today) if mine is not None else 0)
        shares[row.name] = Share(
            tenant=row.name,
            weight=row.weight,
            max_running=row.max_running,
            running=running.get(row.name, 0),
            served_bytes=int(mine.size_bytes) if mine is not None else 0,
            served_tasks=int(mine.tasks) if mine is not None else 0,
            left_today_bytes=left,
        )
    return shares


def add_usage(writing: Writing, tenant: str, size_bytes: int, task_count: int) -> None:
    """Count what a tenant was served, in the current minute."""
    writing.connection.execute(
        writing.insert(usage)
        .values(tenant=tenant, minute=int(writing.now // 60), size_bytes=size_bytes, tasks=task_count)
        .on_conflict_do_update(
            index_elements=["tenant", "minute"],
            set_={"size_bytes": usage.c.size_bytes + size_bytes, "tasks": usage.c.tasks + task_count},
        )
    )


def wake_beside(writing: Writing, names: Iterable[str], tenant: str) -> None:
    """Wake the agents that drive what waits at these sites or for this tenant: a hindrance may be gone."""
    there = list(names)
    query = (
        select(tasks.c.driver)
        .distinct()
        .where(
            tasks.c.state == "waiting",
            or_(tasks.c.source_site.in_(there), tasks.c.target_site.in_(there), tasks.c.tenant == tenant),
        )
    )
    writing.wake.update(writing.connection.execute(query).scalars())


def claim_rows(writing: Writing, chosen: list[Work]) -> list[AnyRow]:
    """The chosen tasks that still wait, in the order chosen; their transfers locked.

    A transfer that somebody changes at this moment is waited for, not skipped: claims are one at a time anyway, and
    what was skipped would wait for a wake that nobody sends.
    """
    if not chosen:
        return []
    if writing.locks_rows:
        there = select(transfers.c.id).where(transfers.c.id.in_([work.transfer for work in chosen]))
        writing.connection.execute(there.order_by(transfers.c.id).with_for_update()).all()
    rows = writing.connection.execute(
        select(tasks).where(tasks.c.id.in_([work.id for work in chosen]), tasks.c.state == "waiting")
    )
    by_id = {row.id: row for row in rows}
    return [by_id[work.id] for work in chosen if work.id in by_id]
