"""All handlers by the name of their route."""

from __future__ import annotations

from flowengine.coordinator.routes import ROUTES
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.agents import Agents
from flowengine.coordinator.web.approvals import Approvals
from flowengine.coordinator.web.catalogue import Catalogue
from flowengine.coordinator.web.evidence import Evidence
from flowengine.coordinator.web.links import Links
from flowengine.coordinator.web.policies import PolicyFiles
from flowengine.coordinator.web.server import Handler
from flowengine.coordinator.web.streams import Streams
from flowengine.coordinator.web.transfers import People, Transfers

__all__ = ["handlers_of"]


def handlers_of(service: Service) -> dict[str, Handler]:
    """The handler of each route; a route without one is a bug."""
    parts = (
        Catalogue(service),
        Links(service),
        Transfers(service),
        People(service),
        PolicyFiles(service),
        Approvals(service),
        Agents(service),
        Streams(service),
        Evidence(service),
    )
    found: dict[str, Handler] = {}
    for route in ROUTES:
        owners = [part for part in parts if hasattr(part, route.name)]
        assert len(owners) == 1, f"{route.name} has {len(owners)} handlers"
        found[route.name] = getattr(owners[0], route.name)
    return found
