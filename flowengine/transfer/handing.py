"""A session that another process of this host carries: this one keeps its connections and decides, that one moves.

Goal
    Whoever moves the data has the rights of the account that it is moved for, and neither a key of this site nor a word
    in what is decided.
Plan
    The *keeper* has the session as it was agreed on, control connection in TLS and all. It hands keys, data connections
    and one end of a socket pair over to the *hands*, which run the engine on them, and splices the pair with the
    control connection. What the engine asks and tells here (how far it is, what is durable, may this go out, dial
    another one) are messages on a line between the two; to stop it, the keeper cuts.
Invariants
    - The keeper's copies of the data connections live as long as the session: what it cuts is cut, whatever the hands do.
    - An object is reported to the peer only after the keeper has taken note of it.
    - While a limit holds, each portion is counted by the keeper before it goes out.
    - The hands read what a peer sends: what they say is judged like a peer's word, and at the worst ends their session.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Annotated, Any, Final, Protocol, TypeAlias

import msgspec
import trio

import flowengine.errors as all_errors
from flowengine.chunking import profile_named
from flowengine.errors import FlowError, ProtocolError, TemporaryError
from flowengine.transfer.channel import first_flow_error
from flowengine.transfer.control import Control
from flowengine.transfer.line import Line
from flowengine.transfer.pacing import AskingPacer, Pacer
from flowengine.transfer.session import Counters, Observer, Session
from flowengine.transfer.streams import MAX_STREAMS, Streams
from flowengine.transfer.timing import StageClock
from flowengine.trust.grant import Party
from flowengine.wire.control import ControlDecoder
from flowengine.wire.keys import SessionSecrets
from flowengine.wire.messages import Options, Progress

__all__ = [
    "Broke",
    "Ended",
    "Handed",
    "Landed",
    "error_of",
    "handed",
    "hear_answer",
    "hear_end",
    "keep_session",
    "tell_landed",
    "told_error",
    "work_on_session",
]


class Landed(Protocol):
    """Takes note of objects that are durable; of what is wrong with them as well, where that is said."""

    def __call__(self, rows: list[tuple[bytes, int]], wrong: str = "") -> None: ...


_SPLICE_BYTES: Final = 256 * 1024
READS: Final = "<reads>"
WRITES: Final = "<writes>"
"""In place of a link's site: the storage that is read from or written to."""
_PACES_EVERY_S: Final = 0.1
_PULSE_S: Final = 5.0
_LAST_WORDS_S: Final = 5.0
"""How long what the hands said last may take to go out."""


class Handed(msgspec.Struct, frozen=True):
    """A session as it is handed over; fields as of `Session`.

    Attributes:
        dials: whether more data connections are dialled by the keeper, rather than asked of the peer.
    """

    secrets: tuple[bytes, int, int, bytes, bytes]
    session_id: bytes
    profile: str
    options: Options
    rtt_s: float
    window_bytes: int
    compression: int | None
    stall_s: float
    first_streams: int
    fixed_streams: bool
    peer: str | None
    sends: bool
    checkpoint: bytes
    halted: str
    route: list[Party]
    dials: bool


class _Told(msgspec.Struct, tag_field="is"):
    """Base of what is told on the line."""


class Came(_Told, tag="came"):
    """A data connection; its descriptor comes with it."""

    number: int
    near: str
    far: str


class Leave(_Told, tag="leave"):
    """These streams are to end."""

    numbers: list[int]


class Halt(_Told, tag="halt"):
    """Nothing more is to be offered."""

    why: str


class Post(_Told, tag="post"):
    """A control message of the keeper's own."""

    framed: bytes


class Pace(_Told, tag="pace"):
    """What holds on a link, or of the storage (`READS`, `WRITES`), now; None: no limit."""

    near: str
    bits_per_s: float | None


class Answered(_Told, tag="answered"):
    """A question is answered."""

    ticket: int


class Status(_Told, tag="status"):
    """How far the hands are."""

    counters: dict[str, int]
    busy: dict[str, int]
    threads: dict[str, int]
    peer: dict[str, int]
    carried: dict[str, int]
    changes: list[str]


