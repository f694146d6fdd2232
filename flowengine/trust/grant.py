"""Grants: the coordinator's signed permission for one task, which both ends check for themselves.

Goal
    An agent serves, sends and writes for a peer only what the coordinator permitted to just these two keys, for a
    few minutes, and it can tell so without asking anybody.
Plan
    A `Grant` is encoded once (MessagePack) and signed with the coordinator's Ed25519 key (RFC 8032) under the
    domain "flowengine grant 1". The checker verifies the signature over the bytes as they came, then the time, then
    that it is itself one party and the peer of the mutually authenticated connection the other.
Invariants
    - Nothing of a grant is believed before its signature was verified.
    - The first thing that is wrong is the reason, in the order: forged, not understood, time, parties, roles,
      superseded, spent.
    - A condition that the checker does not know (`required`) refuses the grant.
    - A grant may be shown again by the same two keys until it is spent, so that a cut link can be dialled anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Final, Literal

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flowengine.errors import UsageError
from flowengine.trust.certificate_facts import Rng
from flowengine.trust.envelope import MAX_DOCUMENT_BYTES, Envelope, seal_envelope, signed_bytes
from flowengine.trust.grant_checks import (
    FED,
    HOLD,
    MAX_LABELS,
    MAX_VALID_S,
    check_conditions,
    check_fence,
    check_time,
    problem_of_permit,
    read_grant,
    refused,
    wire_path,
)
from flowengine.units import is_name, show_path

__all__ = [
    "GRANT_DOMAIN",
    "MAX_GRANT_BYTES",
    "MAX_LABELS",
    "MAX_ROUTE",
    "MAX_VALID_S",
    "VERSION_BYTES",
    "Grant",
    "GrantKey",
    "Party",
    "check_grant",
    "check_requested_path",
    "grant_key_id",
    "peek_grant",
    "wire_path",
]

GRANT_DOMAIN: Final = "flowengine grant 1"
MAX_GRANT_BYTES: Final = MAX_DOCUMENT_BYTES
MAX_ROUTE: Final = 16
SECRET_BYTES: Final = 32

End = Literal["source", "target"]
_KNOWN_REQUIREMENTS: Final = frozenset({HOLD, FED})
VERSION_BYTES: Final = 32


class Party(msgspec.Struct, frozen=True):
    """One end: a site and its key's name (`CertificateFacts.key_sha256`)."""

    site: str
    key_sha256: str


