"""Lanes: the threads that carry data between units of plaintext and sockets of sealed frames.

Goal
    Bytes move at the speed of memory and network; the event loop never sees them.
Plan
    One thread per stream and end, blocking socket calls on reused buffers. A sending lane takes units from the one
    shared queue, so any unit may go on any stream: compose, seal, send. A receiving lane: receive, open,
    and hand each whole record to the target, which verifies and writes it before the buffer is used again.
    Why threads and not tasks: docs/design/adr/0003-lanes-are-threads.md.
Invariants
    - Sealed bytes in flight never exceed the credit window; what waits for credit has sent all it composed.
    - A lane ends by its queue's end mark, by a closed socket, or by an error that ends the session.
"""

from __future__ import annotations

import errno
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Final

import zstandard

from flowengine.codec import decompress
from flowengine.errors import FlowError, TemporaryError
from flowengine.store.buffers import fresh_memory
from flowengine.transfer.compressing import UnitQueue
from flowengine.transfer.compression import CompressionChooser
from flowengine.transfer.leaving import UnitHold
from flowengine.transfer.pacing import Pacer
from flowengine.transfer.streams import SOCKET_TIMEOUT_S
from flowengine.transfer.timing import StageClock
from flowengine.transfer.unit import ChunkGone, PackedUnit, Unit, cut_out, joined
from flowengine.transfer.unit_size import UnitSize
from flowengine.units import MIB
from flowengine.wire.frames import (
    HEADER_BYTES,
    MAX_BODY_BYTES,
    MAX_FRAME_BYTES,
    FrameOpener,
    FrameSealer,
)
from flowengine.wire.records import MAX_UNIT_BYTES, STORED, ZSTD, Run, pack_record_header, parse_record_header

__all__ = [
    "Credit",
    "LaneClosed",
    "ReceivingLane",
    "SendingLane",
]

_LINGER_S: Final = 0.003
"""How long a tail waits for more before it is padded and sent."""
_LOOK_S: Final = 0.5
"""How often an idle lane looks whether it is to end."""
_FIRST_BYTES: Final = 4 * MIB
"""Of its buffer a receiving lane uses so much at first; it is enough for records and frames of 1 MiB."""
_MANY_CHUNKS: Final = 8
"""The sum of so many says little of any of them."""


class LaneClosed(TemporaryError):
    """The session is over and its lanes were told to end."""

    reason = "disconnected"


