"""What agents ask for: heartbeats, claims, reports; and what their streams must tell them."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import Connection, bindparam, func, select, update

from flowengine.api.agents import Claim, Claimed, Heartbeat, HeartbeatReply, Report, ReportReply, TaskGrant
from flowengine.api.sites import SitePolicy
from flowengine.api.transfers import PRIORITIES, Counters, LandedObject
from flowengine.coordinator.actions.duties import quarantines_of
from flowengine.coordinator.actions.feeding import serve_directly, version_of
from flowengine.coordinator.actions.grants import Terms, task_grant, task_routes
from flowengine.coordinator.actions.transfers import redrive
from flowengine.coordinator.database.catalogue import decode_addresses, limits_of_site, revoked_serials
from flowengine.coordinator.database.ledger import count_for_good
from flowengine.coordinator.database.people import moment
from flowengine.coordinator.database.policies import newest
from flowengine.coordinator.database.tables import (
    AnyRow,
    counters,
    landed,
    looks,
    paces,
    sites,
    tasks,
    transfers,
)
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.coordinator.database.transfers import (
    decode_counters,
    decode_request,
    has_moved,
    lock_transfer,
    moved_bytes,
    settle,
)
from flowengine.coordinator.database.work import (
    add_usage,
    claim_rows,
    lock_for_claims,
    read_board,
    wake_beside,
)
from flowengine.coordinator.knowledge import approvals_for, counts_of
from flowengine.coordinator.planning.stored import (
    leases_of_site,
    meetings_of_site,
    read_task_plans,
    routes_of_holder,
    take_up,
    told_routes,
    way_of,
)
from flowengine.coordinator.rules.commands import AgentView, Asked, Directive
from flowengine.coordinator.rules.feeding import falls_back, source_of
from flowengine.coordinator.rules.queue import choose, hindrance
from flowengine.coordinator.rules.reports import Effect, Held, take
from flowengine.coordinator.rules.states import UNHEARD
from flowengine.errors import FlowError, NotFound
from flowengine.plan.links import is_link_bound
from flowengine.trust.fences import lift_fence, next_fence
from flowengine.trust.grant import Grant

__all__ = ["agent_view", "claim", "heartbeat", "report"]

MAX_CLAIM: Final = 64
_COUNTER: Final = select(counters.c.value).where(counters.c.name == bindparam("counter"))
MAX_NOT_BEFORE_S: Final = 8 * 86_400.0
"""No agent can put a task off for longer: windows open within eight days or never."""
ASKED_S: Final = 1.0
"""What lies between asking and beginning belongs to a copy's time; more than that was a queue."""
LOST_CLAIM_S: Final = 60.0
"""A task that its site does not name, and was silent on for so long, never reached it."""


def heartbeat(
    writing: Writing, site: str, beat: Heartbeat, grant_keys: dict[str, str], terms: Terms
) -> HeartbeatReply:
    """Take note of a site's state; what it lost by a restart waits again at once."""
    row = writing.connection.execute(select(sites).where(sites.c.name == site)).one()
    drains = row.draining or beat.draining
    state = "draining" if drains else "online"
    addresses = json_text(beat.addresses)
    writing.connection.execute(
        update(sites)
        .where(sites.c.name == site)
        .values(
            state=state,
            since=writing.now if state != row.state else row.since,
            roots=json_text(beat.roots),
            addresses=addresses,
            software=beat.software[:128],
            boot=beat.boot,
            last_seen=writing.now,
            agent_draining=beat.draining,
            relay=json_text(beat.relay) if beat.relay is not None and beat.relay.max_streams > 0 else "",
            can=None if beat.can is None else json_text(sorted(beat.can)),
            policy=json_text(beat.policy or SitePolicy()),
        )
    )
    if addresses != row.addresses or row.last_seen is None:
        redrive(writing, site)
    if state != row.state:
        writing.emit(f"site.{state}", site=site, previous=row.state)
        _wake_drivers(writing, site)
    last = writing.connection.execute(_COUNTER, {"counter": "fence"}).scalar_one()
    told = lift_fence(last, beat.seen_fence)
    if told > last:
        writing.count_up("fence", 0, told)
    _release_lost(writing, site, beat)
    renew = False
    if row.cert_not_after is not None:
        span = row.cert_not_after - row.cert_not_before
        renew = writing.now > row.cert_not_before + span * terms.renew_certificate_at
    bundle, labels = newest(writing.connection)
    return HeartbeatReply(
        now=moment(writing.now),
        epoch=writing.connection.execute(_COUNTER, {"counter": "epoch"}).scalar_one(),
        grant_keys=grant_keys,
        revoked=revoked_serials(writing.connection, writing.now),
        limits=limits_of_site(writing.connection, writing.now, site),
        draining=row.draining,
        renew=renew,
        bundle=bundle,
        labels=labels,
    )


