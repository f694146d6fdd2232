"""Coverage-guided fuzzing of what strangers show: grants, releases, statements, receipts, certificates, requests, tokens.

Usage: python tests/fuzz/fuzz_trust.py TARGET [libFuzzer options], as `grants -max_total_time=60`. Needs
atheris; importing this module, and calling the targets with bytes, does not.

A target must take any bytes: a `FlowError` of the kinds that it names is right, anything else is a finding.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from flowengine.errors import AuthenticationError, IntegrityError, UsageError
from flowengine.policy.agreements import Agreement
from flowengine.policy.labels import Labelling
from flowengine.policy.model import Authority
from flowengine.trust.agreement import AGREEMENT_DOMAIN, AgreementStatement, sign_agreement, verify_agreement
from flowengine.trust.certificates import (
    check_certificate,
    check_request,
    issue_site,
    make_authority,
    make_key,
    make_request,
    parse_certificate,
    sign_with_key,
)
from flowengine.trust.envelope import Envelope, open_envelope, seal_envelope, seal_signed, signed_bytes
from flowengine.trust.grant import GRANT_DOMAIN, Grant, GrantKey, Party, check_grant
from flowengine.trust.grant_checks import HOLD
from flowengine.trust.labels import LABEL_DOMAIN, LabelStatement, sign_labels, verify_labels
from flowengine.trust.receipt import verify_receipt
from flowengine.trust.relay_grant import (
    RELAY_GRANT_DOMAIN,
    RelayGrant,
    Stop,
    check_relay_grant,
    sign_relay_grant,
)
from flowengine.trust.release import RELEASE_DOMAIN, Release, check_release, sign_release
from flowengine.trust.tokens import JoinSecret, Login, UserToken

_NOW: Final = 1_800_000_000
_RNG: Final = random.Random(8).randbytes
_CA: Final = make_authority(_NOW, _RNG)
_KEY: Final = GrantKey.make(_RNG)
_A, _B = (Party(site, site * 64) for site in "ab")
_REQUEST: Final = make_request(make_key(_RNG), "a")
_GRANT: Final = _KEY.sign(
    Grant(
        id=bytes(16),
        transfer="t",
        task="t",
        fence=1,
        epoch=1,
        issued=_NOW,
        expires=_NOW + 300,
        source=_A,
        target=_B,
        dial="target",
        route=["a", "b"],
        source_path="/a",
        target_path="/b",
        mode="copy",
        secret=bytes(32),
    )
)


_PAYLOAD: Final = open_envelope(_GRANT, GRANT_DOMAIN, "", "").payload


_RELAY_GRANT: Final = sign_relay_grant(
    _KEY,
    RelayGrant(
        id=bytes(16),
        transfer="t",
        task="t",
        fence=1,
        epoch=1,
        issued=_NOW,
        expires=_NOW + 300,
        stops=[Stop("b", _B.key_sha256), Stop("r", "r" * 64, "r:1"), Stop("a", _A.key_sha256, "a:1")],
        dial="target",
        source_path="/a",
        target_path="/b",
    ),
)
_RELAY_PAYLOAD: Final = open_envelope(_RELAY_GRANT, RELAY_GRANT_DOMAIN, "", "").payload


_SOURCE_KEY: Final = make_key(_RNG)
_SOURCE_DER: Final = x509.load_pem_x509_certificate(
    issue_site(_CA, make_request(_SOURCE_KEY, "s"), "s", _NOW, _RNG).encode()
).public_bytes(Encoding.DER)
_S: Final = Party("s", parse_certificate(_SOURCE_DER).key_sha256)
_RELEASE: Final = sign_release(
    Release(
        transfer="t",
        task="t",
        fence=1,
        route=[_S, _B],
        source_path="/a",
        target_path="/b",
        issued=_NOW,
        expires=_NOW + 300,
        labels=["l"],
    ),
    _SOURCE_KEY,
    _SOURCE_DER,
)
_OWNER: Final = Ed25519PrivateKey.from_private_bytes(_RNG(32))
_PUBLIC: Final = _OWNER.public_key().public_bytes_raw()
_LABELS: Final = sign_labels(
    LabelStatement(
        owner="o", site="s", path="/a", number=1, issued=_NOW, labels=["l"], facts={"data.persons": 3}
    ),
    _OWNER,
)
_AGREEMENT: Final = sign_agreement(
    AgreementStatement(
        authority="o", id="ag", number=1, issued=_NOW, roots=["s:/a"], recipients=["b"],
        facts={"agreement.mechanism": "scc"},
    ),
    _OWNER,
)  # fmt: skip


def _payload(document: bytes, domain: str) -> bytes:
    return open_envelope(document, domain, "", "").payload


_RELEASE_PAYLOAD: Final = _payload(_RELEASE, RELEASE_DOMAIN)


def _signed_by_source(payload: bytes) -> bytes:
    """A release with any payload, with a good signature."""
    return seal_envelope(
        Envelope(
            domain=RELEASE_DOMAIN,
            payload=payload,
            signature=sign_with_key(_SOURCE_KEY, signed_bytes(RELEASE_DOMAIN, payload)),
            certificate=_SOURCE_DER,
        )
    )


def _changed(good: bytes, data: bytes) -> bytes:
    """What follows the first byte; where that is odd, as a change of what is good."""
    if not (data[:1] and data[0] & 1):
        return data[1:]
    change = data[1:].ljust(len(good), b"\0")[: len(good)]
    return bytes(a ^ b for a, b in zip(good, change, strict=True)) + data[1 + len(good) :]


def _check(document: bytes) -> Grant:
    return check_grant(document, {_KEY.id: _KEY.public}, _NOW, me=_B, peer=_A, end="target", dials=True)


def grants(data: bytes) -> None:
    """A document as a stranger shows it; with an odd first byte the right one, changed."""
    document = _changed(_GRANT, data)
    try:
        _check(document)
    except AuthenticationError as error:
        str(error).encode("utf-8")
        return
    if document != _GRANT:
        raise AssertionError("a grant was forged")


def signed_grants(data: bytes) -> None:
    """A payload that the coordinator did sign: whatever it says, it is taken or refused, and what is taken is sane."""
    payload = _changed(_PAYLOAD, data)
    document = _KEY.sign_payload(GRANT_DOMAIN, payload) if len(payload) < 8192 else b""
    try:
        grant = _check(document)
    except AuthenticationError as error:
        str(error).encode("utf-8", "surrogatepass")
        return
    if (
        set(grant.required) - {HOLD}
        or grant.fence < 1
        or not grant.source_path.startswith("/")
        or ".." in grant.route
    ):
        raise AssertionError("a grant was taken that nobody can keep")


def relay_grants(data: bytes) -> None:
    """A relay grant as a neighbour shows it, and a payload that the coordinator did sign."""
    payload = _changed(_RELAY_PAYLOAD, data)
    shown = [_changed(_RELAY_GRANT, data)]
    if len(payload) < 8192:
        shown.append(_KEY.sign_payload(RELAY_GRANT_DOMAIN, payload))
    me = Party("r", "r" * 64)
    for document in shown:
        try:
            grant = check_relay_grant(document, {_KEY.id: _KEY.public}, _NOW, me=me, before=_B)
        except AuthenticationError as error:
            str(error).encode("utf-8", "surrogatepass")
            continue
        at = grant.place(me)
        if document is shown[0] and document != _RELAY_GRANT:
            raise AssertionError("a relay grant was forged")
        if (
            not at
            or set(grant.required) - {HOLD}
            or grant.stops[at - 1].party != _B
            or len(set(grant.sites)) < 3
        ):
            raise AssertionError("a relay grant was taken that nobody can keep")


def releases(data: bytes) -> None:
    """A release as a peer shows it, and one that the source's key did sign, with any payload."""
    shown = [_changed(_RELEASE, data)]
    payload = _changed(_RELEASE_PAYLOAD, data)
    if len(payload) < 8192:
        shown.append(_signed_by_source(payload))
    for document in shown:
        try:
            found, _ = check_release(
                document, _CA.certificate_pem, _NOW, transfer="t", task="t", fence=1, route=[_S, _B], source_path="/a",
                target_path="/b",
            )  # fmt: skip
        except AuthenticationError as error:
            str(error).encode("utf-8", "surrogatepass")
            continue
        if (
            document is shown[0]
            and open_envelope(document, RELEASE_DOMAIN, "", "").payload != _RELEASE_PAYLOAD
        ):
            raise AssertionError("a release was forged")
        if (found.task, found.route[0], found.source_path) != ("t", _S, "/a"):
            raise AssertionError("a release was taken that nobody can keep")


