"""Tasks that another target serves: which may be, what they are given, and how the source takes over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import msgspec
from sqlalchemy import Connection, select, update

from flowengine.api.transfers import TransferRequest
from flowengine.coordinator.database.catalogue import decode_addresses
from flowengine.coordinator.database.tables import AnyRow, sites, tasks
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.database.transfers import decode_request, lock_transfer, settle
from flowengine.coordinator.database.work import read_feeders
from flowengine.coordinator.decisions import Verdict
from flowengine.coordinator.rules.feeding import lost
from flowengine.coordinator.rules.paths import clean
from flowengine.coordinator.rules.states import dialer
from flowengine.trust.grant import VERSION_BYTES

__all__ = ["addresses_of", "end_feeds", "hop_request", "part_of", "permits", "serve_directly", "version_of"]


def hop_request(request: TransferRequest, verdict: Verdict, feeder: int, target: int) -> TransferRequest:
    """The hop between two targets as a request of its own: what landed at the first has the labels of the source.

    Args:
        verdict: on the request.
        feeder, target: positions among its targets.
    """
    return msgspec.structs.replace(
        request,
        source=request.targets[feeder],
        targets=[request.targets[target]],
        labels=sorted({*request.labels, *verdict.labels}),
        contracts=sorted({*request.contracts, *verdict.contracts}),
    )


def part_of(request: TransferRequest, ids: Iterable[str]) -> TransferRequest:
    """The part of a request that some of its tasks are, as a request of its own."""
    wanted = [int(task.rpartition(".")[2]) for task in ids]
    return msgspec.structs.replace(request, targets=[request.targets[number - 1] for number in wanted])


def permits(verdict: Verdict) -> bool:
    """Whether all of these decisions permit copies that may be read and passed on."""
    return all(
        one.verdict != "deny" and one.use != "hold" and "onward" not in one.duties
        for one in verdict.decisions
    )


def version_of(connection: Connection, task: str) -> bytes:
    """The version that a task landed, as its target says; empty where none is named."""
    if not task:
        return b""
    said = connection.execute(select(tasks.c.version_id).where(tasks.c.id == task)).scalar_one()
    with contextlib.suppress(ValueError):
        found = bytes.fromhex(said)
        if len(found) == VERSION_BYTES:
            return found
    return bytes(VERSION_BYTES)  # none that there could be: nothing is given


def serve_directly(writing: Writing, row: AnyRow, transfer: AnyRow, why: str) -> None:
    """Let the transfer's source serve a task that another target should have served; it waits for its turn."""
    request = decode_request(transfer.request)
    names = [request.source.site, row.target_site]
    known = {
        found.name: found
        for found in writing.connection.execute(select(sites).where(sites.c.name.in_(names)))
    }
    end = dialer(
        request.source.site,
        addresses_of(known.get(request.source.site)),
        row.target_site,
        addresses_of(known.get(row.target_site)),
    )
    driver = request.source.site if end == "source" else row.target_site
    writing.connection.execute(
        update(tasks)
        .where(tasks.c.id == row.id)
        .values(
            state="waiting",
            source_site=request.source.site,
            source_path=clean(request.source.path),
            driver=driver,
            fed_by="",
            holder="",
            attempts=0,
            ready_at=0.0,
            reason="",
            message="",
            hint="",
            wait_name="",
            wait_since=writing.now,
        )
    )
    writing.emit(
        "task.unfed",
        transfer=row.transfer,
        site=row.target_site,
        user=transfer.user,
        tenant=row.tenant,
        task=row.id,
        feeder=row.fed_by,
        why=why[:500],
        wake=[driver, row.target_site],
    )


def addresses_of(row: AnyRow | None) -> list[str] | None:
    """Where a site can be dialled; None where it was never seen, which may still say so."""
    return None if row is None or row.last_seen is None else decode_addresses(row.addresses)


def end_feeds(writing: Writing) -> None:
    """Let the source serve tasks that wait for a target which cannot serve them, or not soon."""
    rows = writing.connection.execute(
        select(tasks, sites.c.state.label("site_state"))
        .join(sites, sites.c.name == tasks.c.source_site)
        .where(tasks.c.state == "waiting", tasks.c.fed_by != "", ~tasks.c.paused)
        .order_by(tasks.c.transfer)
    ).all()
    feeders = read_feeders(writing.connection, {row.fed_by for row in rows})
    for row in rows:
        why = lost(feeders.get(row.fed_by), row.site_state, row.wait_name, row.wait_since, writing.now)
        if not why:
            continue
        transfer = lock_transfer(writing, row.transfer)
        again = writing.connection.execute(select(tasks).where(tasks.c.id == row.id)).one()
        if again.state == "waiting" and again.fed_by == row.fed_by:
            serve_directly(writing, again, transfer, f"{row.source_site} cannot serve it: {why}")
            settle(writing, row.transfer)
