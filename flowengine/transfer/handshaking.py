"""Both ends of a control connection's beginning: TLS, then the handshake of `wire.handshake` over it."""

from __future__ import annotations

import contextlib
import os
import ssl
import time
from collections.abc import Callable
from hashlib import sha256
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import trio

from flowengine.errors import AuthenticationError, FlowError, ProtocolError
from flowengine.transfer.channel import Channel, disconnected, software
from flowengine.transfer.reaching import Reached
from flowengine.transfer.tcp_info import tcp_state
from flowengine.wire import messages
from flowengine.wire.control import MAX_HANDSHAKE_BYTES, MAX_MESSAGE_BYTES, ControlDecoder
from flowengine.wire.control import encode as frame
from flowengine.wire.handshake import ClientHandshake, Established, ServerHandshake
from flowengine.wire.handshake import refusal as handshake_refusal
from flowengine.wire.messages import Message
from flowengine.wire.proofs import Proof

if TYPE_CHECKING:
    from flowengine.transfer.identity import TicketGuest
    from flowengine.transfer.sites import Guest

__all__ = ["Ahead", "Dialled", "client_handshake", "send_alert", "server_handshake", "tls_refusal"]

TlsStream: TypeAlias = "trio.SSLStream[trio.abc.Stream]"
Ahead: TypeAlias = Callable[[Reached, float], Message]
"""The request that goes right behind the proof, from what was reached and its round-trip time in seconds."""

_ALERT_S: Final = 1.0
"""How long a client that is refused in TLS may take to read why."""


class Dialled(Protocol):
    """How one whole connection to a peer is made: where it is, who it must be, what to prove to it."""

    @property
    def context(self) -> ssl.SSLContext:
        """For this side of TLS."""

    @property
    def client_fingerprint(self) -> bytes:
        """SHA-256 of the certificate that this side shows in TLS; zeros for none."""

    def recognise(self, certificate: bytes | None) -> Proof:
        """What to prove to whoever showed this certificate (DER); raises `AuthenticationError` for anybody else."""


async def client_handshake(
    stream: TlsStream, location: str, dialled: Dialled, ahead: Ahead | None, reached: Reached
) -> Channel:
    """The authenticated channel to whoever listens at `location`; the caller bounds the time and closes on errors.

    Args:
        ahead: as of `connect.dial`.

    Raises:
        AuthenticationError: whoever answers is not the one that is meant, or does not accept the proof.
        ProtocolError: it does not speak TLS 1.3, or no version of the protocol that this side does.
    """
    try:
        await stream.do_handshake()
    except trio.BrokenResourceError as error:
        if not isinstance(error.__cause__, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLEOFError):
            raise  # the connection was cut
        raise tls_refusal(error, location) or ProtocolError(
            f"{location} does not speak TLS 1.3", hint="is it flowengine that listens there?"
        ) from error
    certificate = stream.getpeercert(binary_form=True)
    proof = await trio.to_thread.run_sync(dialled.recognise, certificate)
    fingerprint = sha256(certificate or b"").digest()
    handshake = ClientHandshake(proof, fingerprint, os.urandom(32), software=software())
    # As the kernel saw it while TCP and TLS were set up; through relays the sum of what they saw.
    rtt_s = tcp_state(reached.sock).rtt_s if reached.hop is None else reached.rtt_s
    request = messages.encode(ahead(reached, rtt_s)) if ahead is not None else b""
    early = frame(request) if 0 < len(request) <= MAX_HANDSHAKE_BYTES else b""
    decoder = ControlDecoder(MAX_HANDSHAKE_BYTES)
    outgoing: list[bytes | Established] = list(handshake.start())
    while True:
        for item in outgoing:
            assert isinstance(item, bytes)
            if handshake.proof_given:
                # It has shown the right certificate: its welcome may be followed by what the session sends.
                decoder.max_message = MAX_MESSAGE_BYTES
            await stream.send_all(frame(item) + (early if handshake.proof_given else b""))
        data = await stream.receive_some(MAX_HANDSHAKE_BYTES)
        if not data:
            raise disconnected()
        arrived = decoder.feed(data)
        outgoing = []
        while arrived:
            outgoing += handshake.receive(arrived.pop(0))
            if outgoing and isinstance(outgoing[-1], Established):
                if request and not early:
                    await stream.send_all(frame(request))
                return Channel(
                    stream,
                    outgoing[-1].secrets(dialled.client_fingerprint),
                    rtt_s,
                    decoder=decoder,
                    pending=arrived,
                    peer=reached.address[0],
                    route=reached.hop.grant.route if reached.hop is not None else (),
                )


async def server_handshake(stream: TlsStream, guest: TicketGuest | Guest, peer: str) -> Channel:
    """The authenticated channel to a client, behind TLS; one that is refused is told so before this raises.

    Args:
        peer: the host it comes from, for the memory of links.

    Raises:
        AuthenticationError: it did not prove that it may come in.
        ProtocolError: it broke the protocol, or speaks no version that this side does.
    """
    handshake = ServerHandshake(guest.resolver, guest.own_fingerprint, os.urandom(32), software=software())
    decoder = ControlDecoder(MAX_HANDSHAKE_BYTES)
    handshake.start()
    sent_at = 0.0
    while True:
        data = await stream.receive_some(MAX_HANDSHAKE_BYTES)
        rtt = time.monotonic() - sent_at
        if not data:
            raise disconnected()
        try:
            arrived = decoder.feed(data)
            while arrived:
                for item in await trio.to_thread.run_sync(handshake.receive, arrived.pop(0)):
                    if isinstance(item, Established):
                        # A request may stand right behind the proof.
                        decoder.max_message = MAX_MESSAGE_BYTES
                        secrets = item.secrets(guest.fingerprint)
                        return Channel(stream, secrets, rtt, decoder=decoder, pending=arrived, peer=peer)
                    await stream.send_all(frame(item))
                    sent_at = time.monotonic()
        except FlowError as error:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(frame(handshake_refusal(error)))
            raise


async def send_alert(stream: TlsStream, tcp: trio.SocketStream) -> None:
    """Send what OpenSSL had to say last, which trio drops: the alert that tells a client why it is not let in."""
    outgoing: ssl.MemoryBIO | None = getattr(stream, "_outgoing", None)
    alert = outgoing.read() if outgoing is not None else b""
    with trio.move_on_after(_ALERT_S), contextlib.suppress(trio.BrokenResourceError):
        if alert:
            await tcp.send_all(alert)
            await tcp.send_eof()
            while await tcp.receive_some(4096):  # or closing would reset the connection under the alert
                pass


def tls_refusal(error: BaseException, who: str) -> FlowError | None:
    """What a failed TLS handshake means where certificates decide; None where it means nothing of the kind."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__
    if cause is None:
        return None
    if isinstance(cause, ssl.SSLCertVerificationError):
        expired = cause.verify_code in (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, _HAS_EXPIRED
        return AuthenticationError(
            f"the certificate of {who} is not accepted: {cause.verify_message}",
            reason="certificate-expired" if expired else "certificate-unknown",
            hint="look at both clocks (flow doctor)" if expired else "is it a site of this federation?",
        )
    reason = (cause.reason or "").upper()
    if "CERTIFICATE" not in reason and "UNKNOWN_CA" not in reason:
        return None
    return AuthenticationError(
        f"{who} and this site do not accept each other's certificates: {reason.lower().replace('_', ' ')}",
        reason="certificate-expired" if "EXPIRED" in reason else "certificate-unknown",
        hint="look at the other side's log",
    )