def _wake_drivers(writing: Writing, site: str) -> None:
    query = (
        select(tasks.c.driver)
        .distinct()
        .where(tasks.c.state == "waiting", (tasks.c.source_site == site) | (tasks.c.target_site == site))
    )
    writing.wake.update(writing.connection.execute(query).scalars())


def _release_lost(writing: Writing, site: str, beat: Heartbeat) -> None:
    held = writing.connection.execute(
        select(tasks.c.id, tasks.c.transfer, tasks.c.boot, tasks.c.claimed, tasks.c.reported, tasks.c.fence)
        .where(tasks.c.state == "running", tasks.c.holder == site)
        .order_by(tasks.c.transfer)
    ).all()
    for row in held:
        if beat.holding.get(row.id, -1) == row.fence:
            continue
        if row.boot == beat.boot and writing.now - (row.reported or row.claimed) < LOST_CLAIM_S:
            continue  # its claim, or its last report, may still be under way
        lock_transfer(writing, row.transfer)
        gone = writing.connection.execute(
            update(tasks)
            .where(tasks.c.id == row.id, tasks.c.state == "running", tasks.c.fence == row.fence)
            .values(state="waiting", holder="", reason="", message="", rate_bits_per_s=0.0, ready_at=0.0)
        )
        if gone.rowcount:
            writing.emit(
                "task.lost", transfer=row.transfer, site=site, task=row.id, fence=row.fence, wake=[site]
            )
            settle(writing, row.transfer)


def claim(writing: Writing, site: str, asked: Claim, terms: Terms) -> Claimed:
    """Give a site up to so many tasks that it drives, each with a new fence, a lease and a grant."""
    lock_for_claims(writing)
    board = read_board(writing.connection, writing.now, site)
    place = board.places.get(site)
    if place is None or place.state != "online":
        return Claimed(tasks=[])
    rows = claim_rows(writing, choose(board, site, min(asked.count, MAX_CLAIM)))
    if not rows:
        return Claimed(tasks=[])
    names = {name for row in rows for name in (row.source_site, row.target_site)}
    known = {
        row.name: row for row in writing.connection.execute(select(sites).where(sites.c.name.in_(names)))
    }
    wanted = {row.transfer for row in rows}
    asked_for = {
        row.id: row for row in writing.connection.execute(select(transfers).where(transfers.c.id.in_(wanted)))
    }
    epoch = writing.connection.execute(_COUNTER, {"counter": "epoch"}).scalar_one()
    planned = read_task_plans(writing.connection, [row.id for row in rows])
    between = {
        name for told in planned.values() for way in told.plan.routes for name in way.sites
    } - known.keys()
    if between:
        found = writing.connection.execute(select(sites).where(sites.c.name.in_(between)))
        known |= {row.name: row for row in found if row.state == "online"}
    given = []
    for row in rows:
        last = writing.connection.execute(_COUNTER, {"counter": "fence"}).scalar_one()
        fence = writing.count_up("fence", 0, next_fence(last, writing.now))
        grant = _give(writing, row, asked_for[row.transfer], known, fence, epoch, asked.boot, terms)
        ways = planned[row.id].plan.routes if row.id in planned else []
        if told_routes(ways, row.source_site, row.target_site):
            told = [(way.sites, way.rate_bits_per_s) for way in ways]
            grant.routes = task_routes(
                row, asked_for[row.transfer], known, told, fence, epoch, writing.now, terms
            )
            take_up(writing, row.id, fence, grant.routes)
            writing.wake |= {row.source_site, row.target_site} - {
                site
            }  # the other end may have to come as well
        given.append(grant)
        add_usage(writing, row.tenant, 0, 1)
    for transfer in sorted(wanted):
        settle(writing, transfer)
    return Claimed(tasks=given)


