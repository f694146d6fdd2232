"""Asking for transfers and steering them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, func, select, update

from flowengine.api.transfers import ENDED, PRIORITIES, Decision, Endpoint, Transfer, TransferRequest
from flowengine.coordinator.actions.approvals import ask_for_approval
from flowengine.coordinator.actions.evidence import record_verdict
from flowengine.coordinator.actions.feeding import (
    addresses_of,
    hop_request,
    part_of,
    permits,
    serve_directly,
)
from flowengine.coordinator.database.catalogue import decode_roots
from flowengine.coordinator.database.evidence import Chain
from flowengine.coordinator.database.policies import inherit
from flowengine.coordinator.database.tables import AnyRow, sites, tasks, tenants, transfers
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.coordinator.database.transfers import (
    decode_decisions,
    decode_request,
    find_transfer,
    lock_transfer,
    settle,
)
from flowengine.coordinator.database.work import wake_beside
from flowengine.coordinator.decisions import Decider, Verdict
from flowengine.coordinator.knowledge import reserve
from flowengine.coordinator.rules.feeding import waits_for
from flowengine.coordinator.rules.paths import clean, offering_root
from flowengine.coordinator.rules.queue import first_overlap
from flowengine.coordinator.rules.states import dialer
from flowengine.errors import Denied, FlowError, NotFound, TemporaryError, UsageError

__all__ = [
    "Admitted",
    "Decide",
    "MayRelay",
    "PromisesChanged",
    "create",
    "no_meeting",
    "redrive",
    "site_rows_of",
    "steer",
]

Decide = Callable[[Connection, TransferRequest, Mapping[str, AnyRow], str, float], Verdict]
"""Policy's answer to a request."""
MayRelay = Callable[[Connection, TransferRequest, Mapping[str, AnyRow], str, float, Iterable[str]], set[str]]
"""Which of some sites may pass the data on."""


def site_rows_of(connection: Connection, request: TransferRequest) -> dict[str, AnyRow]:
    """The sites of a request.

    Raises:
        NotFound: one is not known, or was removed.
    """
    names = dict.fromkeys([request.source.site, *(target.site for target in request.targets)])
    found = {row.name: row for row in connection.execute(select(sites).where(sites.c.name.in_(list(names))))}
    for name in names:
        if name not in found or found[name].state == "revoked":
            known = connection.execute(select(sites.c.name).where(sites.c.state != "revoked")).scalars()
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise NotFound(f"there is no site {name}", hint=f"{meant}flow site ls lists the sites", site=name)
    return found


def check_places(request: TransferRequest, rows: Mapping[str, AnyRow]) -> None:
    """Refuse a request that could not be carried out, whatever the agents say later."""
    if request.mode == "verify" and request.options.delete:
        raise UsageError("verify deletes nothing", hint="leave out the option delete, or ask for a sync")
    source = (request.source.site, clean(request.source.path))
    targets = [(target.site, clean(target.path)) for target in request.targets]
    double = first_overlap(targets)
    if double is not None:
        (site, one), (_, other) = double
        raise UsageError(
            f"the targets {site}:{one} and {site}:{other} overlap", hint="name each target once, side by side"
        )
    if first_overlap([source, *targets]) is not None and request.mode != "verify":
        raise UsageError(
            f"a target overlaps the source {source[0]}:{source[1]}", hint="choose a target beside the source"
        )
    _check_offered(rows[request.source.site], request.source, False)
    for target in request.targets:
        _check_offered(rows[target.site], target, request.mode != "verify")


def _check_offered(row: AnyRow, place: Endpoint, writing: bool) -> None:
    roots = decode_roots(row.roots)
    if row.last_seen is None:
        return  # its agent was never here: it will say itself what it offers
    if offering_root(roots, clean(place.path), writing) is None:
        verb = "written to" if writing else "read"
        offered = ", ".join(f"{root.name} ({root.access})" for root in roots) or "nothing"
        raise Denied(
            f"{place.site}:{place.path} is not below a root that may be {verb}",
            hint=f"site {place.site} offers {offered}",
            site=place.site,
            path=place.path,
        )


def _drivers(request: TransferRequest, rows: Mapping[str, AnyRow]) -> tuple[list[str], list[str]]:
    """Which site dials for each target; and targets to which only a relay can lead, that both ends dial."""
    found, meeting = [], []
    source = rows[request.source.site]
    for place in request.targets:
        target = rows[place.site]
        end = dialer(source.name, addresses_of(source), target.name, addresses_of(target))
        if end is None:
            meeting.append(target.name)
        found.append(source.name if end == "source" else target.name)
    return found, meeting


