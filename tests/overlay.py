"""Sites in network namespaces whose links have rates of their own: a bridge between them, HTB on the way out of each.

Needs root. A namespace is named flow-NAME; all are removed at the end.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["HUB", "Overlay", "overlay"]

_BRIDGE = "flow-hub"
_NETWORK = "10.77.0"
HUB = f"{_NETWORK}.254"
"""Where this host itself is on the bridge."""
_MTU = 9000
_FREE = "10gbit"
_QUEUE_MS = 40
"""What waits on a link at most, in milliseconds of its rate."""
_BURST_MS = 20
"""What a link may catch up after a time without a packet: a machine that wakes late loses nothing of the rate."""


@dataclass(frozen=True)
class Overlay:
    """The sites that are up.

    Attributes:
        addresses: by site.
    """

    addresses: dict[str, str]

    def prefix(self, site: str) -> list[str]:
        """What stands before a command that is to run there."""
        return ["ip", "netns", "exec", f"flow-{site}"]

    def shape(self, sender: str, receiver: str, rate_bits_per_s: int) -> None:
        """Change the rate of a link that has one."""
        minor = list(self.addresses).index(receiver) + 10
        _run(
            *self.prefix(sender), "tc", "class", "change", "dev", "eth0", "parent", "1:", "classid", f"1:{minor}",
            "htb", *_htb(rate_bits_per_s),
        )  # fmt: skip

    def cut(self, site: str) -> None:
        """Take a site off the network without a word to anybody."""
        _run("ip", "link", "set", f"flow-{site}", "down")


@contextlib.contextmanager
def overlay(sites: list[str], links: Mapping[tuple[str, str], int]) -> Iterator[Overlay]:
    """Namespaces for sites, with so many bits a second on the links that are named; others are free."""
    made = Overlay({site: f"{_NETWORK}.{number}" for number, site in enumerate(sites, 1)})
    _remove(sites)
    try:
        _run("ip", "link", "add", _BRIDGE, "mtu", str(_MTU), "type", "bridge")
        _run("ip", "addr", "add", f"{HUB}/24", "dev", _BRIDGE)
        _run("ip", "link", "set", _BRIDGE, "up")
        for site in sites:
            _add(made, site, links)
        yield made
    finally:
        _remove(sites)


def _add(made: Overlay, site: str, links: Mapping[tuple[str, str], int]) -> None:
    prefix = made.prefix(site)
    _run("ip", "netns", "add", f"flow-{site}")
    _run("ip", "link", "add", f"flow-{site}", "mtu", str(_MTU), "type", "veth", "peer", "name", "eth0",
         "mtu", str(_MTU), "netns", f"flow-{site}")  # fmt: skip
    _run("ip", "link", "set", f"flow-{site}", "master", _BRIDGE, "up")
    _run(*prefix, "ip", "addr", "add", f"{made.addresses[site]}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _run(*prefix, "ip", "link", "set", device, "up")
    tc = [*prefix, "tc"]
    _run(*tc, "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb", "default", "9")
    _run(*tc, "class", "add", "dev", "eth0", "parent", "1:", "classid", "1:9", "htb", "rate", _FREE)
    for number, other in enumerate(made.addresses, 10):
        rate = links.get((site, other))
        if rate is None:
            continue
        parent = ("dev", "eth0", "parent")
        _run(*tc, "class", "add", *parent, "1:", "classid", f"1:{number}", "htb", *_htb(rate))
        waits = str(rate * _QUEUE_MS // 8000)
        _run(*tc, "qdisc", "add", *parent, f"1:{number}", "bfifo", "limit", waits)
        _run(*tc, "filter", "add", "dev", "eth0", "parent", "1:", "protocol", "ip", "u32", "match", "ip", "dst",
             f"{made.addresses[other]}/32", "flowid", f"1:{number}")  # fmt: skip


def _htb(rate_bits_per_s: int) -> list[str]:
    burst = str(rate_bits_per_s * _BURST_MS // 8000)
    return ["rate", f"{rate_bits_per_s}bit", "burst", burst, "cburst", burst]


def _remove(sites: list[str]) -> None:
    for site in sites:
        subprocess.run(["ip", "netns", "delete", f"flow-{site}"], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", f"flow-{site}"], check=False, capture_output=True)
    subprocess.run(["ip", "link", "delete", _BRIDGE], check=False, capture_output=True)


def _run(*words: str) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
