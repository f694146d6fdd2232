"""An established session: one control connection, its data sockets and the keys between two proven peers.

A transfer outlives its sessions: whatever breaks one, the next continues from what is journalled and cached
(docs/design/adr/0002-sessions-are-passes.md). So a session itself has no resume logic.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
import trio

from flowengine.chunking import Profile
from flowengine.transfer.control import CREDIT_REST_S, STALL_S, Control
from flowengine.transfer.pacing import Limits, Pacer
from flowengine.transfer.streams import NEAR_RTT_S, Streams
from flowengine.transfer.timing import StageClock
from flowengine.wire.frames import FrameOpener, FrameSealer
from flowengine.wire.keys import Direction, SessionSecrets
from flowengine.wire.messages import Options, Progress, Rate, WantStreams

if TYPE_CHECKING:
    from flowengine.trust.grant import Party

__all__ = [
    "MAX_OPEN_OFFERS",
    "MIN_WINDOW_BYTES",
    "Consent",
    "Counters",
    "Observer",
    "Session",
    "first_window_bytes",
    "window_bytes",
]

MIN_WINDOW_BYTES: Final = 16 * 1024 * 1024
"""Least credit window; a longer link gets two bandwidth-delay products."""
MAX_WINDOW_BYTES: Final = 256 * 1024 * 1024
_ASSUMED_BYTES_PER_S: Final = 312_500_000
"""2.5 Gbit/s: what a link is taken for until it was measured."""
_NEAR_BYTES_PER_S: Final = 625_000_000
"""5 Gbit/s: what a near link is taken for always; processors and disks are its limit, and nobody measures it."""
PROGRESS_S: Final = 0.5
_CHANGES_AT_ONCE: Final = 20
_MOST_CHANGES: Final = 1000
_MOST_LETTERS: Final = 300
"""Of one change that is told from outside."""
MAX_OPEN_OFFERS: Final = 512
"""Offers that a source may have unanswered."""


def window_bytes(rtt_s: float, bytes_per_s: float) -> int:
    """The credit window of a link: two bandwidth-delay products, at least 16 MiB, at most 256 MiB.

    >>> window_bytes(0.001, 1e9), window_bytes(0.08, 312.5e6), window_bytes(0.3, 1e10)
    (16777216, 50000000, 268435456)
    """
    return max(MIN_WINDOW_BYTES, min(int(2 * rtt_s * bytes_per_s), MAX_WINDOW_BYTES))


def first_window_bytes(rtt_s: float) -> int:
    """The window of a link that was not measured yet. On a near one it is the rest of credits at both ends that counts.

    >>> first_window_bytes(0.0001), first_window_bytes(0.08)
    (50125000, 50000000)
    """
    if rtt_s < NEAR_RTT_S:
        return window_bytes(rtt_s + CREDIT_REST_S, _NEAR_BYTES_PER_S)
    return window_bytes(rtt_s, _ASSUMED_BYTES_PER_S)


class Counters(msgspec.Struct):
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
        return {name: int(value) for name, value in msgspec.structs.asdict(self).items()}


Observer = Callable[[Counters], None]


class Consent(Protocol):
    """What policy at a site said to a route."""

    @property
    def document(self) -> bytes:
        """The source's ticket, for the sites behind it; empty where the site has no policies."""


