"""Sites, their certificates and join tokens, links, limits: queries and their rows as resources."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from sqlalchemy import Connection, func, or_, select

from flowengine.api.resources import Certificate, Fact, Limit, LimitWindow, Link, Root, Site, SitePolicy
from flowengine.coordinator.database.people import moment, optional_moment
from flowengine.coordinator.database.tables import AnyRow, certificates, limits, links, sites, tasks
from flowengine.coordinator.rules.windows import rate_now

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


def show_link(row: AnyRow) -> Link:
    """A link as the API shows it."""
    return Link(
        source=row.source,
        target=row.target,
        capacity_bits_per_s=row.capacity_bits_per_s,
        rtt_ms=row.rtt_ms,
        loss=row.loss,
        cost_per_gb=row.cost_per_gb,
        as_of=optional_moment(row.as_of),
        source_of_values=row.source_of_values,
    )


def list_links(connection: Connection, after: str, limit: int) -> list[Link]:
    """Links in the order of source and target; the cursor is `source>target`."""
    source, _, target = after.partition(">")
    query = (
        select(links)
        .where(or_(links.c.source > source, (links.c.source == source) & (links.c.target > target)))
        .order_by(links.c.source, links.c.target)
        .limit(limit)
    )
    return [show_link(row) for row in connection.execute(query)]


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
    """The limits that a site's agent must hold to: of it, of links from or to it, of all tenants and transfers."""
    found = []
    for limit in list_limits(connection, now):
        kind, _, name = limit.scope.partition(":")
        if (
            (kind == "site" and name == site)
            or (kind == "link" and site in name.split(">"))
            or kind in ("tenant", "transfer")
        ):
            found.append(limit)
    return found