class Gone(_Told, tag="gone"):
    """A stream ended."""

    number: int


class Dial(_Told, tag="dial"):
    """More data connections are wanted."""

    count: Annotated[int, msgspec.Meta(ge=0, le=MAX_STREAMS)]
    via: str


class Take(_Told, tag="take"):
    """May so much go out over a link, or be read or written?"""

    ticket: int
    near: str
    size: Annotated[int, msgspec.Meta(ge=0)]


class Durable(_Told, tag="durable"):
    """Objects are durable under their names."""

    ticket: int
    rows: list[tuple[bytes, int]]
    wrong: str = ""


class Ended(_Told, tag="ended"):
    """The session came to its end."""

    outcome: bytes
    peer_checkpoint: bytes


class Broke(_Told, tag="broke"):
    """It ended by an error."""

    kind: str
    message: str
    hint: str
    reason: str
    context: dict[str, Any]


_ToHands: TypeAlias = Came | Leave | Halt | Post | Pace | Answered
_ToKeeper: TypeAlias = Status | Gone | Dial | Take | Durable | Ended | Broke
_encode: Final = msgspec.msgpack.Encoder().encode
_to_hands: Final = msgspec.msgpack.Decoder(_ToHands).decode
_to_keeper: Final = msgspec.msgpack.Decoder(_ToKeeper).decode


def _odd(what: str) -> ProtocolError:
    return ProtocolError(
        f"the process that moves the data told {what}",
        hint="its session is ended; look at the agent's log, and please report it",
    )


def _understood(said: bytes) -> _ToKeeper:
    try:
        message: _ToKeeper = _to_keeper(said)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _odd(f"what nobody understands: {error}") from None
    return message


def _pacer(session: Session, of: str) -> Pacer:
    """What holds on a link, or of the storage."""
    return session.reads if of == READS else session.writes if of == WRITES else session.pacer_of(of)


def told_error(error: BaseException) -> Broke:
    """An error for the other process; one that nobody foresaw is told to stderr as well."""
    found = error if isinstance(error, FlowError) else first_flow_error(error)
    if found is None:
        traceback.print_exception(error, file=sys.stderr)
        found = FlowError(
            f"an internal error of a mover: {error!r}"[:500],
            hint="look at the agent's log, and please report it",
        )
    known = next(kind for kind in type(found).__mro__ if getattr(all_errors, kind.__name__, None) is kind)
    context = msgspec.to_builtins(found.context, enc_hook=str)
    return Broke(known.__name__, found.message, found.hint, found.reason, context)


def error_of(broke: Broke) -> FlowError:
    """The error that the other process told of."""
    kind = getattr(all_errors, broke.kind, FlowError)
    if not (isinstance(kind, type) and issubclass(kind, FlowError)):
        kind = FlowError
    made = kind(broke.message, hint=broke.hint, reason=broke.reason)
    made.context = broke.context
    return made


# --- the keeper -----------------------------------------------------------------------------------------------------


class _Clock(StageClock):
    """Stage times as the hands told them."""

    def __init__(self) -> None:
        super().__init__()
        self.busy: dict[str, int] = {}
        self.counts: dict[str, int] = {}

    def busy_ms(self) -> dict[str, int]:
        return self.busy

    def threads(self) -> dict[str, int]:
        return self.counts


def handed(session: Session) -> Handed:
    """What the hands are told of a session; its keys are theirs from now on."""
    return Handed(
        secrets=session.secrets.hand_over(),
        session_id=session.session_id,
        profile=session.profile.name,
        options=session.options,
        rtt_s=session.rtt_s,
        window_bytes=session.window_bytes,
        compression=session.compression,
        stall_s=session.stall_s,
        first_streams=session.first_streams,
        fixed_streams=session.fixed_streams,
        peer=session.peer,
        sends=session.sends,
        checkpoint=session.checkpoint,
        halted=session.halted,
        route=list(session.route),
        dials=session.streams.dial is not None,
    )


