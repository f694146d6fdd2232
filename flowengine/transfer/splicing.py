"""Passing a sealed stream on from one socket to another without seeing it: the kernel moves the pages.

Goal
    A relay costs little processor time, no disk, and memory that does not grow with what passes.
Plan
    A thread per stream: `splice` from the one socket into a pipe, and from the pipe into the other, with blocking calls.
    What the second socket does not take stays in the pipe, so nothing more is read, and TCP slows the sender.
Invariants
    - Bytes go one way only, from the side of the source to that of the target; from the other side nothing is read.
    - At most `PIPE_BYTES` are on their way between the two sockets.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from typing import Final

from flowengine.transfer.pacing import Pacer

__all__ = ["PIPE_BYTES", "Splice"]

PIPE_BYTES: Final = 256 * 1024
_TIMED_OUT: Final = (errno.EAGAIN, errno.EWOULDBLOCK)


class Splice:
    """One stream on its way through a relay.

    Args:
        source, target: connected sockets with blocking calls that time out (`streams.prepare_socket`); closed at the end.
        pacer: the rates that hold on the link behind.
    """

    def __init__(self, source: socket.socket, target: socket.socket, pacer: Pacer) -> None:
        self._source = source
        self._target = target
        self._pacer = pacer
        self._stopped = False
        self.passed_bytes = 0
        self.problem = ""
        """Why it did not come to its own end; empty when it did, or was stopped."""

    def run(self) -> None:
        """Pass on until the source's side ends, or a connection breaks; blocks. Never raises for a broken one."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            except OSError:
                pass  # this account has many pipes already: a smaller one is slower, and right
            self._carry(read_end, write_end)
        except OSError as error:
            if not self._stopped:
                self.problem = "no progress" if error.errno in _TIMED_OUT else error.strerror or str(error)
        finally:
            os.close(read_end)
            os.close(write_end)
            self._source.close()
            self._target.close()

    def _carry(self, read_end: int, write_end: int) -> None:
        source, target = self._source.fileno(), self._target.fileno()
        flags = os.SPLICE_F_MOVE
        while not self._stopped:
            try:
                waiting = os.splice(source, write_end, PIPE_BYTES, flags=flags)
            except BlockingIOError:
                continue  # idle is no fault; a dead neighbour shows on the hop's own connection
            if not waiting:
                self._target.shutdown(socket.SHUT_WR)
                return
            while waiting:
                part = waiting
                if self._pacer.limited:
                    part = self._pacer.portion(waiting)
                    self._pacer.take(part)
                moved = _all_of(lambda size: os.splice(read_end, target, size, flags=flags), part)
                waiting -= moved
                self.passed_bytes += moved

    def stop(self) -> None:
        """Cut it off, from any thread: both sides see a broken connection."""
        self._stopped = True
        self._pacer.close()
        for sock in (self._source, self._target):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # closed already


def _all_of(move: Callable[[int], int], size: int) -> int:
    """Move so many bytes; a call may move fewer."""
    moved = 0
    while moved < size:
        moved += move(size - moved)
    return moved
