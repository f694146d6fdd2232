"""Whom a client of the coordinator talks to: the pinned CA, and the one name that only a coordinator's certificate has."""

from __future__ import annotations

import ssl
from typing import Any, Final

from flowengine.errors import AuthenticationError

__all__ = ["COORDINATOR_NAME", "client_context", "unchecked_context"]

COORDINATOR_NAME: Final = "flow://coordinator"


def _must_be_the_coordinator(certificate: Any) -> None:
    """End the handshake unless the server is the coordinator.

    The federation's CA also certifies agents, and each of them may listen: without this check one of them could
    stand in for the coordinator and be sent a user's token. It runs before the first byte of a request leaves.
    """
    entries = (certificate or {}).get("subjectAltName", ())  # pairs of kind and value
    names = [value for kind, value in entries if kind == "URI"]
    if names != [COORDINATOR_NAME]:
        shown = ", ".join(map(str, names)) or "nothing"
        raise ssl.SSLCertVerificationError(f"the certificate stands for {shown}, not for {COORDINATOR_NAME}")


class _CoordinatorOnly(ssl.SSLObject):
    def do_handshake(self) -> None:
        super().do_handshake()
        _must_be_the_coordinator(self.getpeercert())


class _CoordinatorOnlySocket(ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        _must_be_the_coordinator(self.getpeercert())


def client_context(
    ca_pem: str, *, cert_file: str | None = None, key_file: str | None = None
) -> ssl.SSLContext:
    """TLS 1.3 towards the coordinator.

    With a pinned CA the host's name does not matter; what the certificate stands for does. Without one (a
    coordinator behind a public certificate) name and public CAs are checked as for any web server.

    Args:
        ca_pem: the federation's CA; empty for the public ones.
        cert_file: an agent's certificate chain, with `key_file` its key.

    Raises:
        AuthenticationError: the CA is not a certificate.
    """
    if ca_pem:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.sslobject_class = _CoordinatorOnly
        context.sslsocket_class = _CoordinatorOnlySocket
        try:
            context.load_verify_locations(cadata=ca_pem)
        except (ssl.SSLError, ValueError) as error:
            raise AuthenticationError(
                f"the CA is not a certificate: {error}", hint="flow login again"
            ) from None
    else:
        context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if cert_file:
        context.load_cert_chain(cert_file, key_file)
    return context


def unchecked_context() -> ssl.SSLContext:
    """For the one question that needs no trust: what the CA is, whose fingerprint is compared afterwards."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
