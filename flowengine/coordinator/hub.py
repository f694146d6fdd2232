"""Who waits in this process for news from the database: agents' streams, users' streams, long polls."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from flowengine.coordinator.database.transactions import EventRow

__all__ = ["AgentWaiter", "Hub"]

KEPT: Final = 2000
"""Recent events kept in memory, so that streams need not read them again."""


class AgentWaiter:
    """One agent's stream: woken when something that concerns its site may have changed."""

    def __init__(self) -> None:
        self._woken = asyncio.Event()
        self._woken.set()
        self.work = False

    def wake(self, work: bool) -> None:
        """Wake it; `work`: there is something new to claim."""
        self.work = self.work or work
        self._woken.set()

    async def wait(self, timeout_s: float) -> bool:
        """Whether it was woken, at latest after so long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        except TimeoutError:
            return False
        self._woken.clear()
        return True


class Hub:
    """Wakes who waits. A wake is a hint: who is woken reads the database."""

    def __init__(self) -> None:
        self._agents: dict[str, set[AgentWaiter]] = {}
        self._news = asyncio.Event()
        self.recent: deque[EventRow] = deque(maxlen=KEPT)
        self.last_seq = 0
        self.behind = asyncio.Event()
        """Set when events of another coordinator must be read."""
        self.closing = False

    def start(self, last_seq: int) -> None:
        """Take what was there before as known."""
        self.last_seq = last_seq

    def committed(self, rows: list[EventRow], wake: set[str], landed: set[str]) -> None:
        """This process committed something."""
        if rows and rows[0].seq == self.last_seq + 1:
            self.take(rows)
        elif rows and rows[-1].seq > self.last_seq:
            self.behind.set()
        self._wake_for(rows)
        for site in wake:
            self.wake_agent(site)
        if landed:
            self._tell()

    def take(self, rows: list[EventRow]) -> None:
        """The next events, in order and without a gap."""
        self.recent.extend(rows)
        self.last_seq = rows[-1].seq
        self._tell()

    def heard(self, rows: list[EventRow]) -> None:
        """Events that another coordinator committed, read from the database."""
        fresh = [row for row in rows if row.seq > self.last_seq]
        if fresh:
            self.take(fresh)
            self._wake_for(fresh)

    def _wake_for(self, rows: Iterable[EventRow]) -> None:
        for row in rows:
            for site in row.wake:
                self.wake_agent(site, work=row.type == "transfer.requested")

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def wake_agent(self, site: str, *, work: bool = False) -> None:
        """Wake the streams of a site's agent."""
        for waiter in self._agents.get(site, ()):
            waiter.wake(work)

    def wake_all(self) -> None:
        """Wake everybody, as at the end."""
        for site in list(self._agents):
            self.wake_agent(site)
        self._tell()

    @contextlib.contextmanager
    def agent(self, site: str) -> Iterator[AgentWaiter]:
        """A waiter for a site's agent."""
        waiter = AgentWaiter()
        self._agents.setdefault(site, set()).add(waiter)
        try:
            yield waiter
        finally:
            self._agents[site].discard(waiter)
            if not self._agents[site]:
                del self._agents[site]

    def news(self) -> asyncio.Event:
        """An event that is set at the next news: take it before reading the database, wait for it after."""
        return self._news

    def since(self, seq: int) -> list[EventRow] | None:
        """Events after `seq` from memory; None where some of them are only in the database."""
        if seq >= self.last_seq:
            return []
        if not self.recent or self.recent[0].seq > seq + 1:
            return None
        return [row for row in self.recent if row.seq > seq]
