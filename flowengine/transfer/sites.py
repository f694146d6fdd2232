"""Sites that meet under a grant: mutual TLS with the federation's certificates, and each side's own check of the grant.

What a ticket is between two people, a site's identity together with a signed grant is between two agents. Everything
behind the handshake is the same.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

from flowengine.errors import AuthenticationError, UsageError
from flowengine.store.grants import GrantLedger
from flowengine.trust.certificate_facts import CertificateFacts
from flowengine.trust.deletion import DeleteCertificate, sign_deletion
from flowengine.trust.grant import End, Grant, Party, check_grant, check_requested_path, peek_grant
from flowengine.trust.receipt import SignedReceipt, sign_receipt
from flowengine.trust.relay_grant import RelayGrant, check_relay_grant, peek_relay_grant
from flowengine.trust.release import Release, sign_release
from flowengine.wire.keys import Secret
from flowengine.wire.messages import Open
from flowengine.wire.proofs import GrantProof, Proof, RelayProof, Resolver

__all__ = ["Guest", "SiteIdentity", "SitePeer", "SiteTrust"]


class SiteIdentity(Secret):
    """A site's certificate and key, as an agent got them when it joined.

    Args:
        certificate_pem: leaf, first.
        secret_pem: the private key.
        ca_pem: the federation's CA.

    Raises:
        UsageError: they do not belong together.
    """

    def __init__(self, certificate_pem: str, secret_pem: bytes, ca_pem: str) -> None:
        from cryptography import x509  # this and what reads certificates takes long to load
        from cryptography.hazmat.primitives.serialization import Encoding

        from flowengine.trust.certificates import parse_certificate

        self.facts: CertificateFacts = parse_certificate(certificate_pem)
        self.ca_pem = ca_pem
        self._secret_pem = secret_pem
        leaf = x509.load_pem_x509_certificate(certificate_pem.encode("ascii"))
        self.certificate_der = leaf.public_bytes(Encoding.DER)
        pem = certificate_pem.encode("ascii") + b"\n" + secret_pem
        self.server_context = _context(ssl.PROTOCOL_TLS_SERVER, pem, ca_pem)
        self.client_context = _context(ssl.PROTOCOL_TLS_CLIENT, pem, ca_pem)

    @property
    def site(self) -> str:
        """The site's name."""
        return self.facts.site

    @property
    def party(self) -> Party:
        """The site as grants name it."""
        return Party(self.facts.site, self.facts.key_sha256)

    def signer(self) -> tuple[bytes, bytes]:
        """Private key (PEM) and certificate (DER), for what is signed with both; the key is for that alone."""
        return self._secret_pem, self.certificate_der

    def sign_receipt(self, receipt: SignedReceipt) -> bytes:
        """This site's signed word on what landed."""
        return sign_receipt(receipt, self._secret_pem, self.certificate_der)

    def sign_release(self, release: Release) -> bytes:
        """This site's signed word that its policies let data leave."""
        return sign_release(release, self._secret_pem, self.certificate_der)

    def sign_deletion(self, said: DeleteCertificate) -> bytes:
        """This site's signed word on what it destroyed."""
        return sign_deletion(said, self._secret_pem, self.certificate_der)


