"""The handshake of a control connection, after TLS: who talks which version, and who may talk at all.

Goal
    Both sides agree on a version, prove the same right to each other, and share what the keys are made of.
    Who cannot prove it learns nothing but "authentication failed".
Plan
    client -> server  hello    versions, random, software, limits, features
    server -> client  hello    versions, random                (no name, no limits: nothing is proved yet)
    client -> server  proof    kind, which proof, MAC
    server -> client  welcome  MAC, software, limits, features
    The TLS client has pinned the server's certificate before it says hello. A proof is an HMAC over a label
    of its side and the transcript: the server certificate's fingerprint and both hellos, byte for byte, with
    their randoms; so nobody in between can lower the version, mirror a proof, or use one twice.
Invariants
    - The version is the highest that both list; both compute it, nobody announces it.
    - Unknown optional fields and features are ignored; an unknown *required* feature is refused.
    - An error ends the state machine; `refusal` gives the one message that may still be sent.
    - Whoever must prove more (certificates and grants) brings another of `wire.proofs`; nothing else changes.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256
from typing import Any, Final, TypeAlias, TypeVar

import msgspec

from flowengine.errors import EXIT_CODES, AuthenticationError, Exit, FlowError, PeerError, ProtocolError
from flowengine.wire.control import MAX_HANDSHAKE_BYTES
from flowengine.wire.keys import (
    FINGERPRINT_BYTES,
    NO_FINGERPRINT,
    PROTOCOL_VERSION,
    RANDOM_BYTES,
    Secret,
    SessionSecrets,
    show_version,
)
from flowengine.wire.proofs import Proof, Resolver, TicketProof

__all__ = [
    "MAX_LIMITS",
    "SUPPORTED_VERSIONS",
    "ClientHandshake",
    "Established",
    "PeerInfo",
    "ServerHandshake",
    "Software",
    "refusal",
]

SUPPORTED_VERSIONS: Final = (PROTOCOL_VERSION,)
MAX_LIMITS: Final = 64
"""Entries in a limits dictionary and features in a list."""
MAX_WORD: Final = 64
"""Characters of a name, version or feature."""

_NOT_LET_IN: Final = (
    "the other side did not accept the proof: the ticket's secret is wrong, or it is no longer valid"
)

_M = TypeVar("_M", bound="_Message")


class _Message(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type"):
    pass


class _ClientHello(_Message, tag="client-hello"):
    versions: list[int]
    random: bytes
    software: str = ""
    software_version: str = ""
    limits: dict[str, int] = {}
    features: list[str] = []
    required: list[str] = []


class _ServerHello(_Message, tag="server-hello"):
    versions: list[int]
    random: bytes


class _ClientProof(_Message, tag="proof"):
    kind: str
    identity: bytes
    mac: bytes
    document: bytes = b""


class _Welcome(_Message, tag="welcome"):
    mac: bytes
    software: str = ""
    software_version: str = ""
    limits: dict[str, int] = {}
    features: list[str] = []
    required: list[str] = []


class _Refusal(_Message, tag="refusal"):
    reason: str
    message: str = ""


_ANY: Final = msgspec.msgpack.Decoder(_ClientHello | _ServerHello | _ClientProof | _Welcome | _Refusal)


class Software(msgspec.Struct, frozen=True):
    """What a side says about itself.

    Attributes:
        name: Name of the software.
        version: Its version.
        limits: Named bounds that the other side must keep.
        features: What it can do beyond the protocol version; unknown ones are ignored.
        required: Features that the other side must know, or the connection is refused.
    """

    name: str = "flowengine"
    version: str = ""
    limits: Mapping[str, int] = msgspec.field(default_factory=dict)
    features: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


UNNAMED: Final = Software()
"""One that does not say what it is."""


PeerInfo: TypeAlias = Software


@dataclass(frozen=True, slots=True)
class Established(Secret):
    """The handshake is done: both sides proved their right.

    Attributes:
        version: Protocol version that is spoken from here on.
        peer: What the other side said about itself.
        proof: The proof that was shown; on a server with several, the one that the client holds.
        client_random: 32 bytes.
        server_random: 32 bytes.
        server_fingerprint: SHA-256 of the server's certificate.
    """

    version: int
    peer: PeerInfo
    proof: Proof
    client_random: bytes = field(repr=False)
    server_random: bytes = field(repr=False)
    server_fingerprint: bytes = field(repr=False)
    _binding: bytes = field(repr=False)

    def secrets(self, client_fingerprint: bytes = NO_FINGERPRINT) -> SessionSecrets:
        """What the session's keys are derived from; call it once per connection.

        Args:
            client_fingerprint: SHA-256 of the client's certificate, where TLS asked for one.
        """
        return SessionSecrets(
            self.client_random,
            self.server_random,
            client_fingerprint=client_fingerprint,
            server_fingerprint=self.server_fingerprint,
            binding=self._binding,
            protocol=self.version,
        )


Output: TypeAlias = bytes | Established


class _State(Enum):
    NEW = "new"
    HELLO = "hello"
    PROOF = "proof"
    WELCOME = "welcome"
    DONE = "done"
    FAILED = "failed"


class _Handshake(Secret):
    """What both sides have in common."""

    def __init__(
        self,
        fingerprint: bytes,
        random: bytes,
        software: Software,
        versions: Sequence[int],
        known: Sequence[str],
    ) -> None:
        if len(fingerprint) != FINGERPRINT_BYTES or len(random) != RANDOM_BYTES:
            raise ValueError(f"fingerprint and random have {FINGERPRINT_BYTES} and {RANDOM_BYTES} bytes")
        self._fingerprint = fingerprint
        self._random = random
        self._software = software
        self._versions = tuple(versions)
        self._known = frozenset(known) | frozenset(software.features)
        self._state = _State.NEW
        self._hellos: list[bytes] = []
        self._version = 0

    @property
    def is_done(self) -> bool:
        """Whether `Established` was given."""
        return self._state is _State.DONE

    def receive(self, message: bytes) -> list[Output]:
        """What one message from the peer leads to: messages to send, and `Established` at the end.

        Raises:
            AuthenticationError: the peer's proof is wrong, or it did not accept ours.
            ProtocolError: the peer broke the protocol, or speaks no version that this side does.
            PeerError: the peer refused for a reason of its own.
        """
        try:
            return self._receive(message)
        except FlowError:
            self._state = _State.FAILED
            raise

    def _receive(self, message: bytes) -> list[Output]:
        raise NotImplementedError

    def _own_claims(self) -> dict[str, Any]:
        software = self._software
        return {
            "software": software.name,
            "software_version": software.version,
            "limits": dict(software.limits),
            "features": list(software.features),
            "required": list(software.required),
        }

    def _transcript(self) -> bytes:
        """Digest of all that was agreed on; lengths are fixed, so no two handshakes share one."""
        first, second = (sha256(hello).digest() for hello in self._hellos)
        return sha256(self._fingerprint + first + second).digest()

    def _agree(self, theirs: list[int]) -> int:
        common = set(theirs) & set(self._versions)
        if common:
            return max(common)
        ours_shown = ", ".join(map(show_version, sorted(self._versions)))
        theirs_shown = ", ".join(map(show_version, sorted(theirs)[-8:])) or "none"
        older = "this side" if max(theirs, default=0) > max(self._versions) else "the other side"
        raise ProtocolError(
            f"no protocol version in common: this side speaks {ours_shown}, the other {theirs_shown}",
            hint=f"update flowengine on {older}",
            reason="incompatible",
            ours=ours_shown,
            theirs=theirs_shown,
        )

    def _check_peer(self, message: _ClientHello | _Welcome) -> PeerInfo:
        words = [message.software, message.software_version, *message.features, *message.required]
        if (
            max(len(message.limits), len(message.features), len(message.required)) > MAX_LIMITS
            or any(len(word) > MAX_WORD or not word.isprintable() for word in [*words, *message.limits])
            or any(not 0 <= limit < 1 << 63 for limit in message.limits.values())
        ):
            raise ProtocolError("the other side's hello is longer than allowed or holds control characters")
        unknown = sorted(set(message.required) - self._known)
        if unknown:
            raise ProtocolError(
                f"the other side requires {', '.join(unknown)}, which this side does not know",
                hint="update flowengine on this side",
                reason="incompatible",
            )
        return Software(
            message.software,
            message.software_version,
            dict(message.limits),
            tuple(message.features),
            tuple(message.required),
        )


class ClientHandshake(_Handshake):
    """The side that dialled.

    Args:
        proof: The right to show; a ticket's secret as `TicketProof(secret)`.
        fingerprint: SHA-256 of the certificate that the server showed in TLS, checked before.
        random: 32 fresh random bytes.
        software: What to say about this side.
        versions: Protocol versions that this side speaks.
        known: Features that the server may require, besides those in `software`.
    """

    def __init__(
        self,
        proof: Proof,
        fingerprint: bytes,
        random: bytes,
        *,
        software: Software = UNNAMED,
        versions: Sequence[int] = SUPPORTED_VERSIONS,
        known: Sequence[str] = (),
    ) -> None:
        super().__init__(fingerprint, random, software, versions, known)
        self._proof = proof
        self._server_random = b""

    @property
    def proof_given(self) -> bool:
        """Whether the proof is out and the welcome is not in; a request may follow the proof at once."""
        return self._state is _State.WELCOME

    def start(self) -> list[bytes]:
        """The messages to send first."""
        if self._state is not _State.NEW:
            raise ValueError("the handshake was started before")
        hello = _encode(
            _ClientHello(versions=list(self._versions), random=self._random, **self._own_claims())
        )
        self._hellos.append(hello)
        self._state = _State.HELLO
        return [hello]

    def _receive(self, message: bytes) -> list[Output]:
        if self._state is _State.HELLO:
            hello = _decode(message, _ServerHello)
            _check_random(hello.random, self._random)
            self._version = self._agree(hello.versions)
            self._server_random = hello.random
            self._hellos.append(message)
            self._state = _State.WELCOME
            proof = self._proof
            mac = proof.client_mac(self._transcript())
            shown = _ClientProof(kind=proof.kind, identity=proof.identity, mac=mac, document=proof.document)
            return [_encode(shown)]
        if self._state is _State.WELCOME:
            welcome = _decode(message, _Welcome)
            transcript = self._transcript()
            if not hmac.compare_digest(welcome.mac, self._proof.server_mac(transcript)):
                raise AuthenticationError(
                    f"the server did not prove that it knows the {self._proof.kind}'s secret",
                    hint="somebody else may answer at this address; ask whoever gave you the ticket",
                )
            peer = self._check_peer(welcome)
            self._state = _State.DONE
            return [
                Established(
                    self._version,
                    peer,
                    self._proof,
                    self._random,
                    self._server_random,
                    self._fingerprint,
                    self._proof.binding(transcript),
                )
            ]
        raise _out_of_turn(self._state)


class ServerHandshake(_Handshake):
    """The side that was dialled.

    Args:
        resolve: Finds the right that lets a client in; `among(proofs)` where they are known before.
        fingerprint: SHA-256 of the certificate that this side shows in TLS.
        random: 32 fresh random bytes.
        software: What to say about this side, to a client that proved its right.
        versions: Protocol versions that this side speaks.
        known: Features that a client may require, besides those in `software`.
    """

    def __init__(
        self,
        resolve: Resolver,
        fingerprint: bytes,
        random: bytes,
        *,
        software: Software = UNNAMED,
        versions: Sequence[int] = SUPPORTED_VERSIONS,
        known: Sequence[str] = (),
    ) -> None:
        super().__init__(fingerprint, random, software, versions, known)
        self._resolve = resolve
        # An unknown identity is answered after the same work, with a key that nobody holds.
        self._nobody = TicketProof(sha256(b"flowengine nobody\x00" + random).digest())
        self._client: _ClientHello | None = None

    def start(self) -> list[bytes]:
        """The messages to send first: none, the client begins."""
        if self._state is not _State.NEW:
            raise ValueError("the handshake was started before")
        self._state = _State.HELLO
        return []

    def _receive(self, message: bytes) -> list[Output]:
        if self._state is _State.HELLO:
            self._client = hello = _decode(message, _ClientHello)
            _check_random(hello.random, self._random)
            self._version = self._agree(hello.versions)
            answer = _encode(_ServerHello(versions=list(self._versions), random=self._random))
            self._hellos += [message, answer]
            self._state = _State.PROOF
            return [answer]
        if self._state is _State.PROOF:
            assert self._client is not None
            shown = _decode(message, _ClientProof)
            transcript = self._transcript()
            proof = self._resolve(shown.kind, shown.identity, shown.document)
            expected = (proof or self._nobody).client_mac(transcript)
            if not hmac.compare_digest(shown.mac, expected) or proof is None:
                raise AuthenticationError(
                    "a client could not prove that it knows the secret that lets in",
                    hint="give it the ticket that is printed now; older tickets are no longer valid",
                )
            # Only now: a refusal for other reasons would tell a stranger what this side is.
            peer = self._check_peer(self._client)
            welcome = _encode(_Welcome(mac=proof.server_mac(transcript), **self._own_claims()))
            self._state = _State.DONE
            established = Established(
                self._version,
                peer,
                proof,
                self._client.random,
                self._random,
                self._fingerprint,
                proof.binding(transcript),
            )
            return [welcome, established]
        raise _out_of_turn(self._state)


def refusal(error: FlowError) -> bytes:
    """The message that tells the peer why the handshake ends; a failed authentication says one word."""
    if isinstance(error, AuthenticationError):
        return _encode(_Refusal(reason=error.reason))
    return _encode(_Refusal(reason=error.reason, message=error.message[:512]))


def _encode(message: _Message) -> bytes:
    data = msgspec.msgpack.encode(message)
    if len(data) > MAX_HANDSHAKE_BYTES:
        raise ValueError(f"a handshake message of {len(data)} bytes is longer than {MAX_HANDSHAKE_BYTES}")
    return data


def _decode(message: bytes, expected: type[_M]) -> _M:
    if len(message) > MAX_HANDSHAKE_BYTES:
        raise ProtocolError(
            f"a handshake message has {len(message)} bytes; {MAX_HANDSHAKE_BYTES} are allowed"
        )
    try:
        decoded = _ANY.decode(message)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise ProtocolError(
            "a handshake message cannot be read",
            hint="the peer is not flowengine, or much newer; compare the versions of both sides",
        ) from None
    if isinstance(decoded, expected):
        return decoded
    if isinstance(decoded, _Refusal):
        raise _refused_by_peer(decoded)
    raise ProtocolError(f"a handshake message came out of turn: {type(decoded).__name__.lstrip('_')}")


def _refused_by_peer(message: _Refusal) -> FlowError:
    if message.reason == AuthenticationError.reason:
        return AuthenticationError(_NOT_LET_IN, hint="ask for a new ticket, and paste it whole")
    if EXIT_CODES.get(message.reason) is Exit.AUTHENTICATION:
        return AuthenticationError(
            f"the other side refused: {message.reason}",
            hint="its log says why in full; the reason is explained in docs/reference/errors.md",
            reason=message.reason,
        )
    said = "".join(c if c.isprintable() else "?" for c in message.message[:512]) or "no explanation"
    if message.reason == "incompatible":
        return ProtocolError(
            f"the other side refused: {said}", hint="update the older side", reason="incompatible"
        )
    return PeerError(f"the other side refused the connection: {said}", hint="look at its log")


def _check_random(theirs: bytes, ours: bytes) -> None:
    if len(theirs) != RANDOM_BYTES or theirs == ours:
        raise ProtocolError("the other side's hello does not carry 32 random bytes of its own")


def _out_of_turn(state: _State) -> ProtocolError:
    return ProtocolError(f"a handshake message came when none was due (state: {state.value})")
