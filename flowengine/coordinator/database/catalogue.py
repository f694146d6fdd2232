"""Sites, their certificates and join tokens, links, limits: queries and their rows as resources."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from sqlalchemy import Connection, func, or_, select

from flowengine.api.links import Limit, LimitWindow, Link, LinkLook, Maintenance
from flowengine.api.sites import Certificate, Fact, Root, Site, SitePolicy
from flowengine.coordinator.database.people import moment, optional_moment
from flowengine.coordinator.database.tables import (
    AnyRow,
    certificates,
    limits,
    link_history,
    link_states,
    links,
    sites,
    tasks,
)
from flowengine.coordinator.rules.windows import rate_now
from flowengine.plan.links import LinkState, estimate

__all__ = [
    "find_site",
    "limits_of_site",
    "list_limits",
    "list_links",
    "list_sites",
    "revoked_serials",
    "running_by_site",
]

_facts = msgspec.json.Decoder(dict[str, Fact])
_roots = msgspec.json.Decoder(list[Root])
_addresses = msgspec.json.Decoder(list[str])
_windows = msgspec.json.Decoder(list[LimitWindow])


def decode_roots(text: str) -> list[Root]:
    """Roots as a site's row keeps them."""
    return _roots.decode(text)


def decode_addresses(text: str) -> list[str]:
    """Addresses as a site's row keeps them."""
    return _addresses.decode(text)


def decode_facts(text: str) -> dict[str, Fact]:
    """Facts as a site's row keeps them."""
    return _facts.decode(text)


def running_by_site(connection: Connection, names: Iterable[str] | None = None) -> dict[str, int]:
    """How many tasks run at each site, as source or target."""
    counts: dict[str, int] = {}
    for column, other in ((tasks.c.source_site, None), (tasks.c.target_site, tasks.c.source_site)):
        query = select(column, func.count()).where(tasks.c.state == "running").group_by(column)
        if names is not None:
            query = query.where(column.in_(list(names)))
        if other is not None:
            query = query.where(column != other)  # within one site a task counts once
        for name, count in connection.execute(query):
            counts[name] = counts.get(name, 0) + count
    return counts


def _site(row: AnyRow, running: int) -> Site:
    certificate = None
    if row.cert_serial is not None:
        certificate = Certificate(
            serial=row.cert_serial,
            key_sha256=row.key_sha256,
            not_before=moment(row.cert_not_before),
            not_after=moment(row.cert_not_after),
        )
    return Site(
        name=row.name,
        state=row.state,
        since=moment(row.since),
        facts=decode_facts(row.facts),
        roots=decode_roots(row.roots),
        addresses=decode_addresses(row.addresses),
        software=row.software,
        last_seen=optional_moment(row.last_seen),
        certificate=certificate,
        max_tasks=row.max_tasks,
        running_tasks=running,
        can=None if row.can is None else msgspec.json.decode(row.can, type=list[str]),
        policy=msgspec.json.decode(row.policy, type=SitePolicy),
    )


def list_sites(connection: Connection, after: str, limit: int) -> list[Site]:
    """Sites in the order of their names."""
    rows = connection.execute(
        select(sites).where(sites.c.name > after).order_by(sites.c.name).limit(limit)
    ).all()
    running = running_by_site(connection, [row.name for row in rows])
    return [_site(row, running.get(row.name, 0)) for row in rows]


def find_site(connection: Connection, name: str) -> Site | None:
    """A site by name."""
    row = connection.execute(select(sites).where(sites.c.name == name)).first()
    return None if row is None else _site(row, running_by_site(connection, [name]).get(name, 0))


def revoked_serials(connection: Connection, now: float) -> list[str]:
    """Serials of certificates that are revoked and would still be valid otherwise."""
    query = select(certificates.c.serial).where(
        certificates.c.revoked.is_not(None), certificates.c.not_after > now - 120
    )
    return sorted(connection.execute(query).scalars())


