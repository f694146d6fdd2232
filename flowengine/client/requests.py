"""What callers write, as requests of the API: pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, TypeAlias

import msgspec

from flowengine.api.schema import in_words
from flowengine.api.transfers import Endpoint, Priority, TransferOptions, TransferRequest
from flowengine.errors import UsageError

__all__ = ["Deadline", "Place", "parse_place", "show_place", "transfer_request"]

Place: TypeAlias = str | Endpoint
"""Where data is: "site:/path", or an `Endpoint`."""
Deadline: TypeAlias = datetime | timedelta | None

_PLACE: Final = re.compile(r"([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?):(/[^\x00]{0,4095})")


def parse_place(place: Place) -> Endpoint:
    """A place from "site:/path".

    >>> parse_place("hpc-a:/data/run7/")
    Endpoint(site='hpc-a', path='/data/run7/')
    """
    if isinstance(place, Endpoint):
        return place
    match = _PLACE.fullmatch(place)
    if match is None:
        raise UsageError(
            f"{place!r} is not a path at a site",
            hint="write SITE:/PATH; flow site ls lists sites and what they offer",
        )
    return Endpoint(site=match[1], path=match[2])


def show_place(place: Endpoint) -> str:
    """A place as it is written."""
    return f"{place.site}:{place.path}"


def transfer_request(
    source: Place,
    targets: Place | Sequence[Place],
    *,
    mode: Literal["copy", "sync", "verify"],
    now: datetime,
    labels: Iterable[str] = (),
    contracts: Iterable[str] = (),
    purpose: str = "",
    priority: Priority = "normal",
    deadline: Deadline = None,
    comment: str = "",
    options: TransferOptions | None = None,
    delete: bool | None = None,
    best_effort: bool = False,
    cost_limit_usd: float | None = None,
    size_bytes: int | None = None,
    objects: int | None = None,
    plan: str = "",
) -> TransferRequest:
    """A checked request.

    Raises:
        UsageError: something in it makes no sense.
    """
    places = [targets] if isinstance(targets, str | Endpoint) else list(targets)
    if not places:
        raise UsageError("a transfer needs at least one target", hint='give one like "cloud-b:/data"')
    for name, words in (("labels", labels), ("contracts", contracts)):
        if isinstance(words, str):
            raise UsageError(f"{name} is one text, not a list of them", hint=f"write {name}=[{words!r}]")
    if not isinstance(deadline, datetime | timedelta | None):
        raise UsageError(
            f"the deadline {deadline!r} is no point in time", hint="give a datetime, or a timedelta from now"
        )
    if isinstance(deadline, timedelta):
        deadline = now + deadline
    elif deadline is not None and deadline.tzinfo is None:
        deadline = deadline.astimezone()
    if deadline is not None and deadline <= now:
        raise UsageError(f"the deadline {deadline.isoformat()} has passed", hint="give a later one")
    chosen = options or TransferOptions()
    if delete is not None:
        chosen = msgspec.structs.replace(chosen, delete=delete)
    request = TransferRequest(
        source=parse_place(source),
        targets=[parse_place(place) for place in places],
        mode=mode,
        labels=list(labels),
        contracts=list(contracts),
        purpose=purpose,
        priority=priority,
        deadline=None if deadline is None else deadline.astimezone(UTC),
        best_effort=best_effort,
        cost_limit_usd=cost_limit_usd,
        size_bytes=size_bytes,
        objects=objects,
        plan=plan,
        comment=comment,
        options=chosen,
    )
    try:  # constructors check nothing; the coordinator would, but later and with less context
        return msgspec.convert(msgspec.to_builtins(request), TransferRequest)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"this transfer cannot be asked for: {in_words(error)}",
            hint="help(flowengine.AsyncClient.copy) says what may be given",
        ) from None