def no_meeting(source: str, target: str, forbidden: Sequence[str] = ()) -> str:
    """Why nothing can go from one site to another, neither of which can be dialled."""
    relays = (
        f"policy permits none of the relays {', '.join(forbidden)} to pass this data on"
        if forbidden
        else "no site that policy permits passes on for others now"
    )
    return f"neither {source} nor {target} can be reached from outside, and {relays}"


def _check_meeting(
    writing: Writing,
    request: TransferRequest,
    rows: Mapping[str, AnyRow],
    user: str,
    meeting: Sequence[str],
    may_relay: MayRelay,
) -> None:
    """Refuse what could not even begin: there is no relay at which the two ends may meet."""
    online = writing.connection.execute(
        select(sites).where(sites.c.state == "online", sites.c.relay != "", sites.c.addresses != "[]")
    ).all()
    known = {**rows, **{row.name: row for row in online}}
    names = sorted({row.name for row in online} - {request.source.site, *meeting})
    if may_relay(writing.connection, request, known, user, writing.now, names):
        return
    hint = "let one of the two agents listen (listen and advertise in its site.toml)"
    raise FlowError(
        no_meeting(request.source.site, meeting[0], names),
        hint=f"{hint}, or have a relay permitted: flow policy explain tells by what rule it is not"
        if names
        else f"{hint}, or a site that both can dial pass on for others (enabled in [relay] of its site.toml)",
        reason="no-route",
        relays=names,
    )


@dataclass(frozen=True, slots=True)
class Admitted:
    """What the planner says to a request before it is taken on.

    Attributes:
        size_bytes, objects: what is expected to move to each target; None where nobody knows.
        promised: its deadline can be kept beside all that is promised already.
        promises: the counter of promises when that was found out; another value means: find out anew.
        feeds: targets that other targets should serve, each with its feeder, by position.
    """

    size_bytes: int | None = None
    objects: int | None = None
    promised: bool = False
    promises: int = 0
    feeds: Mapping[int, int] = field(default_factory=dict)


class PromisesChanged(Exception):
    """Somebody else was promised something meanwhile."""


def create(
    writing: Writing,
    transfer: str,
    request: TransferRequest,
    user: str,
    tenant: str,
    decide: Decide,
    may_relay: MayRelay,
    chain: Chain,
    admitted: Admitted = Admitted(),
) -> Transfer | FlowError:
    """Take a request on.

    Returns:
        The transfer; or the refusal, when policy denies: then an event and the evidence are all that is stored.

    Raises:
        FlowError: unknown site, unusable path, no route, quota; nothing is stored.
        PromisesChanged: what was admitted was found out beside other promises than there are now.
    """
    rows = site_rows_of(writing.connection, request)
    check_places(request, rows)
    if admitted.promised and writing.count_up("promise") != admitted.promises + 1:
        raise PromisesChanged
    drivers, meeting = _drivers(request, rows)
    _check_queue(writing, tenant, len(drivers))
    verdict = decide(writing.connection, request, rows, user, writing.now)
    record_verdict(writing, chain, verdict, request, transfer, user)
    if any(decision.verdict == "deny" for decision in verdict.decisions):
        return _refused(writing, request, verdict, user, tenant)
    if meeting:
        _check_meeting(writing, request, rows, user, meeting, may_relay)
    _insert_transfer(writing, transfer, request, user, tenant, verdict, admitted)
    if request.mode != "verify" and not request.options.dry_run and (verdict.labels or verdict.contracts):
        for target in request.targets:  # a copy has the labels of what it came from
            inherit(writing, target.site, target.path, verdict.labels, verdict.contracts)
    feeds = _permitted_feeds(writing, transfer, request, rows, user, decide, chain, verdict, admitted.feeds)
    _insert_tasks(writing, transfer, request, tenant, drivers, feeds)
    if not request.options.dry_run and request.mode != "verify":
        for index, place in enumerate(request.targets, 1):
            if place.site in verdict.about:
                reserve(writing, f"{transfer}.{index}", verdict.about[place.site])
    writing.emit(
        "transfer.requested",
        transfer=transfer,
        user=user,
        tenant=tenant,
        site=request.source.site,
        wake=drivers,
        source=f"{request.source.site}:{request.source.path}",
        targets=[f"{place.site}:{place.path}" for place in request.targets],
        mode=request.mode,
        priority=request.priority,
    )
    for index, (feeder, _) in feeds.items():
        writing.emit(
            "task.fed",
            transfer=transfer,
            site=request.targets[index].site,
            user=user,
            tenant=tenant,
            task=f"{transfer}.{index + 1}",
            feeder=f"{transfer}.{feeder + 1}",
            source=f"{request.targets[feeder].site}:{request.targets[feeder].path}",
        )
    return find_transfer(writing.connection, transfer, None)


