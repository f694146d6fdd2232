"""The federation's own certificates: one CA, a leaf for each site's agent and for the coordinator.

Goal
    An agent proves that it is a site with a key that never left it; a few days after its last renewal, or once it
    is revoked, nobody believes that key any more.
Plan
    ECDSA P-256 throughout (X.509, RFC 5280). The CA signs leaves and nothing else (path length 0). What a leaf
    stands for is its one URI name, `flow://site/NAME` or `flow://coordinator`; host names are there for ordinary
    tools only. A key is named by the SHA-256 of its SubjectPublicKeyInfo (`key_sha256`), which renewal keeps.
Invariants
    - What a request says about itself beyond its key is never taken over into a certificate.
    - A certificate with two URI names, an unknown one, or another kind of key stands for nobody.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from flowengine.errors import AuthenticationError, UsageError
from flowengine.trust.certificate_facts import SKEW_S, CertificateFacts, Rng
from flowengine.units import is_name

__all__ = [
    "AGENT_VALID_S",
    "COORDINATOR_VALID_S",
    "MAX_PEM_BYTES",
    "Authority",
    "check_certificate",
    "check_request",
    "issue_coordinator",
    "issue_site",
    "load_authority",
    "make_authority",
    "make_key",
    "make_request",
    "parse_certificate",
    "sign_with_key",
    "verify_with_certificate",
]

AGENT_VALID_S: Final = 7 * 86400
COORDINATOR_VALID_S: Final = 30 * 86400
AUTHORITY_VALID_S: Final = 20 * 365 * 86400
MAX_PEM_BYTES: Final = 16 * 1024
MAX_NAMES: Final = 32
"""Host names and addresses of a coordinator's certificate."""

_SITE_URI: Final = "flow://site/"
_COORDINATOR_URI: Final = "flow://coordinator"
_CURVE: Final = ec.SECP256R1()
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Order of P-256's base point (SEC 2, 2.4.2)."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A federation's CA: its key and its self-signed certificate."""

    _key: ec.EllipticCurvePrivateKey = field(repr=False)
    _certificate: x509.Certificate = field(repr=False)

    @property
    def certificate_pem(self) -> str:
        """The trust anchor, as sites and clients get it."""
        return _pem(self._certificate)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate: what a join token pins."""
        return sha256(_der(self._certificate)).digest()

    def secret_pem(self) -> bytes:
        """The private key; only for the coordinator's own secret file."""
        return _key_pem(self._key)


def make_authority(now: float, rng: Rng, *, name: str = "flowengine federation") -> Authority:
    """A new CA, valid for twenty years."""
    key = _make_key(rng)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = _builder(subject, subject, key.public_key(), now, AUTHORITY_VALID_S, rng)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    )
    return Authority(key, certificate)


def load_authority(secret_pem: bytes, certificate_pem: str) -> Authority:
    """The CA in two files.

    Raises:
        UsageError: they are not a P-256 key and its certificate.
    """
    key = _load_key(secret_pem)
    certificate = _load_certificate(certificate_pem)
    if certificate.public_key() != key.public_key():
        raise UsageError(
            "the key and the certificate of the CA do not belong together",
            hint="restore both files from the same backup",
        )
    return Authority(key, certificate)


def make_key(rng: Rng) -> bytes:
    """A new P-256 private key (PKCS #8, PEM)."""
    return _key_pem(_make_key(rng))


def make_request(secret_pem: bytes, name: str = "") -> str:
    """A certificate request (PKCS #10, PEM) for a key; `name` is a word for people and decides nothing."""
    key = _load_key(secret_pem)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)] if name else [])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True).public_bytes(
        serialization.Encoding.PEM
    ).decode("ascii")  # fmt: skip


def check_request(request_pem: str) -> str:
    """The name (`key_sha256`) of the key that a request is for, once it proved that its maker holds it.

    Raises:
        UsageError: it is no request, or for a key that is not ECDSA P-256.
        AuthenticationError: its signature is wrong (reason "certificate-forged").
    """
    return _key_sha256(_requested_key(request_pem))


