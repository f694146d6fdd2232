"""A transfer from its first session to its last, with retries.

Goal
    One command ends with everything in place or with a named reason, whatever breaks in between.
Plan
    Passes: each opens a session and runs it to its end. A broken session is followed by another after a backoff;
    what landed or is journalled is not sent again, what was scanned is not read again. Objects that failed for a
    passing reason get another pass too.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import trio

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.errors import FlowError
from flowengine.machine import usable_processors
from flowengine.store.scan_cache import ScanCache
from flowengine.transfer.bwlimit import LimitSetting
from flowengine.transfer.channel import first_flow_error
from flowengine.transfer.control import STALL_S
from flowengine.transfer.session import Counters, Session
from flowengine.units import format_count
from flowengine.wire.messages import Options

__all__ = ["OnePass", "PassResult", "Report", "TransferSettings", "run_passes"]

PASSING_REASONS: Final = frozenset({"stale", "changed", "vanished"})
"""Reasons for which an object that failed is tried once more."""
MAX_PASSES: Final = 3
FIRST_TRIES: Final = 4
"""Tries at an address that refuses connections and where nobody was met yet: a second and a half."""
_FIRST_BACKOFF_S: Final = 0.2
_LAST_BACKOFF_S: Final = 10.0


class TransferSettings(msgspec.Struct, frozen=True):
    """How a transfer is run, apart from what it moves.

    Attributes:
        profile: chunking profile's name.
        options: what is kept, left out and removed.
        streams: data streams; 0 chooses.
        threads: threads that read one large object; 0 chooses.
        compression: zstd level, 0 none, None adapts.
        use_cache: whether the scan cache is read and written.
        retry_for_s: how long to go on after the connection broke without any progress.
        stall_s: how long the peer may say nothing before the connection is taken for broken.
        limit: the rate that the transfer is held to, whichever side sends.
    """

    profile: str = DEFAULT_PROFILE.name
    options: Options = msgspec.field(default_factory=Options)
    streams: int = 0
    threads: int = 0
    compression: int | None = None
    use_cache: bool = True
    retry_for_s: float = 60.0
    stall_s: float = STALL_S
    limit: LimitSetting | None = None

    @property
    def reader_threads(self) -> int:
        """Threads that read one large object."""
        return self.threads or max(1, usable_processors() // 2)

    def caches(self) -> tuple[ScanCache | None, ScanCache | None]:
        """Two connections to the scan cache, for two threads; none where it is not used."""
        if not self.use_cache:
            return None, None
        return ScanCache(self.profile), ScanCache(self.profile)


class Report(msgspec.Struct):
    """How a transfer ended: the numbers of its last pass, bytes over the wire of all passes.

    `streams` is how many data connections were open at most; `link_changes` what was decided about them, with reasons.
    """

    state: str
    version_id: bytes
    counters: Counters
    failures: list[tuple[bytes, str, str]]
    extras: list[bytes]
    bottleneck: str
    seconds: float
    bytes_sent: int
    passes: int
    streams: int
    link_changes: list[str]


class PassResult(msgspec.Struct):
    """How one pass ended, and the session that it was."""

    state: str
    version_id: bytes
    failures: list[tuple[bytes, str, str]]
    extras: list[bytes]
    bottleneck: str
    session: Session


OnePass = Callable[[Counters], Awaitable[PassResult]]


class _Patience:
    """Whether a session that broke is followed by another, and after which pause.

    Args:
        retry_for_s: how long to go on without any progress.
        note: told once what is waited for, not at every try.
        now: of a monotonic clock, in seconds.
    """

    def __init__(self, retry_for_s: float, note: Callable[[str], None], now: float) -> None:
        self._retry_for_s = retry_for_s
        self._note = note
        self._progress_at = now
        self._backoff_s = _FIRST_BACKOFF_S
        self._tries = 0
        self._met = False
        self._noted = ""

    def bears(self, error: FlowError, counters: Counters, now: float) -> bool:
        """Whether to go on after this error, with which a session ended that had come so far."""
        self._tries += 1
        if counters.objects_done - counters.objects_unchanged > 0 or counters.bytes_sent > 1 << 20:
            self._progress_at, self._backoff_s = now, _FIRST_BACKOFF_S
        if error.reason not in ("disconnected", "stalled", "busy"):
            return False
        if now - self._progress_at > self._retry_for_s and error.reason != "busy":
            return False
        self._met = self._met or not error.context.get("refused")
        if not self._met and self._tries >= FIRST_TRIES:
            return False  # nobody was ever there: a wrong port or host, more likely than a restart
        if error.message != self._noted:
            until = "until it works" if error.reason == "busy" else f"in {self._backoff_s:.1f} s"
            self._note(f"{error.message}; trying again {until}")
            self._noted = error.message
        return True

    def pause_s(self) -> float:
        """How long to wait now; the next time longer."""
        pause_s = self._backoff_s
        self._backoff_s = min(2 * pause_s, _LAST_BACKOFF_S)
        return pause_s


async def run_passes(
    one_pass: OnePass,
    settings: TransferSettings,
    note: Callable[[str], None],
    alive: Callable[[], bool] = lambda: True,
) -> Report:
    """Run passes until one ends by itself with nothing left that another could mend.

    Args:
        one_pass: opens a session and runs it to its end, with the counters it is given.
        note: told what a person should know, one line at a time.
        alive: asked before another session is tried.

    Raises:
        FlowError: the transfer cannot go on; what landed stays, and the same call continues.
    """
    started = time.monotonic()
    sent = passes = good_passes = 0
    patience = _Patience(settings.retry_for_s, note, started)
    while True:
        counters = Counters()
        passes += 1
        try:
            done = await one_pass(counters)
        except (FlowError, BaseExceptionGroup) as raised:
            error = raised if isinstance(raised, FlowError) else first_flow_error(raised)
            if error is None:
                raise
            sent += counters.bytes_sent
            if not alive() or not patience.bears(error, counters, time.monotonic()):
                raise error from raised
            await trio.sleep(patience.pause_s())
            continue
        sent += counters.bytes_sent
        good_passes += 1
        failures = done.failures
        passing = bool(failures) and all(reason in PASSING_REASONS for _, reason, _ in failures)
        if passing and good_passes < MAX_PASSES:
            note(f"{format_count(len(failures), 'object')} changed meanwhile; going over what is left")
            continue
        return Report(
            done.state,
            done.version_id,
            counters,
            failures,
            done.extras,
            done.bottleneck,
            time.monotonic() - started,
            sent,
            passes,
            done.session.streams.most,
            done.session.changes,
        )
