"""What happened, and how the coordinator stands."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from flowengine.api.schema import Resource

__all__ = ["Event", "Health"]


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
