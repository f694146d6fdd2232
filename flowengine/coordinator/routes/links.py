"""Links between sites: what they carry, limits of bandwidth, times of maintenance."""

from __future__ import annotations

from typing import Final

from flowengine.api.links import (
    Limit,
    LimitRequest,
    Link,
    LinkLook,
    LinkRequest,
    Maintenance,
    MaintenanceRequest,
    ProbeRequest,
)
from flowengine.api.schema import Page
from flowengine.coordinator.routes.queries import PageQuery
from flowengine.coordinator.routes.route import OPERATOR, READING, Route

__all__ = ["ROUTES"]

ROUTES: Final = (
    Route(
        "GET",
        "/v1/links",
        "list_links",
        "All links",
        READING,
        response=Page,
        items=Link,
        query=PageQuery,
    ),
    Route(
        "GET",
        "/v1/links/{source}/{target}",
        "get_link",
        "What is known of a link",
        READING,
        response=Link,
    ),
    Route(
        "GET",
        "/v1/links/{source}/{target}/looks",
        "list_link_looks",
        "What was measured of a link, the newest first",
        READING,
        response=Page,
        items=LinkLook,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/links/{source}/{target}/probe",
        "probe_link",
        "Measure a link now, by a burst",
        OPERATOR,
        ProbeRequest,
        Link,
        also=("no-route", "busy", "agent-offline", "stalled", "peer"),
    ),
    Route(
        "PUT",
        "/v1/links/{source}/{target}",
        "put_link",
        "Declare a link",
        OPERATOR,
        LinkRequest,
        Link,
    ),
    Route(
        "DELETE",
        "/v1/links/{source}/{target}",
        "remove_link",
        "Forget what was declared and measured",
        OPERATOR,
        status=204,
    ),
    Route(
        "GET",
        "/v1/maintenance",
        "list_maintenance",
        "When sites and links are not to be used",
        READING,
        response=Page,
        items=Maintenance,
        query=PageQuery,
    ),
    Route(
        "POST",
        "/v1/maintenance",
        "create_maintenance",
        "Keep transfers off a site or link for a time",
        OPERATOR,
        MaintenanceRequest,
        Maintenance,
        status=201,
        also=("not-found",),
        creates=True,
    ),
    Route(
        "DELETE",
        "/v1/maintenance/{maintenance}",
        "remove_maintenance",
        "Let a site or link be used again",
        OPERATOR,
        status=204,
    ),
    Route(
        "GET",
        "/v1/limits",
        "list_limits",
        "All bandwidth limits",
        READING,
        response=Page,
        items=Limit,
        query=PageQuery,
    ),
    Route(
        "PUT",
        "/v1/limits/{scope}",
        "put_limit",
        "Set a bandwidth limit; it acts at once",
        OPERATOR,
        LimitRequest,
        Limit,
    ),
    Route("DELETE", "/v1/limits/{scope}", "remove_limit", "Lift a limit", OPERATOR, status=204),
)