def _give(
    writing: Writing,
    row: AnyRow,
    transfer: AnyRow,
    known: dict[str, AnyRow],
    fence: int,
    epoch: int,
    boot: str,
    terms: Terms,
) -> TaskGrant:
    request = decode_request(transfer.request)
    target = request.targets[int(row.id.rpartition(".")[2]) - 1]
    role: Literal["target", "source"] = "target" if row.driver == row.target_site else "source"
    peer = known[row.source_site if role == "target" else row.target_site]
    addresses = decode_addresses(peer.addresses)
    document = terms.sign(_grant_of(writing, row, transfer, known, fence, epoch, terms))
    writing.connection.execute(
        update(tasks)
        .where(tasks.c.id == row.id)
        .values(
            state="running",
            holder=row.driver,
            boot=boot,
            fence=fence,
            epoch=epoch,
            claimed=writing.now,
            lease_until=writing.now + terms.lease_s,
            grant_until=writing.now + terms.grant_s,
            reported=None,
            holder_seq=-1,
            peer_seq=-1,
            rate_bits_per_s=0.0,
            bottleneck="",
            wait_name="",
            counters=json_text(Counters()),
            reason="",
            message="",
            hint="",
        )
    )
    writing.emit(
        "task.claimed",
        transfer=row.transfer,
        site=row.driver,
        user=transfer.user,
        tenant=row.tenant,
        task=row.id,
        fence=fence,
        attempt=row.attempts + 1,
    )
    return TaskGrant(
        task=row.id,
        transfer=row.transfer,
        fence=fence,
        role=role,
        mode=row.mode,
        source=source_of(row.fed_by, request),
        target=target,
        peer_address=addresses[row.attempts % len(addresses)] if addresses else "",
        grant=base64.b64encode(document).decode(),
        lease_s=terms.lease_s,
        options=request.options,
        tenant=row.tenant,
        priority=PRIORITIES[row.priority],
    )


def report(writing: Writing, site: str, task: str, said: Report, terms: Terms) -> ReportReply:
    """Take a report on a task.

    Raises:
        FlowError: the site lost the task to a later claim (reason "fence-superseded").
        NotFound: there is no such task, or the site has no part in it.
    """
    transfer = lock_transfer(writing, task.rpartition(".")[0])
    row = writing.connection.execute(select(tasks).where(tasks.c.id == task)).first()
    if row is None or site not in (row.source_site, row.target_site):
        raise NotFound(f"there is no task {task} for site {site}")
    held = Held(
        row.state,
        row.fence,
        row.holder,
        row.driver,
        row.source_site,
        row.target_site,
        row.attempts,
        row.holder_seq,
        row.peer_seq,
        row.paused,
    )
    peer_counts = row.holder != row.target_site and row.peer_seq >= 0
    effect = take(held, site, said.fence, said.seq, said.state, said.retryable, writing.now, peer_counts)
    if said.state == "released" and said.not_before is not None and effect.state == "waiting":
        later = min(said.not_before.timestamp(), writing.now + MAX_NOT_BEFORE_S)
        effect = replace(effect, ready_at=max(effect.ready_at, later))
    if effect.kind == "superseded":
        raise FlowError(
            f"task {task} is no longer yours under fence {said.fence}",
            hint="stop writing and drop it; a later claim goes on",
            reason="fence-superseded",
            task=task,
            fence=row.fence,
        )
    if effect.kind == "ignored":
        return ReportReply(directive=effect.directive, lease_s=terms.lease_s, reason=effect.reason)
    _record(writing, row, transfer, site, said, effect, terms)
    reply = ReportReply(directive=effect.directive, lease_s=terms.lease_s, reason=effect.reason)
    if effect.state == "running" and site == row.driver and row.grant_until - writing.now < terms.grant_s / 2:
        reply.grant = _new_grant(writing, row, transfer, said.fence, terms)
    return reply


