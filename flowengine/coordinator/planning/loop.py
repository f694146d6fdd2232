"""The planner's loop in the leading coordinator: looks at links each second, and plans when something asks for it.

Goal
    Routes and rates follow what happens within a second or two, and nobody who begins ever waits for a plan.
Plan
    One round: read everything in one transaction; take what was reported into what is believed of links; when an event, a
    link that changed, a limit's edge or the plan's age asks for it, solve in the planner's process and write the outcome in one
    transaction, from which agents' streams take what they must be told. Between two plans lies at least `PAUSE_S`, and
    three times what the last one took, so that a large federation does nothing but plan at most a quarter of the time.
Invariants
    - Only the leader plans; a plan's number is above that of every plan before, whoever made it.
    - A solve reads nothing but its arguments: equal pictures give equal plans.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import Final

from sqlalchemy import Connection, select

from flowengine.api.agents import TaskRoute
from flowengine.coordinator.actions.grants import task_routes
from flowengine.coordinator.database.tables import tasks, transfers
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.decisions import Decider
from flowengine.coordinator.planning import stored
from flowengine.coordinator.planning.outcome import (
    TaskPlan,
    Told,
    guessed_links,
    leases_of,
    plans_of,
    ways_of,
)
from flowengine.coordinator.planning.picture import Picture, TaskFacts, read_picture
from flowengine.coordinator.planning.problem import demands_of, meets, overlay_of, sighted_links
from flowengine.coordinator.planning.watch import Watch
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.calls import log
from flowengine.errors import FlowError
from flowengine.plan import Overlay, Plan

__all__ = ["Planner"]

TICK_S: Final = 1.0
GATHER_S: Final = 0.3
"""An event waits so long for others: a small copy is over before anybody plans for it."""
PAUSE_S: Final = 0.5
EVERY_S: Final = 5.0
SIGN_AGAIN: Final = 0.5
KEPT_WHOLE: Final = 300
"""Up to so many demands each plan is kept with all that the next one may begin from; of more, one in `KEEP_EVERY_S`."""
KEEP_EVERY_S: Final = 30.0
_EVENTS: Final = ("transfer.", "task.", "limit.", "link.", "site.", "maintenance.", "tenant.", "bundle.")


class Planner:
    """Plans while its coordinator leads."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database
        self._watch = Watch()
        self._last: Plan | None = None
        self._asked = False
        self._seen = 0
        self._took_s = 0.0
        self._planned_at = 0.0
        self._kept_at = 0.0
        self._led = False

    async def run(self) -> None:
        """Until cancelled; a round that fails is logged and tried again."""
        self._seen = self._service.hub.last_seq
        while True:
            woken = await self._until_due()
            if not self._service.leader:
                self._led = False
                continue
            try:
                await self._round(woken)
            except FlowError as error:
                log.warning("planner: %s", error.message)
            except Exception:
                log.exception("planner failed")

    async def _until_due(self) -> bool:
        """Wait for an event that matters, or a tick; whether it was an event."""
        hub = self._service.hub
        deadline = asyncio.get_running_loop().time() + TICK_S
        while True:
            news = hub.news()
            rows = hub.since(self._seen)
            self._seen = hub.last_seq
            if rows is None or any(row.type.startswith(_EVENTS) for row in rows):
                await asyncio.sleep(GATHER_S)
                self._seen = hub.last_seq
                return True
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await news.wait()

    async def _round(self, woken: bool) -> None:
        service = self._service
        now = service.clock()
        self._asked = self._asked or woken
        if not self._led:
            _, self._last = await self._db.read(stored.last_plan)
            self._watch, self._led, self._asked = Watch(), True, True
        any_task = select(tasks.c.id).where(tasks.c.state.in_(["waiting", "running"])).limit(1)
        if not self._asked and await self._db.read(lambda c: c.execute(any_task).first()) is None:
            return
        picture, told = await self._db.read(partial(_read, now=now, decider=service.decider))
        if not picture.tasks:
            self._asked = False
            if told:
                await self._db.write(lambda w: stored.apply(w, None, {}, [], told))
            return
        await self._look(picture)
        plans = {task: one.plan for task, one in told.items()}
        if self._watch.bury(picture, plans):
            self._asked = True
        since = now - self._planned_at
        if since < max(PAUSE_S, 3 * self._took_s):
            return
        due = self._last is None or since >= EVERY_S or now >= self._last.valid_until_s
        if self._asked or due or self._watch.differs(picture):
            self._asked = False
            await self._plan(picture, told)

    async def _look(self, picture: Picture) -> None:
        looks = self._watch.look(picture)
        if not looks:
            return

        def keep(writing: Writing) -> None:
            for look in looks:
                stored.keep_link(
                    writing,
                    look.source,
                    look.target,
                    look.state,
                    "transfers",
                    rate_bits_per_s=look.rate_bits_per_s,
                    at_least=look.at_least,
                )

        await self._db.write(keep)

    async def _plan(self, picture: Picture, told: dict[str, Told]) -> None:
        picture.shut = frozenset(self._watch.dead)
        pairs = list(dict.fromkeys((task.source, task.target) for task in picture.tasks))
        overlay = overlay_of(picture, pairs)
        demands = demands_of(picture, sighted_links(picture, overlay, pairs))
        begin = time.perf_counter()
        made = await self._service.solver.plan(overlay, demands, self._last, picture.now)
        self._took_s = time.perf_counter() - begin
        self._planned_at = self._service.clock()
        self._last = made
        before = {task: one.plan for task, one in told.items()}
        counted = {task.id: task.counted for task in picture.tasks}
        ways = ways_of(overlay, demands, made, before)
        plans = plans_of(made, 0, before, counted, ways, guessed_links(overlay))
        held = leases_of(overlay, demands, plans, picture.now, 0)
        self._watch.planned_with = _used(overlay, plans)
        keep = len(demands) <= KEPT_WHOLE or self._planned_at - self._kept_at >= KEEP_EVERY_S
        if keep:
            self._kept_at = self._planned_at

        def write(writing: Writing) -> None:
            fresh = self._routes(writing, picture, plans, told)
            stored.apply(writing, made if keep else None, fresh, held, told)
            for task in picture.tasks:  # what could not begin before there was a way can begin now
                new = task.id in plans and plans[task.id].routes
                old = task.id in before and before[task.id].routes
                if task.state == "waiting" and new and not old and meets(picture, task.source, task.target):
                    writing.wake |= {task.source, task.target}

        await self._db.write(write)

    def _routes(
        self, writing: Writing, picture: Picture, plans: dict[str, TaskPlan], told: dict[str, Told]
    ) -> dict[str, Told]:
        """What drivers are told: signed anew where ways or the claim changed, or half of a grant's time is over."""
        terms = self._service.terms
        found: dict[str, Told] = {}
        for task in picture.tasks:
            if task.id not in plans:
                continue
            now_planned, was = plans[task.id], told.get(task.id)
            one = Told(plan=now_planned)
            ways = [(route.sites, route.rate_bits_per_s) for route in now_planned.routes]
            straight = [task.source, task.target]
            told_before = was is not None and bool(was.routes)
            if (
                task.state == "running"
                and ways
                and (told_before or any(sites != straight for sites, _ in ways))
            ):
                old = was.routes if was is not None else []
                same = (
                    was is not None
                    and was.fence == task.fence
                    and writing.now - was.signed < terms.grant_s * SIGN_AGAIN
                    and [_way(route, task) for route in old] == ways
                )
                if same and was is not None:
                    one = Told(plan=now_planned, fence=was.fence, signed=was.signed, routes=was.routes)
                else:
                    one.fence, one.signed = task.fence, writing.now
                    one.routes = sign_ways(writing, self._service, task.id, picture, ways, task.fence)
            elif was is not None and task.state == "running":
                one.fence = was.fence
            found[task.id] = one
        return found


