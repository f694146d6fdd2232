"""The planner's process: the same plans as here, errors that are told, and no process that outlives its use."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from flowengine.coordinator.planning.solver import Solver
from flowengine.errors import TemporaryError, UsageError
from flowengine.plan import Allowed, Cap, Demand, Estimate, Link, Overlay, Place, Priority, Site, plan
from flowengine.plan.learning import learn
from flowengine.plan.pace import Seen

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]

LINKS = (("a", "b", 1e9), ("a", "c", 2e9), ("c", "b", 5e8))
OVERLAY = Overlay(
    sites=tuple(Site(name=name) for name in "abc"),
    links=tuple(
        Link(
            source=source,
            target=target,
            caps=(Cap(rate_bits_per_s=rate),),
            estimate=Estimate(rate_bits_per_s=rate),
        )
        for source, target, rate in LINKS
    ),
)
DEMANDS = tuple(
    Demand(
        id=f"d{number}",
        sources=(Place("a"),),
        targets=(Place("b"),),
        remaining_bytes=10**9 * (number + 1),
        priority=Priority.NORMAL,
        tenant=f"t{number % 2}",
        allowed=Allowed(relays=frozenset({"c"})),
    )
    for number in range(4)
)


async def test_a_plan_and_a_pace_are_those_that_would_be_made_here() -> None:
    solver = Solver()
    assert solver.pid is None  # nothing is started before it is needed
    first = await solver.plan(OVERLAY, DEMANDS, None, 1e9)
    assert first == plan(OVERLAY, DEMANDS, None, 1e9)
    assert await solver.plan(OVERLAY, DEMANDS, first, 1e9 + 5) == plan(OVERLAY, DEMANDS, first, 1e9 + 5)
    seen = [Seen(objects=n, size_bytes=n * 10**6, seconds=0.1 + n / 100) for n in range(1, 9)]
    assert await solver.learn([seen, []]) == [learn(seen), learn([])]
    await solver.aclose()
    assert solver.pid is None


async def test_what_is_wrong_with_a_question_is_told() -> None:
    solver = Solver()
    twice = Overlay(sites=(*OVERLAY.sites, OVERLAY.sites[0]), links=OVERLAY.links)
    with pytest.raises(UsageError) as here:
        plan(twice, DEMANDS, None, 1e9)
    with pytest.raises(UsageError) as there:
        await solver.plan(twice, DEMANDS, None, 1e9)
    assert (there.value.message, there.value.hint) == (here.value.message, here.value.hint)
    await solver.aclose()


async def test_a_process_that_dies_fails_its_question_and_is_replaced() -> None:
    solver = Solver()
    await solver.learn([[]])
    pid = solver.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # so that it dies with the question unanswered
    asked = asyncio.create_task(solver.learn([[]]))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(TemporaryError):
        await asked
    assert len(await solver.learn([[]])) == 1
    assert solver.pid not in (None, pid)
    await solver.aclose()


async def test_it_ends_when_nobody_asks_and_with_who_asked() -> None:
    solver = Solver(idle_s=0.0)
    await solver.learn([[]])
    ending = solver._idle
    assert ending is not None
    await ending
    assert solver.pid is None
    child = subprocess.Popen(
        [sys.executable, "-m", "flowengine.coordinator.planning.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(60) == 0
