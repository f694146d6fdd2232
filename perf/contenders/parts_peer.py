"""Moves a tree of plain files by the engine's own parts, with nothing between them.

    python parts_peer.py receive TARGET ADDRESS PORT STREAMS
    python parts_peer.py send    SOURCE ADDRESS PORT STREAMS LEVEL {move|describe}

Every byte is read, cut, hashed, sealed, sent, opened, hashed again and written once, on threads like those of the
engine, and synced at the end. Small files that are only described are at the target already, where they are read and
compared. There is no protocol: nothing is offered or wanted, planned, journalled, remembered, continued or shown, and both
sides share a key by being the same program.
"""

from __future__ import annotations

import itertools
import os
import queue
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import zstandard
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from flowengine.chunking import CHUNK_BYTES, DEFAULT_PROFILE, Cutter, are_chunks
from flowengine.chunking.hashing import lengths_of
from flowengine.store.buffers import fresh_memory
from flowengine.store.encoded import block_of, parse_block, same_files
from flowengine.store.filesystem import sync_filesystem
from flowengine.store.many import list_folder, read_rows
from flowengine.store.runs import place_run, write_run
from flowengine.transfer.unit_size import LEAST_UNIT_BYTES
from flowengine.units import MIB
from flowengine.wire.records import MAX_UNIT_BYTES

KEY: Final = bytes(32)
HEAD: Final = struct.Struct("<BBIIQII")
"""Kind, whether compressed, bytes of the path, of what describes the data, its offset, its bytes, and as they are sent."""
LARGE, SMALL = range(2)
TAG_BYTES: Final = 16
ALL_IS_WELL: Final = b"+"
SEGMENT_BYTES: Final = 8 * MIB
BUFFERS: Final = 4
LARGE_BYTES: Final = MIB
NEAR_STREAMS: Final = 2
"""More are for a link, where a stream carries too little for large units."""
MODE_BITS: Final = 0o1777
STAGING: Final = b".parts"
PARTS = ("r.0", "r.1", "r.2", "r.3")


class Buffer:
    """Memory that several units lie in; it goes back once all were sent."""

    def __init__(self, free: queue.SimpleQueue[Buffer]) -> None:
        self.view = fresh_memory(SEGMENT_BYTES + DEFAULT_PROFILE.maximum)
        self._free = free
        self._lock = threading.Lock()
        self._held = 0

    def hold(self, times: int) -> None:
        with self._lock:
            self._held += times

    def let_go(self) -> None:
        with self._lock:
            self._held -= 1
            idle = not self._held
        if idle:
            self._free.put(self)


@dataclass(slots=True)
class Unit:
    """What one message carries."""

    kind: int
    path: bytes
    about: bytes
    offset: int
    data: memoryview
    buffer: Buffer


