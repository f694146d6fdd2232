"""The HTTP interface as a table: each route's method, path, types, who may use it, and how it can be answered.

The server dispatches by this table, the OpenAPI document and docs/reference/http-api.md are made from it; so what is
documented is what is served. `route` says what a route is, `queries` what may stand in an address, and each other module
lists the routes of one kind of resource. No I/O here.
"""

from __future__ import annotations

from typing import Final

from flowengine.coordinator.routes import agents, evidence, general, links, people, policies, sites, transfers
from flowengine.coordinator.routes.route import Route

__all__ = ["ROUTES"]

ROUTES: Final[tuple[Route, ...]] = (
    *general.ROUTES,
    *evidence.ROUTES,
    *sites.ROUTES,
    *links.ROUTES,
    *transfers.ROUTES,
    *policies.ROUTES,
    *people.ROUTES,
    *agents.ROUTES,
)
