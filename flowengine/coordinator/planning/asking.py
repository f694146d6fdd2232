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

from collections.abc import Mapping
from typing import Final

from sqlalchemy import Connection, select

from flowengine.api.agents import Answer
from flowengine.api.plans import Feed, Plan, PlanRequest
from flowengine.api.transfers import PRIORITIES, Decision, TransferRequest
from flowengine.coordinator.actions.feeding import hop_request, permits
from flowengine.coordinator.actions.transfers import Admitted, site_rows_of
from flowengine.coordinator.database.people import moment
from flowengine.coordinator.database.tables import counters, plans
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.coordinator.planning import stored
from flowengine.coordinator.planning.chosen import check_chosen
from flowengine.coordinator.planning.feeding import better_fed, possible_pairs
from flowengine.coordinator.planning.forecast import Solved, forecast, refusal
from flowengine.coordinator.planning.picture import Picture, read_picture, read_world, relays_for
from flowengine.coordinator.planning.problem import (
    CLASSES,
    allowed_of,
    demands_of,
    overlay_of,
    place_of,
    sighted_links,
)
from flowengine.coordinator.rules.feeding import may_be_fed
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.answers import ask_agent, for_whom
from flowengine.coordinator.web.calls import log
from flowengine.errors import FlowError
from flowengine.plan import Allowed, Demand
from flowengine.plan.pace import UNLEARNED, Pace, Seen

__all__ = ["Asking"]

COUNT_S: Final = 10.0
"""How long a site's agent may count what is to be moved."""
GUESSED_BYTES: Final = 4 << 30
"""What a transfer is taken for where nobody could say how much it is."""
KEPT_S: Final = 3600.0
"""How long a plan may be followed after it was made."""


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
        made = forecast(solved, request, decisions, size, objects)
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
    ) -> Solved:
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
        demands = (*demands_of(picture, sighted), *mine)
        made = await self._service.solver.plan(overlay, demands, None, now)
        return Solved(picture, overlay, mine, made, paces, promises, feeds)

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
        shown = forecast(solved, request, [], size, objects)
        if shown.promise == "refused":
            raise refusal(request, shown)
        return Admitted(size, objects, shown.promise == "admitted", solved.promises)

    async def chosen(self, request: TransferRequest, user: str, tenant: str) -> Plan | None:
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
    priority, weight = CLASSES[PRIORITIES.index(request.priority)]
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
        remaining_bytes=max(1, size if size is not None else GUESSED_BYTES),
        priority=priority,
        tenant=tenant,
        weight=weight,
        deadline_s=deadline,
        best_effort=request.best_effort,
        cost_limit_usd=request.cost_limit_usd,
        dataset="new",
        allowed=allowed,
    )
