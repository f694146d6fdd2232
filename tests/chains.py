"""A small federation's keys, and chains made with them, for tests of evidence."""

from __future__ import annotations

import random
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from flowengine.trust.certificates import (
    issue_coordinator,
    issue_site,
    make_authority,
    make_key,
    make_request,
)

__all__ = ["NOW", "Pki", "pki"]

NOW = 1_772_452_804.218


class Pki:
    """A CA, and signers of its sites; the same in every run."""

    def __init__(self, seed: int = 11) -> None:
        self._rng = random.Random(seed).randbytes
        self._authority = make_authority(NOW - 1000, self._rng)
        self._signers: dict[str, tuple[bytes, bytes]] = {}
        self.anchors = self._authority.certificate_pem

    def signer(self, site: str) -> tuple[bytes, bytes]:
        """Key (PEM) and certificate (DER) of a site; of the coordinator for an empty name."""
        if site not in self._signers:
            key = make_key(self._rng)
            if site:
                pem = issue_site(self._authority, make_request(key), site, NOW - 1000, self._rng)
            else:
                pem = issue_coordinator(self._authority, key, ["localhost"], NOW - 1000, self._rng)
            der = x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)
            self._signers[site] = (key, der)
        return self._signers[site]


@cache
def pki(seed: int = 11) -> Pki:
    """The federation of a seed."""
    return Pki(seed)
