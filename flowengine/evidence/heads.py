"""Signed heads of chains against each other: whether they can be of one history, without the records between them.

An agent's checkpoints lie side by side: each signs for the records since the one before. So two of one chain that sign
for the same record differently, or for stretches that overlap, are of two histories: the chain was cut, or forked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from flowengine.errors import FlowError
from flowengine.evidence.checkpoint import Checkpoint, verify_checkpoint
from flowengine.evidence.verify import Finding

__all__ = ["Heads", "contradiction", "verify_heads"]


def contradiction(one: Checkpoint, other: Checkpoint) -> str:
    """Why two checkpoints cannot both be of one history; empty where they may, or are of different chains."""
    if (one.agent, one.chain) != (other.agent, other.chain):
        return ""
    early, late = sorted((one, other), key=lambda head: head.seq)
    if early.seq == late.seq:
        same = (early.hash, early.first, early.root) == (late.hash, late.first, late.root)
        return "" if same else f"two checkpoints sign for record {late.seq} and mean different ones"
    if late.first <= early.seq:
        return (
            f"a checkpoint signs for records {late.first} to {late.seq}, and another one had ended with record "
            f"{early.seq} in their midst"
        )
    return ""


@dataclass(slots=True)
class Heads:
    """What came out for the heads of one site.

    Attributes:
        agent: whose.
        chains: ids of the chains that there are heads of, in the order of their first heads.
        heads: how many were verified.
        signed_to, time: of the newest head.
        findings: what is wrong.
    """

    agent: str
    chains: list[str] = field(default_factory=list)
    heads: int = 0
    signed_to: int = 0
    time: str = ""
    findings: list[Finding] = field(default_factory=list)

    def as_dict(self) -> dict[str, object]:
        """As JSON-able data."""
        return {
            "agent": self.agent,
            "chains": self.chains,
            "heads": self.heads,
            "signed_to": self.signed_to,
            "time": self.time,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def verify_heads(agent: str, documents: Sequence[bytes], anchors_pem: str) -> Heads:
    """Verify and compare all that others hold of one agent's chain.

    Args:
        agent: `site:NAME`.
        documents: signed checkpoints, in any order.
    """
    verdict = Heads(agent)
    found: list[Checkpoint] = []
    for document in documents:
        try:
            head, _ = verify_checkpoint(document, anchors_pem)
        except FlowError as error:
            verdict.findings.append(Finding("checkpoint", None, f"a checkpoint is wrong: {error.message}"))
            continue
        if head.agent == agent:
            found.append(head)
    found.sort(key=lambda head: (head.time, head.seq))
    verdict.heads = len(found)
    verdict.chains = list(dict.fromkeys(head.chain for head in found))
    if found:
        verdict.signed_to, verdict.time = found[-1].seq, found[-1].time
    if len(verdict.chains) > 1:
        text = f"there are heads of {len(verdict.chains)} chains of {agent}: one was put aside, or in another's place"
        verdict.findings.append(Finding("checkpoint", None, text))
    for chain in verdict.chains:
        side_by_side = sorted((head for head in found if head.chain == chain), key=lambda head: head.seq)
        for before, after in pairwise(side_by_side):
            if why := contradiction(before, after):
                verdict.findings.append(Finding("forked", after.seq, why))
    return verdict
