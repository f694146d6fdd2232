"""What is checked of everything that the coordinator signs for agents: grants of both kinds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Literal, Protocol, TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from flowengine.errors import AuthenticationError, ProtocolError
from flowengine.trust.certificate_facts import SKEW_S
from flowengine.trust.envelope import open_envelope, signed_bytes
from flowengine.wire.paths import check_relative_path

__all__ = [
    "FED",
    "HOLD",
    "MAX_VALID_S",
    "arrival_use",
    "check_conditions",
    "check_fence",
    "check_time",
    "problem_of_permit",
    "read_grant",
    "refused",
    "wire_path",
]

MAX_VALID_S: Final = 86_400
"""No grant is believed for longer, whatever it says."""
MAX_LABELS: Final = 100
HOLD: Final = "hold"
"""Condition of a grant by which the target holds: whatever lands there is sealed, and it has no key."""
FED: Final = "fed"
"""Condition of a grant by which the source, itself a target of the transfer, gives the grant's `version` and nothing else."""


def arrival_use(required: Sequence[str]) -> Literal["hold", "land"]:
    """What a grant with these conditions lets the target do with the data, as policies name it."""
    return "hold" if HOLD in required else "land"


class Permit(Protocol):
    """What grants of both kinds say. Read-only."""

    @property
    def id(self) -> bytes:
        """16 random bytes."""

    @property
    def fence(self) -> int:
        """The claim that it belongs to."""

    @property
    def epoch(self) -> int:
        """The coordinator's run that signed it."""

    @property
    def issued(self) -> int:
        """From when it is good, in Unix seconds."""

    @property
    def expires(self) -> int:
        """Until when it is good, in Unix seconds."""

    @property
    def source_path(self) -> str:
        """From where."""

    @property
    def target_path(self) -> str:
        """To where."""

    @property
    def byte_limit(self) -> int | None:
        """Most payload bytes."""

    @property
    def labels(self) -> list[str]:
        """What it was decided on."""

    @property
    def contracts(self) -> list[str]:
        """What it was decided on."""

    @property
    def required(self) -> list[str]:
        """Conditions that whoever checks must know."""


T = TypeVar("T", bound=Permit)


def read_grant(
    document: bytes,
    domain: str,
    keys: Mapping[str, bytes],
    what: str,
    decode: Callable[[bytes], T],
    problem_of: Callable[[T], str],
) -> T:
    """The grant in a document, once its signature was verified and what it says makes sense.

    Args:
        what: "grant" or "relay grant", for messages.
        problem_of: tells what makes one unusable for anybody; empty for nothing.

    Raises:
        AuthenticationError: reason "grant-forged", or "incompatible" where it cannot be understood.
    """
    payload = _verified_payload(document, domain, keys, what)
    try:
        grant = decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        # Signed by the coordinator and yet unreadable: it is newer, and says something that must be understood.
        raise refused(
            f"the {what} cannot be understood: {error}", "incompatible", "update flowengine on this site"
        ) from None
    problem = problem_of(grant)
    if problem:
        raise refused(f"the {what} cannot be used: {problem}", "incompatible", "update the older side")
    return grant


def _verified_payload(document: bytes, domain: str, keys: Mapping[str, bytes], what: str) -> bytes:
    envelope = open_envelope(document, domain, "grant-forged", what)
    public = keys.get(envelope.key_id)
    if public is None:
        raise refused(
            f"the {what} is signed with a key that is not this federation's coordinator's",
            "grant-forged",
            "somebody pretends to be the coordinator; or it has new keys, which the next heartbeat brings",
        )
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(
            envelope.signature, signed_bytes(domain, envelope.payload)
        )
    except (InvalidSignature, ValueError):
        raise refused(f"the {what}'s signature is wrong: it was changed, or forged", "grant-forged") from None
    return envelope.payload


def check_conditions(required: Sequence[str], known: Collection[str], what: str) -> None:
    """Refuse what has conditions that this agent does not know (reason "incompatible")."""
    unknown = sorted(set(required) - set(known))
    if unknown:
        shown = ", ".join(word[:64] for word in unknown[:8])
        raise refused(
            f"the {what} has conditions that this agent does not know: {shown!r}",
            "incompatible",
            "update flowengine on this site",
        )


def check_time(issued: int, expires: int, now: float, what: str) -> None:
    """Refuse what is not valid now (reason "grant-not-yet-valid" or "grant-expired")."""
    if now < issued - SKEW_S:
        raise refused(
            f"the {what} is from {issued - now:.0f} s in the future",
            "grant-not-yet-valid",
            "this site's clock is behind the coordinator's, or the other way round: flow doctor compares them",
        )
    if now > min(expires, issued + MAX_VALID_S) + SKEW_S:
        raise refused(
            f"the {what} expired {now - expires:.0f} s ago",
            "grant-expired",
            "the task is claimed anew for a fresh one; if that fails too, compare the clocks (flow doctor)",
        )


def check_fence(fence: int, highest: int, what: str, *, spent: bool) -> None:
    """Refuse what a later claim superseded, or what was used up (reason "grant-superseded" or "grant-replayed")."""
    if fence < highest:
        raise refused(
            f"the {what} was superseded by fence {highest}",
            "grant-superseded",
            "another claim of the same task goes on; nothing is to be done",
        )
    if spent:
        raise refused(f"the {what} was used up: its task ended here", "grant-replayed")


def problem_of_permit(grant: Permit) -> str:
    """What makes a grant of either kind unusable for anybody; empty for nothing."""
    if len(grant.id) != 16:
        return "its id has the wrong length"
    if not 0 < grant.fence < 1 << 63 or not 0 <= grant.epoch < 1 << 63:
        return "its fence or epoch is out of range"
    if not 0 < grant.expires - grant.issued <= MAX_VALID_S:
        return f"it must be valid for 1 to {MAX_VALID_S} s"
    if grant.byte_limit is not None and grant.byte_limit < 0:
        return "its byte limit is negative"
    if max(len(grant.labels), len(grant.required), len(grant.contracts)) > MAX_LABELS:
        return f"it has more than {MAX_LABELS} labels"
    return _problem_of_path(grant.source_path) or _problem_of_path(grant.target_path)


def _problem_of_path(path: str) -> str:
    """What makes a site path of a grant unusable; empty for nothing."""
    if not path.startswith("/"):
        return "a path of it is not absolute"
    try:
        relative = wire_path(path).removesuffix(b"/")
        if relative:
            check_relative_path(relative)
    except (ProtocolError, UnicodeEncodeError) as error:
        return f"a path of it cannot be used: {error}"
    return ""


def wire_path(site_path: str) -> bytes:
    r"""A site path as `Open` carries it: bytes without the leading slash; a trailing slash keeps its meaning.

    >>> wire_path("/data/sets/a/")
    b'data/sets/a/'
    """
    return site_path.encode("utf-8", "surrogateescape").lstrip(b"/")


def refused(message: str, reason: str, hint: str = "") -> AuthenticationError:
    """The error for a document that is not accepted."""
    return AuthenticationError(message, hint=hint, reason=reason)
