"""Getting from an address to a session: TLS, handshake, `Open`, data connections with their preambles.

One port serves both kinds of connections; the first byte tells them apart. The client pins the server's certificate
by the ticket's fingerprint, before it says anything; the handshake then proves the ticket's secret both ways.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol, TypeAlias

import trio

import flowengine
from flowengine.chunking import profile_named
from flowengine.errors import (
    AuthenticationError,
    FlowError,
    NotFound,
    ProtocolError,
    TemporaryError,
    UsageError,
)
from flowengine.store.secret_files import read_secret, write_secret
from flowengine.transfer.channel import Channel, disconnected
from flowengine.transfer.lanes import prepare_socket
from flowengine.transfer.session import MIN_WINDOW_BYTES, Session
from flowengine.transfer.sites import Guest, SitePeer, SiteTrust, tls_refusal
from flowengine.trust.certificates import CertificateFacts
from flowengine.trust.grant import Grant
from flowengine.wire.control import MAX_HANDSHAKE_BYTES, ControlDecoder
from flowengine.wire.control import encode as frame
from flowengine.wire.handshake import (
    ClientHandshake,
    Established,
    Proof,
    ServerHandshake,
    Software,
    TicketProof,
    among,
)
from flowengine.wire.handshake import refusal as handshake_refusal
from flowengine.wire.keys import NO_FINGERPRINT, Side
from flowengine.wire.messages import Open, Opened, Options
from flowengine.wire.preamble import PREAMBLE_BYTES, Preamble, PreambleRegistry, is_data_connection
from flowengine.wire.ticket import Ticket

__all__ = [
    "DEFAULT_STREAMS",
    "MAX_STREAMS",
    "Identity",
    "Incoming",
    "Listener",
    "dial",
    "join_streams",
]

CONNECT_S: Final = 20.0
HANDSHAKE_S: Final = 15.0
PREAMBLE_S: Final = 5.0
_ALERT_S: Final = 1.0
STREAMS_S: Final = 15.0
MAX_STREAMS: Final = 64
DEFAULT_STREAMS: Final = 8
_NEAR_RTT_S: Final = 0.001
_ASSUMED_BYTES_PER_S: Final = 312_500_000
"""2.5 Gbit/s: what a long link is taken for until it was measured."""


class _TicketGuest:
    """Whoever connected to a listener that made tickets: nothing is known of it but that it knows the secret."""

    grant: Grant | None = None
    facts: CertificateFacts | None = None
    fingerprint = NO_FINGERPRINT

    def __init__(self, own: Identity) -> None:
        self.context = own.context
        self.own_fingerprint = own.fingerprint
        self.certificate: bytes | None = None
        self.resolver = among([TicketProof(own.secret)])

    def check_request(self, request: Open) -> None:
        """A ticket lets its holder ask for everything that is served."""


class Identity:
    """What a listener is known by: key and self-signed certificate, their fingerprint, and the ticket's secret.

    Fresh ones live in memory only; `load` keeps them in a file, so that a ticket outlives a restart.
    """

    def __init__(self, pem: bytes, fingerprint: bytes, secret: bytes) -> None:
        self.fingerprint = fingerprint
        self.secret = secret
        self._pem = pem
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        # The ssl module reads certificates from files only; this one is never seen on a disk.
        fd = os.memfd_create("flow-certificate")
        try:
            os.write(fd, pem)
            self.context.load_cert_chain(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)

    @classmethod
    def fresh(cls) -> Identity:
        """A new key, certificate and secret."""
        import datetime

        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "flowengine")])
        # Fixed dates: the fingerprint is what is checked, and a wrong clock must not break a transfer.
        cert = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.datetime(2020, 1, 1))
            .not_valid_after(datetime.datetime(2120, 1, 1))
            .sign(key, hashes.SHA256())
        )
        pem = cert.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return cls(
            pem, sha256(cert.public_bytes(serialization.Encoding.DER)).digest(), secrets.token_bytes(24)
        )

    @classmethod
    def load(cls, path: str) -> Identity:
        """The identity in a file; where there is none, a fresh one is written there (0600).

        Raises:
            LocalError: the file cannot be read or written, or others can read it.
            UsageError: it is no identity file.
        """
        try:
            data = read_secret(path)
        except NotFound:
            made = cls.fresh()
            made._save(path)
            return made
        first, _, pem = data.partition(b"\n")
        try:
            secret = bytes.fromhex(first.decode().removeprefix("flowengine-secret "))
            return cls(
                pem,
                sha256(ssl.PEM_cert_to_DER_cert(pem.partition(b"-----BEGIN PRIVATE")[0].decode())).digest(),
                secret,
            )
        except (ValueError, ssl.SSLError):
            raise UsageError(
                f"{path} is no identity file", hint="name one that flow serve --identity wrote, or a new one"
            ) from None

    def guest(self) -> _TicketGuest:
        """Whoever connects now, before it has proved anything."""
        return _TicketGuest(self)

    def _save(self, path: str) -> None:
        data = b"flowengine-secret " + self.secret.hex().encode() + b"\n" + self._pem
        write_secret(path, data, replace=False)


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # pinned by fingerprint right after the handshake
    return context


def _software() -> Software:
    return Software("flowengine", flowengine.__version__)


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


class _TicketDialled:
    """A ticket names its listener by the fingerprint of a certificate that nobody signed."""

    client_fingerprint = NO_FINGERPRINT

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self.context = _client_context()

    def recognise(self, certificate: bytes | None) -> Proof:
        if not certificate or sha256(certificate).digest() != self._ticket.fingerprint:
            raise AuthenticationError(
                f"whoever answers at {self._ticket.location} is not the one that made the ticket: another certificate",
                hint="flow serve was started anew (ask for the new ticket), or somebody is in between",
            )
        return TicketProof(self._ticket.secret)


Peer: TypeAlias = Ticket | SitePeer
"""Whom to dial: whoever a ticket names, or another site under a grant."""


def _dialled(peer: Peer) -> Dialled:
    return _TicketDialled(peer) if isinstance(peer, Ticket) else peer.dialled()


async def dial(peer: Peer) -> Channel:
    """An authenticated control connection to a peer.

    Raises:
        TemporaryError: nobody answers there (reason "disconnected").
        AuthenticationError: whoever answers is not who the ticket or grant names, or does not accept it.
    """
    try:
        with trio.fail_after(CONNECT_S):
            tcp = await trio.open_tcp_stream(peer.host, peer.port)
    except (OSError, trio.TooSlowError) as error:
        runs = "flow serve" if isinstance(peer, Ticket) else "the site's agent"
        raise TemporaryError(
            f"cannot reach {peer.location}: {_why(error)}",
            hint=f"check that {runs} runs there and that no firewall stands between",
            reason="disconnected",
            # An agent is started again by whoever runs the site; what a ticket names may never have been there.
            refused=isinstance(peer, Ticket) and _is_refusal(error),
        ) from error
    dialled = _dialled(peer)
    stream = trio.SSLStream(tcp, dialled.context, server_side=False)
    try:
        with trio.fail_after(HANDSHAKE_S):
            return await _client_handshake(stream, peer.location, dialled)
    except trio.TooSlowError:
        await trio.aclose_forcefully(stream)
        raise TemporaryError(
            f"{peer.location} accepted the connection and then said nothing for {HANDSHAKE_S:.0f} s",
            hint="look at the other side; is it flowengine that listens there?",
            reason="stalled",
        ) from None
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        await trio.aclose_forcefully(stream)
        # With TLS 1.3 a server's refusal of this side's certificate comes behind its own handshake.
        raise tls_refusal(error, peer.location) or disconnected() from error
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


def _tried(error: BaseException) -> Sequence[BaseException]:
    """What went wrong at each address of a host."""
    cause = error.__cause__ or error
    return cause.exceptions if isinstance(cause, BaseExceptionGroup) else (cause,)


def _is_refusal(error: BaseException) -> bool:
    """Whether a host answered, at every address, that nothing listens there."""
    return all(isinstance(one, ConnectionRefusedError) for one in _tried(error))


def _why(error: BaseException) -> str:
    if isinstance(error, trio.TooSlowError):
        return f"no answer within {CONNECT_S:.0f} s"
    # trio puts addresses before the system's words, and says of several errors only how many there were.
    reasons = [
        os.strerror(one.errno)
        if isinstance(one, OSError) and one.errno and not isinstance(one, socket.gaierror)
        else getattr(one, "strerror", None) or str(one)
        for one in _tried(error)
    ]
    return ", ".join(dict.fromkeys(reason[:1].lower() + reason[1:] for reason in reasons))


async def _client_handshake(
    stream: trio.SSLStream[trio.SocketStream], location: str, dialled: Dialled
) -> Channel:
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
    handshake = ClientHandshake(proof, fingerprint, os.urandom(32), software=_software())
    decoder = ControlDecoder(MAX_HANDSHAKE_BYTES)
    outgoing: list[bytes | Established] = list(handshake.start())
    sent_at = 0.0
    rtts: list[float] = []
    while True:
        for item in outgoing:
            if isinstance(item, Established):
                return Channel(stream, item.secrets(dialled.client_fingerprint), min(rtts))
            await stream.send_all(frame(item))
            sent_at = time.monotonic()
        data = await stream.receive_some(MAX_HANDSHAKE_BYTES)
        rtts.append(time.monotonic() - sent_at)
        if not data:
            raise disconnected()
        outgoing = [out for message in decoder.feed(data) for out in handshake.receive(message)]


async def join_streams(
    channel: Channel,
    peer: Peer,
    opened: Opened,
    profile_name: str,
    options: Options,
    compression: int | None,
) -> Session:
    """The client's part after `Opened`: dial the data connections and make the session."""
    key = channel.secrets.preamble_key(opened.session_id, Side.SOURCE)
    sockets: list[socket.socket] = []
    try:
        with trio.fail_after(STREAMS_S):
            for number in range(opened.streams):
                tcp = await trio.open_tcp_stream(peer.host, peer.port)
                await tcp.send_all(Preamble(opened.session_id, number, 0).encode(key))
                sockets.append(_blocking(tcp))
    except (OSError, trio.TooSlowError, trio.BrokenResourceError) as error:
        for sock in sockets:
            sock.close()
        raise TemporaryError(
            f"cannot open data connections to {peer.location}: {error or 'no answer in time'}",
            hint="the control connection works, so look for a limit on connections in between",
            reason="disconnected",
        ) from error
    return _session(channel, sockets, opened.session_id, profile_name, options, compression)


