"""Who this agent is: its key, its certificate, whom it believes; enrolment and renewal.

Goal
    A one-time token becomes a certificate for a key that never leaves this host, and the certificate renews itself.
Plan
    The token pins the CA: the coordinator's CA is fetched from an address that proves nothing, compared with the
    token's fingerprint, and only then pinned and spoken to. Renewal is a request over the connection that the
    present certificate opens.
Invariants
    - The key's file is never readable by others, and is never replaced: the site is known by that key.
    - What is stored is stored whole: files are written beside and renamed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Final

import msgspec
import trio

import flowengine
from flowengine.api.agents import Enrolled, Join, Renewal
from flowengine.client.tls import client_context
from flowengine.errors import AuthenticationError, LocalError, NotFound, UsageError
from flowengine.store.secret_files import make_secret_folder, read_secret, write_secret
from flowengine.transfer.sites import SiteIdentity
from flowengine.trust.certificate_facts import CertificateFacts
from flowengine.trust.certificates import make_key, make_request, parse_certificate
from flowengine.trust.tokens import JoinSecret
from flowengine_agent.coordinator_link import CoordinatorLink, fetch_ca

__all__ = ["Identity", "enrol", "keep_grant_keys", "load_identity", "renew"]

_KEY: Final = "key.pem"
_CHAIN: Final = "certificate.pem"
_FEDERATION: Final = "federation.json"


class _Federation(msgspec.Struct, kw_only=True):
    """What enrolment taught, beside the certificate."""

    site: str
    url: str
    ca_pem: str
    grant_keys: dict[str, str]


@dataclass(frozen=True)
class Identity:
    """Key, certificate and trust of an enrolled site.

    Attributes:
        folder: where they are kept.
        site: the site's name, as the certificate says it.
        url: address of the coordinator that enrolled it.
        ca_pem: the federation's CA.
        grant_keys: public keys (raw) that sign grants, by id.
        chain_pem: the certificate, leaf first.
        facts: what the leaf says.
    """

    folder: str
    site: str
    url: str
    ca_pem: str
    grant_keys: dict[str, bytes]
    chain_pem: str
    facts: CertificateFacts

    @property
    def key_file(self) -> str:
        """Path of the private key."""
        return os.path.join(self.folder, _KEY)

    @property
    def chain_file(self) -> str:
        """Path of the certificate chain."""
        return os.path.join(self.folder, _CHAIN)

    def secret_pem(self) -> bytes:
        """The private key; only to sign with."""
        return read_secret(self.key_file)

    def for_engine(self) -> SiteIdentity:
        """The same as the engine shows it to other sites."""
        return SiteIdentity(self.chain_pem, self.secret_pem(), self.ca_pem)


def load_identity(folder: str) -> Identity | None:
    """What an earlier enrolment left; None where there was none.

    Raises:
        LocalError: it cannot be read, or others can read the key.
    """
    try:
        chain = read_secret(os.path.join(folder, _CHAIN)).decode("ascii")
        federation = msgspec.json.decode(read_secret(os.path.join(folder, _FEDERATION)), type=_Federation)
        read_secret(os.path.join(folder, _KEY))
    except NotFound:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LocalError(
            f"the agent's identity in {folder} cannot be used: {error}",
            hint="restore the folder, or remove it and enrol the site with a new join token",
        ) from None
    keys = {name: bytes.fromhex(key) for name, key in federation.grant_keys.items()}
    return Identity(
        folder, federation.site, federation.url, federation.ca_pem, keys, chain, parse_certificate(chain)
    )


async def enrol(folder: str, token_text: str, site: str, urls: tuple[str, ...]) -> Identity:
    """Join the federation with a one-time token.

    Args:
        site: name of the configuration; the token must be for it.
        urls: addresses of the configuration; the token's own where there are none.

    Raises:
        UsageError: the token is none, or another site's.
        AuthenticationError: whoever answers has not the CA that the token names, or does not take the token.
        TemporaryError: the coordinator does not answer.
    """
    token = JoinSecret.parse(token_text)
    if token.site != site:
        raise UsageError(
            f"the join token is for site {token.site!r}; this configuration is site {site!r}",
            hint=f"ask for a token for {site!r}: flow site token {site}",
        )
    url = urls[0] if urls else token.url
    ca_pem = await fetch_ca(url)
    if _fingerprint(ca_pem) != token.ca_sha256:
        raise AuthenticationError(
            f"whoever answers at {url} is not the coordinator that made the join token: it has another CA",
            hint="check the address; if it is right, somebody may be in between",
            reason="coordinator-forged",
        )
    key = await trio.to_thread.run_sync(_own_key, folder)
    link = CoordinatorLink([url], client_context(ca_pem))
    try:
        body = Join(
            token=token_text.strip(), request_pem=make_request(key, site), software=flowengine.__version__
        )
        enrolled = await link.post("/v1/agent/join", body, Enrolled)
    finally:
        await link.aclose()
    return _store(folder, enrolled, url, ca_pem, site)


async def renew(identity: Identity, link: CoordinatorLink) -> Identity:
    """A new certificate for the same key; errors as of `CoordinatorLink.post`."""
    request = make_request(identity.secret_pem(), identity.site)
    enrolled = await link.post("/v1/agent/renew", Renewal(request_pem=request), Enrolled)
    return _store(identity.folder, enrolled, identity.url, identity.ca_pem, identity.site)


def _store(folder: str, enrolled: Enrolled, url: str, ca_pem: str, site: str) -> Identity:
    facts = parse_certificate(enrolled.certificate_pem)
    if (facts.kind, facts.site) != ("site", site):
        raise AuthenticationError(
            f"the coordinator gave site {site!r} a certificate for {facts.shown}", hint="look at its log"
        )
    # The CA stays what the token pinned: a coordinator cannot make its agents believe another one.
    federation = _Federation(site=site, url=url, ca_pem=ca_pem, grant_keys=enrolled.grant_keys)
    write_secret(os.path.join(folder, _FEDERATION), msgspec.json.encode(federation))
    write_secret(os.path.join(folder, _CHAIN), enrolled.certificate_pem.encode("ascii"))
    made = load_identity(folder)
    assert made is not None
    return made


def keep_grant_keys(identity: Identity, grant_keys: dict[str, str]) -> Identity:
    """The identity with the grant keys that the coordinator has now; stored where they changed."""
    keys = {name: bytes.fromhex(key) for name, key in grant_keys.items()}
    if keys == identity.grant_keys:
        return identity
    federation = _Federation(
        site=identity.site, url=identity.url, ca_pem=identity.ca_pem, grant_keys=grant_keys
    )
    write_secret(os.path.join(identity.folder, _FEDERATION), msgspec.json.encode(federation))
    return replace(identity, grant_keys=keys)


def _own_key(folder: str) -> bytes:
    """This host's key, made where there is none."""
    make_secret_folder(folder)
    path = os.path.join(folder, _KEY)
    try:
        return read_secret(path)
    except NotFound:
        key = make_key(os.urandom)
        write_secret(path, key, replace=False)
        return key


def _fingerprint(ca_pem: str) -> bytes:
    from ssl import PEM_cert_to_DER_cert

    try:
        return sha256(PEM_cert_to_DER_cert(ca_pem)).digest()
    except ValueError:
        return b""
