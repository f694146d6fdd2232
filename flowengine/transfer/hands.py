"""The hands that carry a session for its keeper (`handing`): the engine, run on what they are given."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Final, TypeAlias

import trio

from flowengine.chunking import profile_named
from flowengine.errors import FlowError
from flowengine.transfer.control import Control
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
    encode,
    pacer_for,
    to_hands,
    told_error,
)
from flowengine.transfer.line import Line
from flowengine.transfer.pacing import AskingPacer, Pacer
from flowengine.transfer.session import Counters, Observer, Session
from flowengine.transfer.streams import Streams
from flowengine.wire.control import ControlDecoder
from flowengine.wire.keys import SessionSecrets

__all__ = ["Work", "hear_answer", "tell_landed", "tell_named", "work_on_session"]

_PULSE_S: Final = 5.0
"""How often the keeper is told something, also where the engine has nothing to tell."""

Work: TypeAlias = Callable[[Session, Counters, Observer, Landed], Awaitable[bytes]]


class _Streams(Streams):
    """Data connections as the keeper passes them on."""

    def link_to(self, line: Line, *, dials: bool) -> None:
        if dials:
            self.dial = lambda count, via: line.post(encode(Dial(count, via)))
        self.told_gone = lambda number: line.post(encode(Gone(number)))


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
        line.post(encode(final))
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
        subtrees=told.subtrees,
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
        message, descriptors = to_hands(got[0]), got[1]
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
                pacer = pacer_for(session, near)
                assert isinstance(pacer, AskingPacer)
                pacer.rate = None if bits_per_s is None else bits_per_s / 8
            case Answered(ticket):
                line.answered(ticket)
        for fd in descriptors:
            os.close(fd)
    raise line.lost()


def _ask_pace(line: Line, near: str, size: int, is_over: Callable[[], bool]) -> None:
    ticket = line.ticket()
    line.post(encode(Take(ticket, near, size)))
    with contextlib.suppress(FlowError):  # the session ends by it, elsewhere
        line.wait(ticket, is_over)


def tell_landed(line: Line, rows: list[tuple[bytes, int]], wrong: str = "") -> None:
    """Have the keeper take note of objects; returns once it did. For a thread.

    Raises:
        TemporaryError: the keeper is gone; whether it took note is not known.
    """
    ticket = line.ticket()
    line.post(encode(Durable(ticket, rows, wrong)))
    line.wait(ticket)


def tell_named(line: Line, rows: list[tuple[bytes, int]]) -> None:
    """Tell the keeper of objects that have their names now; as `tell_landed`."""
    ticket = line.ticket()
    line.post(encode(Named(ticket, rows)))
    line.wait(ticket)


async def hear_answer(line: Line) -> bool:
    """Wait for an answer of the keeper's outside of a session, and pass it on; False where it is gone."""
    if (got := await line.receive()) is None:
        return False
    for fd in got[1]:
        os.close(fd)
    message = to_hands(got[0])
    if isinstance(message, Answered):
        line.answered(message.ticket)
    return True


def _tell_status(line: Line, session: Session, told: list[int], counters: Counters) -> None:
    fresh = session.changes[told[0] :]
    told[0] += len(fresh)
    line.post(
        encode(
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
