"""The emulated link delays, limits and loses as it was told, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from perf.link import ADDRESSES, Link, LinkError, LinkSpec, parse_spec

pytestmark = [pytest.mark.root, pytest.mark.alone, pytest.mark.slow]

SERVER = """
import socket, sys
with socket.create_server(("", 9000)) as listener:
    print("ready", flush=True)
    peer, _ = listener.accept()
    with peer:
        while peer.recv(1 << 20):
            pass
        peer.sendall(b"!")
"""
CLIENT = """
import socket, sys, time
begin = time.monotonic()
with socket.create_connection((sys.argv[1], 9000)) as peer:
    print(time.monotonic() - begin)
    begin = time.monotonic()
    peer.sendall(bytes(int(sys.argv[2])))
    peer.shutdown(socket.SHUT_WR)
    peer.recv(1)
    print(time.monotonic() - begin)
"""


def measure(link: Link, size_bytes: int) -> tuple[float, float]:
    """Seconds to connect, and to send so many bytes and hear that they came, from site a to site b."""
    server = subprocess.Popen(
        link.command("b", sys.executable, "-c", SERVER), stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        client = link.command("a", sys.executable, "-c", CLIENT, ADDRESSES["b"], str(size_bytes))
        connect, send = subprocess.check_output(client, text=True, timeout=60).split()
        server.wait(60)
    finally:
        server.kill()
        server.communicate()
    return float(connect), float(send)


def test_delay_and_rate_are_kept() -> None:
    link = Link("flow-test")
    with link.raised(LinkSpec.symmetric(rtt_s=0.1, rate_bits_per_s=50_000_000, congestion="cubic")):
        before = 0
        for _ in range(4):  # what it takes longer is the machine's
            connect, send = measure(link, 5_000_000)
            assert connect >= 0.1
            # 0.8 s at the full rate; slow start and the last round trip add some.
            assert send > 0.85
            sent, before = link.bytes_sent("a") - before, link.bytes_sent("a")
            assert 5_000_000 < sent < 12_000_000
            if connect < 1.0 and send < 8:
                break
        else:
            pytest.fail(f"{connect:.2f} and {send:.2f} s in the last of four looks")
    assert not Path("/run/netns/flow-test-a").exists()


def test_loss_is_that_of_the_spec_and_the_data_still_arrives() -> None:
    link = Link("flow-test")
    link.up(LinkSpec.symmetric(rtt_s=0.002, rate_bits_per_s=200_000_000, loss=0.02, mtu=1500))
    try:
        measure(link, 8_000_000)
    finally:
        counters = link.down()
    there = counters["a_to_b"]
    assert isinstance(there, dict)
    assert there["packets"] > 5000
    assert 0.01 < there["lost"] / there["packets"] < 0.04


def test_a_link_is_up_only_once_and_down_twice_is_harmless() -> None:
    link = Link("flow-test")
    spec = LinkSpec.symmetric(rtt_s=0.002, rate_bits_per_s=10_000_000)
    begin = time.monotonic()
    with link.raised(spec), pytest.raises(LinkError, match="up already"):
        link.up(spec)
    assert link.down() == {}
    assert time.monotonic() - begin < 60


def test_specs_are_read_with_their_units() -> None:
    assert [parse_spec(text) for text in ("80ms", "1gbit", "0.1%", "5")] == [0.08, 1e9, 0.001, 5.0]
    with pytest.raises(LinkError, match="parsec"):
        parse_spec("1parsec")
