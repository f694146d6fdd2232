"""Links, plans and leases in the database: functions of a transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec
from sqlalchemy import Connection, delete, select, update

from flowengine.api.agents import Lease, Meeting, TaskRoute
from flowengine.coordinator.database.catalogue import list_limits
from flowengine.coordinator.database.people import moment
from flowengine.coordinator.database.tables import (
    AnyRow,
    leases,
    link_history,
    link_states,
    paces,
    plan_state,
    task_plans,
    tasks,
)
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.coordinator.planning.outcome import LEASE_TERM_S, HeldLease, PlannedRoute, Told
from flowengine.errors import UsageError
from flowengine.plan import Plan
from flowengine.plan.links import LinkState
from flowengine.plan.pace import Seen

__all__ = [
    "Told",
    "apply",
    "ended_tasks",
    "keep_link",
    "last_plan",
    "leases_of_site",
    "meetings_of_site",
    "read_task_plans",
    "told_routes",
    "way_of",
]

LEARN_FROM: Final = 60


_told = msgspec.json.Decoder(Told)


def read_task_plans(connection: Connection, names: Collection[str] | None = None) -> dict[str, Told]:
    """What is planned for tasks; None for all."""
    query = select(task_plans)
    if names is not None:
        query = query.where(task_plans.c.task.in_(list(names)))
    return {row.task: _told.decode(row.body) for row in connection.execute(query)}


def last_plan(connection: Connection) -> tuple[int, Plan | None]:
    """The number of the last plan, and the plan where it was kept and can be read."""
    row = connection.execute(select(plan_state).where(plan_state.c.name == "current")).first()
    if row is None:
        return 0, None
    try:
        return row.number, Plan.from_bytes(row.document.encode()) if row.document else None
    except UsageError:
        return row.number, None


def told_routes(ways: Sequence[PlannedRoute], source: str, target: str) -> bool:
    """Whether a driver must be told of these: the straight way alone needs no word."""
    return any(way.sites != [source, target] for way in ways)


def apply(
    writing: Writing,
    plan: Plan | None,
    told: Mapping[str, Told],
    held: Sequence[HeldLease],
    before: Mapping[str, Told],
) -> int:
    """Make a plan hold: from this commit on agents are told of it. Its number is above that of every one before."""
    number = writing.count_up("plan")
    connection = writing.connection
    alive = {
        row.id: row
        for row in connection.execute(
            select(tasks.c.id, tasks.c.driver, tasks.c.source_site, tasks.c.target_site, tasks.c.fence).where(
                tasks.c.state.in_(["waiting", "running"])
            )
        )
    }
    connection.execute(
        delete(task_plans).where(
            ~task_plans.c.task.in_(select(tasks.c.id).where(tasks.c.state.in_(["waiting", "running"])))
        )
    )
    rows = []
    wake: set[str] = set()
    for task, one in told.items():
        if task not in alive:
            continue
        one = msgspec.structs.replace(one, plan=msgspec.structs.replace(one.plan, number=number))
        rows.append({"task": task, "number": number, "body": json_text(one)})
        was = before.get(task)
        if (was.routes if was is not None else []) != one.routes or (
            was is not None and was.fence != one.fence
        ):
            wake |= {alive[task].source_site, alive[task].target_site}
    if rows:
        statement = writing.insert(task_plans)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["task"],
                set_={"number": statement.excluded.number, "body": statement.excluded.body},
            ),
            rows,
        )
    wake |= _renew(writing, [lease for lease in held if lease.task in alive], number)
    if plan is not None:
        values = {"number": number, "made": writing.now, "document": plan.to_bytes().decode()}
        connection.execute(
            writing.insert(plan_state)
            .values(name="current", **values)
            .on_conflict_do_update(index_elements=["name"], set_=values)
        )
    if wake:
        writing.emit("plan.changed", wake=wake, number=number, tasks=len(rows))
    return number


def _renew(writing: Writing, held: Sequence[HeldLease], number: int) -> set[str]:
    """Replace the leases; one that did not change is renewed when half of its term is over. Sites that must hear of it."""
    connection, now = writing.connection, writing.now
    before = {(row.task, row.site, row.next): row for row in connection.execute(select(leases))}
    wake: set[str] = set()
    keep = set()
    changed = []
    for lease in held:
        key = (lease.task, lease.site, lease.next)
        keep.add(key)
        row = before.get(key)
        if (
            row is not None
            and row.until - now > LEASE_TERM_S / 2
            and abs(row.rate_bits_per_s - lease.rate_bits_per_s) <= 0.01 * row.rate_bits_per_s
        ):
            continue
        wake.add(lease.site)
        changed.append(
            {name: getattr(lease, name) for name in lease.__struct_fields__}
            | {"until": now + LEASE_TERM_S, "number": number}
        )
    for key in before.keys() - keep:
        wake.add(key[1])
        connection.execute(
            delete(leases).where(leases.c.task == key[0], leases.c.site == key[1], leases.c.next == key[2])
        )
    if changed:
        statement = writing.insert(leases)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["task", "site", "next"],
                set_={name: statement.excluded[name] for name in ("number", "rate_bits_per_s", "until")},
            ),
            changed,
        )
    return wake


def routes_of_holder(connection: Connection, site: str) -> dict[str, tuple[int, bytes]]:
    """What the driver of running tasks was told of their routes: by task its fence, and the routes as JSON."""
    query = (
        select(task_plans.c.task, task_plans.c.body, tasks.c.fence)
        .join(tasks, tasks.c.id == task_plans.c.task)
        .where(tasks.c.holder == site, tasks.c.state == "running")
    )
    found = {}
    for row in connection.execute(query):
        told = _told.decode(row.body)
        if told.routes and told.fence == row.fence:
            found[row.task] = (row.fence, msgspec.json.encode(told.routes))
    return found


def meetings_of_site(connection: Connection, site: str) -> list[Meeting]:
    """Where a site that cannot be dialled is to wait for the drivers of running tasks, which cannot be dialled either."""
    query = (
        select(task_plans.c.task, task_plans.c.body, tasks.c.fence)
        .join(tasks, tasks.c.id == task_plans.c.task)
        .where(
            (tasks.c.source_site == site) | (tasks.c.target_site == site),
            tasks.c.holder != site,
            tasks.c.state == "running",
        )
        .order_by(task_plans.c.task)
    )
    found = []
    for row in connection.execute(query):
        told = _told.decode(row.body)
        if told.fence == row.fence:
            found += [
                Meeting(task=row.task, fence=row.fence, relay=route.sites[-2], grant=route.grant)
                for route in told.routes
                if route.grant
            ]
    return found


def leases_of_site(connection: Connection, site: str, now: float) -> list[Lease]:
    """The leases on links out of a site."""
    query = (
        select(leases)
        .join(tasks, tasks.c.id == leases.c.task)
        .where(leases.c.site == site, leases.c.until > now, tasks.c.state == "running")
        .order_by(leases.c.task, leases.c.next)
    )
    return [
        Lease(
            task=row.task,
            transfer=row.transfer,
            next=row.next,
            rate_bits_per_s=row.rate_bits_per_s,
            until=moment(row.until),
            number=row.number,
        )
        for row in connection.execute(query)
    ]


def keep_link(
    writing: Writing,
    source: str,
    target: str,
    state: LinkState,
    kind: str,
    *,
    rate_bits_per_s: float | None,
    at_least: bool = False,
    rtt_ms: float | None = None,
    loss: float | None = None,
) -> None:
    """Remember what was seen of a link, and what is believed of it now."""
    writing.connection.execute(
        link_history.insert().values(
            source=source,
            target=target,
            at=writing.now,
            kind=kind,
            rate_bits_per_s=rate_bits_per_s,
            rtt_ms=rtt_ms,
            loss=loss,
            at_least=at_least,
        )
    )
    values: dict[str, object] = {}
    if state.measured:
        values = {
            "rate_bits_per_s": state.rate_bits_per_s,
            "variance": state.variance,
            "measured": state.measured_s,
        }
    if rtt_ms is not None:
        values["rtt_ms"] = rtt_ms
    if loss is not None:
        values["loss"] = loss
    if values:
        writing.connection.execute(
            writing.insert(link_states)
            .values(source=source, target=target, **values)
            .on_conflict_do_update(index_elements=["source", "target"], set_=values)
        )


def ended_tasks(connection: Connection, source: str, target: str) -> tuple[list[Seen], list[Seen]]:
    """How long tasks took that ended last between two sites, and anywhere."""
    last = select(paces).order_by(paces.c.seq.desc()).limit(LEARN_FROM)
    here = last.where(paces.c.source == source, paces.c.target == target)
    return (
        [_seen(row) for row in connection.execute(here)],
        [_seen(row) for row in connection.execute(last)],
    )


def way_of(connection: Connection, source: str, target: str, tenant: str, now: float) -> float:
    """What the straight way carries for a tenant by limits and by what was measured; 0 where nobody knows."""
    scopes = {f"link:{source}>{target}", f"site:{source}", f"tenant:{tenant}"}
    bounds = [one.now_bits_per_s for one in list_limits(connection, now) if one.scope in scopes]
    known = [float(bound) for bound in bounds if bound is not None]
    here = (link_states.c.source == source) & (link_states.c.target == target)
    measured = connection.execute(select(link_states.c.rate_bits_per_s).where(here)).scalar_one_or_none()
    return min([*known, measured] if measured else known, default=0.0)


def _seen(row: AnyRow) -> Seen:
    return Seen(
        objects=row.objects,
        size_bytes=row.sent_bytes,
        seconds=row.seconds,
        rate_bits_per_s=row.rate_bits_per_s,
    )


def take_up(writing: Writing, task: str, fence: int, routes: list[TaskRoute]) -> None:
    """Note that a claim's grant carried these routes."""
    row = writing.connection.execute(select(task_plans.c.body).where(task_plans.c.task == task)).first()
    if row is None:
        return
    told = _told.decode(row.body)
    told = msgspec.structs.replace(told, fence=fence, signed=writing.now, routes=routes)
    writing.connection.execute(
        update(task_plans).where(task_plans.c.task == task).values(body=json_text(told))
    )