def _session(
    channel: Channel,
    sockets: list[socket.socket],
    session_id: bytes,
    profile_name: str,
    options: Options,
    compression: int | None,
) -> Session:
    return Session(
        control=channel.control(),
        sockets=sockets,
        secrets=channel.secrets,
        session_id=session_id,
        profile=profile_named(profile_name),
        options=options,
        rtt_s=channel.rtt_s,
        window_bytes=max(MIN_WINDOW_BYTES, int(2 * channel.rtt_s * _ASSUMED_BYTES_PER_S)),
        compression=compression,
    )


def _blocking(tcp: trio.SocketStream) -> socket.socket:
    sock = socket.socket(fileno=tcp.socket.detach())
    prepare_socket(sock)
    return sock


def stream_count(rtt_s: float, asked: int) -> int:
    """How many data streams to use: as asked, else few on a near link (cores bound it) and more on a long one."""
    if asked:
        return max(1, min(asked, MAX_STREAMS))
    if rtt_s < _NEAR_RTT_S:
        return max(1, min(4, os.cpu_count() or 1))
    return DEFAULT_STREAMS


@dataclass
class Incoming:
    """A client that proved its right and asked for something.

    Attributes:
        channel: to answer on.
        request: what it asked for.
        peer: its address, for messages.
        grant: under which it is let in; None for a ticket's client.
        site: what its certificate says; None for a ticket's client.
    """

    channel: Channel
    request: Open
    peer: str
    _listener: Listener
    grant: Grant | None = None
    site: CertificateFacts | None = None

    async def accept(self, options: Options, compression: int | None = None) -> Session:
        """Agree, wait for the data connections, and give the session.

        Raises:
            TemporaryError: the data connections did not come in time.
        """
        session_id = secrets.token_bytes(16)
        streams = stream_count(self.channel.rtt_s, self.request.streams)
        waiting = self._listener._expect(session_id, self.channel, streams)
        try:
            await self.channel.send(Opened(streams, session_id))
            with trio.fail_after(STREAMS_S):
                sockets = await waiting.all_here()
        except trio.TooSlowError:
            waiting.close()
            raise TemporaryError(
                f"only some of {streams} data connections came within {STREAMS_S:.0f} s",
                hint="look for a limit on connections between the two sides",
                reason="disconnected",
            ) from None
        finally:
            self._listener._forget(session_id)
        return _session(self.channel, sockets, session_id, self.request.profile, options, compression)