def _insert_transfer(
    writing: Writing,
    transfer: str,
    request: TransferRequest,
    user: str,
    tenant: str,
    verdict: Verdict,
    admitted: Admitted,
) -> None:
    writing.connection.execute(
        transfers.insert().values(
            id=transfer,
            request=json_text(request),
            state="requested",
            reason="queued",
            message="waits for its turn",
            since=writing.now,
            created=writing.now,
            user=user,
            tenant=tenant,
            source_site=request.source.site,
            priority=PRIORITIES.index(request.priority),
            mode=request.mode,
            decisions=json_text(verdict.decisions),
            policy_digest=verdict.digest,
            deadline=request.deadline.timestamp() if request.deadline is not None else None,
            promised=admitted.promised,
            size_bytes=admitted.size_bytes,
            cost_limit_usd=request.cost_limit_usd,
            plan=request.plan,
        )
    )


def _refused(writing: Writing, request: TransferRequest, verdict: Verdict, user: str, tenant: str) -> Denied:
    """What whoever asked is told when policy denies; where people may approve it, they are asked."""
    denied = [decision for decision in verdict.decisions if decision.verdict == "deny"]
    first = denied[0]
    shown = [f"{decision.use} at {decision.site}: {decision.text}" for decision in denied]
    handles = ask_for_approval(writing, request, verdict, user, tenant) if verdict.requestable else []
    writing.emit("transfer.denied", user=user, tenant=tenant, site=first.site, rule=first.rule, why=shown)
    decisions = [_decision_data(decision) for decision in verdict.decisions]
    if handles:
        return Denied(
            f"people have to approve this first, as {', '.join(handles)}: {first.text}",
            hint="flow approval ls shows who; after flow approve, ask for the same again",
            reason="policy-approval",
            handles=handles,
            decisions=decisions,
        )
    return Denied(
        f"policy does not permit to {first.use} this data at {first.site}: {first.text}",
        hint="flow plan show names all decisions; flow policy explain says what would make it legal",
        decisions=decisions,
    )


def _permitted_feeds(
    writing: Writing,
    transfer: str,
    request: TransferRequest,
    rows: Mapping[str, AnyRow],
    user: str,
    decide: Decide,
    chain: Chain,
    verdict: Verdict,
    wanted: Mapping[int, int],
) -> dict[int, tuple[int, str]]:
    """Which targets are served by another one, by position: the feeder's position, and the site that dials.

    Left out is what policy does not permit between the two, and what the feeder does not offer to be read; the source
    serves it. Decisions that permit a hop are on the record.
    """
    found: dict[int, tuple[int, str]] = {}
    if not permits(verdict):
        return found
    for index, feeder in wanted.items():
        hop = hop_request(request, verdict, feeder, index)
        ends = rows[hop.source.site], rows[hop.targets[0].site]
        end = dialer(ends[0].name, addresses_of(ends[0]), ends[1].name, addresses_of(ends[1]))
        path = clean(hop.source.path)
        root = offering_root(decode_roots(ends[0].roots), path, False)
        if end is None or root is None:
            continue
        if clean(root.name) == path and not request.source.path.endswith("/"):
            continue  # what stands there cannot tell whether it was a folder that came, or a file into the root
        said = decide(writing.connection, hop, rows, user, writing.now)
        if permits(said):
            record_verdict(writing, chain, said, hop, transfer, user)
            found[index] = feeder, ends[0].name if end == "source" else ends[1].name
    return found


