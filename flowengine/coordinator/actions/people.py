"""Users, tokens and tenants."""

from __future__ import annotations

import msgspec
from sqlalchemy import delete, func, select, update

from flowengine.api.people import Tenant, TenantRequest, Token, User, UserRequest
from flowengine.coordinator.database.people import find_tenant, find_user, moment
from flowengine.coordinator.database.tables import tenants, tokens, users
from flowengine.coordinator.database.transactions import Writing
from flowengine.errors import FlowError, NotFound, UsageError
from flowengine.trust.tokens import UserToken

__all__ = ["change_tenant", "change_user", "create_tenant", "create_user", "first_admin", "make_token"]

ADMIN = "admin"
DEFAULT_TENANT = "default"
ADMIN_TOKEN_S = 3650 * 86400


def given(raw: bytes) -> set[str]:
    """The fields that a change names: what is left out stays."""
    return set(msgspec.json.decode(raw, type=dict[str, msgspec.Raw]))


def _check_tenant(writing: Writing, name: str) -> None:
    known = writing.connection.execute(select(tenants.c.name).where(tenants.c.name == name)).first()
    if known is None:
        raise NotFound(
            f"there is no tenant {name}", hint="flow tenant set makes it; flow tenant ls lists all"
        )


def create_user(writing: Writing, request: UserRequest, by: str) -> User:
    """Make a user."""
    if request.name is None:
        raise UsageError("a new user needs a name", hint="set name to something like alice")
    if find_user(writing.connection, request.name) is not None:
        raise FlowError(
            f"there is a user {request.name} already", hint="flow user set changes it", reason="conflict"
        )
    _check_tenant(writing, request.tenant)
    writing.connection.execute(
        users.insert().values(
            name=request.name,
            role=request.role,
            tenant=request.tenant,
            disabled=request.disabled,
            created=writing.now,
        )
    )
    writing.emit("user.created", user=request.name, tenant=request.tenant, by=by, role=request.role)
    made = find_user(writing.connection, request.name)
    assert made is not None
    return made


def change_user(writing: Writing, name: str, request: UserRequest, raw: bytes, by: str) -> User:
    """Change role, tenant, or disable; one admin always stays."""
    user = find_user(writing.connection, name)
    if user is None:
        raise NotFound(f"there is no user {name}", hint="GET /v1/users lists them")
    if request.name not in (None, name):
        raise FlowError("a user keeps the name", hint="make a new user", reason="conflict")
    values = {field: getattr(request, field) for field in given(raw) - {"name"}}
    if "tenant" in values:
        _check_tenant(writing, request.tenant)
    stays_admin = values.get("role", user.role) == "admin" and not values.get("disabled", user.disabled)
    if user.role == "admin" and not user.disabled and not stays_admin:
        others = writing.connection.execute(
            select(func.count()).where(users.c.role == "admin", ~users.c.disabled, users.c.name != name)
        ).scalar_one()
        if not others:
            raise FlowError(f"{name} is the last admin", hint="make another admin first", reason="conflict")
    if values:
        writing.connection.execute(update(users).where(users.c.name == name).values(**values))
    writing.emit("user.changed", user=name, by=by, changed=sorted(values))
    changed = find_user(writing.connection, name)
    assert changed is not None
    return changed


def make_token(
    writing: Writing, name: str, valid_s: float, comment: str, by: str, secret: UserToken
) -> Token:
    """Keep a new API token of a user; the answer is the only one with its secret."""
    user = find_user(writing.connection, name)
    if user is None:
        raise NotFound(f"there is no user {name}", hint="GET /v1/users lists them")
    expires = writing.now + valid_s
    writing.connection.execute(
        tokens.insert().values(
            id=secret.id,
            user=name,
            secret_sha256=secret.digest(),
            created=writing.now,
            expires=expires,
            comment=comment,
        )
    )
    writing.connection.execute(delete(tokens).where(tokens.c.expires < writing.now - 30 * 86400))
    writing.emit("token.created", user=name, token=secret.id, by=by)
    return Token(
        id=secret.id,
        user=name,
        created=moment(writing.now),
        expires=moment(expires),
        comment=comment,
        secret=secret.format_secret(),
    )


def first_admin(writing: Writing, secret: UserToken) -> None:
    """Make the first tenant, and the first admin with this token, where there is no user yet."""
    known = writing.connection.execute(select(tenants.c.name).where(tenants.c.name == DEFAULT_TENANT)).first()
    if known is None:
        writing.connection.execute(tenants.insert().values(name=DEFAULT_TENANT, weight=1.0))
    if writing.connection.execute(select(users.c.name).limit(1)).first() is not None:
        return
    create_user(writing, UserRequest(name=ADMIN, role="admin", tenant=DEFAULT_TENANT), "start")
    make_token(writing, ADMIN, ADMIN_TOKEN_S, "first login", "start", secret)


def create_tenant(writing: Writing, request: TenantRequest, by: str) -> Tenant:
    """Make a tenant."""
    if request.name is None:
        raise UsageError("a new tenant needs a name", hint="set name to something like physics")
    if find_tenant(writing.connection, writing.now, request.name) is not None:
        raise FlowError(
            f"there is a tenant {request.name} already", hint="flow tenant set changes it", reason="conflict"
        )
    writing.connection.execute(
        tenants.insert().values(**{name: getattr(request, name) for name in request.__struct_fields__})
    )
    writing.emit("tenant.created", tenant=request.name, user=by)
    made = find_tenant(writing.connection, writing.now, request.name)
    assert made is not None
    return made


def change_tenant(writing: Writing, name: str, request: TenantRequest, raw: bytes, by: str) -> Tenant:
    """Change share and bounds."""
    if find_tenant(writing.connection, writing.now, name) is None:
        raise NotFound(f"there is no tenant {name}", hint="GET /v1/tenants lists them")
    if request.name not in (None, name):
        raise FlowError("a tenant keeps its name", hint="make a new one", reason="conflict")
    values = {field: getattr(request, field) for field in given(raw) - {"name"}}
    if values:
        writing.connection.execute(update(tenants).where(tenants.c.name == name).values(**values))
    writing.emit("tenant.changed", tenant=name, user=by, changed=sorted(values))
    changed = find_tenant(writing.connection, writing.now, name)
    assert changed is not None
    return changed