class Sender:
    """Walks, reads, cuts and hashes on one thread; compresses, seals and sends on one for each stream."""

    def __init__(self, level: int, streams: int, *, describe: bool) -> None:
        self._level = level
        self._unit_bytes = MAX_UNIT_BYTES if streams <= NEAR_STREAMS else LEAST_UNIT_BYTES
        self._describe = describe
        self._cutter = Cutter(DEFAULT_PROFILE)
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(Buffer(self._free))
        self._units: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()

    def walk(self, root: str, streams: int) -> None:
        small, filled = self._free.get(), 0
        small.hold(1)
        for folder, below, _ in os.walk(os.fsencode(root)):
            below.sort()
            path = os.path.relpath(folder, os.fsencode(root))
            fd = os.open(folder, os.O_RDONLY)
            listing = list_folder(fd, LARGE_BYTES, STAGING)
            for name, st in listing.larges.pairs():
                for unit in self._large(os.path.join(folder, name), os.path.join(path, name), st.st_size):
                    self._units.put(unit)
            rows = listing.smalls
            if len(rows):
                total = rows.size_bytes
                if filled + total >= len(small.view):
                    small.let_go()
                    small, filled = self._free.get(), 0
                    small.hold(1)
                if read_rows(fd, rows, small.view, filled) != len(rows):
                    raise SystemExit(f"{folder!r} changes, or has what is no plain file")
                data = small.view[filled : filled + total]
                block = block_of(rows, MODE_BITS, *self._cutter.packed_many(data, *rows.packed_sizes))
                if block is None:
                    raise SystemExit(f"{folder!r} has what is no plain file")
                small.hold(1)
                self._units.put(Unit(SMALL, path, block.data, 0, data, small))
                filled += total
            os.close(fd)
        small.let_go()
        for _ in range(streams):
            self._units.put(None)

    def _large(self, file: bytes, path: bytes, size: int) -> Iterator[Unit]:
        fd = os.open(file, os.O_RDONLY)
        done, rest = 0, b""
        while done < size or rest:
            buffer = self._free.get()
            view, begin = buffer.view, done - len(rest)
            view[: len(rest)] = rest
            until = min(SEGMENT_BYTES, size - begin)
            filling = self._cutter.filling(view, len(rest))
            packed = filling.fill(fd, done, until, ends=begin + until == size)
            done = begin + until
            rest = bytes(view[filling.cut : until])
            parts = [*_in_units(packed, self._unit_bytes)]
            buffer.hold(len(parts))
            at = 0
            for about, length in parts:
                yield Unit(LARGE, path, about, begin + at, view[at : at + length], buffer)
                at += length
        os.close(fd)

    def lane(self, sock: socket.socket) -> None:
        out = fresh_memory(SEGMENT_BYTES + 2 * MIB)
        compressor = zstandard.ZstdCompressor(level=self._level) if self._level else None
        for number in itertools.count():
            unit = self._units.get()
            if unit is None:
                sock.shutdown(socket.SHUT_WR)
                return
            data: memoryview | bytes = unit.data[:0] if self._describe else unit.data
            if compressor is not None and len(data):
                packed = compressor.compress(data)
                data = packed if len(packed) < len(data) else data
            stored, coded = len(data), isinstance(data, bytes)
            head = HEAD.pack(
                unit.kind, coded, len(unit.path), len(unit.about), unit.offset, len(unit.data), stored
            )
            sealing = Cipher(AES(KEY), GCM(number.to_bytes(12, "big"))).encryptor()
            sealing.authenticate_additional_data(head)
            out[: len(head)] = head
            at = len(head)
            for part in (unit.path, unit.about, data):
                at += sealing.update_into(part, out[at : at + len(part) + 15])
            sealing.finalize()
            out[at : at + TAG_BYTES] = sealing.tag
            unit.buffer.let_go()
            sock.sendall(out[: at + TAG_BYTES])


def _in_units(packed: bytes, most: int) -> Iterator[tuple[bytes, int]]:
    """Packed chunks in parts of at most so many bytes: those of each, and how many bytes they are."""
    start = size = 0
    for number, length in enumerate(lengths_of(packed)):
        if size and size + length > most:
            yield packed[start * CHUNK_BYTES : number * CHUNK_BYTES], size
            start, size = number, 0
        size += length
    if size:
        yield packed[start * CHUNK_BYTES :], size


