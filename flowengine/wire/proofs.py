"""What the two sides of a handshake prove to each other: a ticket, a grant, a relay grant.

A proof is an HMAC over a label of the side that shows it and the handshake's transcript; so it can neither be mirrored nor
used twice, and whoever listens learns nothing of the secret.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Final, Protocol, TypeAlias

from flowengine.wire.keys import Secret

__all__ = ["GrantProof", "Proof", "RelayProof", "Resolver", "TicketProof", "among"]

_CLIENT_LABEL: Final = b"flowengine client proof\x00"
_SERVER_LABEL: Final = b"flowengine server proof\x00"
_BINDING_LABEL: Final = b"flowengine key binding\x00"
_IDENTITY_LABEL: Final = b"flowengine ticket id\x00"


class Proof(Protocol):
    """A right that both sides of a handshake show each other without giving it away."""

    @property
    def kind(self) -> str:
        """Stable word for the kind of proof, as "ticket"."""

    @property
    def identity(self) -> bytes:
        """Which proof of its kind it is; not secret, at most 32 bytes."""

    @property
    def document(self) -> bytes:
        """What the client shows along, so that the server can find the proof; empty where that is not needed."""

    def client_mac(self, transcript: bytes) -> bytes:
        """What the client shows for a transcript: 32 bytes."""

    def server_mac(self, transcript: bytes) -> bytes:
        """What the server shows for a transcript: 32 bytes, never equal to the client's."""

    def binding(self, transcript: bytes) -> bytes:
        """Secret that goes into the session's keys: 32 bytes that only holders of the right can compute."""


class _KeyedProof(Secret):
    """Knowledge of a secret key."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def client_mac(self, transcript: bytes) -> bytes:
        return self._mac(_CLIENT_LABEL, transcript)

    def server_mac(self, transcript: bytes) -> bytes:
        return self._mac(_SERVER_LABEL, transcript)

    def binding(self, transcript: bytes) -> bytes:
        return self._mac(_BINDING_LABEL, transcript)

    def _mac(self, label: bytes, transcript: bytes) -> bytes:
        return hmac.digest(self._secret, label + transcript, "sha256")


class TicketProof(_KeyedProof):
    """Knowledge of a ticket's secret."""

    __slots__ = ()
    kind = "ticket"
    document = b""

    @property
    def identity(self) -> bytes:
        return self._mac(_IDENTITY_LABEL, b"")[:8]


class GrantProof(_KeyedProof):
    """A signed grant, which travels along, and knowledge of the secret that is in it.

    It is shown only over TLS in which both sides' certificates were checked: those prove who the sides are.
    """

    __slots__ = ("document",)
    kind = "grant"

    def __init__(self, secret: bytes, document: bytes) -> None:
        super().__init__(secret)
        self.document = document

    @property
    def identity(self) -> bytes:
        return sha256(self.document).digest()[:16]


class RelayProof(_KeyedProof):
    """A signed relay grant, shown to a neighbour on a route over TLS in which both certificates were checked.

    It holds no secret: who may show it is proved by TLS alone, and the MAC only ties the document to this handshake.
    What keys the hop are the two randoms, which travel inside TLS.
    """

    __slots__ = ("document",)
    kind = "relay-grant"

    def __init__(self, document: bytes) -> None:
        super().__init__(sha256(document).digest())
        self.document = document

    @property
    def identity(self) -> bytes:
        return sha256(self.document).digest()[:16]


Resolver: TypeAlias = Callable[[str, bytes, bytes], Proof | None]
"""Finds the proof for a kind, identity and document that a client shows; None where there is none.

It may raise `AuthenticationError` with a reason of its own, which the client is then told.
"""


def among(proofs: Sequence[Proof]) -> Resolver:
    """A resolver that knows these proofs, at most one per kind and identity."""
    known = {(proof.kind, proof.identity): proof for proof in proofs}
    return lambda kind, identity, document: known.get((kind, identity))