async def keep_session(
    session: Session,
    line: Line,
    control: socket.socket,
    *,
    counters: Counters,
    observe: Observer | None = None,
    landed: Landed | None = None,
) -> bytes:
    """Keep a session that hands at the other end of a line carry; gives their outcome.

    Args:
        session: as of `run_source` and `run_target`.
        line: on which the hands were told of it.
        control: this end of the pair whose other end they use for the control connection.
        counters, observe, landed: as of `run_source` and `TargetRoot`.

    Raises:
        TemporaryError: the hands are gone (reason "disconnected"); another session continues.
        FlowError: as they told.
    """
    return await _Keeper(session, line, control, counters, observe, landed).run()


class _Keeper:
    def __init__(
        self,
        session: Session,
        line: Line,
        control: socket.socket,
        counters: Counters,
        observe: Observer | None,
        landed: Landed | None,
    ) -> None:
        self._session = session
        self._line = line
        self._control = trio.SocketStream(trio.socket.from_stdlib_socket(control))
        self._counters = counters
        self._observe = observe
        self._landed = landed
        self._paces: dict[str, float | None] = {}
        self._all_said = trio.Event()
        self._carried: dict[str, int] = {}
        self._clock = session.clock = _Clock()

    async def run(self) -> bytes:
        session, line = self._session, self._line
        session.carried = lambda: dict(self._carried)
        session.told_to_halt = lambda why: self._tell(Halt(why))
        if session.halted:  # perhaps since it was handed over
            self._tell(Halt(session.halted))
        session.streams.told_to_leave = lambda numbers: self._tell(Leave(numbers))
        stream, early = session.control.divert(lambda framed: self._tell(Post(framed)))
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(line.run_writer)
                nursery.start_soon(self._inward, stream, early)
                nursery.start_soon(self._outward, stream)
                nursery.start_soon(self._give_streams)
                self._tell_pace(READS if session.sends else WRITES)
                nursery.start_soon(self._follow_paces)
                ended = await self._listen()
                nursery.cancel_scope.cancel()
        finally:
            session.streams.shut()
            session.streams.close()
            for pacer in (session.pacer, session.reads, session.writes):
                pacer.close()
            line.close()
            await trio.aclose_forcefully(self._control)
        session.peer_checkpoint = ended.peer_checkpoint
        return ended.outcome

    def _tell(self, message: _ToHands, descriptors: tuple[int, ...] = ()) -> None:
        self._line.post(_encode(message), descriptors)

    # --- the control connection ---------------------------------------------------------------------------------

    async def _inward(self, stream: trio.abc.Stream, early: bytes) -> None:
        try:
            if early:
                await self._control.send_all(early)
            while data := await stream.receive_some(_SPLICE_BYTES):
                await self._control.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        with contextlib.suppress(OSError):  # the hands see the end, and say what it means
            self._control.socket.shutdown(socket.SHUT_WR)

    async def _outward(self, stream: trio.abc.Stream) -> None:
        try:
            while data := await self._control.receive_some(_SPLICE_BYTES):
                await stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        with contextlib.suppress(OSError):
            self._control.socket.shutdown(socket.SHUT_RD)
        self._all_said.set()

    # --- data connections and their rates -----------------------------------------------------------------------

    async def _give_streams(self) -> None:
        streams = self._session.streams
        while True:
            number, sock = await streams.next()
            near, far = streams.link(number)
            if self._session.sends:
                self._tell_pace(near)
            self._tell(Came(number, near, far), (sock.fileno(),))

    def _tell_pace(self, near: str) -> None:
        rate = _pacer(self._session, near).rate_bits_per_s
        if near not in self._paces or self._paces[near] != rate:
            self._paces[near] = rate
            self._tell(Pace(near, rate))

    async def _follow_paces(self) -> None:
        while True:
            await trio.sleep(_PACES_EVERY_S)
            for near in list(self._paces):
                self._tell_pace(near)

    async def _take(self, asked: Take) -> None:
        pacer = _pacer(self._session, asked.near)
        while (wait := pacer.take_nowait(asked.size)) > 0:  # noqa: ASYNC110 - time is what is waited for
            await trio.sleep(min(wait, _PACES_EVERY_S))
        self._tell(Answered(asked.ticket))

    # --- what the hands say -------------------------------------------------------------------------------------

    async def _listen(self) -> Ended:
        session = self._session
        while (got := await self._heard()) is not None:
            for fd in got[1]:
                os.close(fd)
            message = _understood(got[0])
            match message:
                case Status():
                    self._status(message)
                case Gone(number):
                    session.streams.gone(number)
                case Dial(count, via):
                    if session.streams.dial is not None:
                        session.streams.dial(count, via)
                case Take():
                    self._nursery.start_soon(self._take, message)
                case Durable():
                    self._nursery.start_soon(self._durable, message)
                case Ended() | Broke():
                    with trio.move_on_after(_LAST_WORDS_S):
                        await self._all_said.wait()
                    if isinstance(message, Broke):
                        raise error_of(message)
                    return message
        raise self._line.lost()

    async def _heard(self) -> tuple[bytes, list[int]] | None:
        """What they say next; they say something every few seconds."""
        try:
            with trio.fail_after(self._session.stall_s):
                return await self._line.receive()
        except trio.TooSlowError:
            raise TemporaryError(
                f"the process that moves the data said nothing for {self._session.stall_s:.0f} s",
                hint="look at the host's load; was the process stopped?",
                reason="stalled",
            ) from None

    def _status(self, told: Status) -> None:
        session = self._session
        known = vars(self._counters)
        if not told.counters.keys() <= known.keys():
            raise _odd("counters that there are not")
        known.update({name: type(known[name])(value) for name, value in told.counters.items()})
        self._clock.busy, self._clock.counts = told.busy, told.threads
        self._carried = told.carried
        session.peer_progress = Progress(told.peer)
        session.changes += told.changes
        if self._observe is not None:
            self._observe(self._counters)

    async def _durable(self, told: Durable) -> None:
        if self._landed is not None:
            await trio.to_thread.run_sync(self._landed, told.rows, told.wrong)
        self._tell(Answered(told.ticket))


