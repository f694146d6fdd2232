"""Transfers and plans: ask, watch, steer; what landed, and what happens."""

from __future__ import annotations

from typing import Final

from flowengine.api.events import Event
from flowengine.api.plans import Plan, PlanRequest
from flowengine.api.schema import Page
from flowengine.api.transfers import DeliveryReceipt, LandedObject, Transfer, TransferRequest, Why
from flowengine.coordinator.routes.queries import (
    EventsQuery,
    LandedQuery,
    PageQuery,
    TransferQuery,
    TransfersQuery,
)
from flowengine.coordinator.routes.route import ASKING, READING, Route

__all__ = ["ROUTES"]

ROUTES: Final = (
    Route(
        "GET",
        "/v1/transfers",
        "list_transfers",
        "Transfers, newest first",
        READING,
        response=Page,
        items=Transfer,
        query=TransfersQuery,
    ),
    Route(
        "POST",
        "/v1/transfers",
        "create_transfer",
        "Ask for a transfer",
        ASKING,
        TransferRequest,
        Transfer,
        status=201,
        also=("not-found", "conflict", "no-route", "quota", "deadline", "busy", "policy-approval"),
        creates=True,
    ),
    Route(
        "GET",
        "/v1/transfers/{transfer}",
        "get_transfer",
        "One transfer and its tasks",
        READING,
        response=Transfer,
        query=TransferQuery,
    ),
    *(
        Route(
            "POST",
            f"/v1/transfers/{{transfer}}/{verb}",
            f"{verb}_transfer",
            text,
            ASKING,
            response=Transfer,
            also=("conflict",),
        )
        for verb, text in (
            ("pause", "Stop moving, keep what landed"),
            ("resume", "Go on"),
            ("cancel", "End it; what landed stays"),
            ("retry", "Run again what failed or was cancelled"),
        )
    ),
    Route(
        "GET",
        "/v1/transfers/{transfer}/why",
        "why_transfer",
        "What it waits for, or what makes it no faster",
        READING,
        response=Why,
    ),
    Route(
        "GET",
        "/v1/transfers/{transfer}/landed",
        "list_landed",
        "Objects as they become durable at the targets",
        READING,
        response=Page,
        items=LandedObject,
        query=LandedQuery,
    ),
    Route(
        "GET",
        "/v1/transfers/{transfer}/receipts",
        "list_receipts",
        "What the targets signed for",
        READING,
        response=Page,
        items=DeliveryReceipt,
        query=PageQuery,
        also=("not-found",),
    ),
    Route(
        "POST",
        "/v1/plans",
        "create_plan",
        "Verdict, ways, time and money; nothing moves",
        ASKING,
        PlanRequest,
        Plan,
        also=("not-found",),
    ),
    Route("GET", "/v1/plans/{plan}", "get_plan", "A stored plan", READING, response=Plan),
    Route(
        "GET",
        "/v1/events",
        "list_events",
        "What happened, as pages or as an event stream",
        READING,
        response=Page,
        items=Event,
        query=EventsQuery,
        streams=True,
    ),
)
