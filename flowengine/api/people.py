"""Who asks, as what, and for how much: users, API tokens, tenants."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from flowengine.api.schema import Name, Request, Resource, Size, Text

__all__ = ["Role", "Tenant", "TenantRequest", "Token", "TokenRequest", "User", "UserRequest"]

Role: TypeAlias = Literal["admin", "operator", "user", "auditor"]


class TenantRequest(Request):
    """A party with its share: weight in the fair queue, and bounds (null: none)."""

    name: Name | None = None
    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    max_running: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    max_queued: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    max_bytes_per_day: Size | None = None


class Tenant(Resource):
    """A party with its share and what it uses now."""

    name: Name
    weight: float
    max_running: int | None
    max_queued: int | None
    max_bytes_per_day: int | None
    running: int = 0
    queued: int = 0
    bytes_today: int = 0


class UserRequest(Request):
    """A new user, or changes to one."""

    name: Name | None = None
    role: Role = "user"
    tenant: Name = "default"
    disabled: bool = False


class User(Resource):
    """Who may ask for what."""

    name: Name
    role: Role
    tenant: Name
    disabled: bool
    created: datetime


class TokenRequest(Request):
    """A new API token for a user (admins: for any)."""

    user: Name | None = None
    valid_s: Annotated[int, Meta(ge=60, le=366 * 86400)] = 90 * 86400
    comment: Text = ""


class Token(Resource):
    """An API token; `secret` is there once, when it was made."""

    id: str
    user: Name
    created: datetime
    expires: datetime
    comment: str = ""
    last_used: datetime | None = None
    secret: str = ""
