"""Transfers and their tasks: rows as resources, and the transfer's state kept equal to what its tasks say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Select, or_, select, update

from flowengine.api.transfers import (
    Counters,
    Decision,
    DeliveryReceipt,
    Disposal,
    LandedObject,
    Task,
    Transfer,
    TransferRequest,
    Wait,
    Way,
)
from flowengine.coordinator.database.ledger import settle_counts
from flowengine.coordinator.database.people import moment, optional_moment
from flowengine.coordinator.database.tables import AnyRow, landed, task_plans, tasks, transfers
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.planning.outcome import TaskPlan, Told
from flowengine.coordinator.rules.feeding import source_of
from flowengine.coordinator.rules.queue import STANDS_STILL
from flowengine.coordinator.rules.states import TaskFacts, Verdict, derive
from flowengine.errors import NotFound

__all__ = [
    "decode_decisions",
    "find_transfer",
    "has_moved",
    "landed_after",
    "list_transfers",
    "lock_transfer",
    "moved_bytes",
    "settle",
    "show_task",
    "show_transfers",
    "sum_counters",
]

_request = msgspec.json.Decoder(TransferRequest)
_decisions = msgspec.json.Decoder(list[Decision])
_counters = msgspec.json.Decoder(Counters)
_disposal = msgspec.json.Decoder(Disposal)
_told = msgspec.json.Decoder(Told)


def decode_request(text: str) -> TransferRequest:
    """A request as a transfer's row keeps it."""
    return _request.decode(text)


def decode_decisions(text: str) -> list[Decision]:
    """What policy decided, as a transfer's row keeps it."""
    return _decisions.decode(text)


def decode_counters(text: str) -> Counters:
    """Counters as a task's row keeps them."""
    return _counters.decode(text)


def show_task(row: AnyRow, request: TransferRequest, planned: TaskPlan | None = None) -> Task:
    """A task as the API shows it; paths as the user wrote them."""
    if row.state not in ("waiting", "running"):
        planned = None
    moves = planned if row.state == "running" or row.wait_name not in STANDS_STILL else None
    index = int(row.id.rpartition(".")[2]) - 1
    wait = None
    if row.state == "waiting" and row.wait_name:
        wait = Wait(
            name=row.wait_name, text=row.wait_text, since=moment(row.wait_since), ends_when=row.wait_ends
        )
    return Task(
        id=row.id,
        transfer=row.transfer,
        source=source_of(row.fed_by, request),
        target=request.targets[index],
        state=row.state,
        holder=row.holder if row.state == "running" else "",
        fence=row.fence,
        attempts=row.attempts,
        lease_until=optional_moment(row.lease_until) if row.state == "running" else None,
        route=moves.routes[0].sites if moves and moves.routes else [row.source_site, row.target_site],
        ways=[
            Way(sites=way.sites, rate_bits_per_s=way.rate_bits_per_s)
            for way in (moves.routes if moves else ())
        ],
        promise=planned.promise if planned else "none",
        binds=moves.binds if moves else "",
        earliest=optional_moment(moves.earliest) if moves else None,
        expected=optional_moment(moves.expected) if moves else None,
        latest=optional_moment(moves.latest) if moves else None,
        counters=decode_counters(row.counters),
        rate_bits_per_s=row.rate_bits_per_s if row.state == "running" else 0.0,
        bottleneck=row.bottleneck,
        wait=wait,
        reason=row.reason,
        message=row.message,
        hint=row.hint,
        version_id=row.version_id,
        disposal=_disposal.decode(row.disposed) if row.disposal else None,
        fed_by=row.fed_by,
    )


def sum_counters(parts: Iterable[Counters]) -> Counters:
    """Counters over all targets; the scan is done when it is for each."""
    total = Counters()
    every = list(parts)
    for field in Counters.__struct_fields__:
        if field == "scan_done":
            total.scan_done = bool(every) and all(part.scan_done for part in every)
        else:
            setattr(total, field, sum(getattr(part, field) for part in every))
    return total


