"""A session that another process carries: the line between the two, and what each tells the other."""

from __future__ import annotations

import os
import socket

import msgspec
import pytest
import trio
import trio.testing
from sessions import session_over

from flowengine.errors import Denied, FlowError, NotFound, ProtocolError, TemporaryError
from flowengine.transfer.channel import first_flow_error
from flowengine.transfer.control import Control
from flowengine.transfer.handing import Ended, Status, error_of, told_error
from flowengine.transfer.keeper import handed, keep_session
from flowengine.transfer.line import Line, line_pair
from flowengine.transfer.pacing import AskingPacer, Limits
from flowengine.transfer.session import Counters
from flowengine.wire.control import ControlDecoder, encode
from flowengine.wire.keys import NO_FINGERPRINT, Direction, SessionSecrets
from flowengine.wire.messages import WantStreams
from flowengine.wire.messages import encode as encode_message
from flowengine_agent.hands import Giving, Taking
from flowengine_agent.mover import Give, TakeIn, Unseal, Where


def lines() -> tuple[Line, Line]:
    one, other = line_pair()
    return Line(one, "the other is gone"), Line(other, "the one is gone")


@pytest.mark.trio
async def test_messages_of_any_length_arrive_whole_and_in_order_with_their_descriptors() -> None:
    one, other = lines()
    read, write = os.pipe()
    sent = [b"", b"x", os.urandom(32 * 1024), os.urandom(32 * 1024 + 1), os.urandom(1_000_000)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run_writer)
        for message in sent:
            one.post(message, (write,))
        os.close(write)
        for message in sent:
            got = await other.receive()
            assert got is not None
            assert got[0] == message
            (descriptor,) = got[1]
            os.write(descriptor, b".")
            os.close(descriptor)
        nursery.cancel_scope.cancel()
    assert os.read(read, 100) == b"....."
    os.close(read)
    one.close()
    assert await other.receive() is None
    other.close()


@pytest.mark.trio
async def test_the_last_words_of_an_end_that_closed_over_unread_messages_are_heard() -> None:
    one, other = lines()
    one.post(b"never read")
    await one.flush()
    other.post(b"last words")
    await other.flush()
    other.close()
    assert await one.receive() == (b"last words", [])
    assert await one.receive() is None
    one.close()


@pytest.mark.trio
async def test_a_writer_that_is_stopped_in_the_middle_of_a_message_leaves_it_whole() -> None:
    """As at the end of a session whose keeper was slow to read: what is said last comes behind it."""
    one, other = lines()
    read, write = os.pipe()
    long = os.urandom(4_000_000)  # more than the kernel takes, so the writer stands in the middle of it
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run_writer)
            one.post(b"first")
            one.post(long, (write,))
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    os.close(write)
    one.post(b"last words")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.flush)
        assert await other.receive() == (b"first", [])
        got = await other.receive()
        assert got is not None
        assert got[0] == long
        (descriptor,) = got[1]
        os.close(descriptor)
        assert await other.receive() == (b"last words", [])
    one.close()
    other.close()
    assert os.read(read, 1) == b""  # every copy of the descriptor is closed
    os.close(read)


@pytest.mark.trio
async def test_who_waits_for_an_answer_is_woken_by_it_and_by_the_end() -> None:
    one, other = lines()
    found: list[str] = []

    def ask() -> None:
        for _ in range(2):
            ticket = one.ticket()
            one.post(b"%d" % ticket)
            try:
                one.wait(ticket)
                found.append("answered")
            except TemporaryError as error:
                found.append(error.reason)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run_writer)
        nursery.start_soon(trio.to_thread.run_sync, ask)
        got = await other.receive()
        assert got is not None
        one.answered(int(got[0]))
        await other.receive()
        other.close()
        assert await one.receive() is None
        while len(found) < 2:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert found == ["answered", "disconnected"]
    one.close()
    with pytest.raises(TemporaryError, match="the other is gone"):
        one.wait(one.ticket())


@pytest.mark.parametrize(
    "error",
    [
        NotFound("it is not there", hint="look", path="x"),
        Denied("no", reason="account-unmapped"),
        TemporaryError("cut", reason="disconnected"),
        ExceptionGroup("several", [TemporaryError("cut", reason="disconnected"), Denied("why")]),
    ],
)
def test_an_error_is_the_same_in_the_other_process(error: Exception) -> None:
    expected = error.exceptions[1] if isinstance(error, ExceptionGroup) else error
    assert isinstance(expected, FlowError)
    found = error_of(told_error(error))
    assert type(found) is type(expected)
    assert found.as_dict() == expected.as_dict()


def test_a_bug_is_told_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = error_of(told_error(ValueError("odd")))
    assert (found.reason, "ValueError('odd')" in found.message) == ("failed", True)
    assert "ValueError: odd" in capsys.readouterr().err


@pytest.mark.trio
async def test_keys_stand_in_no_text_of_what_is_handed_over() -> None:
    near, far = trio.testing.memory_stream_pair()
    told = handed(session_over(near))
    key, secrets = os.urandom(32), [part for part in told.secrets if isinstance(part, bytes)]
    where = Where("/data", b"in", False)
    for operation in (
        Give(where, told, Giving(seal=key)),
        TakeIn(where, told, Taking()),
        Unseal(where, [key], False, False),
    ):
        assert not any(repr(secret)[2:-1] in repr(operation) for secret in (key, *secrets))
        assert "<" in repr(operation)
    await far.aclose()


