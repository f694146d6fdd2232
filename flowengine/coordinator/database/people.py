"""Users, their tokens, tenants with shares and bounds: queries and their rows as resources."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection, func, select, update

from flowengine.api.people import Tenant, Token, User
from flowengine.coordinator.database.tables import AnyRow, tasks, tenants, tokens, usage, users

__all__ = [
    "DAY_S",
    "day_minute",
    "find_tenant",
    "find_token",
    "find_user",
    "list_tenants",
    "list_tokens",
    "list_users",
    "moment",
    "touch_token",
]

DAY_S = 86400
_TOUCH_EVERY_S = 60.0


def moment(at: float) -> datetime:
    """A time as the API shows it."""
    return datetime.fromtimestamp(at, UTC)


def optional_moment(at: float | None) -> datetime | None:
    """A time, where there is one."""
    return None if at is None else moment(at)


def day_minute(now: float) -> int:
    """The first minute of the day (UTC), as `usage` counts them."""
    return int(now // DAY_S * (DAY_S // 60))


def _user(row: AnyRow) -> User:
    return User(
        name=row.name, role=row.role, tenant=row.tenant, disabled=row.disabled, created=moment(row.created)
    )


def find_user(connection: Connection, name: str) -> User | None:
    """A user by name."""
    row = connection.execute(select(users).where(users.c.name == name)).first()
    return None if row is None else _user(row)


def list_users(connection: Connection, after: str, limit: int) -> list[User]:
    """Users in the order of their names."""
    rows = connection.execute(select(users).where(users.c.name > after).order_by(users.c.name).limit(limit))
    return [_user(row) for row in rows]


def find_token(connection: Connection, token_id: str) -> tuple[AnyRow, User] | None:
    """A token's row and its user."""
    row = connection.execute(select(tokens).where(tokens.c.id == token_id)).first()
    if row is None:
        return None
    user = find_user(connection, row.user)
    return None if user is None else (row, user)


def touch_token(connection: Connection, token_id: str, now: float) -> None:
    """Note that a token was used, once a minute at most."""
    connection.execute(
        update(tokens)
        .where(tokens.c.id == token_id, func.coalesce(tokens.c.last_used, 0) < now - _TOUCH_EVERY_S)
        .values(last_used=now)
    )


def show_token(row: AnyRow, secret: str = "") -> Token:
    """A token as the API shows it."""
    return Token(
        id=row.id,
        user=row.user,
        created=moment(row.created),
        expires=moment(row.expires),
        comment=row.comment,
        last_used=optional_moment(row.last_used),
        secret=secret,
    )


def list_tokens(connection: Connection, user: str | None, after: str, limit: int) -> list[Token]:
    """Tokens in the order of their ids: of one user, or all."""
    query = select(tokens).where(tokens.c.id > after).order_by(tokens.c.id).limit(limit)
    if user is not None:
        query = query.where(tokens.c.user == user)
    return [show_token(row) for row in connection.execute(query)]


def list_tenants(
    connection: Connection, now: float, after: str, limit: int, name: str | None = None
) -> list[Tenant]:
    """Tenants in the order of their names, with what they use now."""
    query = select(tenants).where(tenants.c.name > after).order_by(tenants.c.name).limit(limit)
    if name is not None:
        query = query.where(tenants.c.name == name)
    rows = connection.execute(query).all()
    names = [row.name for row in rows]
    counts = {
        (row.tenant, row.state): row.number
        for row in connection.execute(
            select(tasks.c.tenant, tasks.c.state, func.count().label("number"))
            .where(tasks.c.state.in_(["waiting", "running"]), tasks.c.tenant.in_(names))
            .group_by(tasks.c.tenant, tasks.c.state)
        )
    }
    today = {
        row.tenant: int(row.total)
        for row in connection.execute(
            select(usage.c.tenant, func.sum(usage.c.size_bytes).label("total"))
            .where(usage.c.tenant.in_(names), usage.c.minute >= day_minute(now))
            .group_by(usage.c.tenant)
        )
    }
    return [
        Tenant(
            name=row.name,
            weight=row.weight,
            max_running=row.max_running,
            max_queued=row.max_queued,
            max_bytes_per_day=row.max_bytes_per_day,
            running=counts.get((row.name, "running"), 0),
            queued=counts.get((row.name, "waiting"), 0),
            bytes_today=today.get(row.name, 0),
        )
        for row in rows
    ]


def find_tenant(connection: Connection, now: float, name: str) -> Tenant | None:
    """A tenant by name."""
    found = list_tenants(connection, now, "", 1, name)
    return found[0] if found else None