def issue_site(
    authority: Authority, request_pem: str, site: str, now: float, rng: Rng, *, valid_s: int = AGENT_VALID_S
) -> str:
    """A site's certificate (PEM) for the key of a request; errors as for `check_request`."""
    if not is_name(site):
        raise UsageError(f"{site!r} cannot name a site", hint="use lower-case letters, digits and hyphens")
    return _issue(authority, _requested_key(request_pem), _SITE_URI + site, site, (), now, valid_s, rng)


def issue_coordinator(
    authority: Authority,
    secret_pem: bytes,
    names: Sequence[str],
    now: float,
    rng: Rng,
    *,
    valid_s: int = COORDINATOR_VALID_S,
) -> str:
    """The coordinator's server certificate (PEM) for its key; `names` are host names and addresses."""
    key = _load_key(secret_pem).public_key()
    return _issue(authority, key, _COORDINATOR_URI, "coordinator", names, now, valid_s, rng)


def parse_certificate(certificate: str | bytes) -> CertificateFacts:
    """What a certificate (PEM text, or DER) says; nothing is checked but its form.

    Raises:
        AuthenticationError: it stands for nobody here (reason "certificate-unknown").
    """
    return _facts(_load_certificate(certificate))


def check_certificate(
    certificate: str | bytes,
    anchors_pem: str,
    now: float,
    *,
    kind: Literal["site", "coordinator"],
    revoked: Collection[str] = (),
) -> CertificateFacts:
    """The facts of a peer's certificate that may be believed.

    TLS has checked the chain by the system's clock already; this is what decides.

    Args:
        certificate: leaf, PEM or DER.
        anchors_pem: certificates of the CAs that may have signed it.
        now: Unix seconds.
        kind: who it must be.
        revoked: serials that are no longer believed.

    Raises:
        AuthenticationError: reason "certificate-unknown" (another CA, or another kind of party),
            "certificate-expired" or "certificate-revoked".
    """
    leaf = _load_certificate(certificate)
    facts = _facts(leaf)
    if not any(_signed_by(leaf, anchor) for anchor in _load_anchors(anchors_pem)):
        raise _refused(
            f"the certificate of {facts.shown} was not signed by this federation's CA",
            "certificate-unknown",
            "enrol the site here, or look whether somebody pretends to be it",
        )
    if facts.kind != kind:
        raise _refused(f"a {kind} was expected and {facts.shown} answered", "certificate-unknown")
    moment = datetime.fromtimestamp(now, UTC)
    skew = timedelta(seconds=SKEW_S)
    if moment < facts.not_before - skew or moment > facts.not_after + skew:
        raise _refused(
            f"the certificate of {facts.shown} is valid from {facts.not_before:%Y-%m-%d %H:%M} to "
            f"{facts.not_after:%Y-%m-%d %H:%M} UTC, and it is {moment:%Y-%m-%d %H:%M}",
            "certificate-expired",
            "look at both clocks (flow doctor); an agent that was away too long joins again with a new token",
        )
    if facts.serial in revoked:
        raise _refused(
            f"the certificate of {facts.shown} (serial {facts.serial}) was revoked",
            "certificate-revoked",
            "if that was a mistake, an operator makes a new join token for the site",
        )
    return facts


def sign_with_key(secret_pem: bytes, data: bytes) -> bytes:
    """ECDSA P-256 signature with SHA-256 (DER), deterministic (RFC 6979)."""
    return _load_key(secret_pem).sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))


