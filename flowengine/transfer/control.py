"""The control connection as the engine uses it: messages out from any thread, messages in by batch."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Final

import trio

from flowengine.errors import PeerError, ProtocolError, TemporaryError
from flowengine.wire import messages
from flowengine.wire.control import ControlDecoder
from flowengine.wire.control import encode as frame
from flowengine.wire.messages import (
    DirectoryBegin,
    DirectoryEnd,
    EncodedOffer,
    Landed,
    Message,
    ObjectRun,
    Offer,
    Refuse,
    Subtrees,
    Totals,
    Want,
)

__all__ = ["CREDIT_REST_S", "STALL_S", "Control", "wait_for_last_word"]

STALL_S: Final = 60.0
"""A peer that says nothing for so long is taken for dead; both ends send `Progress` every second."""

LAST_WORD_S: Final = 0.5
"""How long a connection that broke waits for the peer's own word on it; both ends do where something between them died."""

MAX_WAITING_MESSAGES: Final = 8192
"""Directories cost no credit and want no answer: this is what keeps a scan from running away from the network."""

_REST_S: Final = 0.005
"""Least time between two sends: many small messages then go as one, and wake both ends' loops once. A wake-up costs
more than what is done by it; the credit window covers many times this."""
_BUSY_REST_S: Final = 0.02
_LONG_REST_S: Final = 0.04
CREDIT_REST_S: Final = 2 * _BUSY_REST_S
"""What a credit may wait on its way besides the link: until it is sent, and until what comes before it is dealt with. Where
the link is short this is nearly all of a credit's round trip."""
_BUSY_SENDS: Final = 8
"""After so many sends without a pause the rest is longer, and longest while nothing waits that is in a hurry."""
_PATIENT: Final = frozenset({Offer, ObjectRun, Subtrees, Want, DirectoryBegin, DirectoryEnd, Landed, Totals})
"""What comes by the hundred, with others of its kind on their way."""
_REST_MESSAGES: Final = 1024
"""With so many waiting there is no rest."""
_RECEIVE_BYTES: Final = 256 * 1024
_JOIN_BYTES: Final = 128 * 1024


