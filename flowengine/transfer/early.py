"""A connection that is begun while the rest of the program is still being loaded: its first round trip costs no time.

Goal
    On a long link a command is at the other side as soon as it is loaded.
Plan
    A thread connects. Who dials that address first takes the connection, and waits for it a little where it is not there
    yet.
Invariants
    - It is a help and no more: where it comes to nothing, whoever dials does so by itself, and says what is wrong.
    - A connection belongs to whoever took it; one that comes too late is closed.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Final

__all__ = ["as_asked_for", "begin", "is_begun", "take"]

_CONNECT_S: Final = 10.0
_PATIENCE_S: Final = 1.0
"""An address of several that does not answer takes longer than to dial all of them, which is what comes then."""

_begun: dict[tuple[str, int], _Connecting] = {}


class _Connecting(threading.Thread):
    def __init__(self, host: str, port: int) -> None:
        super().__init__(name="flow-early", daemon=True)
        self._address = as_asked_for(host), port
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._given_up = False

    def run(self) -> None:
        try:
            sock = socket.create_connection(self._address, _CONNECT_S)  # type: ignore[arg-type]  # bytes do as well
        except OSError:
            return
        sock.setblocking(False)
        with self._lock:
            if not self._given_up:
                self._sock = sock
                return
        sock.close()

    def take(self, patience_s: float) -> socket.socket | None:
        self.join(patience_s)
        with self._lock:
            self._given_up = True
        if self._sock is not None and not _is_open(self._sock):
            self._sock.close()
            return None
        return self._sock


def _is_open(sock: socket.socket) -> bool:
    """Whether the other side, which says nothing by itself, has not closed it: it waits for a first word only so long."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def as_asked_for(host: str) -> str | bytes:
    """A host's name or address as the resolver is given it.

    Text goes by way of IDNA, whose tables take longer to load than a connection inside a machine takes.
    """
    return host.encode() if host.isascii() else host


def begin(host: str, port: int) -> None:
    """Begin a connection that will be wanted soon; returns at once."""
    if is_begun(host, port):
        return
    connecting = _Connecting(host, port)
    with contextlib.suppress(RuntimeError):  # no thread to be had
        connecting.start()
        _begun[host, port] = connecting


def is_begun(host: str, port: int) -> bool:
    """Whether a connection to this address was begun and not taken."""
    return (host, port) in _begun


def take(host: str, port: int, patience_s: float = _PATIENCE_S) -> socket.socket | None:
    """The connection that was begun to this address; None where there is none. Blocks a little."""
    connecting = _begun.pop((host, port), None)
    return None if connecting is None else connecting.take(patience_s)