def verify_with_certificate(certificate: str | bytes, signature: bytes, data: bytes) -> bool:
    """Whether the holder of a certificate's key signed `data`."""
    key = _load_certificate(certificate).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    try:
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _issue(
    authority: Authority,
    key: ec.EllipticCurvePublicKey,
    uri: str,
    common_name: str,
    names: Sequence[str],
    now: float,
    valid_s: int,
    rng: Rng,
) -> str:
    if len(names) > MAX_NAMES:
        raise UsageError(f"{len(names)} names are more than a certificate takes here ({MAX_NAMES})")
    issuer = authority._certificate
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    issuer_key = authority._key.public_key()
    extended = [ExtendedKeyUsageOID.SERVER_AUTH]
    if uri != _COORDINATOR_URI:
        extended.append(ExtendedKeyUsageOID.CLIENT_AUTH)
    certificate = (
        _builder(subject, issuer.subject, key, now, valid_s, rng)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(extended), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri), *map(_host, names)]),
            critical=False,
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
        .sign(authority._key, hashes.SHA256(), ecdsa_deterministic=True)
    )
    return _pem(certificate)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: float,
    valid_s: int,
    rng: Rng,
) -> x509.CertificateBuilder:
    moment = datetime.fromtimestamp(int(now), UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        # 127 random bits; the first bit set, so that it is never short, and never negative (RFC 5280, 4.1.2.2).
        .serial_number(int.from_bytes(rng(16), "big") >> 1 | 1 << 126)
        # The past minute as well: a peer's clock may be a little behind.
        .not_valid_before(moment - timedelta(seconds=SKEW_S))
        .not_valid_after(moment + timedelta(seconds=valid_s))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _make_key(rng: Rng) -> ec.EllipticCurvePrivateKey:
    # 64 bits more than the order has, so that the remainder is uniform (FIPS 186-5, A.2.1).
    return ec.derive_private_key(int.from_bytes(rng(40), "big") % (_ORDER - 1) + 1, _CURVE)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _load_key(secret_pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(secret_pem, None)
    except (ValueError, TypeError):
        raise UsageError(
            "this is no private key in PEM form", hint="restore the file, or join again"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError("the private key is not ECDSA P-256", hint="let the agent make its own key")
    return key


def _requested_key(request_pem: str) -> ec.EllipticCurvePublicKey:
    try:
        if len(request_pem) > MAX_PEM_BYTES:
            raise ValueError
        request = x509.load_pem_x509_csr(request_pem.encode("ascii"))
        key = request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise UsageError("this is no certificate request in PEM form") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError(
            "the request is for a key that is not ECDSA P-256", hint="let the agent make its key"
        )
    if not request.is_signature_valid:
        raise _refused("a certificate request is not signed by the key that it is for", "certificate-forged")
    return key


def _load_certificate(certificate: str | bytes) -> x509.Certificate:
    try:
        if len(certificate) > MAX_PEM_BYTES:
            raise ValueError
        if isinstance(certificate, str):
            made = x509.load_pem_x509_certificate(certificate.encode("ascii"))
        else:
            made = x509.load_der_x509_certificate(certificate)
        key = made.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise _refused("what was shown cannot be read as a certificate", "certificate-unknown") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise _refused("a certificate for a key that is not ECDSA P-256 was shown", "certificate-unknown")
    return made


def _load_anchors(anchors_pem: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(anchors_pem.encode("ascii"))
    except (ValueError, TypeError, x509.InvalidVersion):
        raise UsageError(
            "the CA's certificate cannot be read", hint="restore the file, or join again"
        ) from None


def _signed_by(leaf: x509.Certificate, anchor: x509.Certificate) -> bool:
    try:
        leaf.verify_directly_issued_by(anchor)
        return anchor.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound, UnsupportedAlgorithm):
        return False


def _facts(certificate: x509.Certificate) -> CertificateFacts:
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    kind, site = _stands_for(certificate)
    return CertificateFacts(
        kind,
        site,
        f"{certificate.serial_number:x}",
        _key_sha256(key),
        sha256(_der(certificate)).digest(),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )


def _stands_for(certificate: x509.Certificate) -> tuple[Literal["site", "coordinator", "authority"], str]:
    try:
        extensions = certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        if constraints.ca:
            return "authority", ""
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (
        ValueError,
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ):
        uris = []
    if uris == [_COORDINATOR_URI]:
        return "coordinator", ""
    if len(uris) == 1 and uris[0].startswith(_SITE_URI) and is_name(uris[0].removeprefix(_SITE_URI)):
        return "site", uris[0].removeprefix(_SITE_URI)
    raise _refused(
        "a certificate that stands for no site and no coordinator was shown", "certificate-unknown"
    )


def _key_sha256(key: ec.EllipticCurvePublicKey) -> str:
    info = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
    return sha256(info).hexdigest()


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _refused(message: str, reason: str, hint: str = "") -> AuthenticationError:
    return AuthenticationError(message, hint=hint, reason=reason)
