"""The relays at which this site waits, as the coordinator says: for ends that cannot be dialled any more than it can.

For each meeting one connection waits; when the other end has come, the next one waits beside it, for the session after
that one. What stands goes on to its end when the meeting is over; what waits is called back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from flowengine.api.agents import Meeting
from flowengine.errors import FlowError
from flowengine_agent.logs import Log
from flowengine_agent.site import decode_grant

__all__ = ["Meetings"]

MAX_MEETINGS: Final = 256
AGAIN_S: Final = 1.0
"""How long after a failure the relay is dialled again."""

Meet = Callable[[bytes, Callable[[], None]], Awaitable[None]]


@dataclass(eq=False)
class _Kept:
    """One meeting; a newer grant is used from the next connection on.

    Attributes:
        waiting: of the connection whose other end has not come yet.
        failed: why the last one could not be made.
    """

    meeting: Meeting
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    waiting: trio.CancelScope | None = None
    failed: str = ""

    def end(self) -> None:
        self.scope.cancel()
        if self.waiting is not None:
            self.waiting.cancel()


class Meetings:
    """Keeps them.

    Args:
        meet: waits once, under a relay grant, and serves who comes; calls what it is given when somebody has come.
    """

    def __init__(self, nursery: trio.Nursery, meet: Meet, log: Log) -> None:
        self._nursery = nursery
        self._meet = meet
        self._log = log
        self._kept: dict[tuple[str, int, str], _Kept] = {}

    def set(self, meetings: Sequence[Meeting]) -> None:
        """Wait for these from now on, and for no others."""
        named = {(one.task, one.fence, one.relay): one for one in meetings[:MAX_MEETINGS]}
        for key in self._kept.keys() - named.keys():
            self._kept.pop(key).end()
        for key, meeting in named.items():
            if key in self._kept:
                self._kept[key].meeting = meeting
                continue
            self._log.info("waits at a relay", task=meeting.task, relay=meeting.relay)
            kept = self._kept[key] = _Kept(meeting)
            self._nursery.start_soon(self._keep, kept)

    async def _keep(self, kept: _Kept) -> None:
        with kept.scope:
            while True:
                next_one = trio.Event()
                self._nursery.start_soon(self._one, kept, next_one)
                await next_one.wait()

    async def _one(self, kept: _Kept, next_one: trio.Event) -> None:
        with trio.CancelScope() as scope:
            kept.waiting = scope

            def taken() -> None:
                kept.waiting, kept.failed = None, ""
                next_one.set()

            try:
                await self._meet(decode_grant(kept.meeting.grant), taken)
            except FlowError as error:
                if error.message != kept.failed:
                    kept.failed = error.message
                    self._log.warning(
                        "meeting", task=kept.meeting.task, relay=kept.meeting.relay, why=error.message
                    )
                await trio.sleep(AGAIN_S)
            except Exception as bug:  # whatever is wrong with one must not end the others
                self._log.error("internal error, please report it", exc_info=bug)
                await trio.sleep(AGAIN_S)
        next_one.set()
