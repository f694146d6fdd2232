"""Plans: what a transfer would be, asked before anything moves."""

from __future__ import annotations

from datetime import datetime

from flowengine.api.schema import Name, Request, Resource, Size
from flowengine.api.transfers import Decision, TransferRequest, Way

__all__ = ["Feed", "Plan", "PlanRequest"]


class PlanRequest(Request):
    """Ask what a transfer would be: nothing moves. `size_bytes` and `objects` spare the count where they are known."""

    request: TransferRequest
    size_bytes: Size | None = None
    objects: Size | None = None


class Feed(Resource):
    """A target that another target serves, once that has everything; `source` would serve it otherwise."""

    target: Name
    feeder: Name
    source: Name


class Plan(Resource):
    """What a transfer would be: verdict of policy, ways, time, money, and what binds. A plan that is permitted is kept
    until `expires`; a transfer that names its `id` goes exactly these ways.

    `promise` is what a deadline would get: "none" without one, "admitted", "refused" (with `earliest_possible`) or
    "best-effort".
    """

    permitted: bool
    decisions: list[Decision]
    id: str = ""
    made: datetime | None = None
    expires: datetime | None = None
    routes: list[list[Name]] = []
    ways: list[Way] = []
    size_bytes: int | None = None
    objects: int | None = None
    rate_bits_per_s: float | None = None
    duration_s: float | None = None
    earliest: datetime | None = None
    expected: datetime | None = None
    latest: datetime | None = None
    usd: float | None = None
    promise: str = "none"
    earliest_possible: datetime | None = None
    binds: list[str] = []
    text: str = ""
    feeds: list[Feed] = []
