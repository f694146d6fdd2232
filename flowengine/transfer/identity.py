"""What a listener is known by: key, certificate, and the ticket's secret."""

from __future__ import annotations

import os
import secrets
import ssl
from hashlib import sha256

from flowengine.errors import NotFound, UsageError
from flowengine.store.secret_files import read_secret, write_secret
from flowengine.trust.certificate_facts import CertificateFacts
from flowengine.trust.grant import Grant
from flowengine.wire.keys import NO_FINGERPRINT
from flowengine.wire.messages import Open
from flowengine.wire.proofs import TicketProof, among

__all__ = ["Identity", "TicketGuest"]


class TicketGuest:
    """Whoever connected to a listener that made tickets: nothing is known of it but that it knows the secret."""

    grant: Grant | None = None
    facts: CertificateFacts | None = None
    fingerprint = NO_FINGERPRINT

    def __init__(self, own: Identity) -> None:
        self.context = own.context
        self.own_fingerprint = own.fingerprint
        self.certificate: bytes | None = None
        self.resolver = among([TicketProof(own.secret)])

    def check_request(self, request: Open) -> None:
        """A ticket lets its holder ask for everything that is served."""


class Identity:
    """What a listener is known by: key and self-signed certificate, their fingerprint, and the ticket's secret.

    Fresh ones live in memory only; `load` keeps them in a file, so that a ticket outlives a restart.
    """

    def __init__(self, pem: bytes, fingerprint: bytes, secret: bytes) -> None:
        self.fingerprint = fingerprint
        self.secret = secret
        self._pem = pem
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        # The ssl module reads certificates from files only; this one is never seen on a disk.
        fd = os.memfd_create("flow-certificate")
        try:
            os.write(fd, pem)
            self.context.load_cert_chain(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)

    @classmethod
    def fresh(cls) -> Identity:
        """A new key, certificate and secret."""
        import datetime

        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "flowengine")])
        # Fixed dates: the fingerprint is what is checked, and a wrong clock must not break a transfer.
        cert = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.datetime(2020, 1, 1))
            .not_valid_after(datetime.datetime(2120, 1, 1))
            .sign(key, hashes.SHA256())
        )
        pem = cert.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return cls(
            pem, sha256(cert.public_bytes(serialization.Encoding.DER)).digest(), secrets.token_bytes(24)
        )

    @classmethod
    def load(cls, path: str) -> Identity:
        """The identity in a file; where there is none, a fresh one is written there (0600).

        Raises:
            LocalError: the file cannot be read or written, or others can read it.
            UsageError: it is no identity file.
        """
        try:
            data = read_secret(path)
        except NotFound:
            made = cls.fresh()
            made._save(path)
            return made
        first, _, pem = data.partition(b"\n")
        try:
            secret = bytes.fromhex(first.decode().removeprefix("flowengine-secret "))
            return cls(
                pem,
                sha256(ssl.PEM_cert_to_DER_cert(pem.partition(b"-----BEGIN PRIVATE")[0].decode())).digest(),
                secret,
            )
        except (ValueError, ssl.SSLError):
            raise UsageError(
                f"{path} is no identity file", hint="name one that flow serve --identity wrote, or a new one"
            ) from None

    def guest(self) -> TicketGuest:
        """Whoever connects now, before it has proved anything."""
        return TicketGuest(self)

    def _save(self, path: str) -> None:
        data = b"flowengine-secret " + self.secret.hex().encode() + b"\n" + self._pem
        write_secret(path, data, replace=False)
