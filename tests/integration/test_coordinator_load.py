"""Many tenants, many agents, coordinators that die: nothing lost, nobody starved, no task held twice."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from coordinators import Agent, Coordinator, Http, Lab, Log, connections_end, copy_request, running
from support import until

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]

TENANTS = 5
MIB = 1 << 20
QUICK = ("--lease-s", "2", "--offline-s", "3")
"""Terms with which what a death leaves behind is found soon."""
on_one_every_day = pytest.mark.parametrize(
    "state", ["sqlite", pytest.param("postgresql", marks=pytest.mark.full)], indirect=True
)
"""PostgreSQL in the long form only: every day two coordinators share one, and one of them is killed."""


async def federation(lab: Lab, agents: int, **options: Any) -> tuple[Http, list[Http], list[Agent], Log]:
    """An admin, a user of each tenant, agents that share one log."""
    admin = lab.admin()
    users = [await lab.user(admin, f"user{n}", f"tenant{n}") for n in range(TENANTS)]
    log = Log()
    made = [await lab.agent(admin, f"s{n}", log=log, **options) for n in range(agents)]
    for agent in made:
        await agent.heartbeat()
    return admin, users, made, log


async def queue(users: list[Http], agents: list[Agent], count: int, rng: random.Random) -> list[str]:
    """Ask for transfers, each tenant for its share; their ids."""
    ids = []
    for number in range(count):
        source, target = rng.sample([agent.site for agent in agents], 2)
        body = copy_request(f"{source}:/d/in{number}", f"{target}:/d/out{number}")
        made = await users[number % TENANTS]("POST", "/v1/transfers", body, key=f"n{number}")
        ids.append(made["id"])
    return ids


async def until_all_ended(admin: Http, count: int, timeout_s: float) -> list[dict[str, Any]]:
    """All transfers, once the stream of events has told of the end of each."""
    ended: set[str] = set()
    async with asyncio.timeout(timeout_s):
        async for event in admin.follow("/v1/events?types=transfer.completed,transfer.terminated"):
            assert event["type"] == "transfer.completed", event
            ended.add(event["transfer"])
            if len(ended) == count:
                break
    found = (await admin("GET", "/v1/transfers?limit=1000"))["items"]
    assert len(found) == count
    assert all(item["state"] == "completed" for item in found)
    return list(found)


def check_never_held_twice(log: Log) -> None:
    """A task begins again only under a higher fence; under one fence it is begun once."""
    fences: dict[str, list[int]] = {}
    begun: set[tuple[str, int]] = set()
    for _, _, task, fence, what in log.entries:
        if what == "begin":
            assert (task, fence) not in begun, f"{task} was given twice under fence {fence}"
            begun.add((task, fence))
            fences.setdefault(task, []).append(fence)
    for task, seen in fences.items():
        assert seen == sorted(seen), f"fences of {task} went back"
    done = Counter(task for _, _, task, _, what in log.entries if what == "done")
    assert not [task for task, times in done.items() if times > 1], "a task was ended twice"


def check_one_holder_at_a_time(events: list[dict[str, Any]]) -> int:
    """By the coordinator's log a claim follows only on the end of the one before, under a higher fence; tasks done."""
    fences: dict[str, int] = {}
    free: dict[str, bool] = {}
    done = 0
    for event in events:
        task, fence = event["data"]["task"], event["data"]["fence"]
        if event["type"] == "task.claimed":
            assert free.get(task, True), f"{task} was claimed while it was held"
            assert fence > fences.get(task, 0)
            fences[task], free[task] = fence, False
        else:
            assert fence == fences[task]
            free[task] = event["type"] != "task.done"
            done += event["type"] == "task.done"
    return done


def check_fair(events: list[dict[str, Any]], tenant_of: dict[str, int]) -> None:
    """At no time has a tenant that still has work waiting less than half of its equal share of what was begun."""
    queued = Counter(tenant_of.values())
    begun: Counter[int] = Counter()
    for event in events:
        if event["type"] != "task.claimed" or event["data"]["attempt"] > 1:
            continue
        begun[tenant_of[event["transfer"]]] += 1
        total = sum(begun.values())
        if total < 4 * TENANTS:
            continue
        for tenant, wanted in queued.items():
            if begun[tenant] < wanted:
                assert begun[tenant] >= total / TENANTS / 2, f"tenant{tenant}: {begun[tenant]} of {total}"


async def all_events(admin: Http, kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        page = await admin("GET", f"/v1/events?types={kind}&limit=1000&after={after}")
        found += page["items"]
        after = page["next"]
        if not after:
            return found


async def run_agents(agents: list[Agent]) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(agent.run()) for agent in agents]


