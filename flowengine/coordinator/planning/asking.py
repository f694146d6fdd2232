"""What a transfer would be, beside all that moves already: for `flow plan`, and for deadlines at submission.

Goal
    A time that comes true, and promises that hold: what is said here is made by the same planner as what will run.
Plan
    The request becomes one demand for each target beside the demands of all tasks; the planner's answer for them, with
    what is learned of how long tasks take beside their links, is the plan. A deadline is tried against all that is
    promised; when it cannot be met the planner says the earliest time that could be, and what stands in the way.
Invariants
    - Nothing is promised beside what was read: a promise that somebody else made meanwhile has them start anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from sqlalchemy import Connection, select

from flowengine.api.agents import Answer
from flowengine.api.plans import Feed, Plan, PlanRequest
from flowengine.api.transfers import Decision, TransferRequest, Way
from flowengine.coordinator.actions.feeding import hop_request, permits
from flowengine.coordinator.actions.transfers import Admitted, no_meeting, site_rows_of
from flowengine.coordinator.database.people import moment, optional_moment
from flowengine.coordinator.database.tables import AnyRow, counters, plans
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.coordinator.planning import stored
from flowengine.coordinator.planning.feeding import better_fed, possible_pairs
from flowengine.coordinator.planning.outcome import (
    by_group,
    clock,
    guessed_links,
    known_obstacles,
    only,
    routes_of,
    ways_of,
)
from flowengine.coordinator.planning.picture import (
    CLASSES,
    Picture,
    allowed_of,
    demands_of,
    links_of_plan,
    meets,
    overlay_of,
    place_of,
    read_picture,
    read_world,
    relays_for,
    sighted_links,
)
from flowengine.coordinator.rules.feeding import may_be_fed
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.answers import ask_agent, for_whom
from flowengine.coordinator.web.calls import log
from flowengine.errors import Denied, FlowError, NotFound
from flowengine.plan import Allowed, Demand, Overlay, describe
from flowengine.plan.explain import describe_obstacle
from flowengine.plan.model import DemandPlan
from flowengine.plan.model import Plan as Solved
from flowengine.plan.pace import UNLEARNED, Pace, Seen, expect_s
from flowengine.units import format_bytes, format_duration

__all__ = ["Asking", "chosen_feeds"]

COUNT_S: Final = 10.0
"""How long a site's agent may count what is to be moved."""
KEPT_S: Final = 3600.0
SPREADS: Final = 1.6449
"""Normal quantile of the span that is told: nine of ten fall inside."""


@dataclass(slots=True)
class _Solved:
    picture: Picture
    overlay: Overlay
    demands: tuple[Demand, ...]
    mine: tuple[Demand, ...]
    plan: Solved
    paces: dict[str, Pace]
    promises: int
    feeds: Mapping[int, int]
    """Targets that other targets serve, each with its feeder, by position."""