def _record(
    writing: Writing,
    row: AnyRow,
    transfer: AnyRow,
    site: str,
    said: Report,
    effect: Effect,
    terms: Terms,
) -> None:
    by_holder = site == (row.driver if effect.kind == "adopted" else row.holder)
    values: dict[str, Any] = {"state": effect.state, "attempts": effect.attempts}
    values["holder_seq" if by_holder else "peer_seq"] = said.seq
    if effect.kind == "adopted":
        lift_fence(0, said.fence)  # refuses what no coordinator can have given
        values |= {"fence": said.fence, "holder": site, "claimed": writing.now, "peer_seq": -1}
        writing.count_up("fence", 0, said.fence)
        writing.emit("task.adopted", transfer=row.transfer, site=site, task=row.id, fence=said.fence)
    if effect.renews:
        values["lease_until"] = writing.now + terms.lease_s
    if effect.counts:
        before = decode_counters(row.counters)
        values |= {
            "counters": json_text(said.counters),
            "rate_bits_per_s": said.rate_bits_per_s,
            "bottleneck": said.bottleneck[:128],
            "reported": writing.now,
            "flows": json_text(said.hops),
            "link_bound": is_link_bound(said.stages),
        }
        ends = said.state != "running"
        if has_moved(said.counters) and (ends or not has_moved(before)):
            count_for_good(writing, row.id, moved_bytes(said.counters) if ends else None)
        moved = max(0, said.counters.bytes_done - before.bytes_done)
        if moved:
            add_usage(writing, row.tenant, moved, 0)
    if said.landed and site == row.target_site:
        _land(writing, row, said.landed)
    ended = effect.state != "running" and said.state != "running"
    if ended:
        values |= _end_values(said, effect)
    writing.connection.execute(update(tasks).where(tasks.c.id == row.id).values(**values))
    moved = bool(said.landed) or said.counters.bytes_done > said.counters.bytes_unchanged
    if ended and row.fed_by and falls_back(effect.state, said.reason, moved):
        serve_directly(writing, row, transfer, said.message or said.reason)
        effect = replace(effect, state="waiting")
    if ended and effect.state == "done" and row.claimed is not None:
        _learn_pace(writing, row, transfer, decode_counters(values.get("counters", row.counters)))
    if ended:
        kind = {"waiting": "task.released" if said.state == "released" else "task.retry"}
        writing.emit(
            kind.get(effect.state, f"task.{effect.state}"),
            transfer=row.transfer,
            site=site,
            user=transfer.user,
            tenant=row.tenant,
            task=row.id,
            fence=said.fence,
            reason=said.reason,
            message=said.message,
            wake=[row.driver, row.target_site],
        )
        wake_beside(writing, (row.source_site, row.target_site), row.tenant)
        settle(writing, row.transfer)
    elif row.state != "running" or effect.kind == "adopted":
        settle(writing, row.transfer)


def _learn_pace(writing: Writing, row: AnyRow, transfer: AnyRow, counters: Counters) -> None:
    """How long it took tells how long the next one will; not where it was held up or only looked."""
    request = decode_request(transfer.request)
    if row.mode == "verify" or request.options.dry_run or row.attempts > 0:
        return
    planned = read_task_plans(writing.connection, [row.id]).get(row.id)
    # Short ones end before anybody plans for them; what their way carries is no less known.
    way = planned.plan.way_bits_per_s if planned is not None else 0.0
    way = way or way_of(writing.connection, row.source_site, row.target_site, row.tenant, writing.now)
    begun = transfer.created if row.claimed - transfer.created < ASKED_S else row.claimed
    writing.connection.execute(
        paces.insert().values(
            source=row.source_site,
            target=row.target_site,
            at=writing.now,
            objects=max(0, counters.objects_done - counters.objects_unchanged),
            size_bytes=counters.size_bytes,
            sent_bytes=max(0, counters.bytes_done - counters.bytes_unchanged - counters.bytes_reused),
            seconds=writing.now - begun,
            rate_bits_per_s=way,
        )
    )


def _end_values(said: Report, effect: Effect) -> dict[str, Any]:
    told = said.state == "failed" or said.not_before is not None
    values: dict[str, Any] = {
        "rate_bits_per_s": 0.0,
        "bottleneck": "",
        "reason": said.reason if told else "",
        "message": said.message[:2000] if told else "",
        "hint": said.hint[:1000] if said.state == "failed" else "",
        "version_id": said.version_id,
        "ready_at": effect.ready_at,
    }
    if effect.state == "done":
        values["receipt"] = said.receipt
    else:
        values["holder"] = ""
    return values


