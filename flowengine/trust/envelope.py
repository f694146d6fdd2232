"""Signed documents: what was signed travels as the bytes that were signed, under a domain that names their use."""

from __future__ import annotations

from hashlib import sha256
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flowengine.errors import AuthenticationError

__all__ = [
    "MAX_DOCUMENT_BYTES", "Envelope", "document_domain", "is_signed_by", "open_envelope", "seal_envelope", "seal_signed", "signed_bytes",
]  # fmt: skip

MAX_DOCUMENT_BYTES: Final = 12 * 1024
"""A grant fits a message of a handshake together with what stands around it."""


class Envelope(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A signed payload, as a MessagePack map; unknown fields are ignored, for no signature covers them.

    Attributes:
        domain: what the payload is; part of what is signed, so that no signature means two things.
        payload: the bytes that are signed.
        key_id: which key signed it.
        signature: over `signed_bytes`.
        certificate: DER of the signer's certificate, where the key is known by one.
    """

    domain: str
    payload: bytes
    signature: bytes
    key_id: str = ""
    certificate: bytes = b""


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(Envelope)


def signed_bytes(domain: str, payload: bytes) -> bytes:
    """What a signature is made over: the domain, a NUL, the payload."""
    return domain.encode("ascii") + b"\0" + payload


def seal_envelope(envelope: Envelope) -> bytes:
    """The document's bytes."""
    return _encode(envelope)


def seal_signed(domain: str, payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """A document of somebody whom the policy bundle names with an Ed25519 key."""
    public = key.public_key().public_bytes_raw()
    return seal_envelope(
        Envelope(
            domain=domain,
            payload=payload,
            signature=key.sign(signed_bytes(domain, payload)),
            key_id=sha256(public).hexdigest()[:16],
        )
    )


def is_signed_by(envelope: Envelope, public: bytes) -> bool:
    """Whether an Ed25519 key (raw) signed it."""
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(envelope.signature, signed_bytes(envelope.domain, envelope.payload))
    except (InvalidSignature, ValueError):
        return False
    return True


def document_domain(document: bytes) -> str:
    """What a document says that it is; empty where it is none. Nothing of it is believed by that."""
    try:
        return _decoder.decode(document[: MAX_DOCUMENT_BYTES + 1]).domain
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError):
        return ""


def open_envelope(document: bytes, domain: str, reason: str, what: str) -> Envelope:
    """The envelope in a document; its signature is not checked yet.

    Args:
        reason: code of the error where it is none.
        what: "grant" or "receipt", for the message.

    Raises:
        AuthenticationError: it is no document of this domain.
    """
    try:
        if len(document) > MAX_DOCUMENT_BYTES:
            raise ValueError
        envelope = _decoder.decode(document)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError):
        raise AuthenticationError(f"what was shown is no {what}: it cannot be read", reason=reason) from None
    if envelope.domain != domain:
        raise AuthenticationError(
            f"what was shown is no {what}: it was signed for another use", reason=reason
        )
    return envelope