class Asking:
    """Answers for users, by the planner."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database

    # --- how much it is ---------------------------------------------------------------------------------------------

    async def size_of(
        self, request: TransferRequest, user: str, tenant: str
    ) -> tuple[int | None, int | None]:
        """Bytes and objects: as the request says, else as the source's agent counts; None where neither can tell."""
        if request.size_bytes is not None:
            return request.size_bytes, request.objects or 1
        try:
            answer: Answer = await ask_agent(
                self._service,
                request.source.site,
                "measure",
                request.source.path,
                user,
                COUNT_S,
                for_whom(user, tenant),
            )
        except FlowError:
            return None, None
        if answer.reason or not answer.complete:
            return None, None
        return answer.size_bytes, answer.objects

    # --- who serves whom --------------------------------------------------------------------------------------------

    async def feeds(self, request: TransferRequest, user: str) -> dict[int, int]:
        """Targets that other targets should serve, each with its feeder, by position; see `better_fed`.

        Where the planner cannot be asked the source serves all of them: nothing waits for this.
        """
        if not may_be_fed(request):
            return {}
        now, decider = self._service.clock(), self._service.decider

        def read(connection: Connection) -> tuple[Picture, list[tuple[int, int]], frozenset[str]]:
            picture = read_world(connection, now)
            pairs = possible_pairs(picture, request)
            ends = {request.source.site, *(target.site for target in request.targets)}
            if not pairs or not ends <= picture.rows.keys():
                return picture, [], frozenset()
            verdict = decider.decide(connection, request, picture.rows, user, now)
            if not permits(verdict):
                return picture, [], frozenset()
            hops = {pair: hop_request(request, verdict, *pair) for pair in pairs}
            permitted = [
                pair
                for pair, hop in hops.items()
                if permits(decider.decide(connection, hop, picture.rows, user, now))
            ]
            return picture, permitted, relays_for(connection, picture, decider, request, user)

        picture, pairs, relays = await self._db.read(read)
        if not pairs:
            return {}
        try:
            return await better_fed(self._service.solver.plan, picture, request, pairs, relays)
        except FlowError as error:
            log.warning("who could serve whom was not found out: %s", error.message)
            return {}

    # --- plans ------------------------------------------------------------------------------------------------------

    async def plan(self, asked: PlanRequest, user: str, tenant: str, id_: str) -> Plan:
        """What the transfer would be; kept under `id_` when policy permits it.

        Raises:
            NotFound: a site is not known.
        """
        request = asked.request
        now = self._service.clock()

        def decide(connection: Connection) -> list[Decision]:
            rows = site_rows_of(connection, request)
            return self._service.decider.decide(connection, request, rows, user, now).decisions

        decisions = await self._db.read(decide)
        denied = next((one for one in decisions if one.verdict == "deny"), None)
        if denied is not None:
            return Plan(
                permitted=False,
                decisions=decisions,
                routes=[[request.source.site, target.site] for target in request.targets],
                size_bytes=asked.size_bytes,
                objects=asked.objects,
                text=f"policy does not permit to {denied.use} it at {denied.site}: {denied.text}",
            )
        size, objects = asked.size_bytes, asked.objects
        if size is None:
            size, objects = await self.size_of(request, user, tenant)
        feeds = await self.feeds(request, user)
        solved = await self._solve(request, user, tenant, size, objects, feeds)
        made = self._shown(solved, request, decisions, size, objects)
        made.feeds = [
            Feed(
                target=request.targets[one].site,
                feeder=request.targets[other].site,
                source=request.source.site,
            )
            for one, other in sorted(feeds.items())
        ]
        made.id, made.made = id_, moment(solved.picture.now)
        made.expires = moment(solved.picture.now + KEPT_S)

        def keep(writing: Writing) -> None:
            writing.connection.execute(
                plans.insert().values(
                    id=id_,
                    user=user,
                    tenant=tenant,
                    made=writing.now,
                    expires=writing.now + KEPT_S,
                    request=json_text(request),
                    body=json_text(made),
                )
            )

        await self._db.write(keep)
        return made

    async def _solve(
        self,
        request: TransferRequest,
        user: str,
        tenant: str,
        size: int | None,
        objects: int | None,
        feeds: Mapping[int, int] | None = None,
    ) -> _Solved:
        now = self._service.clock()
        feeds = feeds or {}
        pairs_asked = [
            ((request.targets[feeds[number]] if number in feeds else request.source).site, target.site)
            for number, target in enumerate(request.targets)
        ]
        source_of = {target: source for source, target in pairs_asked}
        targets = list(source_of)

        decider = self._service.decider

        def read(connection: Connection) -> tuple[Picture, list[list[Seen]], int, frozenset[str]]:
            found = [
                seen for name in targets for seen in stored.ended_tasks(connection, source_of[name], name)
            ]
            promises = connection.execute(
                select(counters.c.value).where(counters.c.name == "promise")
            ).scalar_one()
            picture = read_picture(connection, now, decider)
            return picture, found, promises, relays_for(connection, picture, decider, request, user)

        picture, seen, promises, permitted = await self._db.read(read)
        learned = await self._service.solver.learn(seen)
        # By those that ended between the two sites, or where there are too few, anywhere.
        paces = {
            name: here if here.seen else anywhere
            for name, here, anywhere in zip(targets, learned[::2], learned[1::2], strict=True)
        }
        pairs = [(task.source, task.target) for task in picture.tasks]
        pairs += pairs_asked
        overlay = overlay_of(picture, pairs)
        sighted = sighted_links(picture, overlay, pairs)
        mine = tuple(
            _demand(
                request,
                number,
                picture,
                allowed_of(picture, pairs_asked[number], permitted, request.plan or "", sighted),
                tenant,
                size,
                objects,
                paces.get(name, UNLEARNED),
                feeds.get(number, -1),
            )
            for number, name in enumerate(target.site for target in request.targets)
        )
        others = demands_of(picture, sighted)
        demands = (*others, *mine)
        made = await self._service.solver.plan(overlay, demands, None, now)
        return _Solved(picture, overlay, demands, mine, made, paces, promises, feeds)

    def _shown(
        self,
        solved: _Solved,
        request: TransferRequest,
        decisions: list[Decision],
        size: int | None,
        objects: int | None,
    ) -> Plan:
        now, made = solved.picture.now, solved.plan
        groups = by_group(made)
        price = {(link.source, link.target): link.usd_per_gb for link in solved.overlay.links}
        ways_carry = ways_of(solved.overlay, solved.mine, made, {})
        ways: list[Way] = []
        times: dict[int, tuple[float, float, float]] = {}
        binds: list[str] = []
        words: list[str] = []
        usd: float | None = 0.0
        guessed = guessed_links(solved.overlay)
        entries = {entry.id: known_obstacles(entry, guessed) for entry in made.demands}
        for number, demand in enumerate(solved.mine):
            entry = entries[demand.id]
            source, target = demand.sources[0].site, demand.targets[0].site
            found = routes_of(groups.get(entry.group, []), entry)
            total = sum(way.rate_bits_per_s for way in found)
            for way in found:
                hops = list(zip(way.sites, way.sites[1:], strict=False))
                cost = sum(price.get(hop) or 0.0 for hop in hops)
                ways.append(Way(sites=way.sites, rate_bits_per_s=way.rate_bits_per_s, usd_per_gb=cost))
                if usd is not None and size is not None:
                    usd += cost * size / 1e9 * way.rate_bits_per_s / max(total, 1)
            pace = solved.paces.get(target, UNLEARNED)
            if size is not None:
                times[number] = _span(entry, pace, objects or 1, size, ways_carry[demand.id], solved, now)
            binds += [
                describe_obstacle(obstacle, entry, clock)
                for obstacle in entry.obstacles
                if obstacle.kind != "ceiling"
            ]
            lines = describe(only(made, entry, groups.get(entry.group, [])), demand.id, clock)
            prefix = f"to {target}: " if len(solved.mine) > 1 else ""
            if not found and meets(solved.picture, source, target):
                words.append(prefix + no_meeting(source, target))
                continue
            line = _line(entry, lines, source, target, ways_carry[demand.id], found)
            words.append(
                prefix + (f"from {source} once it is complete there, " * (number in solved.feeds)) + line
            )
        promise = _promise([entries[demand.id].promise for demand in solved.mine])
        possible = [entries[demand.id].earliest_s for demand in solved.mine]
        plan = Plan(
            permitted=True,
            decisions=decisions,
            routes=[way.sites for way in ways]
            or [
                [request.source.site, t.site]
                for t in request.targets
                if not meets(solved.picture, request.source.site, t.site)
            ],
            ways=ways,
            size_bytes=size,
            objects=objects,
            usd=round(usd, 6) if usd is not None and size is not None else None,
            promise=promise,
            binds=list(dict.fromkeys(binds)),
        )
        carried = [ways_carry[demand.id] for demand in solved.mine]
        plan.rate_bits_per_s = min(carried) or None
        if times and all(time[1] < float("inf") for time in times.values()):
            ends = [_end(times, solved.feeds, number, now) for number in times]
            earliest, expected, latest = (max(end[at] for end in ends) for at in range(3))
            plan.duration_s = round(expected - now, 3)
            plan.earliest, plan.expected = moment(earliest), moment(expected)
            plan.latest = optional_moment(latest if latest < float("inf") else None)
        if promise == "refused" and any(possible):
            start = max(solved.paces.get(d.targets[0].site, UNLEARNED).start_s for d in solved.mine)
            plan.earliest_possible = moment(max(at for at in possible if at is not None) + start)
        plan.text = _text(words, plan)
        return plan

    # --- deadlines --------------------------------------------------------------------------------------------------

    async def admit(self, request: TransferRequest, user: str, tenant: str) -> Admitted:
        """What a request needs to know of the planner before it is taken on: its size, and a promise.

        Raises:
            FlowError: the deadline cannot be met (reason "deadline"); the message says when it could, and why not now.
        """
        if request.deadline is None:
            return Admitted(request.size_bytes, request.objects)
        size, objects = await self.size_of(request, user, tenant)
        if size is None:
            if request.best_effort:
                return Admitted()
            raise FlowError(
                f"nothing can be promised for {request.deadline.isoformat()}: how much lies at "
                f"{request.source.site}:{request.source.path} could not be counted within {COUNT_S:.0f} s",
                hint="say how much it is (--size), or ask for it without a promise (--best-effort)",
                reason="deadline",
            )
        solved = await self._solve(request, user, tenant, size, objects)
        shown = self._shown(solved, request, [], size, objects)
        if shown.promise == "refused":
            raise _refusal(request, shown)
        return Admitted(size, objects, shown.promise == "admitted", solved.promises)

    async def chosen(self, request: TransferRequest, tenant: str) -> Plan | None:
        """The stored plan that a request names, when it may still be followed.

        Raises:
            NotFound: there is none, or it has expired.
            FlowError: it is for another transfer, or a site or link of it is no longer there (reason "conflict").
            Denied: policy does not permit a relay of it any more.
        """
        if not request.plan:
            return None
        now = self._service.clock()

        decider = self._service.decider

        def read(connection: Connection) -> Plan:
            row = connection.execute(select(plans).where(plans.c.id == request.plan)).first()
            picture = read_picture(connection, now, decider)
            user = row.user if row is not None else ""
            permitted = relays_for(connection, picture, decider, request, user)
            return check_chosen(row, request, tenant, picture, now, permitted)

        return await self._db.read(read)