def _land(writing: Writing, row: AnyRow, objects: list[LandedObject]) -> None:
    first = writing.connection.execute(
        update(transfers)
        .where(transfers.c.id == row.transfer)
        .values(landed=transfers.c.landed + len(objects))
        .returning(transfers.c.landed)
    ).scalar_one() - len(objects)
    writing.connection.execute(
        landed.insert(),
        [
            {
                "transfer": row.transfer,
                "seq": first + index,
                "target": row.target_site,
                "path": found.path,
                "size_bytes": found.size_bytes,
            }
            for index, found in enumerate(objects, 1)
        ],
    )
    writing.landed.add(row.transfer)


def _grant_of(
    writing: Writing,
    row: AnyRow,
    transfer: AnyRow,
    known: dict[str, AnyRow],
    fence: int,
    epoch: int,
    terms: Terms,
) -> Grant:
    """A task's grant, with what people approved and what the counters come to."""
    path = source_of(row.fed_by, decode_request(transfer.request)).path
    return task_grant(
        row, transfer, known, fence, epoch, writing.now, terms,
        approvals=approvals_for(writing.connection, (row.source_site, path), row.target_site, transfer.user),
        counts=counts_of(writing.connection, row.id),
        version=version_of(writing.connection, row.fed_by),
    )  # fmt: skip


def _new_grant(writing: Writing, row: AnyRow, transfer: AnyRow, fence: int, terms: Terms) -> str:
    known = {
        found.name: found
        for found in writing.connection.execute(
            select(sites).where(sites.c.name.in_([row.source_site, row.target_site]))
        )
    }
    if any(found.key_sha256 is None for found in known.values()):
        return ""
    epoch = writing.connection.execute(_COUNTER, {"counter": "epoch"}).scalar_one()
    writing.connection.execute(
        update(tasks).where(tasks.c.id == row.id).values(grant_until=writing.now + terms.grant_s)
    )
    document = terms.sign(_grant_of(writing, row, transfer, known, fence, epoch, terms))
    return base64.b64encode(document).decode()


def agent_view(connection: Connection, now: float, site: str) -> AgentView:
    """All that an agent's stream must have told it by now."""
    row = connection.execute(select(sites.c.draining, sites.c.addresses).where(sites.c.name == site)).one()
    board = read_board(connection, now, site)
    claimable = frozenset(
        work.id for work in board.waiting if work.driver == site and hindrance(board, work) is None
    )
    directives = {}
    query = select(tasks.c.id, tasks.c.fence, tasks.c.state).where(
        tasks.c.holder == site,
        ((tasks.c.state == "running") & tasks.c.paused)
        | (
            (
                (tasks.c.state == "cancelled")
                | ((tasks.c.state == "failed") & tasks.c.reason.in_(["policy-stopped", UNHEARD]))
            )
            & (func.coalesce(tasks.c.lease_until, 0) > now)
        ),
    )
    for task in connection.execute(query):
        reason = {"cancelled": "cancelled", "failed": "policy-stopped"}.get(task.state, "paused")
        directives[task.id] = Directive(task.fence, "pause" if reason == "paused" else "stop", reason)
    asked = connection.execute(
        select(looks).where(looks.c.site == site, looks.c.answer.is_(None), looks.c.expires > now)
    )
    return AgentView(
        claimable=claimable,
        limits=msgspec.json.encode(limits_of_site(connection, now, site)),
        revoked=tuple(revoked_serials(connection, now)),
        draining=row.draining,
        directives=directives,
        quarantines=quarantines_of(connection, site),
        policies=newest(connection),
        looks={look.id: Asked(look.kind, look.path, look.body, look.expires - now) for look in asked},
        routes=routes_of_holder(connection, site),
        leases=msgspec.json.encode(leases_of_site(connection, site, now)),
        meetings=b"[]"
        if decode_addresses(row.addresses)
        else msgspec.json.encode(meetings_of_site(connection, site)),
    )