class Session(msgspec.Struct):
    """What source and target need to run one pass.

    Attributes:
        control: the control connection, handshake done, `Open` agreed.
        streams: data connections, as they come and go.
        secrets: what stream keys are derived from.
        session_id: 16 bytes, new for each session.
        rtt_s: round-trip time seen in the handshake.
        window_bytes: credit window.
        stall_s: how long the peer may say nothing.
        peer_progress: what the peer said last about itself.
        first_streams: data connections that were agreed on at the beginning.
        fixed_streams: whether their number was asked for and stays.
        peer: address of the other side; what is found out about the link is remembered by it.
        pacer: the rates that hold for what this side sends.
        changes: what was decided about the link, with reasons, by the side that sends.
        sends: whether this is that side.
        route: all sites from the source to the target, where the control connection goes through relays; else empty.
        consent: what policy said here to that route before it was dialled, where this side is the source.
        pace_of: the rates that hold for what goes over one link of this side's.
        reads, writes: the rates that hold for the storage that this side reads from, or writes to.
        carried: bytes by link of this side's, of streams that ended as well.
        release: the source's signed word that policy lets this leave, as it came with the answer to the request.
        subtrees: whether the other side understands `Subtrees`.
        checkpoint: signed head of this side's chain of evidence, to be told at the end; empty for none.
        peer_checkpoint: that of the other side, as it came.
        halted: why no object may begin any more; empty while nothing is wrong.
        halt_is_told: whether this side, the target, has said which objects will not land for it.
        told_to_halt: told of that: by whoever carries the session, in this process or another.
    """

    control: Control
    streams: Streams
    secrets: SessionSecrets
    session_id: bytes
    profile: Profile
    options: Options
    rtt_s: float = 0.0
    window_bytes: int = MIN_WINDOW_BYTES
    compression: int | None = None
    stall_s: float = STALL_S
    clock: StageClock = msgspec.field(default_factory=StageClock)
    peer_progress: Progress | None = None
    first_streams: int = 1
    fixed_streams: bool = False
    peer: str | None = None
    pacer: Pacer = msgspec.field(default_factory=lambda: Limits().pacer())
    reads: Pacer = msgspec.field(default_factory=lambda: Limits().pacer())
    writes: Pacer = msgspec.field(default_factory=lambda: Limits().pacer())
    changes: list[str] = msgspec.field(default_factory=list)
    sends: bool = False
    release: bytes = b""
    subtrees: bool = True
    checkpoint: bytes = b""
    peer_checkpoint: bytes = b""
    halted: str = ""
    halt_is_told: bool = False
    route: tuple[Party, ...] = ()
    consent: Consent | None = None
    pace_of: Callable[[str], Pacer] | None = None
    carried: Callable[[], dict[str, int]] = dict
    told_to_halt: Callable[[str], None] = lambda why: None

    def pacer_of(self, near: str) -> Pacer:
        """The rates that hold for streams over the link to a site."""
        return self.pace_of(near) if self.pace_of is not None else self.pacer

    def sealer(self, stream: int) -> FrameSealer:
        """The sealer of a stream that carries data from source to target; once per stream."""
        return FrameSealer(self.secrets.stream_keys(self.session_id, stream, Direction.SOURCE_TO_TARGET, 0))

    def opener(self, stream: int) -> FrameOpener:
        """The opener of a stream that carries data from source to target; once per stream."""
        return FrameOpener(self.secrets.stream_keys(self.session_id, stream, Direction.SOURCE_TO_TARGET, 0))

    def halt(self, why: str) -> None:
        """Let the objects land of which data have, and none begin after it: the target says which, and is told.

        The pass then ends as one whose source was not read whole.
        """
        if not self.halted:
            self.halted = why
            self.told_to_halt(why)

    def limit(self, bits_per_s: float | None) -> None:
        """Hold this session to a rate from now on; the side that sends does it, and is told if that is the other."""
        if self.sends:
            self.pacer.set_rate(bits_per_s)
        else:
            self.control.post(Rate(0 if bits_per_s is None else max(1, int(bits_per_s))))

    def want_streams(self, count: int, via: str = "") -> None:
        """Have so many data connections in all over one link of the source's: dial them here, or ask who dials."""
        streams = self.streams
        if streams.dial is None:
            self.control.post(WantStreams(count, via))
            return
        have = len(streams.over(via) if self.sends else streams.beyond(via)) if via else len(streams)
        streams.dial(count - have, via)

    def end_streams(self, numbers: Iterable[int]) -> None:
        """Let these streams end as soon as they can; what they would have carried goes over others."""
        self.streams.leave(numbers)

    async def heartbeat(
        self, counters: Counters, observe: Observer | None, bottleneck: Callable[[], str]
    ) -> None:
        """Send `Progress` and tell the observer twice a second, until cancelled."""
        last = time.monotonic()
        told = 0
        while True:
            await trio.sleep(PROGRESS_S)
            if observe is not None:
                observe(counters)
            now = time.monotonic()
            if now - last >= PROGRESS_S:
                fresh = self.changes[told : told + _CHANGES_AT_ONCE] if self.sends else []
                told += len(fresh)
                self.control.post(
                    Progress(
                        counters.as_dict() | self.clock_counters(),
                        bottleneck(),
                        fresh,
                        self.halted if self.sends or self.halt_is_told else "",
                    )
                )
                last = now

    def told_changes(self, fresh: Iterable[str]) -> None:
        """The side that sends, or the process that carries the session, decided something; the first thousand are kept."""
        room = max(0, _MOST_CHANGES - len(self.changes))
        self.changes += [change[:_MOST_LETTERS] for change in islice(fresh, room)]

    def peer_counters(self) -> dict[str, int]:
        """The numbers of the peer's last word, its stage times as in `clock_counters`."""
        return self.peer_progress.counters if self.peer_progress is not None else {}

    def clock_counters(self) -> dict[str, int]:
        """Stage times (ms) and thread counts under prefixed names, for the peer's bottleneck line."""
        busy = {f"busy.{name}": spent for name, spent in self.clock.busy_ms().items()}
        return busy | {f"threads.{name}": count for name, count in self.clock.threads().items()}
