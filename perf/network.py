"""Where the two ends of a measurement run: a loopback of their own, or both sides of the emulated link."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from perf.link import ADDRESSES, DEVICE, HOST_SETTINGS, Link, LinkSpec

__all__ = ["LONG_LINKS", "Network", "NetworkError", "opened"]

GIGABIT = 1_000_000_000
LONG_LINKS: dict[str, LinkSpec] = {
    "link": LinkSpec.symmetric(0.080, GIGABIT),
    "link-loss": LinkSpec.symmetric(0.080, GIGABIT, loss=0.001),
    "link-cubic": LinkSpec.symmetric(0.080, GIGABIT, congestion="cubic"),
    "link-stock": LinkSpec.symmetric(0.080, GIGABIT, mtu=1500, tuned=False),
    "link-loss-cubic": LinkSpec.symmetric(0.080, GIGABIT, loss=0.001, congestion="cubic"),
}
LOOPBACK_NAMESPACE = "flow-perf-lo"


class NetworkError(Exception):
    """A network cannot be had here; the message says why and what else to choose."""


@dataclass(frozen=True)
class Network:
    """Two sides, a (source) and b (target), that programs run at, and counters of what passes between."""

    name: str
    addresses: dict[str, str]
    prefixes: dict[str, list[str]]
    counters: dict[Path, str]
    """The /proc/PID/net/dev files to read, each with the device whose sent bytes count."""
    about: dict[str, object]

    def wire_bytes(self) -> int:
        """Bytes that both sides have put on the wire so far, all headers included."""
        total = 0
        for path, device in self.counters.items():
            for line in path.read_text().splitlines():
                name, _, numbers = line.partition(":")
                if name.strip() == device:
                    total += int(numbers.split()[8])
        return total


@contextlib.contextmanager
def opened(name: str) -> Iterator[Network]:
    """The named network, for the length of a with block.

    Raises:
        NetworkError: the name is unknown, or the link needs root.
    """
    if name == "loopback":
        with _loopback() as network:
            yield network
    elif name in LONG_LINKS:
        with _long_link(name, LONG_LINKS[name]) as network:
            yield network
    else:
        raise NetworkError(f"unknown network {name!r}; choose from loopback, {', '.join(LONG_LINKS)}")


@contextlib.contextmanager
def _holder(prefix: list[str]) -> Iterator[Path]:
    """A process that stays in a namespace, so that its counters can be read without starting anything."""
    child = subprocess.Popen([*prefix, "sleep", "infinity"], stdin=subprocess.DEVNULL)
    try:
        # `ip netns exec` enters the namespace first and becomes sleep then.
        while prefix and Path(f"/proc/{child.pid}/comm").read_text().strip() != "sleep":
            if child.poll() is not None:
                raise NetworkError(f"`{' '.join(prefix)}` cannot run a program")
        yield Path(f"/proc/{child.pid}/net/dev")
    finally:
        child.kill()
        child.wait()


@contextlib.contextmanager
def _loopback() -> Iterator[Network]:
    """A namespace with a loopback that nothing else uses; without root, the machine's own loopback."""
    prefix: list[str] = []
    try:
        if os.geteuid() == 0 and shutil.which("ip"):
            subprocess.run(["ip", "netns", "delete", LOOPBACK_NAMESPACE], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "add", LOOPBACK_NAMESPACE], check=True)
            prefix = ["ip", "netns", "exec", LOOPBACK_NAMESPACE]
            subprocess.run([*prefix, "ip", "link", "set", "lo", "up"], check=True)
            for key, value in HOST_SETTINGS.items():
                subprocess.run([*prefix, "sysctl", "-qw", f"{key}={value}"], check=True)
        with _holder(prefix) as counter:
            yield Network(
                "loopback",
                {"a": "127.0.0.1", "b": "127.0.0.1"},
                {"a": prefix, "b": prefix},
                {counter: "lo"},
                {"own_namespace": bool(prefix)},
            )
    finally:
        if prefix:
            subprocess.run(["ip", "netns", "delete", LOOPBACK_NAMESPACE], check=False)


@contextlib.contextmanager
def _long_link(name: str, spec: LinkSpec) -> Iterator[Network]:
    link = Link("flow-perf")
    link.down()
    with link.raised(spec):
        prefixes = {site: link.command(site) for site in ADDRESSES}
        with _holder(prefixes["a"]) as at_a, _holder(prefixes["b"]) as at_b:
            counters = {at_a: DEVICE, at_b: DEVICE}
            yield Network(name, dict(ADDRESSES), prefixes, counters, spec.as_dict())
