"""Releases: a source's signed word that its own policies let these data leave for this target over this route.

The source signs with the key of its certificate, as a receipt is signed. Whoever stands behind it on the route checks
that it is the pinned source's, for this very task, path and route, and not expired; then decides for itself. A
release permits nothing alone: without one nobody takes a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Final

import msgspec

from flowengine.errors import AuthenticationError
from flowengine.trust.certificate_facts import SKEW_S, CertificateFacts
from flowengine.trust.envelope import open_envelope, signed_bytes
from flowengine.trust.grant import Party
from flowengine.trust.site_documents import sign_as_site

__all__ = [
    "MAX_VALID_S",
    "RELEASE_DOMAIN",
    "Release",
    "Sealed",
    "check_release",
    "release_id",
    "sign_release",
]

RELEASE_DOMAIN: Final = "flowengine release 1"
MAX_VALID_S: Final = 900
"""No release is believed for longer, whatever it says."""


class Sealed(msgspec.Struct, frozen=True):
    """A key with which what leaves is sealed.

    Attributes:
        suite: as policies name it.
        key: id of the key, hexadecimal.
        site: which keeps the key.
    """

    suite: str
    key: str
    site: str


class Release(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a source lets go. Times are Unix seconds, by the source's clock.

    Attributes:
        transfer, task, fence: for what it is.
        route: from the source to the target, both included, with the key of each.
        source_path, target_path: site paths.
        labels, contracts: what it was decided on: statements, inheritance and the request together.
        statements: digests (SHA-256) of the label statements that were used.
        requester, purpose: as the grant says them.
        bundle, bundle_version: the policies by which the source decided.
        decisions: ids of its decisions.
        duties: what the target takes on, by type.
        counts: what the source's counters come to with this transfer, by their names in policies.
        sealed: what leaves is sealed objects and nothing else, with these keys; empty where it is as it was.
    """

    transfer: str
    task: str
    fence: int
    route: list[Party]
    source_path: str
    target_path: str
    issued: int
    expires: int
    labels: list[str] = []
    contracts: list[str] = []
    statements: list[bytes] = []
    requester: str = ""
    purpose: str = ""
    bundle: str = ""
    bundle_version: int = 0
    decisions: list[str] = []
    duties: list[str] = []
    counts: dict[str, int] = {}
    sealed: list[Sealed] = []


_decoder = msgspec.msgpack.Decoder(Release)


def sign_release(release: Release, secret_pem: bytes, certificate_der: bytes) -> bytes:
    """The release as it travels."""
    return sign_as_site(RELEASE_DOMAIN, release, secret_pem, certificate_der)


def release_id(document: bytes) -> str:
    """How records name a release."""
    return sha256(document).hexdigest()[:32]


def check_release(
    document: bytes,
    anchors_pem: str,
    now: float,
    *,
    transfer: str,
    task: str,
    fence: int,
    route: Sequence[Party],
    source_path: str,
    target_path: str,
    revoked: frozenset[str] = frozenset(),
    began: bool = False,
) -> tuple[Release, CertificateFacts]:
    """The release in a document, if it is this source's for this task over this route now.

    Args:
        anchors_pem: the federation's CA.
        route: the parties of the grant, from the source to the target.
        began: whether what it permits began while it was valid and now comes to its end: then its age does not count.

    Raises:
        AuthenticationError: it is missing ("release-missing"), not signed by the route's source ("release-forged"), for
            another task, path or route ("release-other"), or not valid now ("release-expired").
    """
    if not document:
        raise _refused(
            f"{route[0].site} shows no release of its own for task {task}",
            "release-missing",
            "its agent has no policies, or is too old: flow policy bundle status",
        )
    from flowengine.trust.certificates import check_certificate, verify_with_certificate  # takes long to load

    envelope = open_envelope(document, RELEASE_DOMAIN, "release-forged", "release")
    facts = check_certificate(envelope.certificate, anchors_pem, now, kind="site", revoked=revoked)
    if not verify_with_certificate(
        envelope.certificate, envelope.signature, signed_bytes(RELEASE_DOMAIN, envelope.payload)
    ):
        raise _refused("the release's signature is wrong: it was changed, or forged", "release-forged")
    if Party(facts.site, facts.key_sha256) != route[0]:
        raise _refused(
            f"the release for task {task} is signed by {facts.shown} and not by {route[0].site}",
            "release-forged",
        )
    try:
        release = _decoder.decode(envelope.payload)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise _refused(f"the release cannot be understood: {error}", "release-forged") from None
    named = (release.transfer, release.task, release.fence, release.source_path, release.target_path)
    if named != (transfer, task, fence, source_path, target_path):
        raise _refused(f"the release is for another task or path than {task}", "release-other")
    if release.route != list(route):
        shown = " > ".join(party.site for party in release.route)
        raise _refused(
            f"the release is for the route {shown[:300]}, not for {' > '.join(party.site for party in route)}",
            "release-other",
        )
    until = min(release.expires, release.issued + MAX_VALID_S) + SKEW_S
    if now < release.issued - SKEW_S or (now > until and not began):
        raise _refused(
            f"the release for task {task} does not hold now",
            "release-expired",
            "it is asked for anew with the next connection; if that fails too, compare the clocks (flow doctor)",
        )
    return release, facts


def _refused(message: str, reason: str, hint: str = "") -> AuthenticationError:
    return AuthenticationError(message, hint=hint, reason=reason)
