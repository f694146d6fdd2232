"""What stands in an address: the parameters behind the question mark, and the names in braces of a path."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from flowengine.api.schema import Name, SitePath
from flowengine.api.transfers import TransferState

__all__ = [
    "PATH_TYPES",
    "AgentLabelsQuery",
    "AgentPartQuery",
    "CheckpointsQuery",
    "EventsQuery",
    "FilesQuery",
    "LabelsQuery",
    "LandedQuery",
    "NoQuery",
    "PageQuery",
    "PartQuery",
    "TransferQuery",
    "TransfersQuery",
]

Limit_: Final = Annotated[int, Meta(ge=1, le=1000, description="How many at most.")]
Cursor: Final = Annotated[
    str, Meta(max_length=200, description="`next` of the page before; empty for the first page.")
]


class NoQuery(msgspec.Struct, forbid_unknown_fields=True):
    """No parameters."""


class PageQuery(msgspec.Struct, forbid_unknown_fields=True):
    """A page of a listing."""

    limit: Limit_ = 100  # type: ignore[valid-type]
    after: Cursor = ""  # type: ignore[valid-type]


class TransfersQuery(PageQuery):
    """A page of transfers, newest first."""

    state: Annotated[TransferState, Meta(description="Only those in this state.")] | None = None
    site: Annotated[Name, Meta(description="Only those from or to this site.")] | None = None
    user: Annotated[Name, Meta(description="Only this user's.")] | None = None
    tenant: Annotated[Name, Meta(description="Only this tenant's.")] | None = None


class TransferQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Whether to wait for the end."""

    wait_s: Annotated[
        float, Meta(ge=0, le=60, description="Answer as soon as it ended, or after so long.")
    ] = 0.0


class LandedQuery(PageQuery):
    """Objects that landed after the cursor; waits for the first where there is none."""

    wait_s: Annotated[float, Meta(ge=0, le=60, description="How long to wait for something new.")] = 0.0


class EventsQuery(PageQuery):
    """Events after the cursor that pass all filters."""

    transfer: Annotated[str, Meta(max_length=64, description="Only this transfer's.")] = ""
    site: Annotated[Name, Meta(description="Only this site's.")] | None = None
    types: Annotated[
        str,
        Meta(
            max_length=400,
            description="Only types that begin with one of these, by commas; one with which none begins is refused.",
        ),
    ] = ""


class LabelsQuery(PageQuery):
    """Label statements in the order in which they came."""

    site: Annotated[Name, Meta(description="Only those on this site's data.")] | None = None


class AgentLabelsQuery(msgspec.Struct, forbid_unknown_fields=True):
    """From where on."""

    after: Annotated[int, Meta(ge=0, le=2**62, description="Serial of the last one that is there.")] = 0


class PartQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which part of a file."""

    offset: Annotated[int, Meta(ge=0, le=2**40, description="Where the part begins.")] = 0


class AgentPartQuery(PartQuery):
    """Which part of which bundle."""

    version: Annotated[
        int, Meta(ge=0, le=2**62, description="Of this version; 0: of that which is in force.")
    ] = 0


class FilesQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which folder."""

    path: Annotated[SitePath, Meta(description="The folder, below one of the site's roots.")]


class CheckpointsQuery(PageQuery):
    """A page of checkpoints, newest first."""

    agent: (
        Annotated[str, Meta(pattern=r"^site:[a-z0-9-]{1,63}$", description="Only those of this agent.")]
        | None
    ) = None


TransferId: Final = Annotated[str, Meta(pattern=r"^t-[0-9a-z]{4,32}$")]
PATH_TYPES: Final[dict[str, object]] = {
    "site": Name,
    "source": Name,
    "target": Name,
    "user": Name,
    "tenant": Name,
    "transfer": TransferId,
    "task": Annotated[str, Meta(pattern=r"^t-[0-9a-z]{4,32}\.[0-9]{1,3}$")],
    "handle": Annotated[str, Meta(pattern=r"^ap-[0-9a-f]{16}$")],
    "approver": Annotated[str, Meta(pattern=r"^[^/\\x00]{1,200}$")],
    "token": Annotated[str, Meta(pattern=r"^[0-9a-f]{8}$")],
    "version": Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,17}$")],
    "answer": Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")],
    "digest": Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$")],
    "plan": Annotated[str, Meta(pattern=r"^p-[0-9a-z]{4,32}$")],
    "maintenance": Annotated[str, Meta(pattern=r"^m-[0-9a-f]{12}$")],
    "scope": Annotated[
        str,
        Meta(
            pattern=r"^(link:[a-z0-9-]{1,63}>[a-z0-9-]{1,63}|site:[a-z0-9-]{1,63}|tenant:[a-z0-9-]{1,63}|transfer:t-[0-9a-z]{4,32}|(read|write):[a-z0-9-]{1,63}:/[^\x00]{0,300})$"
        ),
    ],
}
"""What a name in braces may be; a path that is not so is "usage"."""
