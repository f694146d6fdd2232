"""One request on its way through the server: who asks, what for, decoded; and how errors are answered."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from aiohttp import web

from flowengine.api.problems import TITLES, status_of
from flowengine.api.schema import Problem
from flowengine.coordinator.routes.route import Route
from flowengine.errors import FlowError

__all__ = ["AgentWho", "Call", "UserWho", "problem"]

log: Final = logging.getLogger("flowengine.coordinator")


@dataclass(frozen=True, slots=True)
class UserWho:
    """A user, by an API token."""

    name: str
    role: str
    tenant: str

    @property
    def sees(self) -> str | None:
        """The tenant whose transfers this user may see; None for all."""
        return self.tenant if self.role == "user" else None


@dataclass(frozen=True, slots=True)
class AgentWho:
    """A site's agent, by its certificate."""

    site: str
    key_sha256: str
    serial: str


@dataclass(slots=True)
class Call:
    """A request: its route, who asks, and everything decoded.

    Attributes:
        path: values of the names in braces.
        query: of the route's query type.
        body: of the route's request type; `raw` the bytes.
        key: Idempotency-Key.
        again: asks anew who asks, for what lasts longer than a right; raises AuthenticationError.
    """

    route: Route
    request: web.BaseRequest
    path: dict[str, str]
    query: Any
    body: Any = None
    raw: bytes = b""
    who: UserWho | AgentWho | None = None
    key: str = ""
    again: Callable[[], Awaitable[UserWho | AgentWho | None]] | None = None

    @property
    def user(self) -> UserWho:
        """The user who asks; routes for users have one."""
        assert isinstance(self.who, UserWho)
        return self.who

    @property
    def site(self) -> str:
        """The site whose agent asks; routes for agents have one."""
        assert isinstance(self.who, AgentWho)
        return self.who.site


def problem(error: FlowError, instance: str = "") -> web.Response:
    """The answer that tells an error."""
    status = status_of(error)
    body = Problem(
        title=TITLES.get(status, "failed"),
        status=status,
        reason=error.reason,
        detail=error.message,
        hint=error.hint,
        instance=instance,
        retryable=error.retryable,
        context=error.context,
    )
    headers = {"Cache-Control": "no-store"}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status in (429, 503):
        headers["Retry-After"] = "1"
    return web.Response(
        status=status,
        body=msgspec.json.encode(body, enc_hook=str),
        content_type="application/problem+json",
        headers=headers,
    )
