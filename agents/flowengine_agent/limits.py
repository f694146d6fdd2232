"""Bandwidth limits as the coordinator and site.toml set them, held by what this site sends and kept up with the clock.

Each limit is one bucket that all transfers below its name share (`transfer.pacing`). A link's and a site's limit are
held exactly, because all of it leaves from here; a tenant's is held by each site that sends for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from flowengine.api.resources import Limit
from flowengine.coordinator.rules.windows import rate_now
from flowengine.errors import UsageError
from flowengine.transfer.pacing import Limits, Pacer

__all__ = ["LimitBook"]

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
        self._limits = Limits()

    def set(self, limits: Sequence[Limit], now: datetime) -> None:
        """Replace what the coordinator said before; holds at once, for transfers that run as well."""
        self._told = list(limits)
        self.follow(now)

    def rates(self, now: datetime) -> dict[str, float]:
        """Bits a second by scope ("site:A", "link:A>B", "tenant:T", "transfer:ID") at a moment; without limit, none."""
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
        self._held = rates

    def owe(self, transfer: str, bits_per_s: int | None) -> None:
        """Hold what leaves from here for a transfer to the rate that its policies permit; None: none said."""
        self._limits.set_rate(
            f"duty:{transfer}", None if bits_per_s is None else max(bits_per_s, _STOPPED_BITS_PER_S)
        )

    def pacer(self, source: str, target: str, transfer: str, tenant: str) -> Pacer:
        """What a session that sends from here asks before each portion."""
        names = [f"site:{source}", f"link:{source}>{target}", f"transfer:{transfer}", f"duty:{transfer}"]
        return self._limits.pacer(*names, *([f"tenant:{tenant}"] if tenant else []))
