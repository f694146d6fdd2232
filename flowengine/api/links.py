"""Links between sites: what is declared and measured of them, limits of bandwidth, and times of maintenance."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from flowengine.api.schema import Name, Rate, Request, Resource, Text, Word

__all__ = [
    "Limit",
    "LimitRequest",
    "LimitWindow",
    "Link",
    "LinkLook",
    "LinkRequest",
    "Maintenance",
    "MaintenanceRequest",
    "ProbeRequest",
]


class Link(Resource):
    """A directed path between two sites: what an operator declared, and what was measured.

    `rate_bits_per_s` is what it is believed to carry, give or take `spread` (relative standard deviation), by looks of
    which the last was at `measured`; null while nobody has looked. What was measured beats what was declared.
    """

    source: Name
    target: Name
    capacity_bits_per_s: Rate | None = None
    rtt_ms: float | None = None
    loss: float | None = None
    cost_per_gb: float = 0.0
    as_of: datetime | None = None
    source_of_values: Word = ""
    rate_bits_per_s: float | None = None
    spread: float | None = None
    measured: datetime | None = None


class LinkLook(Resource):
    """One look at a link: a probe, or what all transfers together moved over it. `at_least`: something else held
    them back.
    """

    at: datetime
    kind: Literal["probe", "transfers"]
    rate_bits_per_s: float | None = None
    rtt_ms: float | None = None
    loss: float | None = None
    at_least: bool = False


class LinkRequest(Request):
    """What is declared about a link."""

    capacity_bits_per_s: Rate | None = None
    rtt_ms: Annotated[float, Meta(ge=0, le=100000)] | None = None
    loss: Annotated[float, Meta(ge=0, le=1)] | None = None
    cost_per_gb: Annotated[float, Meta(ge=0)] = 0.0


class ProbeRequest(Request):
    """Measure a link by a burst of at most so many bytes and seconds."""

    size_bytes: Annotated[int, Meta(ge=1 << 16, le=1 << 32)] = 64 << 20
    seconds: Annotated[float, Meta(gt=0, le=30)] = 2.0


class MaintenanceRequest(Request):
    """A time in which a site ("site:A") or link ("link:A>B") is not to be used; from `drain_s` before its start no new
    route is led over it.
    """

    scope: Annotated[str, Meta(pattern=r"^(link:[a-z0-9-]{1,63}>[a-z0-9-]{1,63}|site:[a-z0-9-]{1,63})$")]
    starts: datetime
    ends: datetime
    drain_s: Annotated[float, Meta(ge=0, le=7 * 86400)] = 600.0
    comment: Text = ""


class Maintenance(Resource):
    """A time in which a site or link is not used."""

    id: str
    scope: str
    starts: datetime
    ends: datetime
    drain_s: float
    comment: str = ""
    created_by: str = ""


class LimitWindow(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A rate for some hours: `days` of "mon tue wed thu fri sat sun", `start` and `end` as HH:MM in `zone`."""

    rate_bits_per_s: Annotated[int, Meta(ge=0, le=10**15)]
    start: Annotated[str, Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d$")]
    end: Annotated[str, Meta(pattern=r"^(([01]\d|2[0-3]):[0-5]\d|24:00)$")]
    days: list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]] = []
    zone: Word = "UTC"


class LimitRequest(Request):
    """Bandwidth for a scope; `rate_bits_per_s` holds outside all windows (null: no limit)."""

    rate_bits_per_s: Annotated[int, Meta(ge=0, le=10**15)] | None = None
    windows: Annotated[list[LimitWindow], Meta(max_length=50)] = []


class Limit(Resource):
    """A bandwidth limit.

    `scope` is "link:A>B", "site:A" (what leaves it), "tenant:T", "transfer:ID", or "read:A:/ROOT" and "write:A:/ROOT": what
    is read from and written to one root that a site offers.
    """

    scope: str
    rate_bits_per_s: int | None
    windows: list[LimitWindow]
    now_bits_per_s: int | None
    changed: datetime
    changed_by: str