# --- the hands ------------------------------------------------------------------------------------------------------

Work: TypeAlias = Callable[[Session, Counters, Observer, Landed], Awaitable[bytes]]


class _Streams(Streams):
    """Data connections as the keeper passes them on."""

    def link_to(self, line: Line, *, dials: bool) -> None:
        if dials:
            self.dial = lambda count, via: line.post(_encode(Dial(count, via)))
        self.told_gone = lambda number: line.post(_encode(Gone(number)))


async def work_on_session(told: Handed, line: Line, control: socket.socket, work: Work) -> None:
    """Carry a session for the keeper at the other end of a line, and tell it how that ended.

    Args:
        told: the session.
        control: for the control connection.
        work: runs the engine; given the session, counters, and what to call as it goes on; gives its outcome.
    """
    async with _session(told, line, control) as (session, stream):
        counters = Counters()
        observe = partial(_tell_status, line, session, [0])
        final: Ended | Broke
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(line.run_writer)
                nursery.start_soon(_obey, line, session)
                nursery.start_soon(_pulse, partial(observe, counters))
                try:  # in here, so that threads which wait for an answer get it while the work winds down
                    outcome = await work(session, counters, observe, partial(tell_landed, line))
                    final = Ended(outcome, session.peer_checkpoint)
                except (Exception, BaseExceptionGroup) as error:
                    final = told_error(error)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            final = told_error(group)
        observe(counters)
        await trio.aclose_forcefully(stream)
        line.post(_encode(final))
        await line.flush()