class Grant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Permission to move one path from one site to another. Times are Unix seconds.

    Attributes:
        id: 16 random bytes.
        transfer, task: what it is for.
        fence: the claim of the task that it belongs to; a higher one supersedes it.
        epoch: the coordinator's run that signed it.
        dial: which end dials on the hop.
        route: sites from source to target, both included.
        source_path, target_path: site paths, as "/data/sets/a/".
        mode: "copy", "sync" or "verify"; "probe" lets the source send a burst that the target throws away, and nothing
            else.
        secret: 32 random bytes that only the coordinator and the two ends know.
        byte_limit: most payload bytes that may cross; None for no bound.
        may_delete: whether the target may remove what the source does not have.
        dry_run: whether it permits to look at what would move, and nothing else.
        labels, contracts, purpose, requester, policy_digest: what the policy decision was made on.
        approvals: signed approvals that were given for it, as they came.
        counts: what the coordinator's counters come to with this transfer, by their names in policies.
        tenant: for whom it is, so that its bandwidth limit can be held.
        required: conditions that whoever checks must know; unknown ones refuse the grant. "hold": the target holds the
            data sealed and has no key. "fed": the source gives `version` or nothing.
        version: id of the version that the source has to have at its path, where it was a target itself; else empty.
    """

    id: bytes
    transfer: str
    task: str
    fence: int
    epoch: int
    issued: int
    expires: int
    source: Party
    target: Party
    dial: End
    route: list[str]
    source_path: str
    target_path: str
    mode: Literal["copy", "sync", "verify", "probe"]
    secret: bytes
    byte_limit: int | None = None
    may_delete: bool = False
    dry_run: bool = False
    labels: list[str] = []
    purpose: str = ""
    policy_digest: bytes = b""
    tenant: str = ""
    required: list[str] = []
    contracts: list[str] = []
    requester: str = ""
    approvals: list[bytes] = []
    counts: dict[str, int] = {}
    version: bytes = b""

    def party(self, end: End) -> Party:
        """Who is at an end."""
        return self.source if end == "source" else self.target

    def path(self, end: End) -> str:
        """The site path at an end."""
        return self.source_path if end == "source" else self.target_path

    @property
    def shown(self) -> str:
        """What it is for, for messages and logs; without its secret."""
        return (
            f"{self.source.site}:{self.source_path} -> {self.target.site}:{self.target_path} "
            f"(task {self.task}, fence {self.fence})"
        )

    def __repr__(self) -> str:
        return f"<Grant {self.id.hex()} {self.shown}>"

    def __rich_repr__(self) -> list[tuple[str, object]]:
        return [("id", self.id.hex()), ("what", self.shown)]


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Grant)


class GrantKey:
    """The coordinator's key for grants (Ed25519)."""

    def __init__(self, secret: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(secret)
        self.public = self._key.public_key().public_bytes_raw()
        self.id = grant_key_id(self.public)

    @classmethod
    def make(cls, rng: Rng) -> GrantKey:
        """A new key."""
        return cls(rng(32))

    def secret_bytes(self) -> bytes:
        """The 32 bytes to keep; only for the coordinator's own secret file."""
        return self._key.private_bytes_raw()

    def sign(self, grant: Grant) -> bytes:
        """The signed grant, as it travels.

        Raises:
            UsageError: it says something that no checker would accept, or is too large.
        """
        problem = _problem(grant)
        if problem:
            raise UsageError(f"this grant cannot be given: {problem}")
        return self.sign_payload(GRANT_DOMAIN, _encode(grant))

    def sign_payload(self, domain: str, payload: bytes) -> bytes:
        """A payload as the document that travels, signed for one use.

        Raises:
            UsageError: it would be too large.
        """
        signature = self._key.sign(signed_bytes(domain, payload))
        document = seal_envelope(
            Envelope(domain=domain, payload=payload, signature=signature, key_id=self.id)
        )
        if len(document) > MAX_GRANT_BYTES:
            raise UsageError(
                f"paths and labels of this transfer are too long: its grant would have {len(document)} bytes, "
                f"{MAX_GRANT_BYTES} are allowed",
                hint="use shorter paths or fewer labels",
            )
        return document

    def __repr__(self) -> str:
        return f"<GrantKey {self.id}>"


def grant_key_id(public: bytes) -> str:
    """The id of a public grant key: the first 8 bytes of its SHA-256, hexadecimal."""
    return sha256(public).hexdigest()[:16]


def check_grant(
    document: bytes,
    keys: Mapping[str, bytes],
    now: float,
    *,
    me: Party,
    peer: Party | None,
    end: End,
    dials: bool,
    highest_fence: int = 0,
    spent: bool = False,
) -> Grant:
    """The grant in a document, if it lets `me` and `peer` do this now.

    Args:
        document: as it came.
        keys: the coordinator's public Ed25519 keys by id.
        now: Unix seconds.
        me: this agent.
        peer: who is at the other end of the mutually authenticated connection; None before there is one.
        end: which end this agent is.
        dials: whether this agent dialled.
        highest_fence: highest fence seen of the grant's task; `peek_grant` tells the task.
        spent: whether the task of this grant ended here already.

    Raises:
        AuthenticationError: with one reason: "grant-forged", "incompatible", "grant-not-yet-valid", "grant-expired",
            "grant-other-party", "grant-superseded" or "grant-replayed".
    """
    grant = peek_grant(document, keys)
    what = f"grant for {grant.shown}"
    check_conditions(grant.required, _KNOWN_REQUIREMENTS, "grant")
    check_time(grant.issued, grant.expires, now, what)
    other: End = "target" if end == "source" else "source"
    if grant.party(end) != me:
        raise refused(
            f"the grant for {grant.shown} is not for this site as its {end} (this is {me.site})",
            "grant-other-party",
        )
    if peer is not None and grant.party(other) != peer:
        raise refused(
            f"{peer.site} (key {peer.key_sha256[:16]}…) showed a grant for {grant.shown}, which is not the {other} "
            "that it names",
            "grant-other-party",
            "a site that was enrolled anew has another key: the coordinator gives a new grant",
        )
    if (grant.dial == end) != dials:
        raise refused(f"by the grant for {grant.shown} the {grant.dial} dials", "grant-other-party")
    check_fence(grant.fence, highest_fence, what, spent=spent)
    return grant


def peek_grant(document: bytes, keys: Mapping[str, bytes]) -> Grant:
    """What a grant says once its signature was verified and nothing else: to look up its task's fence.

    Raises:
        AuthenticationError: reason "grant-forged", or "incompatible" where it cannot be understood.
    """
    return read_grant(document, GRANT_DOMAIN, keys, "grant", _decoder.decode, _problem)


def check_requested_path(grant: Grant, end: End, path: bytes) -> None:
    """Refuse a request to this `end` for a path (of `Open`) that is not the grant's.

    Raises:
        AuthenticationError: reason "grant-other-path".
    """
    allowed = wire_path(grant.path(end))
    if path != allowed:
        raise refused(
            f"/{show_path(path[:200])} was asked for with a grant for {grant.shown}",
            "grant-other-path",
            "each path needs its own transfer",
        )


def _problem(grant: Grant) -> str:
    """What makes a grant unusable for anybody; empty for nothing."""
    if len(grant.secret) != SECRET_BYTES:
        return "its secret has the wrong length"
    if not 2 <= len(grant.route) <= MAX_ROUTE or not all(map(is_name, grant.route)):
        return "its route is no list of sites"
    if (grant.route[0], grant.route[-1]) != (grant.source.site, grant.target.site):
        return "its route does not lead from its source to its target"
    if len(grant.version) not in (0, VERSION_BYTES) or bool(grant.version) != (FED in grant.required):
        return "it does not say which version its source has to give, or does not require it"
    return problem_of_permit(grant)
