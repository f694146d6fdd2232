"""Whoever dials a site and checks nothing, as an attacker would not."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

import trio

from flowengine.store.grants import GrantLedger
from flowengine.transfer.connect import dial
from flowengine.transfer.sites import SiteDialled, SiteIdentity, SitePeer, SiteTrust
from flowengine.wire.proofs import GrantProof, Proof

__all__ = ["Attacker", "Unchecked", "meet"]


@dataclass(frozen=True)
class Unchecked(SiteDialled):
    """A connection of somebody who checks neither the peer nor the own grant."""

    secret: bytes = b""
    no_certificate: bool = False

    @property
    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if self.no_certificate else self.own.client_context
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    def recognise(self, certificate: bytes | None) -> Proof:
        return GrantProof(self.secret, self.document)


class Attacker(SitePeer):
    """Dials with any identity and any document."""

    def __init__(
        self, port: int, own: SiteIdentity, document: bytes, secret: bytes, *, bare: bool = False
    ) -> None:
        super().__init__("127.0.0.1", port, SiteTrust(own, {}, GrantLedger(":memory:")), document)
        self._secret = secret
        self._bare = bare

    def dialled(self) -> SiteDialled:
        return Unchecked(
            self.trust, self.trust.identity, self.document, secret=self._secret, no_certificate=self._bare
        )


def meet(peer: SitePeer) -> None:
    """Get as far as an authenticated connection, and no further."""

    async def main() -> None:
        await (await dial(peer)).aclose()

    trio.run(main)