def _read(connection: Connection, now: float, decider: Decider) -> tuple[Picture, dict[str, Told]]:
    return read_picture(connection, now, decider), stored.read_task_plans(connection)


def _way(route: TaskRoute, task: TaskFacts) -> tuple[list[str], int | None]:
    sites = route.sites if route.sites[0] == task.source else route.sites[::-1]
    return sites, route.rate_bits_per_s


def sign_ways(
    writing: Writing,
    service: Service,
    task: str,
    picture: Picture,
    ways: list[tuple[list[str], int]],
    fence: int,
) -> list[TaskRoute]:
    """The routes of a task as its driver is told them."""
    row = writing.connection.execute(select(tasks).where(tasks.c.id == task)).one()
    transfer = writing.connection.execute(select(transfers).where(transfers.c.id == row.transfer)).one()
    return task_routes(row, transfer, picture.rows, ways, fence, service.epoch, writing.now, service.terms)


def _used(overlay: Overlay, plans: dict[str, TaskPlan]) -> dict[tuple[str, str], float]:
    rates = {(link.source, link.target): link.estimate.rate_bits_per_s for link in overlay.links}
    return {
        hop: rates[hop]
        for one in plans.values()
        for route in one.routes
        for hop in zip(route.sites, route.sites[1:], strict=False)
        if hop in rates
    }
