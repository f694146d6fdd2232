"""Transfers that policy ended and whose agent cannot say so: it has been cut off for longer than it may run by itself.

Goal
    Nothing that policy forbids stays open for ever, waiting for a word that does not come.
Plan
    An agent that does not hear from the coordinator stops by itself after `max_offline`. Once that is over for the agent
    whose word would end a task, and policy denies the transfer as it would be asked for now, the coordinator ends the task.
    What policy still permits is left waiting: it goes on when the agent is back.
Invariants
    - An end that was said so is final: a report that comes later changes nothing, not even one that all has landed. What
      had arrived goes to quarantine as soon as the target hears of it, and the transfer becomes `quarantined`, `purged`.
    - What may have moved, counts.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import msgspec
from sqlalchemy import select, update

from flowengine.api.sites import SitePolicy
from flowengine.coordinator.actions.feeding import part_of
from flowengine.coordinator.actions.transfers import site_rows_of
from flowengine.coordinator.database.tables import AnyRow, sites, tasks
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.database.transfers import decode_request, lock_transfer, settle
from flowengine.coordinator.database.work import wake_beside
from flowengine.coordinator.decisions import Decider
from flowengine.coordinator.rules.states import UNHEARD
from flowengine.errors import NotFound

__all__ = ["end_unheard"]

_SILENT: Final = (
    select(tasks.c.id, tasks.c.transfer, sites.c.last_seen)
    .join(sites, sites.c.name == tasks.c.driver)
    .where(tasks.c.state.in_(["waiting", "running"]), tasks.c.fence > 0, sites.c.state == "offline")
    .order_by(tasks.c.transfer)
)


def end_unheard(writing: Writing, decider: Decider, margin_s: float) -> None:
    """End the tasks that policy denies now and that nobody else will end.

    Args:
        margin_s: for how long an agent is silent before it counts as cut off; and what is added to its `max_offline`.
    """
    for found in writing.connection.execute(_SILENT).all():
        if writing.now - (found.last_seen or 0.0) <= margin_s:
            continue
        transfer = lock_transfer(writing, found.transfer)
        row = writing.connection.execute(
            select(tasks).where(tasks.c.id == found.id, tasks.c.state.in_(["waiting", "running"]))
        ).first()
        if row is not None:
            _look_at(writing, decider, transfer, row, margin_s)


def _look_at(writing: Writing, decider: Decider, transfer: AnyRow, row: AnyRow, margin_s: float) -> None:
    request = part_of(decode_request(transfer.request), [row.id])
    try:
        rows = site_rows_of(writing.connection, request)
    except NotFound:
        return  # a site was removed: its tasks say so by themselves
    verdict = decider.decide(writing.connection, request, rows, transfer.user, writing.now, [row.id])
    denied = next(
        (
            one
            for one in verdict.decisions
            # Policies that have expired are no denial: a new bundle may be on its way.
            if one.verdict == "deny"
            and one.rule != "policy-expired"
            and (one.use == "release" or one.site == row.target_site)
        ),
        None,
    )
    if denied is None:
        return
    agent = rows[row.driver]
    said = msgspec.json.decode(agent.policy or "{}", type=SitePolicy)
    most = said.max_offline_s
    if most is None:
        most = decider.max_offline_s(writing.connection, said.version, verdict)
    last_seen = agent.last_seen or 0.0
    if writing.now - last_seen <= most + margin_s:
        return
    seen = datetime.fromtimestamp(last_seen, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    why = (
        f"policy no longer permits to {denied.use} this data at {denied.site} ({denied.rule or 'nothing permits it'}); "
        f"the agent of {row.driver} has not been heard since {seen}: by its policies it stops {most:.0f} s after the "
        f"last word from here, and what had arrived at {row.target_site} goes to quarantine once that site hears of it"
    )
    _end(writing, transfer, row, why)


def _end(writing: Writing, transfer: AnyRow, row: AnyRow, why: str) -> None:
    writing.connection.execute(
        update(tasks)
        .where(tasks.c.id == row.id)
        .values(state="failed", reason=UNHEARD, message=why, rate_bits_per_s=0.0, wait_name="")
    )
    writing.emit(
        "task.failed",
        transfer=row.transfer,
        site=row.driver,
        user=transfer.user,
        tenant=row.tenant,
        task=row.id,
        fence=row.fence,
        reason=UNHEARD,
        message=why,
        wake=[row.driver, row.source_site, row.target_site],
    )
    wake_beside(writing, (row.source_site, row.target_site), row.tenant)
    settle(writing, row.transfer)
