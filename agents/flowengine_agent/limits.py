"""Bandwidth limits as the coordinator and site.toml set them, kept up with the clock."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from flowengine.api.resources import Limit
from flowengine.coordinator.rules.windows import rate_now
from flowengine.errors import UsageError

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
        self._held = rates
