"""The shell around `concurrency`: takes samples of the data connections, applies what was decided, remembers it."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from typing import Final

import msgspec
import trio

from flowengine.store.scan_cache import state_directory
from flowengine.transfer.concurrency import Change, Concurrency, Remembered, Sample
from flowengine.transfer.session import Session, window_bytes
from flowengine.transfer.streams import MAX_STREAMS, NEAR_RTT_S
from flowengine.transfer.tcp_info import TcpState, tcp_state
from flowengine.units import format_bytes, format_rate

__all__ = ["LinkControl", "load_remembered", "save_remembered"]

_TICK_S: Final = 0.2
_TICK_ROUND_TRIPS: Final = 2.5
_EARLY_S: Final = 3.0
_EARLY_TICKS: Final = 3
"""Slow start doubles with each round trip: it is watched more closely."""
_PACE_HEADROOM: Final = 1.05
"""What a remembered rate is exceeded by at the start, so that a link that got faster is noticed."""
_LEAST_MEASURED_BYTES: Final = 64 * 1024 * 1024
_MAX_LINKS: Final = 256
_MOST_STREAMS: Final = 32
"""More are opened only where they are asked for: each costs both ends some megabytes."""
_LANE_BYTES: Final = 512 * 1024
"""What a lane holds between its queue and the network."""
_MAX_AGE_S: Final = 7 * 24 * 3600.0
_SO_MAX_PACING_RATE: Final = 47
_NO_PACE: Final = 0xFFFFFFFFFFFFFFFF


class LinkControl:
    """Watches the link of one session at its source.

    Args:
        session: whose streams are watched.
        resize: told the credit window.
        end_stream: asked to end one stream, whichever is free first.
    """

    def __init__(
        self,
        session: Session,
        resize: Callable[[int], None],
        end_stream: Callable[[], None],
    ) -> None:
        self._session = session
        self._resize = resize
        self._end_stream = end_stream
        self._fixed = session.fixed_streams
        self._peer = session.peer
        self._latest: dict[int, TcpState] = {}
        self._window = session.window_bytes
        self._started = time.monotonic()
        self._paced: tuple[int, int] = (0, 0)
        self._rule: Concurrency | None = None

    async def run(self) -> None:
        """Watch until cancelled. A near link needs none of this: its cores are the limit."""
        session = self._session
        if session.rtt_s < NEAR_RTT_S:
            return
        await session.streams.wait_first()
        known = load_remembered(self._peer) if self._peer else None
        streams = max(1, len(session.streams), session.first_streams)
        pace = known.bytes_per_s * _PACE_HEADROOM if known else None
        rule = self._rule = Concurrency(streams, _MOST_STREAMS, probe=not self._fixed, pace=pace)
        if known and pace:
            self._note(
                Change(0.0, "pace", int(pace), f"an earlier transfer saw {format_rate(known.bytes_per_s)}")
            )
            if known.streams != streams and not self._fixed:
                rule.streams = known.streams
                self._note(Change(0.0, "streams", known.streams, "an earlier transfer did best with them"))
                self._adjust(known.streams)
        try:
            while True:
                sample = self._sample()
                for change in rule.observe(sample):
                    self._note(change)
                    if change.what == "streams":
                        self._adjust(change.value)
                self._apply_pace(rule.pace)
                self._apply_window(sample, rule.best, lossy=rule.lossy)
                early = sample.at_s < _EARLY_S
                await trio.sleep(
                    max(_TICK_S, _TICK_ROUND_TRIPS * session.rtt_s) / (_EARLY_TICKS if early else 1)
                )
        finally:
            arrived = sum(state.arrived_bytes for state in self._latest.values())
            if self._peer and not self._fixed and arrived >= _LEAST_MEASURED_BYTES:
                save_remembered(self._peer, rule.remember())

    def _sample(self) -> Sample:
        for number, sock in list(self._session.streams.sockets.items()):
            try:
                self._latest[number] = tcp_state(sock)
            except OSError:
                continue
        states = list(self._latest.values())
        live = [self._latest[number] for number in self._session.streams.sockets if number in self._latest]
        now = time.monotonic()
        return Sample(
            now - self._started,
            sum(state.arrived_bytes for state in states),
            sum(state.sent_segments for state in states),
            sum(state.resent_segments for state in states),
            self._session.clock.busy_s("send"),
            sum(state.receiver_limited_s for state in states),
            sum(state.rtt_s for state in live) / max(1, len(live)),
            min((state.min_rtt_s for state in live if state.min_rtt_s), default=self._session.rtt_s),
            len(live),
        )

    def _note(self, change: Change) -> None:
        value = {"pace": format_rate, "window": format_bytes}.get(change.what, str)(change.value)
        self._session.changes.append(f"{change.at_s:.2f} s: {change.what} {value}: {change.reason}")

    def _adjust(self, count: int) -> None:
        """Have so many streams: ask for more, or end some."""
        session = self._session
        have = len(session.streams)
        if count > have:
            session.want_streams(count)
        for _ in range(have - count):
            self._end_stream()

    def _apply_pace(self, pace: float | None) -> None:
        sockets = list(self._session.streams.sockets.values())
        each = _NO_PACE if pace is None else max(1, int(pace / max(1, len(sockets))))
        if (each, len(sockets)) == self._paced or (pace is None and not self._paced[0]):
            return
        self._paced = (each, len(sockets))
        for sock in sockets:
            try:
                sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, each.to_bytes(8, "little"))
            except OSError:
                continue  # it just ended, or this system cannot: then nothing is held back

    def _apply_window(self, sample: Sample, best: float, *, lossy: bool) -> None:
        # What is behind a gap has arrived and cannot be taken: a repair costs another round trip.
        if sample.at_s < 1.0 or not best:
            return
        window = window_bytes(sample.rtt_s * (2 if lossy else 1), best) + sample.streams * _LANE_BYTES
        if window > 1.25 * self._window or window < 0.5 * self._window:
            self._window = window
            self._resize(window)
            self._note(
                Change(
                    sample.at_s, "window", window, f"{format_rate(best)} over {sample.rtt_s * 1000:.0f} ms"
                )
            )


def _path() -> str:
    return os.path.join(state_directory(), "links.json")


def _load() -> dict[str, dict[str, float]]:
    try:
        with open(_path(), "rb") as file:
            return msgspec.json.decode(file.read(), type=dict[str, dict[str, float]])
    except (OSError, msgspec.MsgspecError):
        return {}  # it is only a hint


def load_remembered(peer: str) -> Remembered | None:
    """What was found out about the link to an address within the last week."""
    known = _load().get(peer)
    if known is None or not 0 <= time.time() - known.get("at", 0.0) < _MAX_AGE_S:
        return None
    streams, rate = int(known.get("streams", 0)), known.get("bytes_per_s", 0.0)
    return Remembered(streams, rate) if 0 < streams <= MAX_STREAMS and rate > 0 else None


def save_remembered(peer: str, found: Remembered) -> None:
    """Keep what was found out; of more than 256 links the oldest are forgotten."""
    links = _load()
    links[peer] = {"streams": found.streams, "bytes_per_s": found.bytes_per_s, "at": time.time()}
    newest = sorted(links.items(), key=lambda item: item[1].get("at", 0.0), reverse=True)[:_MAX_LINKS]
    part = f"{_path()}.{os.getpid()}.part"
    try:
        with open(part, "w", encoding="utf-8") as file:
            json.dump(dict(newest), file)
        os.replace(part, _path())
    except OSError:
        return  # the next transfer finds it out again
