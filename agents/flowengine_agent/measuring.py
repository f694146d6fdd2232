"""What a link carries, measured where the coordinator asks.

A probe sends a sealed burst to another site's data port, over several
connections, under a grant that permits nothing else; the kernel's count of what was acknowledged is what is believed,
its first part left out, because a connection begins slowly.
"""

from __future__ import annotations

import os
from typing import Final

import trio

from flowengine.api.agents import Answer, ProbeCommand
from flowengine.errors import FlowError, ProtocolError
from flowengine.transfer.channel import Channel, first_flow_error
from flowengine.transfer.connect import dial
from flowengine.transfer.sites import SitePeer
from flowengine.transfer.tcp_info import TcpState, tcp_state
from flowengine.wire.messages import Open, Opened, Options
from flowengine_agent.site import Site, decode_grant

__all__ = ["PROBE_STREAMS", "probe"]

PROBE_STREAMS: Final = 4
PROBE_BLOCK_BYTES: Final = 64 << 10
WARM_UP: Final = 0.3
"""Part of a burst's time, and of its bytes, that is not counted."""
SAMPLE_S: Final = 0.005
NEARLY: Final = 0.95


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