def _demand(
    request: TransferRequest,
    number: int,
    picture: Picture,
    allowed: Allowed,
    tenant: str,
    size: int | None,
    objects: int | None,
    pace: Pace,
    feeder: int = -1,
) -> Demand:
    begin = request.source if feeder < 0 else request.targets[feeder]
    priority, weight = CLASSES[("low", "normal", "high", "urgent").index(request.priority)]
    deadline = None
    if request.deadline is not None:
        # What the ends need beside the links must fit as well.
        beside = pace.start_s + pace.object_s * (objects or 0)
        deadline = max(request.deadline.timestamp() - beside, picture.now + 1.0)
    return Demand(
        id=f"new.{number + 1}",
        sources=(place_of(picture, begin.site, begin.path, writing=False),),
        targets=(
            place_of(picture, request.targets[number].site, request.targets[number].path, writing=True),
        ),
        remaining_bytes=max(1, size if size is not None else 4 << 30),
        priority=priority,
        tenant=tenant,
        weight=weight,
        deadline_s=deadline,
        best_effort=request.best_effort,
        cost_limit_usd=request.cost_limit_usd,
        dataset="new",
        allowed=allowed,
    )


def check_chosen(
    row: AnyRow,
    request: TransferRequest,
    tenant: str,
    picture: Picture,
    now: float,
    permitted: frozenset[str],
) -> Plan:
    """See `Asking.chosen`."""
    if row is None or row.tenant != tenant or row.expires < now:
        raise NotFound(
            f"there is no plan {request.plan}",
            hint="plans are kept for an hour: plan again",
            plan=request.plan,
        )
    planned = msgspec.json.decode(row.request, type=TransferRequest)
    for name in ("source", "targets", "mode", "labels", "purpose", "priority"):
        if getattr(planned, name) != getattr(request, name):
            raise FlowError(
                f"plan {request.plan} is for another transfer: its {name} is {getattr(planned, name)!r}",
                hint="plan this transfer, and use that plan's id",
                reason="conflict",
            )
    plan = msgspec.json.decode(row.body, type=Plan)
    between = sorted({site for way in plan.ways for site in way.sites[1:-1]})
    for site in between:
        facts = picture.sites.get(site)
        if facts is None or not facts.relays:
            raise FlowError(
                f"plan {request.plan} leads over {site}, which does not relay any more",
                hint="plan again",
                reason="conflict",
            )
        if site not in permitted:
            raise Denied(
                f"plan {request.plan} leads over {site}, and policy does not permit that any more",
                hint="plan again",
                site=site,
            )
    pairs = _pairs(request) + [(feed.feeder, feed.target) for feed in plan.feeds]
    there = {link.label for link in overlay_of(picture, pairs).links}
    gone = sorted(links_of_plan(plan) - there)
    if gone:
        raise FlowError(
            f"plan {request.plan} uses {', '.join(gone)}, which is not there any more",
            hint="plan again",
            reason="conflict",
        )
    return plan