def labels(data: bytes) -> None:
    """A label statement as a coordinator hands it on, and any payload that its owner did sign."""
    _statements(data, _LABELS, LABEL_DOMAIN, lambda document: verify_labels(document, {"o": _PUBLIC}))


def agreements(data: bytes) -> None:
    """An agreement as a coordinator hands it on, and any payload that its authority did sign."""
    known = {"o": Authority("o", _PUBLIC, (("*", "/"),), ("agreement.*",))}
    _statements(data, _AGREEMENT, AGREEMENT_DOMAIN, lambda document: verify_agreement(document, known))


def _statements(
    data: bytes, good: bytes, domain: str, read: Callable[[bytes], Labelling | Agreement]
) -> None:
    shown = [_changed(good, data)]
    payload = _changed(_payload(good, domain), data)
    if len(payload) < 8192:
        shown.append(seal_signed(domain, payload, _OWNER))
    for document in shown:
        try:
            found = read(document)
        except AuthenticationError as error:
            str(error).encode("utf-8", "surrogatepass")
            continue
        if document is shown[0] and open_envelope(document, domain, "", "").payload != _payload(good, domain):
            raise AssertionError("a statement was forged")
        if found.number < 1 or found.key != _PUBLIC:
            raise AssertionError("a statement was taken that nobody can mean")