def _insert_tasks(
    writing: Writing,
    transfer: str,
    request: TransferRequest,
    tenant: str,
    drivers: list[str],
    feeds: Mapping[int, tuple[int, str]],
) -> None:
    sources = [
        request.targets[feeds[index][0]] if index in feeds else request.source
        for index in range(len(request.targets))
    ]
    writing.connection.execute(
        tasks.insert(),
        [
            {
                "id": f"{transfer}.{index}",
                "transfer": transfer,
                "tenant": tenant,
                "priority": PRIORITIES.index(request.priority),
                "mode": request.mode,
                "source_site": sources[index - 1].site,
                "source_path": clean(sources[index - 1].path),
                "target_site": place.site,
                "target_path": clean(place.path),
                "driver": feeds[index - 1][1] if index - 1 in feeds else driver,
                "fed_by": f"{transfer}.{feeds[index - 1][0] + 1}" if index - 1 in feeds else "",
                "state": "waiting",
                "wait_since": writing.now,
                **_first_wait(place.site, request, feeds.get(index - 1)),
            }
            for index, (place, driver) in enumerate(zip(request.targets, drivers, strict=True), 1)
        ],
    )


def _first_wait(target: str, request: TransferRequest, feed: tuple[int, str] | None) -> dict[str, str]:
    """What a task waits for from the beginning."""
    if feed is None:
        return {"wait_name": "", "wait_text": "", "wait_ends": ""}
    feeder = request.targets[feed[0]]
    name, words, ends = waits_for(target, feeder.site, clean(feeder.path))
    return {"wait_name": name, "wait_text": words, "wait_ends": ends}


def _decision_data(decision: Decision) -> dict[str, object]:
    return {name: getattr(decision, name) for name in decision.__struct_fields__}


def _check_queue(writing: Writing, tenant: str, more: int) -> None:
    most = writing.connection.execute(
        select(tenants.c.max_queued).where(tenants.c.name == tenant)
    ).scalar_one()
    if most is None:
        return
    queued = writing.connection.execute(
        select(func.count()).where(tasks.c.tenant == tenant, tasks.c.state == "waiting")
    ).scalar_one()
    if queued + more > most:
        raise TemporaryError(
            f"tenant {tenant} has {queued} of at most {most} tasks in the queue",
            hint="wait until some of them have begun, or ask an admin for a larger quota",
            reason="quota",
        )


def steer(
    writing: Writing,
    transfer: str,
    verb: Literal["pause", "resume", "cancel", "retry"],
    user: str,
    tenant: str | None,
    decider: Decider,
    chain: Chain,
) -> Transfer | FlowError:
    """Pause, resume, cancel or retry; asking for what is so already changes nothing.

    Returns:
        The transfer; or the refusal, when policy denies a retry: it is decided anew like a new request.

    Raises:
        FlowError: the transfer is in a state in which this makes no sense (reason "conflict").
    """
    row = lock_transfer(writing, transfer, tenant)
    ended = row.state in ENDED
    if (verb == "retry") != ended and not (verb == "cancel" and row.cancelled):
        raise FlowError(
            f"transfer {transfer} is {row.state}: it cannot be {_past(verb)}",
            hint="flow transfer show tells what became of it",
            reason="conflict",
        )
    if verb == "cancel" and row.cancelled:
        return find_transfer(writing.connection, transfer, tenant)
    if verb == "retry" and row.state == "completed":
        raise FlowError(f"transfer {transfer} is complete: there is nothing to retry", reason="conflict")
    mine = tasks.c.transfer == transfer
    values: dict[str, Any]
    if verb == "pause":
        _set(writing, transfer, {"paused": True}, mine & tasks.c.state.in_(["waiting", "running"]))
    elif verb == "resume":
        values = {"paused": False, "ready_at": 0.0}
        _set(writing, transfer, values, mine & tasks.c.state.in_(["waiting", "running"]))
    elif verb == "cancel":
        _set(
            writing,
            transfer,
            {"state": "cancelled", "paused": False, "reason": "cancelled", "message": f"cancelled by {user}"},
            mine & tasks.c.state.in_(["waiting", "running"]),
        )
    else:
        values = {"state": "waiting", "paused": False, "attempts": 0, "ready_at": 0.0, "holder": ""}
        values |= {"reason": "", "message": "", "hint": "", "wait_name": "", "wait_since": writing.now}
        values |= {"disposal": "", "disposed": "{}"}
        ended_so = tasks.c.state.in_(["failed", "cancelled"])
        refusal = _decide_again(writing, row, _ids(writing, mine & ended_so), decider, chain)
        if refusal is not None:
            return refusal
        fed = writing.connection.execute(select(tasks).where(mine, ended_so, tasks.c.fed_by != "")).all()
        _set(writing, transfer, values, mine & ended_so)
        for task in fed:
            serve_directly(writing, task, row, "the transfer is retried")
    writing.emit(f"transfer.{_past(verb)}", transfer=transfer, user=user, tenant=row.tenant, by=user)
    here = writing.connection.execute(
        select(tasks.c.source_site, tasks.c.target_site, tasks.c.driver, tasks.c.holder).where(mine)
    ).all()
    writing.wake.update(name for found in here for name in (found.driver, found.holder) if name)
    if verb in ("cancel", "pause"):
        wake_beside(writing, {name for found in here for name in found[:2]}, row.tenant)
    settle(writing, transfer)
    return find_transfer(writing.connection, transfer, tenant)