async def while_they_run(
    agents: list[asyncio.Task[None]], waiting: Coroutine[Any, Any, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """What is waited for; where an agent ends instead, its fault at once."""
    found = asyncio.create_task(waiting)
    done, _ = await asyncio.wait([found, *agents], return_when=asyncio.FIRST_COMPLETED)
    if found not in done:
        found.cancel()
        for agent in done:
            agent.result()
    return await found


async def end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        assert not task.done() or task.exception() is None, task.exception()
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await task
    await connections_end()


@on_one_every_day
async def test_many_transfers_of_5_tenants_over_many_agents(
    state: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """200 transfers and 20 agents are what is promised; every day it is a fifth of that."""
    count = 200 if pytestconfig.getoption("--full") else 40
    coordinator = Coordinator(state, tmp_path / "secrets", executed=True)
    with running(coordinator):
        lab = Lab([coordinator], tmp_path)
        admin, users, agents, log = await federation(lab, count // 10, size=4 * MIB)
        ids = await queue(users, agents, count, random.Random(7))
        tasks = await run_agents(agents)
        ended = await while_they_run(tasks, until_all_ended(admin, count, 300))
        history = await all_events(admin, "task.")
        await end(tasks)
        own, planner = coordinator.peak_bytes()
        await lab.aclose()
    assert {item["id"] for item in ended} == set(ids)
    assert all(item["counters"]["bytes_done"] == 4 * MIB for item in ended)
    assert check_one_holder_at_a_time(history) == count
    check_never_held_twice(log)
    check_fair(history, {transfer: number % TENANTS for number, transfer in enumerate(ids)})
    print(f"the coordinator had {own / MIB:.0f} MiB at most, its planner's process {planner / MIB:.0f}")
    assert own < 150 * MIB, f"{own / MIB:.0f} MiB"
    assert planner > 0, "nothing was planned"
    assert own + planner < 200 * MIB, f"{own / MIB:.0f} and {planner / MIB:.0f} MiB"
    assert "Traceback" not in coordinator.log


@on_one_every_day
@pytest.mark.parametrize("count", [16, pytest.param(100, marks=pytest.mark.full)])
async def test_kill_9_at_random_moments_loses_nothing(state: str, tmp_path: Path, count: int) -> None:
    rng = random.Random(11)
    coordinator = Coordinator(state, tmp_path / "secrets", options=QUICK)
    with running(coordinator):
        lab = Lab([coordinator], tmp_path, patience_s=60)
        admin, users, agents, log = await federation(lab, 6, step_s=0.1, fail_one_in=15)
        tasks = await run_agents(agents)
        queueing = asyncio.create_task(queue(users, agents, count, rng))
        for _ in range(2):
            await log.wait_for(len(log.entries) + rng.randrange(1, 6))
            coordinator.kill()
            await asyncio.to_thread(coordinator.start)
        ids = await queueing
        ended = await while_they_run(tasks, until_all_ended(admin, count, 300))
        history = await all_events(admin, "task.")
        await end(tasks)
        await lab.aclose()
    assert {item["id"] for item in ended} == set(ids)
    assert check_one_holder_at_a_time(history) == count
    check_never_held_twice(log)


@pytest.mark.parametrize("count", [16, pytest.param(100, marks=pytest.mark.full)])
async def test_two_coordinators_on_one_postgresql_and_one_is_killed(
    postgres_server: Callable[[], str], tmp_path: Path, count: int
) -> None:
    state = postgres_server()
    pair = [Coordinator(state, tmp_path / "secrets", options=QUICK) for _ in range(2)]
    with running(*pair):
        lab = Lab(pair, tmp_path, patience_s=60)
        admin, users, agents, log = await federation(lab, 6, step_s=0.1)
        leads = [(await lab.client(urls=[url])("GET", "/v1/health"))["leader"] for url in lab.urls]
        assert leads.count(True) <= 1
        tasks = await run_agents(agents)
        queueing = asyncio.create_task(queue(users, agents, count, random.Random(3)))
        await log.wait_for(8)
        leader = leads.index(True) if True in leads else 0
        pair[leader].kill()
        ids = await queueing
        ended = await while_they_run(tasks, until_all_ended(admin, count, 300))
        left = lab.client(urls=[lab.urls[1 - leader]])
        await until(lambda: leads_now(left), "the other one to lead")
        history = await all_events(admin, "task.")
        await end(tasks)
        await lab.aclose()
    assert {item["id"] for item in ended} == set(ids)
    assert check_one_holder_at_a_time(history) == count
    check_never_held_twice(log)


async def leads_now(client: Http) -> bool:
    return bool((await client("GET", "/v1/health"))["leader"])
