"""A route: its method, path, types, who may use it, and how it can be answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from flowengine.api.problems import STATUSES
from flowengine.coordinator.routes.queries import NoQuery

__all__ = ["ADMIN", "ASKING", "MAX_BODY_BYTES", "OPERATOR", "READING", "SEEING", "Route", "statuses"]

MAX_BODY_BYTES: Final = 1 << 20

ADMIN: Final = frozenset({"admin"})
OPERATOR: Final = frozenset({"admin", "operator"})
ASKING: Final = frozenset({"admin", "operator", "user"})
READING: Final = frozenset({"admin", "operator", "user", "auditor"})
SEEING: Final = frozenset({"admin", "operator", "auditor"})


@dataclass(frozen=True, slots=True)
class Route:
    """One way to ask.

    Attributes:
        name: of the handler, and the OpenAPI operationId.
        who: roles of users, "agent" for a TLS client certificate, "any" without authentication.
        request: what the body is decoded as, strictly; None: no body.
        response: what is answered with `status`; None: nothing.
        items: what a `Page` that is answered holds.
        also: reasons beyond those that every route of its kind can have.
        media: of the answer.
        creates: takes `Idempotency-Key`.
        max_body_bytes: most that is read of a request; above `MAX_BODY_BYTES` one at a time.
    """

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    name: str
    summary: str
    who: frozenset[str] | Literal["agent", "any"]
    request: type | None = None
    response: type | None = None
    items: type | None = None
    query: type = NoQuery
    status: int = 200
    also: tuple[str, ...] = ()
    media: str = "application/json"
    streams: bool = False
    creates: bool = False
    max_body_bytes: int = MAX_BODY_BYTES

    @property
    def parameters(self) -> list[str]:
        """The names in braces."""
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]


def statuses(route: Route) -> dict[int, tuple[str, ...]]:
    """Every status that an error of this route can have, with its reasons; 500 is none: it would be a bug."""
    reasons = ["usage", "temporary", *route.also]
    if route.who != "any":
        reasons += ["authentication", "denied"]
    if route.parameters:
        reasons.append("not-found")
    if route.request is not None:
        reasons += ["too-large", "wrong-media-type"]
    if route.creates:
        reasons.append("conflict")
    found: dict[int, list[str]] = {}
    for reason in dict.fromkeys(reasons):
        found.setdefault(STATUSES[reason], []).append(reason)
    return {status: tuple(found[status]) for status in sorted(found)}
