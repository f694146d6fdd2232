"""Certificates: who a certificate stands for, and when it is not believed."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from flowengine.errors import AuthenticationError, FlowError, UsageError
from flowengine.trust.certificates import (
    AGENT_VALID_S,
    Authority,
    check_certificate,
    check_request,
    issue_coordinator,
    issue_site,
    load_authority,
    make_authority,
    make_key,
    make_request,
    parse_certificate,
    sign_with_key,
    verify_with_certificate,
)

NOW = 1_800_000_000.0
RNG = random.Random(1).randbytes
CA = make_authority(NOW, RNG)
KEY = make_key(RNG)
REQUEST = make_request(KEY, "whatever it says")
LEAF = issue_site(CA, REQUEST, "berlin-2", NOW, RNG)


def reason(certificate: str | bytes, *, now: float = NOW, **more: object) -> str:
    arguments: dict[str, object] = {"kind": "site"} | more
    with pytest.raises(FlowError) as raised:
        check_certificate(certificate, CA.certificate_pem, now, **arguments)  # type: ignore[arg-type]
    assert raised.value.message
    return raised.value.reason


def hand_made(*names: x509.GeneralName, key: object = None, ca: bool | None = False) -> str:
    """A certificate of the right CA with any names and extensions."""
    public = key.public_key() if key is not None else ec.generate_private_key(ec.SECP256R1()).public_key()  # type: ignore[attr-defined]
    moment = datetime.fromtimestamp(NOW, UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(CA._certificate.subject)
        .public_key(public)
        .serial_number(7)
        .not_valid_before(moment)
        .not_valid_after(moment + timedelta(days=1))
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(CA._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def test_a_site_gets_what_the_ca_says_and_not_what_it_asked_for() -> None:
    facts = check_certificate(LEAF, CA.certificate_pem, NOW, kind="site")
    assert (facts.kind, facts.site, facts.shown) == ("site", "berlin-2", "site berlin-2")
    assert facts.key_sha256 == check_request(REQUEST)
    assert facts.not_after == datetime.fromtimestamp(NOW, UTC) + timedelta(seconds=AGENT_VALID_S)
    assert facts.not_before < facts.renew_at < facts.not_after
    assert "whatever" not in x509.load_pem_x509_certificate(LEAF.encode()).subject.rfc4514_string()


def test_a_renewed_certificate_has_the_same_key_and_another_serial() -> None:
    again = parse_certificate(issue_site(CA, make_request(KEY), "berlin-2", NOW + 1, RNG))
    before = parse_certificate(LEAF)
    assert again.key_sha256 == before.key_sha256
    assert again.serial != before.serial


@pytest.mark.parametrize(("offset", "believed"), [(-119, True), (-121, False)])
def test_it_is_believed_a_minute_before_its_time(offset: int, believed: bool) -> None:
    if believed:
        check_certificate(LEAF, CA.certificate_pem, NOW + offset, kind="site")
    else:
        assert reason(LEAF, now=NOW + offset) == "certificate-expired"


@pytest.mark.parametrize(("offset", "believed"), [(AGENT_VALID_S + 59, True), (AGENT_VALID_S + 61, False)])
def test_it_is_believed_a_minute_behind_its_time(offset: int, believed: bool) -> None:
    if believed:
        check_certificate(LEAF, CA.certificate_pem, NOW + offset, kind="site")
    else:
        assert reason(LEAF, now=NOW + offset) == "certificate-expired"


def test_a_revoked_serial_is_refused() -> None:
    assert reason(LEAF, revoked={parse_certificate(LEAF).serial}) == "certificate-revoked"
    check_certificate(LEAF, CA.certificate_pem, NOW, kind="site", revoked={"1234"})


def test_another_ca_of_the_same_name_is_unknown() -> None:
    other = make_authority(NOW, RNG)
    assert reason(issue_site(other, REQUEST, "berlin-2", NOW, RNG)) == "certificate-unknown"
    assert reason(LEAF, kind="coordinator") == "certificate-unknown"


def test_the_coordinator_is_no_site() -> None:
    made = issue_coordinator(CA, KEY, ["localhost", "127.0.0.1", "::1"], NOW, RNG)
    facts = check_certificate(made, CA.certificate_pem, NOW, kind="coordinator")
    assert (facts.kind, facts.site) == ("coordinator", "")
    assert reason(made) == "certificate-unknown"
    names = x509.load_pem_x509_certificate(made.encode()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost"]
    assert len(names.value.get_values_for_type(x509.IPAddress)) == 2


URI = x509.UniformResourceIdentifier


@pytest.mark.parametrize(
    "names",
    [
        [],
        [URI("flow://site/a"), URI("flow://site/b")],
        [URI("flow://site/a"), URI("flow://coordinator")],
        [URI("flow://site/")],
        [URI("flow://site/A")],
        [URI("flow://site/a/b")],
        [URI("https://site/a")],
        [x509.DNSName("a")],
    ],
)
def test_a_certificate_with_other_names_stands_for_nobody(names: list[x509.GeneralName]) -> None:
    assert reason(hand_made(*names)) == "certificate-unknown"


def test_a_site_cannot_sign_for_another() -> None:
    """A leaf that passes itself off as a CA, and a CA that passes itself off as a leaf."""
    leaf = Authority(
        serialization.load_pem_private_key(KEY, None), x509.load_pem_x509_certificate(LEAF.encode())
    )  # type: ignore[arg-type]
    assert reason(issue_site(leaf, REQUEST, "paris", NOW, RNG)) == "certificate-unknown"
    with pytest.raises(AuthenticationError):
        check_certificate(
            issue_site(leaf, REQUEST, "paris", NOW, RNG), CA.certificate_pem + LEAF, NOW, kind="site"
        )
    assert reason(CA.certificate_pem) == "certificate-unknown"
    assert reason(hand_made(URI("flow://site/a"), ca=True)) == "certificate-unknown"


def test_other_keys_than_p256_are_refused() -> None:
    for key in (
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ):
        assert reason(hand_made(URI("flow://site/a"), key=key)) == "certificate-unknown"
        algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm)
        with pytest.raises(UsageError, match="P-256"):
            check_request(request.public_bytes(serialization.Encoding.PEM).decode())
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with pytest.raises(UsageError, match="P-256"):
            make_request(pem)


def test_a_request_for_a_key_that_its_maker_does_not_hold_is_refused() -> None:
    mine = x509.load_pem_x509_csr(REQUEST.encode())
    other = x509.load_pem_x509_csr(make_request(make_key(RNG)).encode())
    der = bytearray(mine.public_bytes(serialization.Encoding.DER))
    position = der.index(mine.signature)
    signature = other.signature.ljust(len(mine.signature), b"\0")[: len(mine.signature)]
    if len(other.signature) == len(mine.signature):
        der[position : position + len(signature)] = signature
    else:
        der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(AuthenticationError) as raised:
        check_request(forged)
    assert raised.value.reason == "certificate-forged"


@pytest.mark.parametrize(
    "text", ["", "x", "é", REQUEST[:100], LEAF, "-----BEGIN CERTIFICATE REQUEST-----\n" + "A" * 20_000]
)
def test_what_is_no_request_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        check_request(text)


@pytest.mark.parametrize("text", ["", "x", b"", b"\x30\x80", REQUEST, LEAF[:200], "é", b"0" * 20_000])
def test_what_is_no_certificate_is_refused(text: str | bytes) -> None:
    assert reason(text) == "certificate-unknown"


def test_a_certificate_of_no_known_version_is_refused() -> None:
    """Found by fuzzing: the library has an error of its own for it, which is no ValueError."""
    der = x509.load_pem_x509_certificate(LEAF.encode()).public_bytes(serialization.Encoding.DER)
    changed = der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x60", 1)
    assert changed != der
    assert reason(changed) == "certificate-unknown"


def test_names_that_cannot_be_a_sites_get_no_certificate() -> None:
    for name in ("", "A", "a.b", "a/b", "-a", "a" * 64, "a\n"):
        with pytest.raises(UsageError):
            issue_site(CA, REQUEST, name, NOW, RNG)


def test_the_ca_survives_its_files() -> None:
    loaded = load_authority(CA.secret_pem(), CA.certificate_pem)
    assert loaded.fingerprint == CA.fingerprint
    check_certificate(issue_site(loaded, REQUEST, "berlin-2", NOW, RNG), CA.certificate_pem, NOW, kind="site")
    with pytest.raises(UsageError, match="belong"):
        load_authority(KEY, CA.certificate_pem)
    assert "PRIVATE" not in repr(CA)
    assert "key" not in repr(CA)


def test_signatures_with_a_sites_key() -> None:
    signature = sign_with_key(KEY, b"text")
    assert signature == sign_with_key(KEY, b"text")
    assert verify_with_certificate(LEAF, signature, b"text")
    assert not verify_with_certificate(LEAF, signature, b"other")
    assert not verify_with_certificate(LEAF, b"", b"text")
