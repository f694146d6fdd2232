"""What agents ask: they are known by their TLS certificates."""

from __future__ import annotations

from typing import Final

from flowengine.api.agents import (
    AgentLabels,
    Answer,
    Checkpointed,
    Claim,
    Claimed,
    Disposed,
    Enrolled,
    Heartbeat,
    HeartbeatReply,
    Join,
    Renewal,
    Report,
    ReportReply,
    Taken,
)
from flowengine.api.policies import PolicyBundleContent
from flowengine.coordinator.routes.queries import AgentLabelsQuery, AgentPartQuery
from flowengine.coordinator.routes.route import Route

__all__ = ["ROUTES"]

ROUTES: Final = (
    Route(
        "POST",
        "/v1/agent/join",
        "join",
        "Enrol with a join token",
        "any",
        Join,
        Enrolled,
        also=("authentication", "incompatible"),
    ),
    Route(
        "POST",
        "/v1/agent/renew",
        "renew",
        "A new certificate for the same key",
        "agent",
        Renewal,
        Enrolled,
        also=("incompatible",),
    ),
    Route(
        "GET",
        "/v1/agent/events",
        "agent_events",
        "Commands, as an event stream",
        "agent",
        response=dict,
        media="text/event-stream",
        streams=True,
    ),
    Route(
        "POST",
        "/v1/agent/heartbeat",
        "heartbeat",
        "An agent's state",
        "agent",
        Heartbeat,
        HeartbeatReply,
        also=("incompatible",),
    ),
    Route(
        "GET",
        "/v1/agent/policy",
        "agent_policy",
        "A part of the policy bundle in force, or of an older one",
        "agent",
        response=PolicyBundleContent,
        query=AgentPartQuery,
        also=("not-found",),
    ),
    Route(
        "GET",
        "/v1/agent/labels",
        "agent_labels",
        "Label statements",
        "agent",
        response=AgentLabels,
        query=AgentLabelsQuery,
    ),
    Route(
        "POST",
        "/v1/agent/claim",
        "claim",
        "Ask for work",
        "agent",
        Claim,
        Claimed,
        also=("incompatible",),
    ),
    Route(
        "POST",
        "/v1/agent/tasks/{task}/reports",
        "report",
        "How a task stands",
        "agent",
        Report,
        ReportReply,
        also=("fence-superseded", "incompatible"),
    ),
    Route(
        "POST",
        "/v1/agent/checkpoints",
        "checkpoint",
        "A checkpoint of the site's chain of evidence",
        "agent",
        Checkpointed,
        Taken,
        also=("evidence", "incompatible"),
    ),
    Route(
        "POST",
        "/v1/agent/disposals",
        "dispose",
        "What became of data that may not stay",
        "agent",
        Disposed,
        Taken,
        also=("not-found", "incompatible"),
    ),
    Route(
        "POST",
        "/v1/agent/answers/{answer}",
        "answer",
        "Answer to a look command",
        "agent",
        Answer,
        status=204,
        also=("incompatible",),
    ),
)