def chosen_feeds(request: TransferRequest, plan: Plan) -> dict[int, int]:
    """Targets of a request that others serve by a stored plan, each with its feeder, by position."""
    if not may_be_fed(request):
        return {}
    at = {target.site: index for index, target in enumerate(request.targets)}
    return {at[feed.target]: at[feed.feeder] for feed in plan.feeds}


def _pairs(request: TransferRequest) -> list[tuple[str, str]]:
    return [(request.source.site, target.site) for target in request.targets]


def _promise(promises: Sequence[str]) -> str:
    for word in ("refused", "best-effort", "late"):
        if word in promises:
            return "best-effort" if word == "late" else word
    return "admitted" if "admitted" in promises or "kept" in promises else "none"


def _span(
    entry: DemandPlan, pace: Pace, objects: int, size: int, way: float, solved: _Solved, now: float
) -> tuple[float, float, float]:
    """Earliest, expected and latest end: the pace of the ends on what the ways carry, and the links' own spread."""
    if entry.promise == "refused" or (not entry.rate_bits_per_s and entry.eta.expected_s is None):
        never = float("inf")
        return never, never, never
    took = expect_s(pace, objects, size, way or None)
    expected = now + took
    if not entry.rate_bits_per_s and entry.eta.expected_s is not None:
        expected = entry.eta.expected_s + took  # its turn comes first
    link = next(
        (
            one.estimate.spread
            for one in solved.overlay.links
            if way and (one.source, one.target) == (entry_source(solved, entry), entry_target(solved, entry))
        ),
        0.0,
    )
    on_way = 8 * size / way / took if way else 0.0
    near = SPREADS * min((pace.spread**2 + (link * min(on_way, 1.0)) ** 2) ** 0.5, 2.0)
    length = expected - now
    return now + length / (1 + near), expected, now + length * (1 + near)


