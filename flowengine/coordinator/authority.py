"""The coordinator's secrets on disk, and what is signed with them: certificates, grants, sealed answers.

SECRETS/ca.key, ca.pem    the federation's CA
SECRETS/grant.key         Ed25519 key of grants
SECRETS/server.key        key of the coordinator's own certificate, which is issued anew at each start
SECRETS/epoch             highest epoch of any start: not in the database, so that a restore does not lower it
SECRETS/admin-login       login string of the first admin, written once
"""

from __future__ import annotations

import os
import ssl
from base64 import b64decode, b64encode
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from flowengine.errors import LocalError, NotFound, UsageError
from flowengine.store.secret_files import make_secret_folder, read_secret, write_secret
from flowengine.trust import certificates as trust
from flowengine.trust.fences import next_epoch
from flowengine.trust.grant import Grant, GrantKey
from flowengine.trust.relay_grant import RelayGrant, sign_relay_grant

__all__ = ["Secrets"]

_SEALING: Final = b"flowengine sealed answers 1"
_EVIDENCE: Final = b"flowengine evidence digests 1"


class Secrets:
    """What is in the folder of secrets; made where it is missing.

    Args:
        folder: SECRETS; 0700.
        now: Unix seconds.
        agent_valid_s: how long an agent's certificate is good.
    """

    def __init__(self, folder: str, now: float, agent_valid_s: int = trust.AGENT_VALID_S) -> None:
        make_secret_folder(folder)
        self.folder = Path(folder)
        self.agent_valid_s = agent_valid_s
        self.authority = self._authority(now)
        self._grant_key = GrantKey(self._bytes("grant.key", lambda: GrantKey.make(os.urandom).secret_bytes()))
        self._served: tuple[ssl.SSLContext, list[str]] | None = None
        self._renew_at = 0.0
        self._sealing = AESGCM(sha256(_SEALING + self._grant_key.secret_bytes()).digest())

    def _bytes(self, name: str, make: object) -> bytes:
        path = str(self.folder / name)
        try:
            return read_secret(path)
        except NotFound:
            assert callable(make)
            write_secret(path, make(), replace=False)
            return read_secret(path)

    def _authority(self, now: float) -> trust.Authority:
        key, certificate = str(self.folder / "ca.key"), str(self.folder / "ca.pem")
        try:
            return trust.load_authority(read_secret(key), read_secret(certificate).decode("ascii"))
        except NotFound:
            if os.path.exists(key) or os.path.exists(certificate):
                raise LocalError(
                    f"of ca.key and ca.pem in {self.folder} one is missing",
                    hint="restore both from the same backup; without them every site must be enrolled anew",
                ) from None
        made = trust.make_authority(now, os.urandom)
        write_secret(certificate, made.certificate_pem.encode("ascii"), replace=False)
        write_secret(key, made.secret_pem(), replace=False)
        return made

    @property
    def ca_pem(self) -> str:
        """The trust anchor."""
        return self.authority.certificate_pem

    @property
    def grant_keys(self) -> dict[str, str]:
        """Public keys of grants, hexadecimal, by id."""
        return {self._grant_key.id: self._grant_key.public.hex()}

    def sign_grant(self, grant: Grant) -> bytes:
        """The grant as agents check it."""
        return self._grant_key.sign(grant)

    def sign_relay_grant(self, grant: RelayGrant) -> bytes:
        """The relay grant as agents check it."""
        return sign_relay_grant(self._grant_key, grant)

    def issue(self, request_pem: str, site: str, now: float) -> str:
        """A certificate for a site's key."""
        return trust.issue_site(
            self.authority, request_pem, site, now, os.urandom, valid_s=self.agent_valid_s
        )

    def raise_epoch(self, stored: int, now: float) -> int:
        """The epoch of this start, kept beside the secrets before anybody hears of it."""
        path = str(self.folder / "epoch")
        try:
            filed = int(read_secret(path))
        except NotFound:
            filed = 0
        except ValueError:
            raise LocalError(
                f"{path} holds no number", hint="restore it, or write a number above every epoch so far"
            ) from None
        epoch = next_epoch(stored, filed, now)
        write_secret(path, str(epoch).encode("ascii"))
        return epoch

    def server_context(self, names: Sequence[str], now: float) -> ssl.SSLContext:
        """TLS of the server: 1.3 only, its certificate for these names, client certificates of the own CA welcome."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._served = (context, list(names))
        self._renew_at = 0.0
        self.renew_server(now)
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=self.ca_pem)
        context.set_alpn_protocols(["http/1.1"])
        return context

    def signer(self, now: float) -> tuple[bytes, bytes]:
        """The coordinator's key and its certificate (DER), for what it signs to be verified years later."""
        key = self._bytes("server.key", lambda: trust.make_key(os.urandom))
        certificate = trust.issue_coordinator(self.authority, key, [], now, os.urandom)
        return key, ssl.PEM_cert_to_DER_cert(certificate)

    @property
    def evidence_key(self) -> bytes:
        """Key of the digests that stand for personal values in the coordinator's evidence."""
        return sha256(_EVIDENCE + self._grant_key.secret_bytes()).digest()

    def renew_server(self, now: float) -> None:
        """Give the server a new certificate where half of the old one's time is over; new connections see it."""
        if self._served is None or now < self._renew_at:
            return
        context, names = self._served
        key = self._bytes("server.key", lambda: trust.make_key(os.urandom))
        certificate = trust.issue_coordinator(self.authority, key, names, now, os.urandom)
        self._renew_at = trust.parse_certificate(certificate).renew_at.timestamp()
        path = str(self.folder / f"server.{os.getpid()}.pem")
        write_secret(path, certificate.encode("ascii") + self.ca_pem.encode("ascii") + key)
        try:
            context.load_cert_chain(path)
        finally:
            os.unlink(path)

    def seal(self, text: str, about: str) -> str:
        """Text that only this federation's coordinators can read again."""
        nonce = os.urandom(12)
        return b64encode(nonce + self._sealing.encrypt(nonce, text.encode(), about.encode())).decode("ascii")

    def unseal(self, sealed: str, about: str) -> str:
        """The text that was sealed for `about`."""
        data = b64decode(sealed)
        try:
            return self._sealing.decrypt(data[:12], data[12:], about.encode()).decode()
        except InvalidTag:
            raise UsageError(
                "the answer that was kept for this Idempotency-Key was sealed with another secret",
                hint="ask again with a new key",
            ) from None
