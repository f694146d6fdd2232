"""Hash and signature of a chain, named by it: one interface, so that a chain of another kind is refused by name.

`sha256+ecdsa-p256` is the suite of the federation's certificates. National suites (sm3+sm2) belong here once a
well-kept library signs with SM2; `cryptography` does not.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from flowengine.errors import IntegrityError
from flowengine.trust.certificates import sign_with_key, verify_with_certificate

__all__ = ["DEFAULT_SUITE", "SUITES", "Suite", "find_suite"]

DEFAULT_SUITE: Final = "sha256+ecdsa-p256"


@dataclass(frozen=True, slots=True)
class Suite:
    """How a chain hashes, keys digests and signs.

    Attributes:
        name: as a chain's first record names it.
        prefix: of its digests in text, as `sha256`.
        raw: digest of bytes.
        mac: keyed digest of bytes: (key, data).
        sign: signature by a private key in PEM: (key, data).
        verify: whether the key of a certificate (DER) signed: (certificate, signature, data).
    """

    name: str
    prefix: str
    raw: Callable[[bytes], bytes]
    mac: Callable[[bytes, bytes], bytes]
    sign: Callable[[bytes, bytes], bytes]
    verify: Callable[[bytes, bytes, bytes], bool]

    def digest(self, data: bytes) -> str:
        """The digest as records carry it: prefix, colon, hexadecimal."""
        return f"{self.prefix}:{self.raw(data).hex()}"

    @property
    def zero(self) -> str:
        """What the first record of a chain has before it."""
        return f"{self.prefix}:{'0' * 2 * len(self.raw(b''))}"


def _sha256(data: bytes) -> bytes:
    return sha256(data).digest()


SUITES: Final[Mapping[str, Suite]] = {
    DEFAULT_SUITE: Suite(
        DEFAULT_SUITE,
        "sha256",
        _sha256,
        lambda key, data: hmac.digest(key, data, "sha256"),
        sign_with_key,
        verify_with_certificate,
    )
}


def find_suite(name: object) -> Suite:
    """The suite of that name.

    Raises:
        IntegrityError: this version does not know it (reason "incompatible").
    """
    suite = SUITES.get(name) if isinstance(name, str) else None
    if suite is None:
        raise IntegrityError(
            f"the chain is of suite {str(name)[:64]!r}, which this version does not know",
            hint=f"known: {', '.join(SUITES)}; verify it with a version that knows it",
            reason="incompatible",
        )
    return suite
