"""Sealing keys as they are kept and given away: a file of secrets for each, and the same wrapped for one other site.

A key is wrapped with HPKE (RFC 9180: X25519, HKDF-SHA256, AES-256-GCM) to a site's *opening key*, which its agent makes
for nothing else. So it may travel by any way; what it opens is bound into what is authenticated.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from flowengine.errors import AuthenticationError, LocalError
from flowengine.trust.certificate_facts import Rng
from flowengine.trust.sealed import KEY_BYTES, SealingKey
from flowengine.trust.statements import MAX_TIME
from flowengine.units import is_name
from flowengine.wire.keys import Secret

__all__ = ["KeptKey", "OpeningKey", "dump_key", "load_key", "make_key", "unwrap_key", "wrap_key"]

_FORMAT: Final = "flowengine sealing key 1"
_WRAPPED: Final = "flowengine wrapped sealing key 1"
_INFO: Final = b"flowengine wrapped sealing key 1\0"


class KeptKey(Secret):
    """A sealing key, and what it is for.

    Attributes:
        site: where what it seals comes from, and which keeps it.
        tenant, path: whose data, and the site path that was given away.
        created: Unix seconds.
    """

    __slots__ = ("created", "key", "path", "site", "tenant")

    def __init__(self, key: SealingKey, site: str, tenant: str, path: str, created: int) -> None:
        self.key = key
        self.site = site
        self.tenant = tenant
        self.path = path
        self.created = created

    def __repr__(self) -> str:
        return f"<KeptKey {self.key.id.hex()} of {self.site}:{self.path}>"


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A key file, as JSON."""

    format: str
    id: str
    secret: str
    site: str
    tenant: str
    path: str
    created: int


class _Wrapped(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A wrapped key, as JSON."""

    format: str
    id: str
    site: str
    tenant: str
    path: str
    created: int
    to: str
    wrapped: str


def make_key(site: str, tenant: str, path: str, now: float, rng: Rng) -> KeptKey:
    """A new key for what leaves a site from one path."""
    return KeptKey(SealingKey(rng(KEY_BYTES)), site, tenant, path, int(now))


def dump_key(kept: KeptKey) -> bytes:
    """A key file; a secret."""
    return _text(
        _File(
            format=_FORMAT,
            id=kept.key.id.hex(),
            secret=kept.key.secret_bytes().hex(),
            site=kept.site,
            tenant=kept.tenant,
            path=kept.path,
            created=kept.created,
        )
    )


def _text(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def load_key(data: bytes, where: str) -> KeptKey:
    """The key of a key file.

    Raises:
        LocalError: it is none, or is damaged (reason "sealing-key-damaged").
    """
    try:
        file = msgspec.json.decode(data, type=_File)
        key = SealingKey(bytes.fromhex(file.secret))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise _damaged(where, "it cannot be read as one") from None
    if file.format != _FORMAT:
        raise _damaged(where, f"it says to be {file.format[:60]!r}")
    if file.id != key.id.hex():
        raise _damaged(where, f"its secret is not that of key {file.id[:32]}")
    return KeptKey(key, file.site, file.tenant, file.path, file.created)


def _damaged(where: str, why: str) -> LocalError:
    return LocalError(
        f"the sealing key file {where} is damaged: {why}",
        hint="restore it from a backup: without it nothing that it sealed can be opened",
        reason="sealing-key-damaged",
    )


# --- for another site -------------------------------------------------------------------------------------------


class OpeningKey(Secret):
    """The key of a site to which sealing keys are wrapped (X25519).

    Args:
        secret: 32 random bytes.
    """

    __slots__ = ("_key", "public")

    def __init__(self, secret: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(secret)
        self.public: str = self._key.public_key().public_bytes_raw().hex()

    def secret_bytes(self) -> bytes:
        """The 32 bytes to keep; only for a file of secrets."""
        return self._key.private_bytes_raw()

    def open(self, wrapped: bytes, info: bytes) -> bytes:
        """What was wrapped to this key.

        Raises:
            InvalidTag, ValueError: it was not, or was changed.
        """
        opened: bytes = _suite().decrypt(wrapped, self._key, info)
        return opened


def _suite() -> Any:
    return Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def _about(wrapped: _Wrapped) -> bytes:
    """What is authenticated beside the secret."""
    named = (wrapped.id, wrapped.site, wrapped.tenant, wrapped.path, wrapped.created, wrapped.to)
    return _INFO + msgspec.json.encode(named)


def wrap_key(kept: KeptKey, public: str) -> bytes:
    """A key for the holder of one opening key, as the document that travels; no secret.

    Args:
        public: hexadecimal, as the other site's agent shows it.

    Raises:
        AuthenticationError: that is no such key.
    """
    try:
        recipient = X25519PublicKey.from_public_bytes(bytes.fromhex(public))
    except ValueError:
        raise AuthenticationError(
            f"{public[:80]!r} is no opening key",
            hint="ask the other site: flowengine-agent keys show prints 64 hexadecimal digits",
            reason="sealing-key-other",
        ) from None
    document = _Wrapped(
        format=_WRAPPED,
        id=kept.key.id.hex(),
        site=kept.site,
        tenant=kept.tenant,
        path=kept.path,
        created=kept.created,
        to=public.lower(),
        wrapped="",
    )
    sealed = _suite().encrypt(kept.key.secret_bytes(), recipient, _about(document))
    return _text(msgspec.structs.replace(document, wrapped=sealed.hex()))


def unwrap_key(document: bytes, own: OpeningKey, where: str) -> KeptKey:
    """The key in a document that was wrapped for this site.

    Raises:
        AuthenticationError: it is none, was wrapped for another, or was changed (reason "sealing-key-other").
    """
    try:
        wrapped = msgspec.json.decode(document, type=_Wrapped)
        sealed = bytes.fromhex(wrapped.wrapped)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise _foreign(where, "it cannot be read as a wrapped key") from None
    if wrapped.format != _WRAPPED:
        raise _foreign(where, f"it says to be {wrapped.format[:60]!r}")
    if (
        not is_name(wrapped.site)
        or not wrapped.path.startswith("/")
        or not (wrapped.tenant == "" or is_name(wrapped.tenant))
        or not 0 <= wrapped.created < MAX_TIME
    ):
        raise _foreign(where, "no site has what it says to be of")
    if wrapped.to != own.public:
        raise _foreign(
            where, f"it was wrapped for the opening key {wrapped.to[:16]}…, this site's is {own.public[:16]}…"
        )
    try:
        key = SealingKey(own.open(sealed, _about(wrapped)))
    except (InvalidTag, ValueError):
        raise _foreign(where, "it was changed on its way") from None
    if key.id.hex() != wrapped.id:
        raise _foreign(where, "what is wrapped is another key than it says")
    return KeptKey(key, wrapped.site, wrapped.tenant, wrapped.path, wrapped.created)


def _foreign(where: str, why: str) -> AuthenticationError:
    return AuthenticationError(
        f"{where} gives this site no sealing key: {why}",
        hint="have it wrapped anew for this site: flowengine-agent keys give, at the site that keeps the key",
        reason="sealing-key-other",
    )
