"""Checkpoints: a chain's head and the Merkle root over the records since the one before, signed by the agent's key.

Whoever holds one can tell later that the chain was cut behind it, or that another was put in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from flowengine.errors import AuthenticationError, IntegrityError
from flowengine.evidence.canonical import canonical, read_canonical
from flowengine.evidence.chain import Head, moment_ms
from flowengine.evidence.merkle import merkle_root
from flowengine.evidence.suites import find_suite
from flowengine.trust.certificate_facts import CertificateFacts
from flowengine.trust.certificates import check_certificate, parse_certificate
from flowengine.trust.envelope import Envelope, open_envelope, seal_envelope, signed_bytes

__all__ = ["CHECKPOINT_DOMAIN", "Checkpoint", "read_checkpoint", "sign_checkpoint", "verify_checkpoint"]

import msgspec

CHECKPOINT_DOMAIN: Final = "flowengine checkpoint 1"
MAX_CHECKPOINT_BYTES: Final = 4096


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is signed.

    Attributes:
        v: 1.
        agent, chain, suite: whose chain.
        first, seq: the records that `root` is over, both included.
        hash: of record `seq`.
        root: Merkle root over the hashes of these records.
        time: RFC 3339, by the agent's clock.
    """

    v: int
    agent: str
    chain: str
    suite: str
    first: int
    seq: int
    hash: str
    root: str
    time: str

    def as_peer(self) -> dict[str, object]:
        """How a record of another chain names the head."""
        return {"agent": self.agent, "chain": self.chain, "seq": self.seq, "hash": self.hash}


def sign_checkpoint(
    head: Head, hashes: Sequence[str], now: float, secret_pem: bytes, certificate_der: bytes
) -> bytes:
    """A signed checkpoint of a head.

    Args:
        hashes: of the records since the last checkpoint, the head's the last of them.
    """
    assert hashes[-1:] == [head.hash]
    payload = canonical(
        {
            "v": 1,
            "agent": head.agent,
            "chain": head.chain,
            "suite": head.suite.name,
            "first": head.seq - len(hashes) + 1,
            "seq": head.seq,
            "hash": head.hash,
            "root": merkle_root(head.suite, hashes),
            "time": moment_ms(now),
        }
    )
    return seal_envelope(
        Envelope(
            domain=CHECKPOINT_DOMAIN,
            payload=payload,
            signature=head.suite.sign(secret_pem, signed_bytes(CHECKPOINT_DOMAIN, payload)),
            key_id=parse_certificate(certificate_der).key_sha256,
            certificate=certificate_der,
        )
    )


def read_checkpoint(document: bytes) -> tuple[Checkpoint, Envelope]:
    """What a document says, without believing it.

    Raises:
        AuthenticationError: it is none.
        IntegrityError: it is of another version.
    """
    if len(document) > MAX_CHECKPOINT_BYTES:
        raise AuthenticationError("what was shown is no checkpoint: it is too long", reason="evidence")
    envelope = open_envelope(document, CHECKPOINT_DOMAIN, "evidence", "checkpoint")
    try:
        read_canonical(envelope.payload)
        found = msgspec.json.decode(envelope.payload, type=Checkpoint)
        if found.v != 1 or not 1 <= found.first <= found.seq:
            raise ValueError("its version or range is wrong")
    except (msgspec.MsgspecError, ValueError) as error:
        raise IntegrityError(f"the checkpoint cannot be understood: {error}", reason="evidence") from None
    return found, envelope


def verify_checkpoint(document: bytes, anchors_pem: str) -> tuple[Checkpoint, CertificateFacts]:
    """The checkpoint in a document, and whose certificate signed it; needs neither network nor clock.

    Raises:
        AuthenticationError: its certificate is not this federation's, was not valid then, or is somebody else's.
        IntegrityError: it was changed, or is not understood.
    """
    found, envelope = read_checkpoint(document)
    suite = find_suite(found.suite)
    parse_certificate(envelope.certificate)
    if not suite.verify(
        envelope.certificate, envelope.signature, signed_bytes(CHECKPOINT_DOMAIN, envelope.payload)
    ):
        raise IntegrityError(
            f"the signature of a checkpoint of {found.agent[:80]} is wrong: it was changed, or forged",
            reason="evidence",
        )
    try:
        at = datetime.strptime(found.time, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise IntegrityError("a checkpoint's time is none", reason="evidence") from None
    kind, _, site = found.agent.partition(":")
    facts = check_certificate(
        envelope.certificate, anchors_pem, at, kind="site" if kind == "site" else "coordinator"
    )
    if facts.site != site:
        raise AuthenticationError(
            f"{facts.shown} signed a checkpoint in the name of {found.agent[:80]!r}", reason="evidence"
        )
    return found, facts
