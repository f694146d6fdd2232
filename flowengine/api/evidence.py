"""Evidence that the coordinator holds: checkpoints of the sites' chains, and its own chain."""

from __future__ import annotations

from datetime import datetime

from flowengine.api.schema import Resource

__all__ = ["EvidenceBundle", "EvidenceCheckpoint", "EvidenceRecord"]


class EvidenceCheckpoint(Resource):
    """A signed head of a chain of evidence that the coordinator holds.

    `agent` is `site:NAME`; `chain` the hash of its first record; `seq` and `hash` name the record that is signed for;
    `time` is the agent's; `document` is base64 (docs/spec/evidence.md).
    """

    agent: str
    chain: str
    seq: int
    hash: str
    time: str
    received: datetime
    document: str


class EvidenceRecord(Resource):
    """A record of the coordinator's own chain: its number, and the line as it was hashed."""

    seq: int
    line: str


class EvidenceBundle(Resource):
    """Policies that decisions of the coordinator name: a part of the bundle (base64) from `offset` on, of `size_bytes`."""

    digest: str
    content: str
    offset: int = 0
    size_bytes: int = 0
