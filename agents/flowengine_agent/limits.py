"""Bandwidth limits as the coordinator and site.toml set them, held by what this site sends and kept up with the clock.

Each limit is one bucket that all transfers below its name share (`transfer.pacing`). A link's and a site's limit are
held exactly, because all of it leaves from here; a tenant's is held by each site that sends for it. What is read from
and written to a root is held where it is read and written, over all transfers.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Final

from flowengine.api.agents import Lease
from flowengine.api.links import Limit
from flowengine.coordinator.rules.windows import rate_now
from flowengine.errors import UsageError
from flowengine.transfer.pacing import Limits, Pacer
from flowengine.transfer.session import Session

__all__ = ["LimitBook"]

_RELAY: Final = "relay"
_MAX_NUMBERS: Final = 10_000
"""Numbers of leases that are remembered, the latest."""
_STOPPED_BITS_PER_S: Final = 1.0
"""What a limit of 0 comes to: nothing goes out until it is changed."""


class LimitBook:
    """All limits that concern this site.

    Args:
        own_bits_per_s: what site.toml lets leave the site; None: no limit of its own.
    """

    def __init__(self, site: str, own_bits_per_s: int | None) -> None:
        self._site = site
        self._own = own_bits_per_s
        self._told: list[Limit] = []
        self._held: dict[str, float] = {}
        self._owed: dict[str, list[int]] = {}
        self._limits = Limits()
        self._landing: list[tuple[Session, str]] = []
        self._leases: dict[tuple[str, str], Lease] = {}
        self._numbers: dict[tuple[str, str], tuple[int, float]] = {}

    def set(self, limits: Sequence[Limit], now: datetime) -> None:
        """Replace what the coordinator said before; holds at once, for transfers that run as well."""
        self._told = list(limits)
        self.follow(now)

    def rates(self, now: datetime) -> dict[str, float]:
        """Bits a second by scope ("site:A", "link:A>B", "tenant:T", "read:A:/R", …) at a moment; without limit, none."""
        rates: dict[str, float] = {}
        for limit in self._told:
            try:
                rate = rate_now(limit.rate_bits_per_s, limit.windows, now.timestamp())
            except UsageError:  # a time zone that this host has no table of
                rate = limit.now_bits_per_s
            if rate is not None:
                rates[limit.scope] = max(rate, _STOPPED_BITS_PER_S)
        if self._own is not None:
            scope = f"site:{self._site}"
            rates[scope] = min(self._own, rates.get(scope, self._own))
        return rates

    def follow(self, now: datetime) -> None:
        """Hold to the rates of this moment; to be called again and again, for windows begin and end."""
        rates = self.rates(now)
        for scope in self._held.keys() - rates.keys():
            self._limits.set_rate(scope, None)
        for scope, rate in rates.items():
            if self._held.get(scope) != rate:
                self._limits.set_rate(scope, rate)
        for session, scope in self._landing:
            if self._held.get(scope) != rates.get(scope):
                session.limit(rates.get(scope))
        self._held = rates

    def owe(self, transfer: str, bits_per_s: int | None) -> None:
        """Hold what leaves from here for a transfer to the rate that its policies permit; None: none said.

        Each session of the transfer owes, and the least of them holds until `settle`.
        """
        if bits_per_s is not None:
            self._owed.setdefault(transfer, []).append(bits_per_s)
            self._limits.set_rate(f"duty:{transfer}", max(self.owed(transfer) or 0, _STOPPED_BITS_PER_S))

    def settle(self, transfer: str, bits_per_s: int | None) -> None:
        """A session that owed a rate has ended."""
        if bits_per_s is None:
            return
        self._owed[transfer].remove(bits_per_s)
        left = self.owed(transfer)
        if left is None:
            del self._owed[transfer]
        self._limits.set_rate(f"duty:{transfer}", None if left is None else max(left, _STOPPED_BITS_PER_S))

    def owed(self, transfer: str) -> int | None:
        """The rate that policies hold a transfer to now; None for none."""
        return min(self._owed.get(transfer, ()), default=None)

    def lease(self, leases: Sequence[Lease], now: datetime) -> None:
        """Hold what goes for a task over a link to the plan's rate; replaces what was said before, but for older numbers.

        A lease that ends is held to all the same: no news gives nobody more. What is not named is free of leases.
        """
        named = {(lease.task, lease.next): lease for lease in leases}
        for key in self._leases.keys() - named.keys():
            self._limits.set_rate(_lease_name(*key), None)
            del self._leases[key]
        for key, lease in named.items():
            seen, _ = self._numbers.get(key, (-1, 0.0))
            if lease.number < seen:
                continue
            self._numbers[key] = lease.number, now.timestamp()
            self._leases[key] = lease
            self._limits.set_rate(_lease_name(*key), max(lease.rate_bits_per_s, _STOPPED_BITS_PER_S))
        if len(self._numbers) > _MAX_NUMBERS:
            newest = sorted(self._numbers.items(), key=lambda item: item[1][1])[-_MAX_NUMBERS // 2 :]
            self._numbers = dict(newest)

    def relay_most(self, bits_per_s: int | None) -> None:
        """Let so much pass through this site for others; None: as much as goes."""
        self._limits.set_rate(_RELAY, bits_per_s)

    def pacer(self, transfer: str, tenant: str) -> Pacer:
        """What a session that sends from here asks before each portion, whichever link it goes over."""
        names = [f"site:{self._site}", f"transfer:{transfer}", f"duty:{transfer}"]
        return self._limits.pacer(*names, *([f"tenant:{tenant}"] if tenant else []))

    def reader(self, root: str) -> Pacer:
        """What reading from a root of this site asks before each piece."""
        return self._limits.pacer(f"read:{self._site}:{root}")

    @contextlib.asynccontextmanager
    async def landing(self, session: Session, root: str) -> AsyncIterator[None]:
        """Hold what a session writes to a root of this site to its limit.

        The sender is told of it as well: where this side alone held it, connections would look dead at low rates.
        """
        scope = f"write:{self._site}:{root}"
        session.writes = self._limits.pacer(scope)
        lands = (session, scope)
        self._landing.append(lands)
        try:
            if scope in self._held:
                session.limit(self._held[scope])
            yield
        finally:
            self._landing = [one for one in self._landing if one is not lands]

    def over_link(self, pacer: Pacer, task: str, near: str) -> Pacer:
        """The same for what goes over the link to one site, by that link's limit and the task's lease on it."""
        return pacer.over(f"link:{self._site}>{near}", _lease_name(task, near))

    def relay_pacer(self, task: str, near: str, transfer: str, tenant: str) -> Pacer:
        """What a stream that passes through this site asks before each portion."""
        names = [f"site:{self._site}", f"link:{self._site}>{near}", _RELAY, f"transfer:{transfer}"]
        names += [_lease_name(task, near), *([f"tenant:{tenant}"] if tenant else [])]
        return self._limits.pacer(*names)


def _lease_name(task: str, near: str) -> str:
    return f"lease:{task}>{near}"