class Credit:
    """The window of bytes that may be sent and not yet be received (verified, written, journalled)."""

    def __init__(self, window_bytes: int) -> None:
        self._condition = threading.Condition()
        self._window = window_bytes
        self._used = 0
        self._closed = False

    @property
    def window_bytes(self) -> int:
        """What may be in flight now."""
        return self._window

    def try_take(self, size_bytes: int) -> bool:
        """Take credit if there is enough now. A unit larger than the window passes when nothing is in flight."""
        with self._condition:
            if self._used and self._used + size_bytes > self._window:
                return False
            self._used += size_bytes
            return True

    def take(self, size_bytes: int) -> None:
        """Take credit; blocks until there is enough.

        Raises:
            LaneClosed: the session ended meanwhile.
        """
        with self._condition:
            while self._used and self._used + size_bytes > self._window:
                if self._closed:
                    raise LaneClosed("the session ended while waiting for credit")
                self._condition.wait()
            self._used += size_bytes

    def give_back(self, size_bytes: int) -> None:
        """The peer has received so many bytes."""
        with self._condition:
            self._used = max(0, self._used - size_bytes)
            self._condition.notify_all()

    def resize(self, window_bytes: int) -> None:
        """Change the window; a smaller one takes effect as bytes are received."""
        with self._condition:
            self._window = window_bytes
            self._condition.notify_all()

    def close(self) -> None:
        """Wake all waiters with `LaneClosed`."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()


class SendingLane:
    """One stream's sending thread.

    Args:
        sock: connected, blocking socket; the preamble was sent.
        sealer: of this stream.
        units: shared queue; None ends the lane after a sealed end of stream.
        credit: shared window.
        chooser: shared compression choice.
        clock: stage timing.
        pacer: the rates that hold for this transfer.
        lanes: tells how many lanes share the link now.
        lost: told of a run whose bytes can no longer be read.
        carried: told of each unit that this lane is done with.
        size: of a full frame.
        leaving: asked whether this lane is to end before the others.
        going: asked of each run which parts of it are to be sent; None for all of it.
    """

    def __init__(
        self,
        sock: socket.socket,
        sealer: FrameSealer,
        units: UnitQueue,
        credit: Credit,
        chooser: CompressionChooser,
        clock: StageClock,
        pacer: Pacer,
        lanes: Callable[[], int],
        lost: Callable[[Run, ChunkGone], None],
        carried: Callable[[Unit], None],
        size: UnitSize,
        leaving: Callable[[], bool] = lambda: False,
        going: Callable[[UnitHold, Run], list[Run] | None] = lambda hold, run: None,
    ) -> None:
        self._leaving = leaving
        self._going = going
        self._lost = lost
        self._carried = carried
        self._sock = sock
        self._sealer = sealer
        self._units = units
        self._credit = credit
        self._chooser = chooser
        self._lanes = lanes
        self._pacer = pacer
        self._seal, self._send, self._pace = (clock.stage(name) for name in ("seal", "send", "pace"))
        self._out = fresh_memory(MAX_FRAME_BYTES)
        self._parts: list[memoryview] = []
        self._held: list[Unit | PackedUnit] = []
        self._size = size
        self._full = size.payload_bytes
        self._filled = 0
        self._chunks = 0
        self._full_before = False
        self.bytes_sent = 0
        self.stored_bytes = 0
        self.raw_bytes = 0

    def run(self) -> None:
        """Carry units until the end mark; blocks.

        Raises:
            TemporaryError: the connection broke or stalled.
        """
        try:
            while True:
                try:
                    cargo = self._units.get(_LINGER_S if self._filled else _LOOK_S)
                except queue.Empty:
                    self._flush()
                    if self._leaving():
                        self._end()
                        return
                    continue
                if cargo is not None and self._leaving():
                    self._units.put_back(cargo)  # any other lane may have it
                    cargo = None
                if cargo is None:
                    self._end()
                    return
                for unit in cargo:
                    self._carry(unit)
        except OSError as error:
            raise _broken(error) from error
        finally:
            self._let_go()
            # A session keeps its lanes for what they counted, also those of streams that were taken back.
            self._out = memoryview(b"")

    @property
    def sending_s(self) -> float:
        """How long it stood in send calls."""
        return self._send.busy_ns / 1e9

    def _end(self) -> None:
        self._flush()
        self._transmit(self._sealer.seal_end(self._out))
        self._sock.shutdown(socket.SHUT_WR)

    def _carry(self, unit: Unit | PackedUnit) -> None:
        """Compose a unit; what fills no frame of it yet is held until it is sealed."""
        self._held.append(unit)
        if not self._compose(unit):
            self._let_go()

    def _compose(self, unit: Unit | PackedUnit) -> int:
        """Put a unit behind what is composed and send what is full; gives the bytes that wait."""
        runs, views, codec, raw = self._load(unit)
        stored = sum(map(len, views))
        if not runs:
            return self._filled
        if not self._credit.try_take(stored):
            self._flush(keep=unit)  # what the peer has not got it cannot acknowledge
            self._credit.take(stored)
        self._chunks += sum([count for _, _, count in runs])
        self._put(memoryview(pack_record_header(codec, raw, stored, runs)), unit)
        for view in views:
            self._put(view, unit)
        self.raw_bytes += raw
        self.stored_bytes += stored
        return self._filled

    def _let_go(self, keep: Unit | PackedUnit | None = None) -> None:
        """Nothing of the units that were held is needed any more, but for `keep`."""
        held, self._held = self._held, [] if keep is None else [keep]
        for unit in held:
            if isinstance(unit, Unit) and unit is not keep:
                unit.release()
                self._carried(unit)

    def _load(self, unit: Unit | PackedUnit) -> tuple[list[Run], list[memoryview], int, int]:
        """What of a unit may leave: its runs, the bytes to send, how these are coded, and how many they are decoded."""
        going = [self._going(hold, run) for run, hold in zip(unit.runs, unit.holds, strict=True)]
        going = [None if parts == [run] else parts for run, parts in zip(unit.runs, going, strict=True)]
        if isinstance(unit, PackedUnit) and all(parts is None for parts in going):
            return joined(unit.runs), [memoryview(unit.data)], ZSTD, unit.raw_bytes
        runs: list[Run] = []
        views: list[memoryview] = []
        plaintexts = _unpacked(unit) if isinstance(unit, PackedUnit) else self._plaintexts(unit, going)
        for run, hold, parts, plain in zip(unit.runs, unit.holds, going, plaintexts, strict=True):
            if plain is None or parts == []:
                continue
            if parts is None:
                runs.append(run)
                views += plain
            else:
                runs += parts
                data = plain[0] if len(plain) == 1 else memoryview(b"".join(plain))
                views += cut_out(data, hold.lengths, run, parts)
        return joined(runs), views, STORED, sum(map(len, views))

    def _plaintexts(self, unit: Unit, going: list[list[Run] | None]) -> Iterator[list[memoryview] | None]:
        """The bytes of each run; None where nothing of it goes, or it can no longer be read."""
        for run, parts, source in zip(unit.runs, going, unit.parts, strict=True):
            try:
                yield None if parts == [] else source.views()
            except ChunkGone as gone:
                self._lost(run, gone)
                yield None

    def _put(self, view: memoryview, unit: Unit | PackedUnit) -> None:
        at = 0
        size = len(view)
        while at < size:
            if not self._filled:
                self._full = self._size.payload_bytes
            take = min(self._full - self._filled, size - at)
            self._parts.append(view[at : at + take])
            self._filled += take
            at += take
            if self._filled == self._full:
                self._flush(keep=unit)

    def _flush(self, keep: Unit | PackedUnit | None = None) -> None:
        """Send what is composed, and let go of the units that it came from, but for the one that is being composed.

        A tail of few chunks may be one alone, whose size is nobody's business: it is padded most.
        """
        if not self._filled:
            return
        lone = not self._full_before and self._chunks < _MANY_CHUNKS
        start = perf_counter_ns()
        size = self._sealer.seal_into(self._parts, self._out, lone=lone)
        self._seal.since(start)
        self._full_before = self._filled == self._full
        self._filled = self._chunks = 0
        self._parts.clear()
        self._let_go(keep)
        self._transmit(size)

    def _transmit(self, size: int) -> None:
        start = perf_counter_ns()
        if self._pacer.limited:
            self._transmit_slowly(size)
        else:
            self._sock.sendall(self._out[:size])
            self._send.since(start)
        self.bytes_sent += size
        now = perf_counter_ns()
        self._chooser.sent(size, (now - start) / 1e9, now / 1e9, self._lanes())

    def _transmit_slowly(self, size: int) -> None:
        at = 0
        while at < size:
            start = perf_counter_ns()
            part = self._pacer.portion(size - at)
            self._pacer.take(part)
            start = self._pace.since(start)
            self._sock.sendall(self._out[at : at + part])
            self._send.since(start)
            at += part


def _unpacked(unit: PackedUnit) -> Iterator[list[memoryview]]:
    """The bytes of each run."""
    plain = memoryview(decompress(zstandard.ZstdDecompressor(), unit.data, unit.raw_bytes))
    at = 0
    for (_, index, count), hold in zip(unit.runs, unit.holds, strict=True):
        size = sum(hold.lengths[index : index + count])
        yield [plain[at : at + size]]
        at += size


class ReceivingLane:
    """One stream's receiving thread.

    Args:
        sock: connected, blocking socket; the preamble was read.
        opener: of this stream.
        max_record_bytes: most plaintext bytes of a record (`wire.records.record_limit`).
        deliver: called with (runs, plaintext, stored bytes) of each whole record, in this thread.
        clock: stage timing.
    """

    def __init__(
        self,
        sock: socket.socket,
        opener: FrameOpener,
        max_record_bytes: int,
        deliver: Callable[[list[Run], memoryview, int], None],
        clock: StageClock,
    ) -> None:
        self._sock = sock
        self._opener = opener
        self._limit = max_record_bytes
        self._deliver = deliver
        self._receive, self._open = (clock.stage(name) for name in ("receive", "open"))
        self._decompressor = zstandard.ZstdDecompressor()
        self._header = memoryview(bytearray(HEADER_BYTES))
        # Room for unfinished records of the largest kind and one more frame behind them. Frames are received where their
        # plaintext belongs and opened there: what passes the processor's cache less often is done sooner. While records
        # are small only the first part of it is used, and the rest is no memory.
        self._plain = fresh_memory(2 * MAX_UNIT_BYTES + self._limit + MAX_BODY_BYTES)
        self._used = min(_FIRST_BYTES, len(self._plain))
        self.bytes_received = 0

    def run(self) -> None:
        """Receive until the sealed end of the stream; blocks.

        Raises:
            TemporaryError: the connection broke, stalled or was cut before its sealed end.
            IntegrityError, ProtocolError: what arrived is not what was sent.
        """
        try:
            self._run()
        finally:
            self._plain = memoryview(b"")  # as for a `SendingLane`

    def _run(self) -> None:
        start = end = 0
        while not self._opener.ended:
            if not self._fill(self._header, at_frame=True):
                self._opener.finish()
            length = self._opener.parse_header(self._header)
            if end + length > self._used:
                self._plain[: end - start] = self._plain[start:end]  # moved, also where the two overlap
                start, end = 0, end - start
                if end + length > self._used:  # twice that, so that little is moved from now on
                    self._used = min(len(self._plain), 2 * (end + length))
            body = self._plain[end : end + length]
            self._fill(body, at_frame=False)
            began = perf_counter_ns()
            end += self._opener.open_into(self._header, body, body)
            self._open.since(began)
            self.bytes_received += HEADER_BYTES + len(body)
            start = self._records(start, end)
            if start == end:
                start = end = 0
        if start != end:
            raise TemporaryError("a stream ended inside a record", reason="disconnected")

    def _records(self, start: int, end: int) -> int:
        """Deliver the whole records in [start, end); where the first incomplete one begins."""
        while True:
            header = parse_record_header(self._plain[start:end], self._limit)
            if header is None:
                return start
            codec, raw, stored, runs, size = header
            if start + size + stored > end:
                return start
            payload = self._plain[start + size : start + size + stored]
            if codec == ZSTD:
                self._deliver(runs, memoryview(decompress(self._decompressor, payload, raw)), stored)
            else:
                self._deliver(runs, payload, stored)
            start += size + stored

    def _fill(self, view: memoryview, *, at_frame: bool) -> bool:
        """Fill `view` from the socket; False at a clean end of file before the first byte."""
        began = perf_counter_ns()
        got = 0
        while got < len(view):
            try:
                count = self._sock.recv_into(view[got:], 0, socket.MSG_WAITALL)
            except BlockingIOError:
                if at_frame and got == 0:
                    continue  # idle is no fault; a dead peer shows on the control connection
                raise _broken(
                    TimeoutError(errno.ETIMEDOUT, "the peer stopped in the middle of a frame")
                ) from None
            except OSError as error:
                raise _broken(error) from error
            if count == 0:
                if at_frame and got == 0:
                    return False
                raise TemporaryError(
                    "a data stream was cut in the middle of a frame",
                    hint="what arrived whole is kept; the stream is opened again",
                    reason="disconnected",
                )
            got += count
        self._receive.since(began)
        return True


def _broken(error: OSError) -> FlowError:
    if isinstance(error, BlockingIOError | TimeoutError):
        return TemporaryError(
            f"a data stream made no progress for {SOCKET_TIMEOUT_S} s",
            hint="look at the peer's disk and the network; the same command continues where it stopped",
            reason="stalled",
        )
    return TemporaryError(
        f"a data stream broke: {error.strerror or error}", hint="it is opened again", reason="disconnected"
    )