class _Waiting:
    """Data connections of one session as they come in."""

    def __init__(self, count: int) -> None:
        self._sockets: dict[int, socket.socket] = {}
        self._count = count
        self._here = trio.Event()

    def add(self, number: int, sock: socket.socket) -> None:
        if number >= self._count or number in self._sockets:
            sock.close()
            return
        self._sockets[number] = sock
        if len(self._sockets) == self._count:
            self._here.set()

    async def all_here(self) -> list[socket.socket]:
        await self._here.wait()
        return [self._sockets[number] for number in range(self._count)]

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()


Handler = Callable[[Incoming], Awaitable[None]]


class Listener:
    """Accepts tickets' clients, or other sites under grants, on one port.

    Args:
        host, port: where to listen; port 0 takes a free one.
        identity: certificate and secret that let tickets' clients in, a fresh one where None; or whom a site
            believes, to let sites in.
        log: told of what was refused, in one line without secrets.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        identity: Identity | SiteTrust | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._identity = identity or Identity.fresh()
        self._registry = PreambleRegistry()
        self._waiting: dict[bytes, _Waiting] = {}
        self._log = log or (lambda line: None)
        self._sockets: list[trio.SocketListener] = []
        self._bound: list[socket.socket] = []

    def bind(self) -> None:
        """Take the port; raises `OSError` where that is not possible."""
        infos = socket.getaddrinfo(
            self._host or None, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, proto, _, address = infos[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(1024)
        except BaseException:
            sock.close()
            raise
        self._port = sock.getsockname()[1]
        self._bound = [sock]

    def ticket(self, host: str | None = None, path: bytes = b"") -> Ticket:
        """The ticket that lets a client in."""
        if not isinstance(self._identity, Identity):
            raise UsageError("a site lets nobody in by a ticket")
        return Ticket(host or self._host, self._port, path, self._identity.fingerprint, self._identity.secret)

    @property
    def port(self) -> int:
        """The port, once it is bound."""
        return self._port

    def close_bound(self) -> None:
        """Close the listening sockets in this process (after a fork, in the one that does not serve)."""
        for sock in self._bound:
            sock.close()
        self._bound = []

    async def serve(self, handler: Handler, *, max_connections: int = 256) -> None:
        """Accept until cancelled; each client's request is handled in its own task.

        An error of one client's session is logged and told to that client; it does not end the others.
        """
        limit = trio.CapacityLimiter(max_connections)
        self._sockets = [trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in self._bound]

        async def accepted(stream: trio.SocketStream) -> None:
            async with limit:
                await self._connection(stream, handler)

        await trio.serve_listeners(accepted, self._sockets)

    def _expect(self, session_id: bytes, channel: Channel, count: int) -> _Waiting:
        self._registry.register(session_id, channel.secrets.preamble_key(session_id, Side.SOURCE))
        waiting = self._waiting[session_id] = _Waiting(count)
        return waiting

    def _forget(self, session_id: bytes) -> None:
        self._registry.forget(session_id)
        self._waiting.pop(session_id, None)

    async def _connection(self, tcp: trio.SocketStream, handler: Handler) -> None:
        peer = "?"
        try:
            peer = "{}:{}".format(*tcp.socket.getpeername()[:2])
            with trio.fail_after(PREAMBLE_S):
                first = await tcp.socket.recv(1, socket.MSG_PEEK)
            if not first:
                await tcp.aclose()
            elif is_data_connection(first[0]):
                await self._data_connection(tcp)
            else:
                await self._control_connection(tcp, peer, handler)
        except FlowError as error:
            self._log(f"{peer}: {_logged(error)}")
            await trio.aclose_forcefully(tcp)
        except (
            OSError,
            trio.TooSlowError,
            trio.BrokenResourceError,
            trio.ClosedResourceError,
            ssl.SSLError,
        ) as error:
            self._log(f"{peer}: connection dropped: {error or type(error).__name__}")
            await trio.aclose_forcefully(tcp)
        except Exception as error:
            # One client's session, whatever is wrong with it, must not end the others'.
            self._log(f"{peer}: internal error, please report it: {_innermost(error)!r}")
            await trio.aclose_forcefully(tcp)

    async def _data_connection(self, tcp: trio.SocketStream) -> None:
        data = b""
        with trio.fail_after(PREAMBLE_S):
            while len(data) < PREAMBLE_BYTES:
                part = await tcp.receive_some(PREAMBLE_BYTES - len(data))
                if not part:
                    raise ProtocolError("a data connection closed inside its preamble")
                data += part
        preamble = self._registry.accept(data)
        waiting = self._waiting.get(preamble.session_id)
        if waiting is None:
            raise AuthenticationError("a data connection came for a session that is not open any more")
        waiting.add(preamble.stream, _blocking(tcp))

    async def _control_connection(self, tcp: trio.SocketStream, peer: str, handler: Handler) -> None:
        guest = self._identity.guest()
        stream = trio.SSLStream(tcp, guest.context, server_side=True)
        with trio.fail_after(HANDSHAKE_S):
            try:
                await stream.do_handshake()
            except trio.BrokenResourceError as error:
                refused = tls_refusal(error, "whoever connected")
                if refused is None:
                    raise
                self._log(f"{peer}: {_logged(refused)}")
                await _send_alert(stream, tcp)
                await trio.aclose_forcefully(tcp)
                return
            guest.certificate = stream.getpeercert(binary_form=True)
            channel = await self._server_handshake(stream, guest)
        try:
            while True:
                request = await channel.receive()
                if request is None:
                    return
                if not isinstance(request, Open):
                    raise ProtocolError(
                        f"the client began with {type(request).__name__} instead of a request"
                    )
                guest.check_request(request)
                await handler(Incoming(channel, request, peer, self, guest.grant, guest.facts))
                if request.role not in ("stat", "list"):
                    return
        except FlowError as error:
            self._log(f"{peer}: {_logged(error)}")
            await channel.refuse(error)
        except OSError as error:
            self._log(f"{peer}: {error}")
            await channel.refuse(
                NotFound(str(error)) if isinstance(error, FileNotFoundError) else FlowError(str(error))
            )
        finally:
            await channel.aclose()

    async def _server_handshake(
        self, stream: trio.SSLStream[trio.SocketStream], guest: _TicketGuest | Guest
    ) -> Channel:
        handshake = ServerHandshake(
            guest.resolver, guest.own_fingerprint, os.urandom(32), software=_software()
        )
        decoder = ControlDecoder(MAX_HANDSHAKE_BYTES)
        handshake.start()
        sent_at = 0.0
        while True:
            data = await stream.receive_some(MAX_HANDSHAKE_BYTES)
            rtt = time.monotonic() - sent_at
            if not data:
                raise disconnected()
            try:
                for message in decoder.feed(data):
                    for item in await trio.to_thread.run_sync(handshake.receive, message):
                        if isinstance(item, Established):
                            return Channel(stream, item.secrets(guest.fingerprint), rtt)
                        await stream.send_all(frame(item))
                        sent_at = time.monotonic()
            except FlowError as error:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(frame(handshake_refusal(error)))
                raise


async def _send_alert(stream: trio.SSLStream[trio.SocketStream], tcp: trio.SocketStream) -> None:
    """Send what OpenSSL had to say last, which trio drops: the alert that tells a client why it is not let in."""
    outgoing: ssl.MemoryBIO | None = getattr(stream, "_outgoing", None)
    alert = outgoing.read() if outgoing is not None else b""
    with trio.move_on_after(_ALERT_S), contextlib.suppress(trio.BrokenResourceError):
        if alert:
            await tcp.send_all(alert)
            await tcp.send_eof()
            while await tcp.receive_some(4096):  # or closing would reset the connection under the alert
                pass


def _logged(error: FlowError) -> str:
    """An error as a line of the log; what was refused is found there by its reason."""
    if isinstance(error, AuthenticationError) and error.reason != AuthenticationError.reason:
        return f"refused ({error.reason}): {error.message}"
    return error.message


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
