"""What a running task's reports say, taken from the engine's counters while it works."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import msgspec

from flowengine.api.agents import HopTraffic
from flowengine.api.transfers import Counters
from flowengine.errors import Denied
from flowengine.transfer.session import Counters as EngineCounters
from flowengine.transfer.session import Session
from flowengine.transfer.timing import bottleneck_line
from flowengine_agent.reporting import Standing

__all__ = ["Meter"]

_NAMES: Final = tuple(field.name for field in msgspec.structs.fields(Counters))


class Meter:
    """Keeps a task's `Standing` as the engine goes on.

    Args:
        byte_limit: most bytes that the grant lets cross.
        check: called with the counters twice a second; may raise to end the task.
        site: this one's name, for what is told of its links.
    """

    def __init__(
        self,
        standing: Standing,
        *,
        byte_limit: int | None,
        check: Callable[[EngineCounters], None] = lambda counters: None,
        site: str = "",
    ) -> None:
        self._site = site
        self._hops: dict[str, int] = {}
        self._hops_before: dict[str, int] = {}
        self._standing = standing
        self._byte_limit = byte_limit
        self._check = check
        self._earlier_sent = 0
        self._session: Session | None = None
        self._at = time.monotonic()
        self._sent = 0
        self._busy: dict[str, int] = {}

    def begin(self, session: Session) -> None:
        """Another pass begins."""
        for near, size in self._hops.items():  # what earlier passes brought stays counted
            self._hops_before[near] = self._hops_before.get(near, 0) + size
        self._hops = {}
        self._session = session
        self._earlier_sent = self._standing.counters.bytes_sent
        self._at, self._sent, self._busy = time.monotonic(), 0, {}

    def observe(self, counters: EngineCounters) -> None:
        """Take what the engine counted.

        Raises:
            Denied: more crossed than the grant permits (reason "grant-used-up").
        """
        self._standing.counters = self.totals(counters)
        now = time.monotonic()
        elapsed = now - self._at
        if elapsed > 0.2:
            self._standing.rate_bits_per_s = 8 * max(0, counters.bytes_sent - self._sent) / elapsed
            self._standing.stages = self._shares(elapsed)
            self._standing.hops = self._links(elapsed)
            self._at, self._sent = now, counters.bytes_sent
        limit = self._byte_limit
        if limit is not None and self._standing.counters.bytes_sent > limit:
            raise Denied(
                f"more crossed than the grant's {limit} bytes",
                hint="ask for a new transfer",
                reason="grant-used-up",
            )
        self._check(counters)

    def _links(self, elapsed_s: float) -> list[HopTraffic]:
        """What went over each link of this site's, and how fast since it was asked last."""
        session = self._session
        if session is None or not self._site:
            return []
        now = session.carried()
        told = []
        for near in sorted(now.keys() | self._hops_before.keys()):
            if not near:
                continue
            size, before = now.get(near, 0), self._hops.get(near, 0)
            sender, receiver = (self._site, near) if session.sends else (near, self._site)
            told.append(
                HopTraffic(
                    sender=sender,
                    receiver=receiver,
                    size_bytes=size + self._hops_before.get(near, 0),
                    rate_bits_per_s=8 * max(0, size - before) / elapsed_s,
                    streams=len(session.streams.over(near)),
                )
            )
        self._hops = now
        return told

    def totals(self, counters: EngineCounters) -> Counters:
        """The counters for a report; what crossed counts over all passes."""
        values = {name: getattr(counters, name) for name in _NAMES}
        values["bytes_sent"] += self._earlier_sent
        return Counters(**values)

    def finish(self, counters: EngineCounters, bottleneck: str) -> None:
        """The last pass ended by itself."""
        self._standing.counters = self.totals(counters)
        self._standing.bottleneck = bottleneck

    def _shares(self, elapsed_s: float) -> dict[str, float]:
        session = self._session
        if session is None:
            return {}
        busy = dict(session.clock.busy_ms())
        threads = dict(session.clock.threads())
        own = set(busy)
        for name, value in session.peer_counters().items():
            if name.startswith("busy."):
                busy[name[5:]] = value
            elif name.startswith("threads."):
                threads[name[8:]] = value
        before, self._busy = self._busy, busy
        if before:
            recent = {name: max(0, value - before.get(name, 0)) for name, value in busy.items()}
            theirs = {name: value for name, value in recent.items() if name not in own}
            ours = {name: value for name, value in recent.items() if name in own}
            self._standing.bottleneck = bottleneck_line(theirs, ours, elapsed_s, threads)
        return {
            name: round(
                min(1.0, (value - before.get(name, 0)) / 1000 / elapsed_s / max(1, threads.get(name, 1))), 3
            )
            for name, value in busy.items()
        }