def _ids(writing: Writing, which: Any) -> list[str]:
    found = writing.connection.execute(select(tasks.c.id).where(which).order_by(tasks.c.id)).scalars()
    return [str(task) for task in found]


def _decide_again(
    writing: Writing, row: AnyRow, ids: Sequence[str], decider: Decider, chain: Chain
) -> Denied | None:
    """Decide by what is known now on what of a transfer ended incomplete; what it may then is what its grants will say.

    Targets that have everything ask for nothing: whatever has become of them keeps nobody else from it.

    Args:
        ids: the tasks that are to be tried again.

    Returns:
        The refusal, when policy denies.

    Raises:
        NotFound: a site was removed meanwhile.
    """
    whole = decode_request(row.request)
    request = part_of(whole, ids)
    rows = site_rows_of(writing.connection, request)
    verdict = decider.decide(writing.connection, request, rows, row.user, writing.now, ids)
    record_verdict(writing, chain, verdict, request, row.id, row.user)
    if any(decision.verdict == "deny" for decision in verdict.decisions):
        return _refused(writing, request, verdict, row.user, row.tenant)
    settled = {place.site for place in whole.targets} - {place.site for place in request.targets}
    before = [
        one for one in decode_decisions(row.decisions) if one.site in settled and one.use in ("land", "hold")
    ]
    writing.connection.execute(
        update(transfers)
        .where(transfers.c.id == row.id)
        .values(decisions=json_text([*verdict.decisions, *before]), policy_digest=verdict.digest)
    )
    if request.options.dry_run or request.mode == "verify":
        return None
    for task, place in zip(ids, request.targets, strict=True):
        if verdict.labels or verdict.contracts:
            inherit(writing, place.site, place.path, verdict.labels, verdict.contracts)
        if place.site in verdict.about:
            reserve(writing, task, verdict.about[place.site])
    return None


def _past(verb: str) -> str:
    return {"pause": "paused", "resume": "resumed", "cancel": "cancelled", "retry": "retried"}[verb]


def _set(writing: Writing, transfer: str, values: dict[str, Any], which: Any) -> None:
    writing.connection.execute(update(tasks).where(which).values(**values))
    flags: dict[str, Any] = {name: values[name] for name in ("paused",) if name in values}
    if values.get("state") == "cancelled":
        flags["cancelled"] = True
    elif values.get("state") == "waiting":
        flags |= {"cancelled": False, "ended": None}
    writing.connection.execute(update(transfers).where(transfers.c.id == transfer).values(**flags))


def redrive(writing: Writing, site: str) -> None:
    """Choose anew who dials for the waiting tasks of a site whose addresses changed."""
    waiting = writing.connection.execute(
        select(tasks.c.id, tasks.c.source_site, tasks.c.target_site, tasks.c.driver).where(
            tasks.c.state == "waiting", (tasks.c.source_site == site) | (tasks.c.target_site == site)
        )
    ).all()
    names = {name for row in waiting for name in (row.source_site, row.target_site)}
    rows = {row.name: row for row in writing.connection.execute(select(sites).where(sites.c.name.in_(names)))}
    for row in waiting:
        if row.source_site not in rows or row.target_site not in rows:
            continue
        source, target = rows[row.source_site], rows[row.target_site]
        end = dialer(source.name, addresses_of(source), target.name, addresses_of(target))
        driver = {"source": source.name, "target": target.name, None: row.driver}[end]
        if driver != row.driver:
            writing.connection.execute(update(tasks).where(tasks.c.id == row.id).values(driver=driver))
            writing.wake.add(driver)
