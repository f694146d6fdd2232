"""The shell around `concurrency`: takes samples of the data connections, applies what was decided, remembers it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Final

import msgspec
import trio

from flowengine.store.scan_cache import state_directory
from flowengine.transfer.concurrency import Change, Concurrency, Remembered, Sample
from flowengine.transfer.control import CREDIT_REST_S
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
"""What a lane holds between its queue and the network: half a frame of 1 MiB. Larger ones come only where the window has room
for several of each stream."""
_MAX_AGE_S: Final = 7 * 24 * 3600.0
_SO_MAX_PACING_RATE: Final = 47
_NO_PACE: Final = 0xFFFFFFFFFFFFFFFF


class _Link(msgspec.Struct, eq=False):
    """One link of this side's and what is known of it.

    Attributes:
        near: the site at its other end.
        known_as: by what it is remembered; None: not at all.
        rtt_s: when it was first seen.
        latest: what TCP counted last, by stream.
        alone: whether no other link was seen.
        paced: what was set: bytes a second for each of so many sockets.
    """

    near: str
    rule: Concurrency
    known_as: str | None
    rtt_s: float
    latest: dict[int, TcpState] = msgspec.field(default_factory=dict)
    paced: tuple[int, int] = (0, 0)
    sample: Sample | None = None
    alone: bool = True


class LinkControl:
    """Watches the links that one session goes over at its source, each for itself.

    Args:
        session: whose streams are watched.
        resize: told the credit window.
        sending_s: tells how long lanes over a link stood in send calls, summed.
    """

    def __init__(
        self,
        session: Session,
        resize: Callable[[int], None],
        sending_s: Callable[[str], float],
    ) -> None:
        self._session = session
        self._resize = resize
        self._sending_s = sending_s
        self._window = session.window_bytes
        self._started = time.monotonic()
        self._links: dict[str, _Link] = {}

    async def run(self) -> None:
        """Watch until cancelled. A near link needs none of this: its cores are the limit."""
        session = self._session
        await session.streams.wait_first()
        try:
            while True:
                self._look_for_links()
                for link in self._links.values():
                    self._steer(link)
                self._apply_window()
                early = time.monotonic() - self._started < _EARLY_S
                rtt_s = max((link.rtt_s for link in self._links.values()), default=session.rtt_s)
                await trio.sleep(max(_TICK_S, _TICK_ROUND_TRIPS * rtt_s) / (_EARLY_TICKS if early else 1))
        finally:
            for link in self._links.values():
                arrived = sum(state.arrived_bytes for state in link.latest.values())
                if link.known_as and not session.fixed_streams and arrived >= _LEAST_MEASURED_BYTES:
                    save_remembered(link.known_as, link.rule.remember())

    def _look_for_links(self) -> None:
        """Begin to watch links that have streams and are long enough to need it."""
        streams = self._session.streams
        nears = {streams.near(number) for number in streams.sockets}
        if len(nears) > 1:
            for link in self._links.values():
                if link.alone:  # what was agreed on for all streams is not this link's alone
                    link.alone = False
                    link.rule.streams = max(1, len(streams.over(link.near)))
        for near in nears - self._links.keys():
            rtt_s = self._round_trip(near)
            if rtt_s is not None and rtt_s >= NEAR_RTT_S:
                self._begin(near, rtt_s)

    def _round_trip(self, near: str) -> float | None:
        """Of the link, as the handshake saw it where it is the one of the control connection."""
        session = self._session
        if (
            len({session.streams.near(number) for number in session.streams.sockets}) == 1
            and not session.route
        ):
            return session.rtt_s
        for number in session.streams.over(near):
            try:
                state = tcp_state(session.streams.sockets[number])
            except (OSError, KeyError):
                continue
            return state.min_rtt_s or state.rtt_s
        return None

    def _begin(self, near: str, rtt_s: float) -> None:
        session = self._session
        alone = not self._links and not session.route
        known_as = session.peer if alone else f"{session.peer}>{near}" if session.peer else None
        known = load_remembered(known_as) if known_as else None
        open_now = len(session.streams.over(near))
        streams = max(1, open_now, session.first_streams if alone else 0)
        pace = known.bytes_per_s * _PACE_HEADROOM if known else None
        rule = Concurrency(streams, _MOST_STREAMS, probe=not session.fixed_streams, pace=pace)
        link = self._links[near] = _Link(near, rule, known_as, rtt_s, alone=alone)
        if known and pace:
            self._note(
                link,
                Change(0.0, "pace", int(pace), f"an earlier transfer saw {format_rate(known.bytes_per_s)}"),
            )
            if known.streams != streams and not session.fixed_streams:
                rule.streams = known.streams
                self._note(
                    link, Change(0.0, "streams", known.streams, "an earlier transfer did best with them")
                )
                self._adjust(link, known.streams)

    def _steer(self, link: _Link) -> None:
        sample = link.sample = self._sample(link)
        for change in link.rule.observe(sample):
            self._note(link, change)
            if change.what == "streams":
                self._adjust(link, change.value)
        self._apply_pace(link)

    def _sample(self, link: _Link) -> Sample:
        streams = self._session.streams
        for number, sock in list(streams.sockets.items()):
            if streams.near(number) != link.near:
                continue
            try:
                link.latest[number] = tcp_state(sock)
            except OSError:
                continue
        states = list(link.latest.values())
        live = [state for number, state in link.latest.items() if number in streams.sockets]
        return Sample(
            time.monotonic() - self._started,
            sum(state.arrived_bytes for state in states),
            sum(state.sent_segments for state in states),
            sum(state.resent_segments for state in states),
            self._sending_s(link.near),
            sum(state.receiver_limited_s for state in states),
            sum(state.rtt_s for state in live) / max(1, len(live)),
            min((state.min_rtt_s for state in live if state.min_rtt_s), default=link.rtt_s),
            len(live),
        )

    def _note(self, link: _Link | None, change: Change) -> None:
        value = {"pace": format_rate, "window": format_bytes}.get(change.what, str)(change.value)
        where = f" to {link.near}" if link is not None and link.near and len(self._links) > 1 else ""
        self._session.changes.append(f"{change.at_s:.2f} s: {change.what}{where} {value}: {change.reason}")

    def _adjust(self, link: _Link, count: int) -> None:
        """Have so many streams over a link: ask for more, or end some."""
        session = self._session
        have = sorted(session.streams.over(link.near))
        if count > len(have):
            session.want_streams(count, link.near)
        session.end_streams(have[count:])

    def _apply_pace(self, link: _Link) -> None:
        streams, pace = self._session.streams, link.rule.pace
        sockets = [
            sock for number, sock in list(streams.sockets.items()) if streams.near(number) == link.near
        ]
        each = _NO_PACE if pace is None else max(1, int(pace / max(1, len(sockets))))
        if (each, len(sockets)) == link.paced or (pace is None and not link.paced[0]):
            return
        link.paced = (each, len(sockets))
        for sock in sockets:
            try:
                sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, each.to_bytes(8, "little"))
            except OSError:
                continue  # it just ended, or this system cannot: then nothing is held back

    def _apply_window(self) -> None:
        """Over all links together: what is on its way on one may be waited for by all."""
        best = sum(link.rule.best for link in self._links.values())
        samples = [link.sample for link in self._links.values() if link.sample is not None]
        now = time.monotonic() - self._started
        if now < 1.0 or not best or not samples:
            return
        # What is behind a gap has arrived and cannot be taken: a repair costs another round trip.
        lossy = any(link.rule.lossy for link in self._links.values())
        rtt_s = max(sample.rtt_s for sample in samples)
        if self._session.route:  # through relays a link is only the first part of the way
            rtt_s = max(rtt_s, self._session.rtt_s)
        window = window_bytes(rtt_s * (2 if lossy else 1) + CREDIT_REST_S, best)
        window += sum(sample.streams for sample in samples) * _LANE_BYTES
        if window > 1.25 * self._window or window < 0.5 * self._window:
            self._window = window
            self._resize(window)
            reason = f"{format_rate(best)} over {rtt_s * 1000:.0f} ms"
            self._note(None, Change(now, "window", window, reason))


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
        with open(part, "wb") as file:
            file.write(msgspec.json.encode(dict(newest)))
        os.replace(part, _path())
    except OSError:
        return  # the next transfer finds it out again