def show_transfers(connection: Connection, rows: Sequence[AnyRow]) -> list[Transfer]:
    """Transfers as the API shows them, with all their tasks, in the order of the rows."""
    if not rows:
        return []
    by_transfer: dict[str, list[AnyRow]] = {}
    query = select(tasks).where(tasks.c.transfer.in_([row.id for row in rows])).order_by(tasks.c.seq)
    for task in connection.execute(query):
        by_transfer.setdefault(task.transfer, []).append(task)
    names = [row.id for row in rows if row.ended is None]
    planned: dict[str, TaskPlan] = {}
    if names:
        told = (
            select(task_plans).join(tasks, tasks.c.id == task_plans.c.task).where(tasks.c.transfer.in_(names))
        )
        planned = {one.task: _told.decode(one.body).plan for one in connection.execute(told)}
    return [_transfer(row, by_transfer.get(row.id, []), planned) for row in rows]


def _transfer(row: AnyRow, task_rows: Sequence[AnyRow], planned: Mapping[str, TaskPlan]) -> Transfer:
    request = decode_request(row.request)
    shown = [show_task(task, request, planned.get(task.id)) for task in task_rows]
    counters = sum_counters(task.counters for task in shown)
    eta = _eta(task_rows) if row.state == "started" else None
    spread = [
        (task.earliest, task.expected, task.latest) for task in shown if task.state in ("waiting", "running")
    ]
    return Transfer(
        id=row.id,
        request=request,
        state=row.state,
        reason=row.reason,
        message=row.message,
        since=moment(row.since),
        created=moment(row.created),
        user=row.user,
        tenant=row.tenant,
        counters=counters,
        tasks=shown,
        decisions=decode_decisions(row.decisions),
        ended=optional_moment(row.ended),
        eta=optional_moment(eta) or _latest([expected for _, expected, _ in spread]),
        eta_earliest=_latest([earliest for earliest, _, _ in spread]),
        eta_latest=_latest([latest for _, _, latest in spread]),
        promised=row.promised,
    )


def _latest(times: Sequence[datetime | None]) -> datetime | None:
    """The last of some times; None where one of them cannot be told."""
    found = [time for time in times if time is not None]
    return max(found) if found and len(found) == len(times) else None


def _eta(task_rows: Sequence[AnyRow]) -> float | None:
    """When the last task will end at the rates of the last reports; None while one cannot be told."""
    latest: float | None = None
    for task in task_rows:
        if task.state == "done":
            continue
        counters = decode_counters(task.counters)
        if task.state != "running" or task.rate_bits_per_s <= 0 or not counters.scan_done:
            return None
        left_bits = max(0, counters.size_bytes - counters.bytes_done - counters.bytes_unchanged) * 8
        end = (task.reported or task.claimed) + left_bits / task.rate_bits_per_s
        latest = end if latest is None else max(latest, end)
    return latest


def find_transfer(connection: Connection, transfer: str, tenant: str | None) -> Transfer:
    """A transfer by id.

    Args:
        tenant: whose it must be; None for anybody's.

    Raises:
        NotFound: there is none, or it is another tenant's: the two must look the same.
    """
    query = select(transfers).where(transfers.c.id == transfer)
    if tenant is not None:
        query = query.where(transfers.c.tenant == tenant)
    row = connection.execute(query).first()
    if row is None:
        raise no_transfer(transfer)
    return show_transfers(connection, [row])[0]


def no_transfer(transfer: str) -> NotFound:
    """The error for a transfer that is not there."""
    return NotFound(f"there is no transfer {transfer}", hint="flow transfer ls lists those you may see")


def list_transfers(
    connection: Connection,
    *,
    before: int | None,
    limit: int,
    state: str | None = None,
    site: str | None = None,
    user: str | None = None,
    tenant: str | None = None,
) -> tuple[list[Transfer], int | None]:
    """Transfers, newest first, older than `before`; and where the next page begins."""
    query: Select[Any] = select(transfers).order_by(transfers.c.seq.desc()).limit(limit + 1)
    if before is not None:
        query = query.where(transfers.c.seq < before)
    for column, value in (
        (transfers.c.state, state),
        (transfers.c.user, user),
        (transfers.c.tenant, tenant),
    ):
        if value is not None:
            query = query.where(column == value)
    if site is not None:
        there = select(tasks.c.transfer).where(or_(tasks.c.source_site == site, tasks.c.target_site == site))
        query = query.where(transfers.c.id.in_(there))
    rows = connection.execute(query).all()
    shown = show_transfers(connection, rows[:limit])
    return shown, rows[limit - 1].seq if len(rows) > limit else None