def show_link(declared: AnyRow | None, state: AnyRow | None, now: float) -> Link:
    """A link as the API shows it, by its row of links and of link_states; one of them is there."""
    row = declared if declared is not None else state
    assert row is not None
    found = Link(source=row.source, target=row.target)
    if declared is not None:
        found.capacity_bits_per_s = declared.capacity_bits_per_s
        found.rtt_ms, found.loss = declared.rtt_ms, declared.loss
        found.cost_per_gb = declared.cost_per_gb
        found.as_of, found.source_of_values = optional_moment(declared.as_of), declared.source_of_values
    if state is not None:
        found.rtt_ms = state.rtt_ms if state.rtt_ms is not None else found.rtt_ms
        found.loss = state.loss if state.loss is not None else found.loss
        if state.rate_bits_per_s:
            known = LinkState(
                rate_bits_per_s=state.rate_bits_per_s, variance=state.variance, measured_s=state.measured
            )
            found.rate_bits_per_s = state.rate_bits_per_s
            found.spread = estimate(known, now).spread
            found.measured = moment(state.measured)
    return found


def find_link(connection: Connection, source: str, target: str, now: float) -> Link | None:
    """What is known of a link."""
    rows = [
        connection.execute(select(table).where(table.c.source == source, table.c.target == target)).first()
        for table in (links, link_states)
    ]
    return None if rows == [None, None] else show_link(rows[0], rows[1], now)


def list_links(connection: Connection, after: str, limit: int, now: float) -> list[Link]:
    """Links in the order of source and target; the cursor is `source>target`."""
    source, _, target = after.partition(">")
    found: dict[tuple[str, str], list[AnyRow | None]] = {}
    for at, table in enumerate((links, link_states)):
        query = (
            select(table)
            .where(or_(table.c.source > source, (table.c.source == source) & (table.c.target > target)))
            .order_by(table.c.source, table.c.target)
            .limit(limit)
        )
        for row in connection.execute(query):
            found.setdefault((row.source, row.target), [None, None])[at] = row
    return [show_link(found[key][0], found[key][1], now) for key in sorted(found)[:limit]]


def link_looks(
    connection: Connection, source: str, target: str, before: int | None, limit: int
) -> list[AnyRow]:
    """Looks at a link, the newest first."""
    query = select(link_history).where(link_history.c.source == source, link_history.c.target == target)
    if before is not None:
        query = query.where(link_history.c.seq < before)
    return list(connection.execute(query.order_by(link_history.c.seq.desc()).limit(limit)))


def show_look(row: AnyRow) -> LinkLook:
    """A look as the API shows it."""
    return LinkLook(
        at=moment(row.at),
        kind=row.kind,
        rate_bits_per_s=row.rate_bits_per_s,
        rtt_ms=row.rtt_ms,
        loss=row.loss,
        at_least=row.at_least,
    )


def show_maintenance(row: AnyRow) -> Maintenance:
    """A time of maintenance as the API shows it."""
    return Maintenance(
        id=row.id,
        scope=row.scope,
        starts=moment(row.starts),
        ends=moment(row.ends),
        drain_s=row.drain_s,
        comment=row.comment,
        created_by=row.created_by,
    )


def show_limit(row: AnyRow, now: float) -> Limit:
    """A limit as the API shows it."""
    windows = _windows.decode(row.windows)
    return Limit(
        scope=row.scope,
        rate_bits_per_s=row.rate_bits_per_s,
        windows=windows,
        now_bits_per_s=rate_now(row.rate_bits_per_s, windows, now),
        changed=moment(row.changed),
        changed_by=row.changed_by,
    )


def list_limits(connection: Connection, now: float, after: str = "", limit: int = 100_000) -> list[Limit]:
    """Limits in the order of their scopes."""
    query = select(limits).where(limits.c.scope > after).order_by(limits.c.scope).limit(limit)
    return [show_limit(row, now) for row in connection.execute(query)]


def limits_of_site(connection: Connection, now: float, site: str) -> list[Limit]:
    """The limits that a site's agent must hold to: of it, its roots, links from or to it, all tenants and transfers."""
    found = []
    for limit in list_limits(connection, now):
        kind, _, name = limit.scope.partition(":")
        if (
            (kind == "site" and name == site)
            or (kind == "link" and site in name.split(">"))
            or (kind in ("read", "write") and name.partition(":")[0] == site)
            or kind in ("tenant", "transfer")
        ):
            found.append(limit)
    return found
