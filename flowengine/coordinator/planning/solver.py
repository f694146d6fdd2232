"""The planner beside the coordinator, in a process of its own.

Goal
    Nobody waits for a plan: not the event loop, which a solve in a thread would hold up by the interpreter's lock, and
    not the machine's memory, of which numpy and HiGHS take as much as the rest of the coordinator.
Plan
    The process is started at the first question, which a small copy never lives to see, and ends when nobody asked for
    `IDLE_S`. It answers one question at a time.
Invariants
    - Every question ends: by its answer, by the process's end, or after `ANSWER_S`.
    - A process whose answer was not read to its end is never asked again.
    - It ends with the coordinator, however that ends: its input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from typing import Final

import msgspec

from flowengine.coordinator.planning.questions import (
    LENGTH_BYTES,
    Answer,
    Failed,
    Learn,
    Learned,
    Question,
    Solve,
    Solved,
    frame,
)
from flowengine.errors import FlowError, TemporaryError, UsageError
from flowengine.plan import Demand, Overlay, Plan
from flowengine.plan.pace import Pace, Seen

__all__ = ["Solver"]

ANSWER_S: Final = 120.0
"""Longest time for one answer; the largest federations of the tests are planned in a tenth of it."""
IDLE_S: Final = 600.0


class Solver:
    """Plans and paces from the planner's process; used by one event loop."""

    def __init__(self, idle_s: float = IDLE_S) -> None:
        self._turn = asyncio.Lock()
        self._process: Process | None = None
        self._decoder = msgspec.msgpack.Decoder(Answer)
        self._idle_s = idle_s
        self._idle: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process, where there is one."""
        return None if self._process is None else self._process.pid

    async def plan(
        self, overlay: Overlay, demands: tuple[Demand, ...], previous: Plan | None, now_s: float
    ) -> Plan:
        """See `flowengine.plan.plan`.

        Raises:
            UsageError: The overlay or a demand contradicts itself.
            TemporaryError: The process ended, or took too long.
        """
        answer = await self._ask(Solve(overlay, demands, previous, now_s))
        assert isinstance(answer, Solved)
        return answer.plan

    async def learn(self, seen: Sequence[list[Seen]]) -> list[Pace]:
        """The pace of each of these, see `flowengine.plan.learning.learn`.

        Raises:
            TemporaryError: The process ended, or took too long.
        """
        answer = await self._ask(Learn(list(seen)))
        assert isinstance(answer, Learned)
        return answer.paces

    async def aclose(self) -> None:
        """End the process."""
        async with self._turn:
            if self._idle is not None:
                self._idle.cancel()
            await self._end()

    async def _ask(self, question: Question) -> Solved | Learned:
        async with self._turn:
            if self._idle is not None:
                self._idle.cancel()
            process = await self._running()
            whole = False
            try:
                async with asyncio.timeout(ANSWER_S):
                    answer = await self._exchange(process, question)
                whole = True
            except TimeoutError:
                raise TemporaryError(f"the planner gave no answer within {ANSWER_S:.0f} s") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise TemporaryError(
                    "the planner's process ended; the next question starts another"
                ) from None
            finally:
                if not whole:
                    await self._end()
            self._idle = asyncio.create_task(self._end_when_idle())
        if isinstance(answer, Failed):
            if answer.message:
                raise UsageError(answer.message, hint=answer.hint)
            raise FlowError(
                "the planner failed; what happened is in the coordinator's log", hint="tell its operator"
            )
        return answer

    async def _running(self) -> Process:
        if self._process is not None and self._process.returncode is not None:
            await self._end()
        if self._process is None:
            # -P: a file of the folder in which the coordinator was started must not pass for a module.
            words = ("-P", "-m", "flowengine.coordinator.planning.worker")
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *words, stdin=PIPE, stdout=PIPE
            )
        return self._process

    async def _exchange(self, process: Process, question: Question) -> Answer:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(frame(question))
        await process.stdin.drain()
        head = await process.stdout.readexactly(LENGTH_BYTES)
        answer: Answer = self._decoder.decode(await process.stdout.readexactly(int.from_bytes(head, "big")))
        return answer

    async def _end_when_idle(self) -> None:
        await asyncio.sleep(self._idle_s)
        async with self._turn:
            await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()  # it has nothing to lose
        await process.wait()
