"""Probes of links: who may send a burst to whom, and what is made of the answer; and which link is to be probed next."""

from __future__ import annotations

from typing import Final

from sqlalchemy import select

from flowengine.api.agents import Answer
from flowengine.api.links import ProbeRequest
from flowengine.coordinator.actions.grants import Terms
from flowengine.coordinator.database.tables import AnyRow, counters, link_states
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.planning import stored
from flowengine.coordinator.planning.picture import Picture, link_state
from flowengine.plan.links import PRIOR, observe
from flowengine.trust.fences import next_fence
from flowengine.trust.grant import Grant, Party

__all__ = ["next_probe", "probe_grant", "take_answer"]

GRANT_S: Final = 120
AGAIN_S: Final = 6 * 3600.0
"""A link on a way over a relay that nobody has used for so long is probed again."""


def probe_grant(
    source: AnyRow, target: AnyRow, epoch: int, asked: ProbeRequest, writing: Writing, terms: Terms
) -> bytes:
    """Permission for one site to send a bounded burst to another, which throws it away."""
    id_ = terms.rng(16)
    last = writing.connection.execute(select(counters.c.value).where(counters.c.name == "fence")).scalar_one()
    fence = writing.count_up("fence", 0, next_fence(last, writing.now))
    return terms.sign(
        Grant(
            id=id_,
            transfer="probe",
            task=f"probe.{id_.hex()}",
            fence=fence,
            epoch=epoch,
            issued=int(writing.now),
            expires=int(writing.now) + GRANT_S,
            source=Party(source.name, source.key_sha256),
            target=Party(target.name, target.key_sha256),
            dial="source",
            route=[source.name, target.name],
            source_path="/",
            target_path="/",
            mode="probe",
            secret=terms.rng(32),
            byte_limit=asked.size_bytes,
        )
    )


def take_answer(writing: Writing, source: str, target: str, answer: Answer, user: str) -> None:
    """Believe a probe."""
    row = writing.connection.execute(
        select(link_states).where(link_states.c.source == source, link_states.c.target == target)
    ).first()
    before = link_state(row) if row is not None and row.rate_bits_per_s else PRIOR
    state = observe(before, answer.rate_bits_per_s or 0.0, writing.now, "probe")
    stored.keep_link(
        writing,
        source,
        target,
        state,
        "probe",
        rate_bits_per_s=answer.rate_bits_per_s,
        rtt_ms=answer.rtt_ms,
        loss=answer.loss,
    )
    writing.emit(
        "link.measured", user=user, source=source, target=target, rate_bits_per_s=answer.rate_bits_per_s
    )


def next_probe(picture: Picture) -> tuple[str, str] | None:
    """The idle link that has waited longest to be probed: those to and from relays, whose ways are only planned on
    when they are known. None where none is due, or something moves: a probe never competes with transfers.
    """
    if any(task.state == "running" for task in picture.tasks):
        return None
    relays = {site.name for site in picture.sites.values() if site.relays}
    due: list[tuple[float, str, str]] = []
    for source in picture.sites.values():
        for target in picture.sites.values():
            key = (source.name, target.name)
            if source.name == target.name or not {source.name, target.name} & relays:
                continue
            if not (source.online and target.online and target.reachable) or key in picture.shut:
                continue
            row = picture.measured.get(key)
            last = max(row.measured, row.asked) if row is not None else 0.0
            if picture.now - last >= AGAIN_S:
                due.append((last, *key))
    return min(due)[1:] if due else None
