"""Routes and bandwidth: overlay and demands in, a plan with its reasons out; pure functions only."""

from __future__ import annotations

from flowengine.plan.demands import ANYWHERE, Allowed, Demand, Place, Priority
from flowengine.plan.explain import describe
from flowengine.plan.model import Allocation, DemandPlan, Eta, Limits, Obstacle, Plan, Route
from flowengine.plan.planner import DEFAULT_EFFORT, admit, plan
from flowengine.plan.topology import (
    Cap,
    Endpoint,
    Estimate,
    Link,
    Maintenance,
    Overlay,
    Site,
    Tenant,
    Window,
)

__all__ = [
    "ANYWHERE",
    "DEFAULT_EFFORT",
    "Allocation",
    "Allowed",
    "Cap",
    "Demand",
    "DemandPlan",
    "Endpoint",
    "Estimate",
    "Eta",
    "Limits",
    "Link",
    "Maintenance",
    "Obstacle",
    "Overlay",
    "Place",
    "Plan",
    "Priority",
    "Route",
    "Site",
    "Tenant",
    "Window",
    "admit",
    "describe",
    "plan",
]