class Receiver:
    """Receives, opens, verifies and writes on one thread for each stream."""

    def __init__(self, root: str) -> None:
        self._root = os.open(root, os.O_RDONLY)
        self._staging = -1
        self._numbers = self._part = 0
        self._parts: list[int] = []
        self._lock = threading.Lock()
        self._larges: dict[bytes, int] = {}

    def begin(self) -> None:
        os.mkdir(STAGING, dir_fd=self._root)
        self._staging = os.open(STAGING, os.O_RDONLY, dir_fd=self._root)
        for name in PARTS:
            os.mkdir(name, dir_fd=self._staging)
            self._parts.append(os.open(name, os.O_RDONLY, dir_fd=self._staging))

    def lane(self, sock: socket.socket) -> None:
        buffer = fresh_memory(SEGMENT_BYTES + 2 * MIB)
        old = fresh_memory(SEGMENT_BYTES)
        head = memoryview(bytearray(HEAD.size))
        opening = AESGCM(KEY)
        decompressor = zstandard.ZstdDecompressor()
        for number in itertools.count():
            if not sock.recv_into(head, 0, socket.MSG_WAITALL):
                return
            kind, coded, path_bytes, about_bytes, offset, raw, stored = HEAD.unpack(head)
            body = buffer[: path_bytes + about_bytes + stored + TAG_BYTES]
            if sock.recv_into(body, 0, socket.MSG_WAITALL) != len(body):
                raise SystemExit("a stream was cut")
            opening.decrypt_into(number.to_bytes(12, "big"), body, bytes(head), body[:-TAG_BYTES])
            path = bytes(body[:path_bytes])
            about = bytes(body[path_bytes : path_bytes + about_bytes])
            data = body[path_bytes + about_bytes : -TAG_BYTES]
            if coded:
                data = memoryview(decompressor.decompress(data, raw))
            if kind == SMALL:
                if stored:
                    self._small(path, about, data)
                else:
                    self._compare(path, about, old)
                continue
            if not are_chunks(data, about):
                raise SystemExit(f"{path!r} is not what was sent")
            os.pwrite(self._large(path), data, offset)

    def _large(self, path: bytes) -> int:
        with self._lock:
            if path not in self._larges:
                where = b"/proc/self/fd/%d/%s" % (self._root, path)
                os.makedirs(os.path.dirname(where), exist_ok=True)
                self._larges[path] = os.open(where, os.O_WRONLY | os.O_CREAT, 0o600)
            return self._larges[path]

    def _small(self, path: bytes, about: bytes, data: memoryview) -> None:
        block = parse_block(about)
        if block is None:
            raise SystemExit(f"{path!r} was described by what is no block")
        where = b"/proc/self/fd/%d/%s" % (self._root, path)
        if not are_chunks(data, block.columns.chunks):
            raise SystemExit(f"{path!r} is not what was sent")
        with self._lock:
            number, self._numbers = self._numbers, self._numbers + block.count
            self._part = (self._part + 1) % len(PARTS)
            part = self._parts[self._part]
        write_run(part, number, block.columns.packed, data)
        os.makedirs(where, exist_ok=True)
        folder = os.open(where, os.O_RDONLY)
        place_run(part, number, block, folder)
        os.close(folder)

    def _compare(self, path: bytes, about: bytes, view: memoryview) -> None:
        block = parse_block(about)
        folder = os.open(path, os.O_RDONLY, dir_fd=self._root)
        rows = list_folder(folder, LARGE_BYTES, STAGING).smalls
        if (
            block is None
            or not same_files(block, rows, attributes=True)
            or read_rows(folder, rows, view, 0) != len(rows)
            or not are_chunks(view, block.columns.chunks)
        ):
            raise SystemExit(f"{path!r} is not the same")
        os.close(folder)

    def end(self) -> None:
        for name, part in zip(PARTS, self._parts, strict=True):
            os.close(part)
            os.rmdir(name, dir_fd=self._staging)
        os.close(self._staging)
        os.rmdir(STAGING, dir_fd=self._root)
        sync_filesystem(self._root)


def run_threads(calls: list[Callable[[], None]]) -> None:
    """Run all at the same time; whatever one of them raises ends the program."""

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def receive(target: str, address: str, port: str, streams: str) -> None:
    receiver = Receiver(target)
    with socket.create_server((address, int(port)), backlog=int(streams)) as listener:
        while True:
            socks = [listener.accept()[0] for _ in range(int(streams))]
            receiver.begin()
            run_threads([lambda sock=sock: receiver.lane(sock) for sock in socks])  # type: ignore[misc]
            receiver.end()
            for sock in socks:
                sock.sendall(ALL_IS_WELL)  # and durable
                sock.close()


def send(source: str, address: str, port: str, streams: str, level: str, what: str) -> None:
    sender = Sender(int(level), int(streams), describe=what == "describe")
    socks = [socket.create_connection((address, int(port))) for _ in range(int(streams))]
    lanes: list[Callable[[], None]] = [lambda sock=sock: sender.lane(sock) for sock in socks]  # type: ignore[misc]
    run_threads([lambda: sender.walk(source, int(streams)), *lanes])
    for sock in socks:
        if sock.recv(1) != ALL_IS_WELL:
            raise SystemExit("the receiver failed")


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(*sys.argv[2:])
    else:
        send(*sys.argv[2:])
