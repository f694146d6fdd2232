"""The coordinator itself: its state, its certificate authority, this interface, and who asks."""

from __future__ import annotations

from typing import Final

from flowengine.api.events import Health
from flowengine.api.people import User
from flowengine.coordinator.routes.route import READING, Route

__all__ = ["ROUTES"]

ROUTES: Final = (
    Route("GET", "/v1/health", "health", "The coordinator's state", "any", response=Health),
    Route(
        "GET",
        "/v1/ca",
        "ca",
        "The federation's CA certificate, PEM",
        "any",
        response=str,
        media="application/x-pem-file",
    ),
    Route("GET", "/v1/openapi.json", "openapi", "This interface as OpenAPI 3.1", "any", response=dict),
    Route("GET", "/v1/me", "me", "Who the token stands for", READING, response=User),
)
