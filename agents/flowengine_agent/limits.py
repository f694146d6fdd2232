"""Bandwidth limits as the coordinator sets them, kept up with the time of day."""

from __future__ import annotations

from collections.abc import Sequence

from flowengine.api.resources import Limit

__all__ = ["LimitBook"]


class LimitBook:
    """All limits that concern this site.

    Args:
        own_bits_per_s: what site.toml lets leave the site; None: no limit of its own.
    """

    def __init__(self, site: str, own_bits_per_s: int | None) -> None:
        self._site = site
        self._own = own_bits_per_s
        self._limits: list[Limit] = []

    def set(self, limits: Sequence[Limit]) -> None:
        """Replace what the coordinator said before."""
        self._limits = list(limits)

    def rates(self) -> dict[str, int | None]:
        """Bits a second by scope ("site:A", "link:A>B", "tenant:T", "transfer:ID") as they are now."""
        rates = {limit.scope: limit.now_bits_per_s for limit in self._limits}
        if self._own is not None:
            scope = f"site:{self._site}"
            told = rates.get(scope)
            rates[scope] = self._own if told is None else min(told, self._own)
        return rates
