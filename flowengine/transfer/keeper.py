"""The keeper of a session that other hands carry (`handing`): it has the connections, and decides."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Final

import msgspec
import trio

from flowengine.errors import TemporaryError
from flowengine.transfer.handing import (
    READS,
    WRITES,
    Answered,
    Broke,
    Came,
    Dial,
    Durable,
    Ended,
    Gone,
    Halt,
    Handed,
    Landed,
    Leave,
    Named,
    Pace,
    Post,
    Status,
    Take,
    ToHands,
    encode,
    error_of,
    odd,
    pacer_for,
    understood,
)
from flowengine.transfer.line import Line
from flowengine.transfer.session import Counters, Observer, Session
from flowengine.transfer.timing import StageClock
from flowengine.wire.messages import Progress

__all__ = ["handed", "hear_end", "keep_session"]

_SPLICE_BYTES: Final = 256 * 1024
_PACES_EVERY_S: Final = 0.1
_MOST_QUESTIONS: Final = 1024
"""That hands may have open at once: more than they have threads."""
_LAST_WORDS_S: Final = 5.0
"""How long what the hands said last may take to go out."""


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
        subtrees=session.subtrees,
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
        self._questions = 0
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

    def _tell(self, message: ToHands, descriptors: tuple[int, ...] = ()) -> None:
        self._line.post(encode(message), descriptors)

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
        rate = pacer_for(self._session, near).rate_bits_per_s
        if near not in self._paces or self._paces[near] != rate:
            self._paces[near] = rate
            self._tell(Pace(near, rate))

    async def _follow_paces(self) -> None:
        while True:
            await trio.sleep(_PACES_EVERY_S)
            for near in list(self._paces):
                self._tell_pace(near)

    async def _answer(self, asked: Take | Durable) -> None:
        try:
            await (self._take(asked) if isinstance(asked, Take) else self._durable(asked))
        finally:
            self._questions -= 1
        self._tell(Answered(asked.ticket))

    async def _take(self, asked: Take) -> None:
        pacer = pacer_for(self._session, asked.near)
        while (wait := pacer.take_nowait(asked.size)) > 0:  # noqa: ASYNC110 - time is what is waited for
            await trio.sleep(min(wait, _PACES_EVERY_S))

    # --- what the hands say -------------------------------------------------------------------------------------

    async def _listen(self) -> Ended:
        session = self._session
        while (got := await self._heard()) is not None:
            for fd in got[1]:
                os.close(fd)
            message = understood(got[0])
            match message:
                case Status():
                    self._status(message)
                case Gone(number):
                    session.streams.gone(number)
                case Dial(count, via):
                    if session.streams.dial is not None:
                        session.streams.dial(count, via)
                case Take() | Durable():
                    if self._questions >= _MOST_QUESTIONS:
                        raise odd("more than it can wait for")
                    self._questions += 1
                    self._nursery.start_soon(self._answer, message)
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
        known = msgspec.structs.asdict(self._counters)
        if not told.counters.keys() <= known.keys():
            raise odd("counters that there are not")
        for name, value in told.counters.items():
            setattr(self._counters, name, type(known[name])(value))
        self._clock.busy, self._clock.counts = told.busy, told.threads
        self._carried = told.carried
        session.peer_progress = Progress(told.peer)
        session.told_changes(told.changes)
        if self._observe is not None:
            self._observe(self._counters)

    async def _durable(self, told: Durable) -> None:
        if self._landed is not None:
            await trio.to_thread.run_sync(self._landed, told.rows, told.wrong)


async def hear_end(
    line: Line,
    landed: Landed | None = None,
    named: Callable[[list[tuple[bytes, int]]], object] | None = None,
) -> Ended | Broke | None:
    """Wait for the end of what hands were asked for outside of a session; None where they are gone.

    Args:
        landed: takes note of what they tell meanwhile.
        named: hears of those of it that have their names.

    Raises:
        ProtocolError: they said what nobody understands.
    """
    while (got := await line.receive()) is not None:
        for fd in got[1]:
            os.close(fd)
        message = understood(got[0])
        if isinstance(message, Ended | Broke):
            return message
        if isinstance(message, Durable) and landed is not None:
            await trio.to_thread.run_sync(landed, message.rows, message.wrong)
        elif isinstance(message, Named) and named is not None:
            await trio.to_thread.run_sync(named, message.rows)
        else:
            raise odd("of what it was not asked for")
        line.post(encode(Answered(message.ticket)))
        await line.flush()
    return None
