"""Routes and bandwidth: overlay and demands in, a plan with its reasons out; pure functions only.

The planner itself is loaded when it is first named: who only reads plans does not pay for numpy and HiGHS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowengine.plan.demands import ANYWHERE, Allowed, Demand, Place, Priority
from flowengine.plan.explain import describe
from flowengine.plan.model import Allocation, DemandPlan, Eta, Limits, Obstacle, Plan, Route
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
from flowengine.plan.trees import Feed, feeds_of

if TYPE_CHECKING:
    from flowengine.plan.planner import DEFAULT_EFFORT, admit, plan

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
    "Feed",
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
    "feeds_of",
    "plan",
]

_LAZY = ("DEFAULT_EFFORT", "admit", "plan")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'flowengine.plan' has no attribute {name!r}")
    from flowengine.plan import planner

    return getattr(planner, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