def test_secrets_that_were_handed_over_make_the_same_keys_there_and_none_here() -> None:
    def made() -> SessionSecrets:
        return SessionSecrets(
            bytes(32), bytes([1]) * 32, client_fingerprint=NO_FINGERPRINT, server_fingerprint=bytes([2]) * 32
        )

    ours = made()
    theirs = SessionSecrets.taken_over(*ours.hand_over())
    use = (bytes(16), 3, Direction.SOURCE_TO_TARGET, 0)
    assert theirs.stream_keys(*use)._iv == made().stream_keys(*use)._iv  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="in use"):
        ours.hand_over()
    with pytest.raises(ValueError, match="in use"):
        theirs.hand_over()


@pytest.mark.trio
async def test_a_diverted_connection_loses_nothing_either_way() -> None:
    one, other = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(one))
    first, second = encode(b"first"), encode(b"second")
    decoder = ControlDecoder()
    pending = decoder.feed(first + second[:5])
    control = Control(stream, decoder, pending)
    control.post(WantStreams(1, "a"))
    elsewhere: list[bytes] = []
    given, early = control.divert(elsewhere.append)
    control.post(WantStreams(2, "b"))
    assert given is stream
    assert early == first + second[:5]
    assert elsewhere == [
        encode(encode_message(WantStreams(count, via))) for count, via in ((1, "a"), (2, "b"))
    ]
    await stream.aclose()
    other.close()


def test_a_pace_that_another_process_holds_is_asked_for_while_it_holds() -> None:
    asked: list[int] = []
    session = Limits().pacer()
    pacer = AskingPacer(session, lambda size, is_over: asked.append(size))
    pacer.take(1000)
    assert (pacer.limited, asked) == (False, [])
    pacer.rate = 100_000.0
    assert pacer.limited
    assert pacer.portion(1 << 20) == 4096
    pacer.take(1000)
    assert asked == [1000]
    session.close()
    pacer.take(2000)
    assert asked == [1000]


def test_what_is_taken_without_waiting_counts_like_the_rest() -> None:
    now = [0.0]
    pacer = Limits(lambda: now[0]).pacer("site:a")
    pacer.set_rate(8000)
    assert pacer.take_nowait(600) == 0
    assert pacer.take_nowait(1) == pytest.approx(0.6)
    now[0] = 0.6
    assert pacer.take_nowait(1) == 0
    assert pacer.rate_bits_per_s == 8000
    pacer.close()
    assert pacer.take_nowait(10**9) == 0


@pytest.mark.trio
@pytest.mark.parametrize(
    "said",
    [
        b"\xc1",
        msgspec.msgpack.encode({"is": "nothing"}),
        msgspec.msgpack.encode({"is": "take", "ticket": 1, "near": "", "size": -(10**15)}),
        msgspec.msgpack.encode({"is": "dial", "count": 10**9, "via": ""}),
        msgspec.msgpack.encode(Status({"__class__": 1}, {}, {}, {}, {}, [])),
    ],
    ids=["no message", "unknown", "negative", "countless", "no counter"],
)
async def test_what_no_hands_say_ends_their_session(said: bytes) -> None:
    """Hands read what a peer sends and have an account's rights: their word is judged like a peer's."""
    one, other = lines()
    near, far = trio.testing.memory_stream_pair()
    ours, theirs = socket.socketpair()
    counters = Counters()
    other.post(said)
    await other.flush()
    with pytest.raises((FlowError, BaseExceptionGroup)) as refused, trio.fail_after(60):
        await keep_session(session_over(near), one, ours, counters=counters)
    assert isinstance(first_flow_error(refused.value), ProtocolError), refused.value
    assert counters == Counters()
    other.close()
    theirs.close()
    await far.aclose()


@pytest.mark.trio
async def test_what_was_decided_elsewhere_is_kept_within_bounds() -> None:
    one, other = lines()
    near, far = trio.testing.memory_stream_pair()
    ours, theirs = socket.socketpair()
    session = session_over(near)
    theirs.close()
    for _ in range(3):
        other.post(msgspec.msgpack.encode(Status({}, {}, {}, {}, {}, ["x" * 1000] * 700)))
    other.post(msgspec.msgpack.encode(Ended(b"done", b"")))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other.flush)
        assert await keep_session(session, one, ours, counters=Counters()) == b"done"
    assert [len(change) for change in session.changes] == [300] * 1000
    other.close()
    await far.aclose()


@pytest.mark.trio
async def test_hands_that_ask_without_end_are_left() -> None:
    """Each of their threads asks one thing at a time; who asks more has the agent keep it all in mind."""
    one, other = lines()
    near, far = trio.testing.memory_stream_pair()
    ours, theirs = socket.socketpair()
    session = session_over(near)
    session.pacer.set_rate(8)

    async def ask() -> None:
        for ticket in range(2_000):
            other.post(msgspec.msgpack.encode({"is": "take", "ticket": ticket, "near": "", "size": 1000}))
        await other.flush()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        with pytest.raises((FlowError, BaseExceptionGroup)) as refused, trio.fail_after(60):
            await keep_session(session, one, ours, counters=Counters())
    assert isinstance(first_flow_error(refused.value), ProtocolError), refused.value
    other.close()
    theirs.close()
    await far.aclose()


@pytest.mark.trio
async def test_descriptors_in_the_middle_of_a_message_are_no_message_and_are_closed() -> None:
    ours, theirs = line_pair()
    line = Line(ours, "the other is gone")
    read, write = os.pipe()
    socket.send_fds(theirs, [b"\1half"], [write])
    os.close(write)
    with pytest.raises(ProtocolError), trio.fail_after(60):
        await line.receive()
    assert os.read(read, 1) == b""
    os.close(read)
    theirs.close()
    line.close()