def landed_after(connection: Connection, transfer: str, after: int, limit: int) -> list[LandedObject]:
    """Objects that landed after the cursor."""
    query = (
        select(landed)
        .where(landed.c.transfer == transfer, landed.c.seq > after)
        .order_by(landed.c.seq)
        .limit(limit)
    )
    return [
        LandedObject(seq=row.seq, target=row.target, path=row.path, size_bytes=row.size_bytes)
        for row in connection.execute(query)
    ]


def receipts_of(connection: Connection, transfer: str, skip: int, limit: int) -> list[DeliveryReceipt]:
    """What the targets of a transfer signed for."""
    query = (
        select(tasks.c.id, tasks.c.target_site, tasks.c.receipt)
        .where(tasks.c.transfer == transfer, tasks.c.receipt != "")
        .order_by(tasks.c.id)
        .offset(skip)
        .limit(limit)
    )
    return [
        DeliveryReceipt(task=row.id, site=row.target_site, receipt=row.receipt)
        for row in connection.execute(query)
    ]


def lock_transfer(writing: Writing, transfer: str, tenant: str | None = None) -> AnyRow:
    """The transfer's row, nobody else's until the commit; always the first row that is locked."""
    query = select(transfers).where(transfers.c.id == transfer)
    if tenant is not None:
        query = query.where(transfers.c.tenant == tenant)
    if writing.locks_rows:
        query = query.with_for_update()
    row = writing.connection.execute(query).first()
    if row is None:
        raise no_transfer(transfer)
    return row


def _moved(connection: Connection, transfer: str) -> dict[str, int | None]:
    """Bytes that came to the target of each task, reused ones among them: a copy is a copy, and one of no bytes, too.

    What somebody holds who has not told its end may have moved, nobody knows how much. Tasks of which surely nothing
    has are left out.
    """
    query = select(tasks.c.id, tasks.c.counters, tasks.c.state, tasks.c.fence, tasks.c.holder)
    found: dict[str, int | None] = {}
    for row in connection.execute(query.where(tasks.c.transfer == transfer)):
        counted = decode_counters(row.counters)
        if row.state == "done" or has_moved(counted):
            found[row.id] = moved_bytes(counted)
        elif row.fence and row.holder:
            found[row.id] = None
    return found


def moved_bytes(counted: Counters) -> int:
    """How much came to the target; of what is not whole there, what was sent."""
    return counted.bytes_done or counted.bytes_sent


def has_moved(counted: Counters) -> bool:
    """Whether anything came to the target, whole or not, or was there already and counts as a copy."""
    return bool(counted.bytes_sent or counted.objects_done or counted.objects_unchanged)


def settle(writing: Writing, transfer: str) -> Verdict:
    """Bring a transfer's state up to its tasks and flags; leaves an event where the state changed."""
    row = lock_transfer(writing, transfer)
    task_rows = writing.connection.execute(
        select(
            tasks.c.state,
            tasks.c.attempts,
            tasks.c.reason,
            tasks.c.message,
            tasks.c.wait_name,
            tasks.c.wait_since,
            tasks.c.target_site,
            tasks.c.disposal,
        )
        .where(tasks.c.transfer == transfer)
        .order_by(tasks.c.seq)
    ).all()
    begun = row.begun or any(task.state == "running" for task in task_rows)
    verdict = derive(
        [TaskFacts(*task) for task in task_rows],
        paused=row.paused,
        cancelled=row.cancelled,
        begun=begun,
        now=writing.now,
    )
    if (verdict.state, verdict.reason, verdict.message, begun) == (
        row.state,
        row.reason,
        row.message,
        row.begun,
    ):
        return verdict
    changed = verdict.state != row.state
    writing.connection.execute(
        update(transfers)
        .where(transfers.c.id == transfer)
        .values(
            state=verdict.state,
            reason=verdict.reason,
            message=verdict.message,
            begun=begun,
            since=writing.now if changed or verdict.reason != row.reason else row.since,
            ended=(row.ended or writing.now) if verdict.ended else None,
        )
    )
    if changed and verdict.ended:
        settle_counts(writing, transfer, moved=_moved(writing.connection, transfer))
    if changed:
        writing.emit(
            f"transfer.{verdict.state}",
            transfer=transfer,
            user=row.user,
            tenant=row.tenant,
            reason=verdict.reason,
            message=verdict.message,
            previous=row.state,
        )
    return verdict
