"""The overlay in numbers: every limit is a resource with an index, every route a list of resources.

Goal: the solver and the searches see arrays, never objects.

Plan: resources are laid out in blocks: links, what leaves each site, what enters it, what each endpoint
reads, what it writes, what each tenant moves. A link's traffic uses the link, its source's *out* and its
target's *in*, so a relay pays in both directions. Rates are gigabits a second inside the planner: it keeps the numbers near 1,
where the solver's tolerances mean something.

Invariants: an index never changes within one Network; capacities are never negative; a capacity that nothing
bounds is infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowengine.errors import UsageError
from flowengine.plan.demands import Allowed, Place
from flowengine.plan.topology import Cap, Maintenance, Overlay, cap_at, window_edges

__all__ = ["BoolArray", "FloatArray", "IntArray", "Network", "Resource", "sum_by"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
GIGABIT = 1e9
GIGABITS_PER_GB = 8.0


@dataclass(frozen=True, slots=True)
class Resource:
    """One limit, as explanations name it."""

    kind: str
    name: str

    def __str__(self) -> str:
        return {
            "link": f"link {self.name}",
            "out": f"what leaves site {self.name}",
            "in": f"what enters site {self.name}",
            "read": f"reading from {self.name}",
            "write": f"writing to {self.name}",
            "tenant": f"the cap of tenant {self.name}",
        }[self.kind]


class Network:
    """The compiled overlay.

    Args:
        overlay: What to compile.
        tenants: Names of all tenants that have demands, listed in the overlay or not.

    Raises:
        UsageError: A name is used twice, or a link or endpoint names a site that is not there.
    """

    def __init__(self, overlay: Overlay, tenants: tuple[str, ...] = ()) -> None:
        self.overlay = overlay
        self.sites = _index("site", [site.name for site in overlay.sites])
        self.links = _index("link", [link.label for link in overlay.links])
        self.endpoints = _index("endpoint", [f"{e.site}/{e.name}" for e in overlay.endpoints])
        known = {tenant.name: tenant for tenant in overlay.tenants}
        _index("tenant", [tenant.name for tenant in overlay.tenants])
        names = sorted(known.keys() | set(tenants))
        self.tenants = {name: i for i, name in enumerate(names)}
        self.tenant_weight = np.array([known[n].weight if n in known else 1.0 for n in names])
        self._tenant_caps = [known[n].caps if n in known else () for n in names]
        site_of = self._site_of
        self.link_source: IntArray = np.array(
            [site_of(x.source, x.label) for x in overlay.links], dtype=np.int64
        )
        self.link_target: IntArray = np.array(
            [site_of(x.target, x.label) for x in overlay.links], dtype=np.int64
        )
        for endpoint in overlay.endpoints:
            site_of(endpoint.site, endpoint.name)
        sites, links, endpoints = len(self.sites), len(self.links), len(self.endpoints)
        self.out_base, self.in_base = links, links + sites
        self.read_base = links + 2 * sites
        self.write_base = self.read_base + endpoints
        self.tenant_base = self.write_base + endpoints
        self.resource_count = self.tenant_base + len(names)
        self.link_resources: IntArray = np.stack(
            [np.arange(links), self.out_base + self.link_source, self.in_base + self.link_target], axis=1
        ).reshape(links, 3)
        self.price: FloatArray = np.array(
            [math.nan if x.usd_per_gb is None else x.usd_per_gb / GIGABITS_PER_GB for x in overlay.links]
        )
        dearest = float(np.nanmax(self.price)) if links and not np.isnan(self.price).all() else 0.0
        self.assumed_price: FloatArray = np.where(np.isnan(self.price), dearest, self.price)
        self.estimate: FloatArray = np.array(
            [max(x.estimate.rate_bits_per_s, 0.0) / GIGABIT for x in overlay.links]
        )
        self.spread: FloatArray = np.array([x.estimate.spread for x in overlay.links])
        self.resources = [
            Resource(kind, name)
            for kind, table in (
                ("link", self.links),
                ("out", self.sites),
                ("in", self.sites),
                ("read", self.endpoints),
                ("write", self.endpoints),
                ("tenant", self.tenants),
            )
            for name in table
        ]
        self.resource_numbers = {f"{r.kind} {r.name}": i for i, r in enumerate(self.resources)}
        self._capacities: dict[float, FloatArray] = {}
        self._masks: dict[Allowed, tuple[BoolArray, BoolArray]] = {}

    def _site_of(self, name: str, label: str) -> int:
        if name not in self.sites:
            raise UsageError(
                f"{label} names site {name!r}, which the overlay does not have",
                hint="add the site or mend the name",
            )
        return self.sites[name]

    def capacity_at(self, at_s: float) -> FloatArray:
        """Every resource's capacity at an instant, in Gbit/s; not to be written to."""
        found = self._capacities.get(at_s)
        if found is None:
            found = self._capacities[at_s] = self._compute_capacity(at_s)
            found.flags.writeable = False
        return found

    def _compute_capacity(self, at_s: float) -> FloatArray:
        overlay = self.overlay
        capacity = np.full(self.resource_count, math.inf)
        for i, link in enumerate(overlay.links):
            capacity[i] = self.estimate[i]
            if link.caps:
                capacity[i] = min(self.estimate[i], cap_at(link.caps, at_s) / GIGABIT)
            if link.maintenance and _in_maintenance(link.maintenance, at_s):
                capacity[i] = 0.0
        for i, site in enumerate(overlay.sites):
            if site.caps_out:
                capacity[self.out_base + i] = cap_at(site.caps_out, at_s) / GIGABIT
            if site.caps_in:
                capacity[self.in_base + i] = cap_at(site.caps_in, at_s) / GIGABIT
            if site.maintenance and _in_maintenance(site.maintenance, at_s):
                capacity[self.out_base + i] = capacity[self.in_base + i] = 0.0
        for i, endpoint in enumerate(overlay.endpoints):
            capacity[self.read_base + i] = cap_at(endpoint.caps_read, at_s) / GIGABIT
            capacity[self.write_base + i] = cap_at(endpoint.caps_write, at_s) / GIGABIT
        for i, caps in enumerate(self._tenant_caps):
            capacity[self.tenant_base + i] = cap_at(caps, at_s) / GIGABIT
        return capacity

    def draining_at(self, at_s: float) -> BoolArray:
        """Links that no new route may take: they, or a site at their ends, are about to leave service."""
        site_drains = np.array([_drains(site.maintenance, at_s) for site in self.overlay.sites], dtype=bool)
        link_drains = np.array([_drains(link.maintenance, at_s) for link in self.overlay.links], dtype=bool)
        if not len(link_drains):
            return link_drains
        drains: BoolArray = link_drains | site_drains[self.link_source] | site_drains[self.link_target]
        return drains

    def planned_capacity_at(self, at_s: float) -> FloatArray:
        """What may be counted on at a later instant: like `capacity_at`, but nothing of what drains then."""
        capacity = self.capacity_at(at_s)
        drains = self.draining_at(at_s)
        if drains.any():
            capacity = capacity.copy()
            capacity[: len(drains)][drains] = 0.0
        return capacity

    def edges(self, start_s: float, end_s: float) -> list[float]:
        """Every instant in (start, end) at which some capacity may change, ascending."""
        overlay = self.overlay
        caps: set[Cap] = set()
        downs: set[Maintenance] = set()
        for site in overlay.sites:
            caps.update(site.caps_in, site.caps_out)
            downs.update(site.maintenance)
        for link in overlay.links:
            caps.update(link.caps)
            downs.update(link.maintenance)
        for endpoint in overlay.endpoints:
            caps.update(endpoint.caps_read, endpoint.caps_write)
        for tenant_caps in self._tenant_caps:
            caps.update(tenant_caps)
        instants = {
            t for m in downs for t in (m.start_s - m.drain_s, m.start_s, m.end_s) if start_s < t < end_s
        }
        for window in {cap.window for cap in caps if cap.window is not None}:
            instants.update(window_edges(window, start_s, end_s))
        return sorted(instants)

    def masks(self, allowed: Allowed) -> tuple[BoolArray, BoolArray]:
        """Which links an allowed set leaves, and which sites it lets relay."""
        found = self._masks.get(allowed)
        if found is None:
            links = np.ones(len(self.links), dtype=bool)
            if allowed.links is not None:
                links = np.array([name in allowed.links for name in self.links], dtype=bool)
            relays = np.ones(len(self.sites), dtype=bool)
            if allowed.relays is not None:
                relays = np.array([name in allowed.relays for name in self.sites], dtype=bool)
            found = self._masks[allowed] = (links, relays)
        return found

    def place_resources(self, place: Place, base: int) -> list[int]:
        """The endpoint's resource, when the place names an endpoint that the overlay knows."""
        if not place.endpoint:
            return []
        index = self.endpoints.get(f"{place.site}/{place.endpoint}")
        return [] if index is None else [base + index]


def sum_by(index: IntArray, values: FloatArray, count: int) -> FloatArray:
    """Sums of values with equal index, `count` of them."""
    return np.bincount(index, weights=values, minlength=count).astype(np.float64, copy=False)


def _index(kind: str, names: list[str]) -> dict[str, int]:
    table = {name: i for i, name in enumerate(names)}
    if len(table) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(f"the overlay has more than one {kind} {twice[0]!r}", hint="give each its own name")
    return table


def _in_maintenance(times: tuple[Maintenance, ...], at_s: float) -> bool:
    return any(m.start_s <= at_s < m.end_s for m in times)


def _drains(times: tuple[Maintenance, ...], at_s: float) -> bool:
    return any(m.start_s - m.drain_s <= at_s < m.end_s for m in times)