@contextlib.asynccontextmanager
async def _session(
    told: Handed, line: Line, control: socket.socket
) -> AsyncIterator[tuple[Session, trio.SocketStream]]:
    streams = _Streams()
    streams.link_to(line, dials=told.dials)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(control))
    session = Session(
        control=Control(stream, ControlDecoder()),
        streams=streams,
        secrets=SessionSecrets.taken_over(*told.secrets),
        session_id=told.session_id,
        profile=profile_named(told.profile),
        options=told.options,
        rtt_s=told.rtt_s,
        window_bytes=told.window_bytes,
        compression=told.compression,
        stall_s=told.stall_s,
        first_streams=told.first_streams,
        fixed_streams=told.fixed_streams,
        peer=told.peer,
        sends=told.sends,
        checkpoint=told.checkpoint,
        halted=told.halted,
        route=tuple(told.route),
    )
    session.reads = AskingPacer(session.reads, partial(_ask_pace, line, READS))
    session.writes = AskingPacer(session.writes, partial(_ask_pace, line, WRITES))
    if told.sends:
        paces: dict[str, AskingPacer] = {}

        def pace_of(near: str) -> Pacer:
            if near not in paces:
                paces[near] = AskingPacer(session.pacer, partial(_ask_pace, line, near))
            return paces[near]

        session.pace_of = pace_of
    try:
        yield session, stream
    finally:
        streams.close()
        await trio.aclose_forcefully(stream)


async def _pulse(tell: Callable[[], None]) -> None:
    """Say something also where the engine does not yet, or not any more."""
    while True:
        await trio.sleep(_PULSE_S)
        tell()


async def _obey(line: Line, session: Session) -> None:
    """Do what the keeper says; where it is gone the session is over."""
    while (got := await line.receive()) is not None:
        message, descriptors = _to_hands(got[0]), got[1]
        match message:
            case Came(number, near, far) if descriptors:
                session.streams.arrived(number, socket.socket(fileno=descriptors.pop()), near, far)
            case Leave(numbers):
                session.streams.leave(numbers)
            case Halt(why):
                session.halt(why)
            case Post(framed):
                session.control.post_encoded(framed)
            case Pace(near, bits_per_s):
                pacer = _pacer(session, near)
                assert isinstance(pacer, AskingPacer)
                pacer.rate = None if bits_per_s is None else bits_per_s / 8
            case Answered(ticket):
                line.answered(ticket)
        for fd in descriptors:
            os.close(fd)
    raise line.lost()


def _ask_pace(line: Line, near: str, size: int, is_over: Callable[[], bool]) -> None:
    ticket = line.ticket()
    line.post(_encode(Take(ticket, near, size)))
    with contextlib.suppress(FlowError):  # the session ends by it, elsewhere
        line.wait(ticket, is_over)


def tell_landed(line: Line, rows: list[tuple[bytes, int]], wrong: str = "") -> None:
    """Have the keeper take note of objects; returns once it did. For a thread.

    Raises:
        TemporaryError: the keeper is gone; whether it took note is not known.
    """
    ticket = line.ticket()
    line.post(_encode(Durable(ticket, rows, wrong)))
    line.wait(ticket)


async def hear_answer(line: Line) -> bool:
    """Wait for an answer of the keeper's outside of a session, and pass it on; False where it is gone."""
    if (got := await line.receive()) is None:
        return False
    for fd in got[1]:
        os.close(fd)
    message = _to_hands(got[0])
    if isinstance(message, Answered):
        line.answered(message.ticket)
    return True


async def hear_end(line: Line, landed: Landed | None = None) -> Ended | Broke | None:
    """Wait for the end of what hands were asked for outside of a session; None where they are gone.

    Args:
        landed: takes note of what they tell meanwhile.

    Raises:
        ProtocolError: they said what nobody understands.
    """
    while (got := await line.receive()) is not None:
        for fd in got[1]:
            os.close(fd)
        message = _understood(got[0])
        if isinstance(message, Ended | Broke):
            return message
        if not isinstance(message, Durable) or landed is None:
            raise _odd("of what it was not asked for")
        await trio.to_thread.run_sync(landed, message.rows, message.wrong)
        line.post(_encode(Answered(message.ticket)))
        await line.flush()
    return None


def _tell_status(line: Line, session: Session, told: list[int], counters: Counters) -> None:
    fresh = session.changes[told[0] :]
    told[0] += len(fresh)
    line.post(
        _encode(
            Status(
                counters.as_dict(),
                session.clock.busy_ms(),
                session.clock.threads(),
                session.peer_counters(),
                session.carried(),
                fresh,
            )
        )
    )
