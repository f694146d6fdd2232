"""What happened, and how the coordinator stands."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal

from flowengine.api.schema import Resource

__all__ = ["EVENT_TYPES", "Event", "Health"]

EVENT_TYPES: Final = (
    "agreement.set",
    "approval.given", "approval.requested", "approval.withdrawn",
    "evidence.contradicted", "evidence.new-chain",
    "label.set",
    "limit.changed", "limit.removed",
    "link.changed", "link.measured", "link.removed",
    "maintenance.created", "maintenance.removed",
    "plan.changed",
    "policy.activated",
    "site.changed", "site.draining", "site.expected", "site.joined", "site.looked", "site.measured", "site.offline",
    "site.online", "site.probed", "site.renewed", "site.revoked", "site.token",
    "task.adopted", "task.claimed", "task.done", "task.expired", "task.failed", "task.fed", "task.lost", "task.purged",
    "task.quarantined", "task.released", "task.retry", "task.unfed",
    "tenant.changed", "tenant.created",
    "token.created", "token.removed",
    "transfer.cancelled", "transfer.completed", "transfer.denied", "transfer.paused", "transfer.purged",
    "transfer.quarantined", "transfer.requested", "transfer.resumed", "transfer.retried", "transfer.started",
    "transfer.suspended", "transfer.terminated",
    "user.changed", "user.created",
)  # fmt: skip
"""All that a coordinator of this version leaves (docs/reference/events.md); a later one may leave others too."""


class Health(Resource):
    """The coordinator's state: its version, database, clock, and whether it leads the planning."""

    status: Literal["ok", "starting", "stopping"]
    version: str
    api: Literal["v1"]
    database: Literal["sqlite", "postgresql"]
    leader: bool
    epoch: int
    now: datetime


class Event(Resource):
    """Something that happened; `seq` is the cursor of the stream (the SSE id)."""

    seq: int
    at: datetime
    type: str
    transfer: str = ""
    site: str = ""
    user: str = ""
    data: dict[str, Any] = {}