def receipts(data: bytes) -> None:
    """A receipt that somebody shows."""
    try:
        verify_receipt(data, _CA.certificate_pem)
    except (AuthenticationError, IntegrityError):
        return
    raise AssertionError("a receipt was forged")


def certificates(data: bytes) -> None:
    """A certificate in DER; with an odd first byte as PEM text."""
    shown: str | bytes = data[1:]
    if data[:1] and data[0] & 1:
        shown = data[1:].decode("utf-8", "replace")
    try:
        check_certificate(shown, _CA.certificate_pem, _NOW, kind="site")
    except AuthenticationError:
        return
    raise AssertionError("a certificate was forged")


def requests(data: bytes) -> None:
    """A certificate request; whoever proves a key gets one for its site and nothing more."""
    text = data.decode("utf-8", "replace")
    if data[:1] and data[0] & 1:
        text = _REQUEST[: data[0]] + text[1:] + _REQUEST[data[0] :]
    try:
        check_request(text)
    except (UsageError, AuthenticationError):
        return
    issued = issue_site(_CA, text, "a", _NOW, _RNG)
    if check_certificate(issued, _CA.certificate_pem, _NOW, kind="site").site != "a":
        raise AssertionError("a request chose its own name")


def tokens(data: bytes) -> None:
    """What somebody pasted, or sent as a bearer token."""
    text = data.decode("utf-8", "surrogateescape")
    for kind, prefix in ((UserToken, "flowt_"), (JoinSecret, "flowj_"), (Login, "flowl_")):
        for tried in (text, prefix + text):
            try:
                token = kind.parse(tried)
            except UsageError as error:
                str(error).encode("utf-8")
                continue
            if kind.parse(token.format_secret()) != token:
                raise AssertionError("a token changed on its way")


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target
    for target in (
        grants,
        signed_grants,
        relay_grants,
        releases,
        labels,
        agreements,
        receipts,
        certificates,
        requests,
        tokens,
    )
}


if __name__ == "__main__":
    from instrument import fuzz

    fuzz(sys.argv, TARGETS, "flowengine.trust.")
