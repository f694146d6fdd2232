"""What a certificate of the federation says, for whoever only needs to know: without what reads and makes certificates.

That takes as long to load as a small file to move, and most commands meet no certificate (`trust.certificates`).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Final, Literal

import msgspec

__all__ = ["SKEW_S", "CertificateFacts", "Rng"]

Rng = Callable[[int], bytes]

SKEW_S: Final = 60
"""How far two clocks of one federation may be apart."""


class CertificateFacts(msgspec.Struct, frozen=True):
    """What a certificate says.

    Attributes:
        kind: "site", "coordinator" or "authority".
        site: name of the site; empty for the others.
        serial: hexadecimal, lower case, without leading zeros: as revocation lists name it.
        key_sha256: SHA-256 of the SubjectPublicKeyInfo, hexadecimal: the key's name, which renewal keeps.
        fingerprint: SHA-256 of the whole certificate.
        not_before, not_after: validity, UTC.
    """

    kind: Literal["site", "coordinator", "authority"]
    site: str
    serial: str
    key_sha256: str
    fingerprint: bytes
    not_before: datetime
    not_after: datetime

    @property
    def renew_at(self) -> datetime:
        """When half of the validity is over: time to renew."""
        return self.not_before + (self.not_after - self.not_before) / 2

    @property
    def shown(self) -> str:
        """Who it is, for messages."""
        return f"site {self.site}" if self.kind == "site" else f"the {self.kind}"