class Control:
    """One control connection after its handshake.

    `post` may be called from any thread and never blocks; what bounds the queue are the offers in flight.

    Args:
        stream: TLS, established.
        decoder: what cuts the stream into messages; it may hold the beginning of one.
        pending: whole messages that arrived already.
    """

    def __init__(
        self, stream: trio.abc.Stream, decoder: ControlDecoder, pending: list[bytes] | None = None
    ) -> None:
        self._stream = stream
        self._pending = pending or []
        self._decoder = decoder
        self._outgoing: deque[bytes] = deque()
        self._wake = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._loop_thread = threading.get_ident()
        self._closing = False
        self._signalled = False
        self._hurried = False
        self._room = threading.Event()
        self._ended = False
        self._elsewhere: Callable[[bytes], None] | None = None
        self.bytes_sent = 0
        self.bytes_received = 0

    def divert(self, elsewhere: Callable[[bytes], None]) -> tuple[trio.abc.Stream, bytes]:
        """Let another process use the connection: gives it, with what of the peer's arrived already.

        Args:
            elsewhere: takes what was posted here, and what will be, as `post_encoded` does there.
        """
        early = b"".join(map(frame, self._pending)) + self._decoder.take_rest()
        self._pending = []
        self._elsewhere = elsewhere
        while self._outgoing:
            elsewhere(self._outgoing.popleft())
        return self._stream, early

    def post(self, message: Message | EncodedOffer) -> None:
        """Queue a message for sending."""
        if isinstance(message, EncodedOffer):
            self.post_encoded(frame(message.encode()), hurried=False)
            return
        self.post_encoded(frame(messages.encode(message)), hurried=type(message) not in _PATIENT)

    def post_encoded(self, framed: bytes, *, hurried: bool = True) -> None:
        """The same, of one that is encoded and framed."""
        if self._elsewhere is not None:
            self._elsewhere(framed)
            return
        self._outgoing.append(framed)
        if self._signalled and (self._hurried or not hurried):
            return  # the writer was woken and has not looked yet: waking costs two system calls
        self._signalled = True
        self._hurried = self._hurried or hurried
        if threading.get_ident() == self._loop_thread:
            self._wake.set()
        else:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._wake_up)

    def wait_for_room(self, most: int = MAX_WAITING_MESSAGES) -> None:
        """Hold a worker thread back while more messages than so many wait to be sent. Not for the loop's thread."""
        while len(self._outgoing) > most and not self._ended:
            self._room.clear()
            if len(self._outgoing) > most and not self._ended:
                self._room.wait(1.0)

    def _wake_up(self) -> None:
        self._wake.set()

    async def run_writer(self) -> None:
        """Send what is posted until `finish_writing`; the one task that writes to the stream."""
        sent_at = -_REST_S
        in_a_row = 0
        try:
            while True:
                in_a_row = in_a_row + 1 if trio.current_time() < sent_at + _LONG_REST_S else 0
                await self._rest(sent_at, busy=in_a_row > _BUSY_SENDS)
                # Cleared before looking: what is posted from here on wakes again.
                self._signalled = self._hurried = False
                more = bool(self._outgoing)
                while more:
                    parts: list[bytes] = []
                    size = 0
                    while self._outgoing and size < _JOIN_BYTES:
                        part = self._outgoing.popleft()
                        parts.append(part)
                        size += len(part)
                    self._room.set()
                    await self._stream.send_all(b"".join(parts))
                    self.bytes_sent += size
                    sent_at = trio.current_time()
                    more = size >= _JOIN_BYTES and bool(self._outgoing)
                if self._outgoing:
                    continue  # what was posted while this was sent waits for more, as all else does
                if self._closing:
                    return
                await self._wake.wait()
                self._wake = trio.Event()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._ended = True
            self._room.set()
            broken = TemporaryError(
                "the control connection to the peer broke", hint="it is dialled again", reason="disconnected"
            )
            await wait_for_last_word(broken)
            raise broken from error
        finally:
            self._ended = True
            self._room.set()

    async def _rest(self, sent_at: float, *, busy: bool) -> None:
        """Let messages come together, since the last ones went only just now."""
        while not self._closing and len(self._outgoing) < _REST_MESSAGES:
            patient = busy and not self._hurried
            least = _LONG_REST_S if patient else _BUSY_REST_S if busy else _REST_S
            rest = sent_at + least - trio.current_time()
            if rest <= 0:
                return
            if not patient:
                await trio.sleep(rest)
                return
            self._wake = trio.Event()
            if not self._hurried:
                with trio.move_on_after(rest):
                    await self._wake.wait()

    def finish_writing(self) -> None:
        """Let `run_writer` end once the queue is empty."""
        self._closing = True
        self._wake.set()

    async def receive(self, stall_s: float = STALL_S) -> AsyncGenerator[list[Message | EncodedOffer], None]:
        """Batches of messages in order of arrival; ends when the peer closes.

        Raises:
            TemporaryError: the connection broke, or nothing arrived for `stall_s` (reason "stalled").
            PeerError: the peer refused to go on (`Refuse`).
            ProtocolError: what arrived is no message.
        """
        if self._pending:  # came together with the last message of the handshake
            early, self._pending = self._batch(self._pending), []
            yield early
        while True:
            try:
                with trio.fail_after(stall_s):
                    data = await self._stream.receive_some(_RECEIVE_BYTES)
            except trio.TooSlowError:
                raise TemporaryError(
                    f"the peer said nothing for {stall_s:.0f} s",
                    hint="look at the peer and the network; the same command continues where it stopped",
                    reason="stalled",
                ) from None
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise TemporaryError(
                    "the control connection to the peer broke",
                    hint="it is dialled again",
                    reason="disconnected",
                ) from error
            if not data:
                return
            self.bytes_received += len(data)
            batch = self._batch(self._decoder.feed(data))
            if batch:
                yield batch

    @staticmethod
    def _batch(items: list[bytes]) -> list[Message | EncodedOffer]:
        batch = [messages.decode_lazily(item) for item in items]
        for message in batch:
            if isinstance(message, Refuse):
                raise refusal(message)
        return batch

    async def aclose(self) -> None:
        """Close the connection without waiting for the peer."""
        await trio.aclose_forcefully(self._stream)


async def wait_for_last_word(error: TemporaryError) -> None:
    """Where a connection broke, give the task that receives time to raise what the peer says of it: this is cancelled then.

    A peer whose disk is full ends its data connections first and then tells why. Without this wait the first sign of it
    would pass for a network that broke, and be tried again.
    """
    if error.reason == "disconnected":
        await trio.sleep(LAST_WORD_S)


def refusal(message: Refuse) -> Exception:
    """The peer's `Refuse` as an error of this side."""
    kind = (
        TemporaryError if message.retryable else ProtocolError if message.reason == "protocol" else PeerError
    )
    return kind(message.message, hint=message.hint, reason=message.reason)
