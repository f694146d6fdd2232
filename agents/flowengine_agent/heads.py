"""What two agents tell each other of their evidence: each puts the other's signed head into its own chain.

A site that later cuts its chain, or puts another in its place, is contradicted by the chains of all that it dealt with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from flowengine.errors import FlowError
from flowengine.evidence.private import Private
from flowengine.transfer.session import Counters, Session
from flowengine.transfer.source import SourceOutcome
from flowengine.trust.grant import Grant
from flowengine_agent.permits import Permit
from flowengine_agent.recording import EVERYWHERE, private_counts, shown_sealed
from flowengine_agent.site import Site

__all__ = ["note_head", "record_left", "show_head"]


async def show_head(site: Site, permit: Permit, session: Session) -> None:
    """Have a checkpoint ready that signs for what was decided here; nothing where nothing was.

    Raises:
        Denied: it cannot be recorded.
    """
    if permit.bundle is not None:
        session.checkpoint = await site.evidence.checkpoint()


async def note_head(site: Site, grant: Grant, end: Literal["source", "target"], session: Session) -> None:
    """Put the other side's checkpoint on the record, where one came; one that is wrong is logged and no more.

    Args:
        end: which end the other side is.
    """
    if not session.peer_checkpoint:
        return
    peer = grant.party(end).site
    try:
        await site.evidence.note_peer(session.peer_checkpoint, site.identity.ca_pem, site=peer)
    except FlowError as error:
        site.log.warning("a peer's checkpoint is wrong", peer=peer, reason=error.reason, why=error.message)


async def record_left(
    site: Site,
    grant: Grant,
    permit: Permit,
    session: Session,
    counters: Counters,
    outcome: SourceOutcome,
    stopped: str = "",
    account: str = "",
) -> None:
    """Put it on the record what left this site, what became of its duties, and the target's head.

    Args:
        stopped: by which mild stop it came to its end; empty for none.
        account: by which it was read; empty for the agent's own.
    """
    if permit.bundle is None:
        return
    await site.gate.recorder.moved(
        "left",
        grant,
        f"{grant.source.site}:{grant.source_path}",
        permit.owed,
        root="" if stopped and outcome.receipt.state != "completed" else outcome.version_id.hex(),
        objects=counters.objects,
        size_bytes=counters.size_bytes,
        proofs=_proofs(site, grant, permit, counters),
        to=f"{grant.target.site}:{grant.target_path}",
        bytes_sent=counters.bytes_payload,
        **shown_sealed(permit.sealed),
        **({"stopped": stopped} if stopped else {}),
        **({"account": Private("account", account)} if account else {}),
    )
    await note_head(site, grant, "target", session)


def _proofs(site: Site, grant: Grant, permit: Permit, counters: Counters) -> dict[str, Mapping[str, object]]:
    """What shows that the source did its duties."""
    duties = {one.duty.type: one.duty for one in permit.owed}
    proofs: dict[str, Mapping[str, object]] = dict(EVERYWHERE)
    if "rate_max" in duties:
        proofs["rate_max"] = {
            "limit_bits_per_s": site.limits.owed(grant.transfer) or 0, "bytes_sent": counters.bytes_payload,
        }  # fmt: skip
    if "count" in duties and permit.counts:
        proofs["count"] = {"counters": private_counts(permit.counts)}
    return proofs
