"""A line between two processes of this host: messages of any length, with descriptors, in order, from any thread.

Goal
    A session runs in one process while who decides on it is in another, and either sees at once that the other is gone.
Plan
    A pair of Unix sockets that keep the borders of packets. A message is cut into packets, each with a first byte that
    says whether more of it follows; descriptors travel with the last one. One task writes what any thread posts; a
    packet leaves the queue once it was sent, so that whoever writes on after a cancelled writer goes on where it stood.
    A question is a message with a ticket; the thread that asked waits for the answer's ticket.
Invariants
    - Nothing has a name: only the two processes can hold the ends.
    - Whoever waits for an answer is woken when the line ends.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import trio

from flowengine.errors import ProtocolError, TemporaryError

__all__ = ["Line", "line_pair"]

_PACKET_BYTES: Final = 32 * 1024
"""Well below what a packet of a Unix socket may have (net.core.wmem_default less what the kernel counts besides)."""
_MOST_BYTES: Final = 1 << 30
_MOST_DESCRIPTORS: Final = 8
_LOOK_S: Final = 0.2
_MORE: Final = b"\1"
_LAST: Final = b"\0"


def line_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a new line, as sockets; each becomes a `Line` where it is used."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Line:
    """One end. Made where an event loop runs; `post` and `ask` may be called from any thread.

    Args:
        sock: of `line_pair`; the line closes it.
        gone: what to say when the other end is not there any more.
    """

    def __init__(self, sock: socket.socket, gone: str) -> None:
        sock.setblocking(False)
        self._sock = trio.socket.from_stdlib_socket(sock)
        self._gone = gone
        self._outgoing: deque[tuple[bytes, memoryview, list[int]]] = deque()
        self._writing = trio.Lock()
        self._wake = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._waiting: dict[int, threading.Event] = {}
        self._tickets = 0
        self._closed = False

    def lost(self) -> TemporaryError:
        """The error of a line whose other end went."""
        return TemporaryError(self._gone, hint="it is tried again from what is there", reason="disconnected")

    # --- out ----------------------------------------------------------------------------------------------------

    def post(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Queue a message; descriptors are copied and may be closed at once."""
        copies = [os.dup(fd) for fd in descriptors]
        view = memoryview(message)
        last = max(0, len(message) - 1) // _PACKET_BYTES * _PACKET_BYTES
        packets: list[tuple[bytes, memoryview, list[int]]] = [
            (_MORE, view[at : at + _PACKET_BYTES], []) for at in range(0, last, _PACKET_BYTES)
        ]
        with self._lock:
            if not self._closed:
                self._outgoing.extend([*packets, (_LAST, view[last:], copies)])
                copies = []
        for fd in copies:
            os.close(fd)
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._wake_up)

    def _wake_up(self) -> None:
        self._wake.set()

    async def run_writer(self) -> None:
        """Send what is posted until cancelled."""
        while True:
            await self.flush()
            await self._wake.wait()
            self._wake = trio.Event()

    async def flush(self) -> None:
        """Send what was posted; ends without a word where the other end is gone, which the reader tells."""
        async with self._writing:
            while self._outgoing:
                kind, body, descriptors = self._outgoing[0]
                rights = (
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
                    if descriptors
                    else []
                )
                try:
                    await self._sock.sendmsg([kind, body], rights)
                except OSError:
                    self._end()
                    return
                with self._lock:
                    if self._closed:  # meanwhile, and all descriptors with it
                        return
                    self._outgoing.popleft()
                for fd in descriptors:
                    os.close(fd)

    # --- questions ----------------------------------------------------------------------------------------------

    def ticket(self) -> int:
        """A number for a question that `wait` is to wait for; from a worker thread."""
        with self._lock:
            self._tickets += 1
            self._waiting[self._tickets] = threading.Event()
            if self._closed:
                self._waiting[self._tickets].set()
            return self._tickets

    def wait(self, ticket: int, is_over: Callable[[], bool] = lambda: False) -> None:
        """Hold a worker thread until the question was answered.

        Args:
            is_over: asked now and then whether nobody needs the answer any more.

        Raises:
            TemporaryError: the line ended meanwhile.
        """
        waiting = self._waiting[ticket]
        while not waiting.wait(_LOOK_S) and not is_over():
            pass
        with self._lock:
            del self._waiting[ticket]
            if self._closed:
                raise self.lost()

    def answered(self, ticket: int) -> None:
        """Let who waits for it go on."""
        with self._lock:
            waiting = self._waiting.get(ticket)
        if waiting is not None:
            waiting.set()

    # --- in -----------------------------------------------------------------------------------------------------

    async def receive(self) -> tuple[bytes, list[int]] | None:
        """The next message with its descriptors, which are the caller's to close; None when the other end is gone.

        Raises:
            ProtocolError: the other end sent what cannot be a message.
        """
        parts: list[bytes] = []
        size = 0
        space = socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)
        while True:
            try:
                data, rights, _, _ = await self._sock.recvmsg(
                    _PACKET_BYTES + 1, space, socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionResetError:
                continue  # the other end closed over something unread: what it said before is still to be had
            except OSError:
                data, rights = b"", []
            descriptors = array.array("i")
            for level, kind, held in rights:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors.frombytes(held[: len(held) - len(held) % descriptors.itemsize])
            if not data:
                self._end()
                return None
            parts.append(data[1:])
            size += len(data)
            if size > _MOST_BYTES or (data[:1] != _LAST and descriptors):
                for fd in descriptors:
                    os.close(fd)
                raise ProtocolError(
                    "a process of this host sent a message without end, or descriptors within it"
                )
            if data[:1] == _LAST:
                return b"".join(parts), list(descriptors)

    def _end(self) -> None:
        with self._lock:
            self._closed = True
            waiting = list(self._waiting.values())
            left, self._outgoing = list(self._outgoing), deque()
        for event in waiting:
            event.set()
        for _, _, descriptors in left:
            for fd in descriptors:
                os.close(fd)

    def close(self) -> None:
        """End the line; the other end sees it."""
        self._end()
        self._sock.close()
