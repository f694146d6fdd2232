"""What is put on the record when something that runs is decided anew and may not go on: the decision, and the stop."""

from __future__ import annotations

import os

from flowengine.errors import FlowError
from flowengine.evidence.bodies import recheck_body, stop_body
from flowengine.evidence.decisions import Asked, decision_body
from flowengine_agent.gate import Gate
from flowengine_agent.recording import Entry
from flowengine_agent.running import Watch

__all__ = ["record_stop"]

_POINTS = {"source": "release", "relay": "relay", "target": "land"}


async def record_stop(gate: Gate, watch: Watch, cause: str) -> None:
    """Record the decision that denied, that it was a re-check, and the stop.

    Args:
        cause: what changed: "bundle", "label", "fact", "approval" or "time".

    Raises:
        Denied: it cannot be recorded.
    """
    error: FlowError | None = watch.error
    assert error is not None
    decision_id = ""
    entries: list[Entry] = []
    found = gate.policies.in_force
    if watch.denied is not None and found is not None:
        decision_id = os.urandom(8).hex()
        await gate.activated(found)
        asked = Asked(
            point=_POINTS[watch.end], phase="running", site=watch.denied.place.name, data=watch.data,
            bundle=found.bundle.digest, transfer=watch.transfer, task=watch.task,
        )  # fmt: skip
        body = decision_body(
            found.engine, watch.denied.decision, asked, decision_id=decision_id, resolved=watch.denied.known
        )
        recheck = recheck_body(
            cause, "deny", transfer=watch.transfer, task=watch.task, decision_id=decision_id
        )
        entries += [("decision", body), ("recheck", recheck)]
    stop = stop_body(
        watch.mode or "stop-now", cause, transfer=watch.transfer, task=watch.task, decision_id=decision_id
    )
    proof = {"mode": watch.mode or "stop-now", "reason": error.reason}
    done = "window" if error.reason == "policy-window" else "stop"
    await gate.recorder.keep(
        *entries,
        *(one.entry("fulfilled", proof) for one in watch.owed if one.duty.type == done),
        ("stop", stop | {"end": watch.end, "reason": error.reason, "why": error.message}),
    )