def _context(protocol: int, pem: bytes, ca_pem: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the site's name in the certificate counts, wherever it is reached
    context.verify_mode = ssl.CERT_REQUIRED
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # every connection shows its certificate
    # The ssl module reads certificates from files only; the key is never seen on a disk by this.
    fd = os.memfd_create("flow-certificate")
    try:
        os.write(fd, pem)
        context.load_verify_locations(cadata=ca_pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    except ssl.SSLError as error:
        raise UsageError(
            f"certificate, key and CA of this site cannot be used together: {error.reason or error}",
            hint="restore them from one backup, or join again with a new token",
        ) from None
    finally:
        os.close(fd)
    return context


class SiteTrust(msgspec.Struct):
    """Whom an agent believes now; the agent replaces the parts as it learns of new ones.

    Attributes:
        identity: its own certificate; a renewed one is used from the next connection on.
        grant_keys: the coordinator's public keys for grants (raw), by id.
        ledger: what it remembers of grants.
        revoked: serials of revoked certificates.
        clock: gives Unix seconds.
    """

    identity: SiteIdentity
    grant_keys: Mapping[str, bytes]
    ledger: GrantLedger
    revoked: frozenset[str] = frozenset()
    clock: Callable[[], float] = time.time

    def check_peer(self, certificate: bytes | None) -> CertificateFacts:
        """The facts of a peer's certificate (DER), if it may be believed now.

        Raises:
            AuthenticationError: reason "certificate-unknown", "certificate-expired" or "certificate-revoked".
        """
        from flowengine.trust.certificates import check_certificate  # takes long to load

        if not certificate:
            raise AuthenticationError("the peer showed no certificate", reason="certificate-unknown")
        return check_certificate(
            certificate, self.identity.ca_pem, self.clock(), kind="site", revoked=self.revoked
        )

    def admit(self, document: bytes, *, dials: bool, peer: CertificateFacts | None = None) -> Grant:
        """The grant in a document, if it lets this agent act now; from then on lower fences of its task are refused.

        Args:
            dials: whether this agent dials, rather than being dialled.
            peer: who is at the other end; None before that is known.

        Raises:
            AuthenticationError: with its one reason, as of `trust.grant.check_grant`.
        """
        peeked = peek_grant(document, self.grant_keys)
        dialler: End = peeked.dial
        end: End = dialler if dials else "source" if dialler == "target" else "target"
        fence, spent = self.ledger.standing(peeked.task)
        grant = check_grant(
            document,
            self.grant_keys,
            self.clock(),
            me=self.identity.party,
            peer=Party(peer.site, peer.key_sha256) if peer is not None else None,
            end=end,
            dials=dials,
            highest_fence=fence,
            spent=spent and peeked.fence == fence,
        )
        self.ledger.admit(grant)
        return grant

    def admit_relay(self, document: bytes, *, before: CertificateFacts | None) -> RelayGrant:
        """The relay grant in a document, if it gives this agent a place on a route now; fences as of `admit`.

        Args:
            before: who dialled this agent for it; None where this agent dials, as one end of the route.

        Raises:
            AuthenticationError: with its one reason, as of `trust.relay_grant.check_relay_grant`.
        """
        peeked = peek_relay_grant(document, self.grant_keys)
        fence, spent = self.ledger.standing(peeked.task)
        grant = check_relay_grant(
            document,
            self.grant_keys,
            self.clock(),
            me=self.identity.party,
            before=Party(before.site, before.key_sha256) if before is not None else None,
            highest_fence=fence,
            spent=spent and peeked.fence == fence,
        )
        self.ledger.admit(grant)
        return grant

    def guest(self) -> Guest:
        """Whoever connects now, before anything is known of it."""
        return Guest(self, self.identity)


@dataclass
class Guest:
    """A site that connects.

    Attributes:
        own: the identity that this side shows to it.
        certificate: what it showed in TLS.
        facts: of that certificate, once it was checked.
        grant: under which it is let in, once it showed one that holds.
        relay_grant, document: where it asks for a hop instead: the relay grant, and how it came.
    """

    trust: SiteTrust
    own: SiteIdentity
    certificate: bytes | None = None
    facts: CertificateFacts | None = None
    grant: Grant | None = None
    relay_grant: RelayGrant | None = None
    document: bytes = field(default=b"", repr=False)

    @property
    def context(self) -> ssl.SSLContext:
        """For this side of TLS."""
        return self.own.server_context

    @property
    def own_fingerprint(self) -> bytes:
        """SHA-256 of the certificate that this side shows."""
        return self.own.facts.fingerprint

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of its certificate."""
        assert self.facts is not None
        return self.facts.fingerprint

    @property
    def resolver(self) -> Resolver:
        """Finds the proof for what the guest shows."""
        return self._resolve

    def _resolve(self, kind: str, identity: bytes, document: bytes) -> Proof | None:
        if kind not in (GrantProof.kind, RelayProof.kind):
            return None
        self.facts = self.trust.check_peer(self.certificate)
        if kind == RelayProof.kind:
            self.relay_grant, self.document = self.trust.admit_relay(document, before=self.facts), document
            return RelayProof(document)
        self.grant = self.trust.admit(document, dials=False, peer=self.facts)
        return GrantProof(self.grant.secret, document)

    def check_request(self, request: Open) -> None:
        """Refuse a request that the guest's grant does not cover.

        Raises:
            AuthenticationError: reason "grant-other-path", or "grant-other-party" for another role than the grant's.
            A guest may also "stat" the path, to learn whether it is a folder.
        """
        grant = self.grant
        assert grant is not None
        served: End = "source" if grant.dial == "target" else "target"
        roles = ("probe",) if grant.mode == "probe" else (grant.dial, "stat")
        if request.role not in roles:
            raise AuthenticationError(
                f"the {grant.dial} of the grant for {grant.shown} asked for {request.role[:16]!r}",
                reason="grant-other-party",
            )
        check_requested_path(grant, served, request.path)


@dataclass
class SitePeer:
    """Another site, to be dialled under a grant.

    Attributes:
        host, port: where its agent listens.
        trust: this agent's.
        document: the signed grant; a newer one of the same task is used from the next connection on.
        serial: of the certificate that it showed last; empty before.
    """

    host: str
    port: int
    trust: SiteTrust
    document: bytes = field(repr=False)
    serial: str = ""

    @classmethod
    def at(cls, address: str, trust: SiteTrust, document: bytes) -> SitePeer:
        """A peer at "host:port"; IPv6 addresses in brackets.

        Raises:
            UsageError: that is no address.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65_536:
            raise UsageError(f"{address!r} is no address", hint="write it like agent.example.org:7443")
        return cls(host.removeprefix("[").removesuffix("]"), int(port), trust, document)

    @property
    def location(self) -> str:
        """Where it is, for messages."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def dialled(self) -> SiteDialled:
        """For one connection."""
        return SiteDialled(self.trust, self.trust.identity, self.document, self._recognised)

    def _recognised(self, facts: CertificateFacts) -> None:
        self.serial = facts.serial


@dataclass(frozen=True)
class SiteDialled:
    """One connection to another site, with the identity and the grant that were there when it began."""

    trust: SiteTrust
    own: SiteIdentity
    document: bytes = field(repr=False)
    recognised: Callable[[CertificateFacts], None] = field(default=lambda facts: None, repr=False)

    @property
    def context(self) -> ssl.SSLContext:
        """For this side of TLS."""
        return self.own.client_context

    @property
    def client_fingerprint(self) -> bytes:
        """SHA-256 of the certificate that this side shows."""
        return self.own.facts.fingerprint

    def recognise(self, certificate: bytes | None) -> Proof:
        """What to prove to whoever showed this certificate (DER) in TLS.

        Raises:
            AuthenticationError: it is not the peer of the grant, or the grant does not hold.
        """
        facts = self.trust.check_peer(certificate)
        grant = self.trust.admit(self.document, dials=True, peer=facts)
        self.recognised(facts)
        return GrantProof(grant.secret, self.document)
