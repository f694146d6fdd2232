"""An established session: one control connection, its data sockets and the keys between two proven peers.

A transfer outlives its sessions: whatever breaks one, the next continues from what is journalled and cached
(docs/design/adr/0002-sessions-are-passes.md). So a session itself has no resume logic.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from flowengine.chunking import Profile
from flowengine.transfer.control import STALL_S, Control
from flowengine.transfer.timing import StageClock
from flowengine.wire.frames import FrameOpener, FrameSealer
from flowengine.wire.keys import Direction, SessionSecrets
from flowengine.wire.messages import Options, Progress

__all__ = ["MAX_OPEN_OFFERS", "MIN_WINDOW_BYTES", "Counters", "Observer", "Session"]

MIN_WINDOW_BYTES: Final = 16 * 1024 * 1024
"""Least credit window; a longer link gets two bandwidth-delay products."""
PROGRESS_S: Final = 0.5
MAX_OPEN_OFFERS: Final = 512
"""Offers that a source may have unanswered."""


@dataclass
class Counters:
    """What a transfer has done so far, as one end sees it. Plain numbers that any thread may read.

    `objects` and `size_bytes` are what the scan found; the rest says what became of it. `bytes_sent` is what went
    over the wire in frames, control messages included where they are counted by the caller.
    """

    objects: int = 0
    size_bytes: int = 0
    scan_done: bool = False
    objects_done: int = 0
    bytes_done: int = 0
    objects_unchanged: int = 0
    objects_failed: int = 0
    objects_deleted: int = 0
    objects_read: int = 0
    bytes_read: int = 0
    bytes_sent: int = 0
    bytes_payload: int = 0
    bytes_reused: int = 0
    bytes_unchanged: int = 0

    def as_dict(self) -> dict[str, int]:
        """The numbers by name, for `Progress` and `Receipt`."""
        return {name: int(value) for name, value in vars(self).items()}


Observer = Callable[[Counters], None]


@dataclass
class Session:
    """What source and target need to run one pass.

    Attributes:
        control: the control connection, handshake done, `Open` agreed.
        sockets: connected data sockets, preambles exchanged; index is the stream number.
        secrets: what stream keys are derived from.
        session_id: 16 bytes, new for each session.
        rtt_s: round-trip time seen in the handshake.
        window_bytes: credit window.
        stall_s: how long the peer may say nothing.
        peer_progress: what the peer said last about itself.
    """

    control: Control
    sockets: list[socket.socket]
    secrets: SessionSecrets
    session_id: bytes
    profile: Profile
    options: Options
    rtt_s: float = 0.0
    window_bytes: int = MIN_WINDOW_BYTES
    compression: int | None = None
    stall_s: float = STALL_S
    clock: StageClock = field(default_factory=StageClock)
    peer_progress: Progress | None = None

    def sealer(self, stream: int) -> FrameSealer:
        """The sealer of a stream that carries data from source to target; once per stream."""
        return FrameSealer(self.secrets.stream_keys(self.session_id, stream, Direction.SOURCE_TO_TARGET, 0))

    def opener(self, stream: int) -> FrameOpener:
        """The opener of a stream that carries data from source to target; once per stream."""
        return FrameOpener(self.secrets.stream_keys(self.session_id, stream, Direction.SOURCE_TO_TARGET, 0))

    def shut_sockets(self) -> None:
        """Wake every lane by ending its connection; safe to call twice."""
        for sock in self.sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close_sockets(self) -> None:
        """Close the data sockets; no lane may be running."""
        for sock in self.sockets:
            sock.close()

    async def heartbeat(
        self, counters: Counters, observe: Observer | None, bottleneck: Callable[[], str]
    ) -> None:
        """Send `Progress` and tell the observer twice a second, until cancelled."""
        last = time.monotonic()
        while True:
            await trio.sleep(PROGRESS_S)
            if observe is not None:
                observe(counters)
            now = time.monotonic()
            if now - last >= PROGRESS_S:
                self.control.post(Progress(counters.as_dict() | self.clock_counters(), bottleneck()))
                last = now

    def peer_counters(self) -> dict[str, int]:
        """The numbers of the peer's last word, its stage times as in `clock_counters`."""
        return self.peer_progress.counters if self.peer_progress is not None else {}

    def clock_counters(self) -> dict[str, int]:
        """Stage times (ms) and thread counts under prefixed names, for the peer's bottleneck line."""
        busy = {f"busy.{name}": spent for name, spent in self.clock.busy_ms().items()}
        return busy | {f"threads.{name}": count for name, count in self.clock.threads().items()}
