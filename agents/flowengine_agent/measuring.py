"""Answers to what the coordinator asks besides work: how much lies below a path, and what a link carries.

A count looks at names and sizes alone. A probe sends a sealed burst to another site's data port, over several
connections, under a grant that permits nothing else; the kernel's count of what was acknowledged is what is believed,
its first part left out, because a connection begins slowly.
"""

from __future__ import annotations

import os
import stat
import time
from typing import Final

import trio

from flowengine.api.agents import Answer, ProbeCommand
from flowengine.errors import FlowError, NotFound, ProtocolError
from flowengine.store.filesystem import open_beneath
from flowengine.transfer.channel import Channel, first_flow_error
from flowengine.transfer.connect import dial
from flowengine.transfer.sites import SitePeer
from flowengine.transfer.tcp_info import TcpState, tcp_state
from flowengine.wire.messages import Open, Opened, Options
from flowengine.wire.paths import STAGING_NAME
from flowengine_agent.roots import Place, Roots
from flowengine_agent.site import Site, decode_grant

__all__ = ["PROBE_STREAMS", "count", "probe"]

PROBE_STREAMS: Final = 4
PROBE_BLOCK_BYTES: Final = 64 << 10
WARM_UP: Final = 0.3
"""Part of a burst's time, and of its bytes, that is not counted."""
SAMPLE_S: Final = 0.005
NEARLY: Final = 0.95
MAX_WAITING: Final = 1_000_000


def count(roots: Roots, site_path: str, within_s: float) -> Answer:
    """How many objects lie below a path and how large they are; what is wrong is in the answer. For a thread."""
    try:
        return _count(roots.find(site_path, "read"), site_path, within_s)
    except FlowError as error:
        return Answer(reason=error.reason, message=error.message, complete=False)
    except OSError as error:
        return Answer(reason="denied", message=f"{site_path}: {error.strerror}", complete=False)


def _count(place: Place, shown: str, within_s: float) -> Answer:
    top = place.lstat()
    if top is None:
        raise NotFound(f"{shown} does not exist")
    if not stat.S_ISDIR(top.st_mode):
        return Answer(objects=1, size_bytes=top.st_size if stat.S_ISREG(top.st_mode) else 0)
    until = time.monotonic() + within_s
    objects = size = 0
    waiting = [place.path]
    linked: set[tuple[int, int]] = set()
    while waiting:
        if time.monotonic() > until or len(waiting) > MAX_WAITING:
            return Answer(objects=objects, size_bytes=size, complete=False)
        folder = waiting.pop()
        try:
            fd = open_beneath(place.root.fd, folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # it went, or may not be read: the transfer itself will say so
        try:
            for text in os.listdir(fd):
                name = os.fsencode(text)
                if name == STAGING_NAME:
                    continue
                try:
                    st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                except OSError:
                    continue
                objects += 1
                if stat.S_ISDIR(st.st_mode):
                    waiting.append(folder + b"/" + name if folder else name)
                elif stat.S_ISREG(st.st_mode) and (st.st_dev, st.st_ino) not in linked:
                    size += st.st_size
                    if st.st_nlink > 1:
                        linked.add((st.st_dev, st.st_ino))
        finally:
            os.close(fd)
    return Answer(objects=objects, size_bytes=size)


async def probe(site: Site, command: ProbeCommand) -> Answer:
    """Send the burst and tell what came of it; what is wrong is in the answer."""
    try:
        peer = SitePeer.at(command.address, site.trust, decode_grant(command.grant))
        site.log.info("probes", site=command.site, size_bytes=command.size_bytes, seconds=command.seconds)
        answer = await _burst(peer, command.size_bytes, command.seconds)
    except FlowError as error:
        return Answer(reason=error.reason, message=error.message, complete=False)
    except BaseExceptionGroup as group:
        failure = first_flow_error(group)
        if failure is None:
            raise
        return Answer(reason=failure.reason, message=failure.message, complete=False)
    site.log.info("probed", site=command.site, rate_bits_per_s=answer.rate_bits_per_s, rtt_ms=answer.rtt_ms)
    return answer


async def _opened(peer: SitePeer, channels: list[Channel]) -> None:
    channel = await dial(peer)
    channels.append(channel)
    await channel.send(Open("probe", b"", b"", 1, "64KiB", Options()))
    if not isinstance(await channel.receive(), Opened):
        raise ProtocolError("a peer answered a probe with something else than its consent")


async def _burst(peer: SitePeer, size_bytes: int, seconds: float) -> Answer:
    channels: list[Channel] = []
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(PROBE_STREAMS):
                nursery.start_soon(_opened, peer, channels)
        return await _measured(channels, size_bytes, seconds)
    finally:
        for channel in channels:
            await channel.aclose()


async def _measured(channels: list[Channel], size_bytes: int, seconds: float) -> Answer:
    sockets = [channel.stream.transport_stream.socket for channel in channels]  # type: ignore[attr-defined]
    block = os.urandom(PROBE_BLOCK_BYTES)
    samples: list[tuple[float, int]] = []
    left = size_bytes

    def states() -> list[TcpState]:
        return [tcp_state(sock) for sock in sockets]

    first = sum(state.arrived_bytes for state in states())

    def sample() -> None:
        samples.append((trio.current_time(), sum(state.arrived_bytes for state in states()) - first))

    async def send(channel: Channel) -> None:
        nonlocal left
        while left > 0:
            part = min(left, len(block))
            left -= part
            await channel.stream.send_all(block[:part])

    async def watch() -> None:
        """Until nearly all that is sent has arrived."""
        while not samples or samples[-1][1] < size_bytes * NEARLY:
            await trio.sleep(SAMPLE_S)
            sample()

    with trio.move_on_after(seconds):
        try:
            async with trio.open_nursery() as nursery:
                sample()
                nursery.start_soon(watch)
                for channel in channels:
                    nursery.start_soon(send, channel)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the other side has enough, or went; what arrived counts
    sample()
    last = states()
    sent_segments = sum(state.sent_segments for state in last)
    resent = sum(state.resent_segments for state in last)
    return Answer(
        rate_bits_per_s=_rate(samples),
        rtt_ms=round(min(state.min_rtt_s for state in last) * 1e3, 3),
        loss=round(resent / sent_segments, 6) if sent_segments else None,
    )


def _rate(samples: list[tuple[float, int]]) -> float | None:
    """Bits a second behind the slow beginning.

    >>> _rate([(0.0, 0), (1.0, 10), (2.0, 1010), (3.0, 2010)])
    8000.0
    """
    begin, end = samples[0][0], samples[-1][0]
    whole = samples[-1][1]
    counted = [
        (at, arrived)
        for at, arrived in samples
        if at - begin >= WARM_UP * (end - begin) or arrived >= WARM_UP * whole
    ]
    if len(counted) < 2 or counted[-1][1] <= counted[0][1]:  # over before it could be looked at twice
        return whole * 8 / (end - begin) if end > begin and whole else None
    return (counted[-1][1] - counted[0][1]) * 8 / (counted[-1][0] - counted[0][0])