def _end(
    times: Mapping[int, tuple[float, float, float]], feeds: Mapping[int, int], number: int, now: float
) -> tuple[float, float, float]:
    """Earliest, expected and latest end of a target, which begins when its feeder is done."""
    earliest, expected, latest = times[number]
    if number not in feeds:
        return earliest, expected, latest
    before = _end(times, feeds, feeds[number], now)
    return earliest + before[0] - now, expected + before[1] - now, latest + before[2] - now


def entry_source(solved: _Solved, entry: DemandPlan) -> str:
    """The site that a new demand reads from."""
    return next(d.sources[0].site for d in solved.mine if d.id == entry.id)


def entry_target(solved: _Solved, entry: DemandPlan) -> str:
    """The site that a new demand writes to."""
    return next(d.targets[0].site for d in solved.mine if d.id == entry.id)


def _line(
    entry: DemandPlan, lines: list[str], source: str, target: str, way: float, found: Sequence[object]
) -> str:
    if entry.promise == "refused" or not found:
        return lines[0]
    straight = len(found) == 1 and getattr(found[0], "sites", []) == [source, target]
    if straight:
        return "straight" + ("" if way else "; nothing is known yet of the link")
    return (
        f"over {len(found)} ways at once"
        if len(found) > 1
        else "over " + " > ".join(getattr(found[0], "sites", []))
    )


def _text(words: list[str], plan: Plan) -> str:
    text = "; ".join(dict.fromkeys(words))
    if plan.rate_bits_per_s and plan.promise != "refused":
        text += f", at up to {format_bytes(plan.rate_bits_per_s / 8)}/s"
    if plan.duration_s is not None and plan.promise != "refused":
        text += f": about {format_duration(plan.duration_s)}"
    if plan.promise == "refused" and plan.earliest_possible is not None:
        text += f"; the earliest that can be promised is {clock(plan.earliest_possible.timestamp())}"
    return text


def _refusal(request: TransferRequest, shown: Plan) -> FlowError:
    assert request.deadline is not None
    due = clock(request.deadline.timestamp())
    when = shown.earliest_possible
    earliest = (
        f"the earliest possible is {clock(when.timestamp())}"
        if when
        else "no later time can be promised either"
    )
    way = "; ".join(shown.binds) or "the ends need longer for it than there is"
    return FlowError(
        f"the transfer cannot be there by {due}: {earliest}. What stands in the way: {way}",
        hint="ask for a later time, for a higher priority, or for it without a promise (--best-effort)",
        reason="deadline",
        deadline=due,
        earliest=when.isoformat() if when else None,
        binds=shown.binds,
    )
