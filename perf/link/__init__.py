"""An emulated long-distance link: two network namespaces and a forwarder with delay, rate, queue and loss.

Goal
    Measure over a link as sites have it, on one machine whose kernel need not have netem.
Plan
    `longlink.c` makes a TUN device in each of two fresh namespaces and carries packets between them. This
    module compiles it, starts it, gives the devices addresses and routes, and takes everything down again.
Invariants
    Only namespaces and files with this link's name are made or removed. Two links with different names may be
    up at once. Not emulated: jitter, reordering, cross traffic.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ADDRESSES", "DEVICE", "Direction", "Link", "LinkError", "LinkSpec", "parse_spec"]

DEVICE = "long0"
ADDRESSES = {"a": "10.81.0.1", "b": "10.81.0.2"}
STATE_ROOT = Path("/run/flow-perf")
SOURCE = Path(__file__).with_name("longlink.c")
START_LIMIT_S = 10.0

# What a host that moves data over long links has; the kernel's own limits stop one stream at 4 to 6 MiB.
HOST_SETTINGS = {
    "net.ipv4.tcp_rmem": "4096 131072 67108864",
    "net.ipv4.tcp_wmem": "4096 65536 67108864",
    "net.ipv4.tcp_no_metrics_save": "1",
    "net.ipv4.tcp_slow_start_after_idle": "0",
}


class LinkError(Exception):
    """The link cannot be made, is not there, or is there already; the message says which and what to do."""


@dataclass(frozen=True)
class Direction:
    """One direction of a link."""

    delay_s: float
    rate_bits_per_s: int
    queue_bytes: int
    loss: float = 0.0

    def argument(self) -> str:
        """The form that the forwarder reads."""
        return f"{self.delay_s * 1e6:.0f}:{self.rate_bits_per_s}:{self.queue_bytes}:{self.loss * 1e6:.0f}"


@dataclass(frozen=True)
class LinkSpec:
    """What a link is like: each direction, the MTU, the congestion control of both ends, and whether their limits
    for TCP buffers are those of hosts that move data, or those of this kernel."""

    ab: Direction
    ba: Direction
    mtu: int = 9000
    congestion: str = "bbr"
    seed: int = 1
    tuned: bool = True

    @classmethod
    def symmetric(
        cls,
        rtt_s: float,
        rate_bits_per_s: int,
        loss: float = 0.0,
        queue_bdp: float = 1.0,
        mtu: int = 9000,
        congestion: str = "bbr",
        seed: int = 1,
        tuned: bool = True,
    ) -> LinkSpec:
        """Both directions alike; the queue is in bandwidth-delay products, and holds a few packets."""
        queue = max(int(rate_bits_per_s / 8 * rtt_s * queue_bdp), 8 * mtu)
        one_way = Direction(rtt_s / 2, rate_bits_per_s, queue, loss)
        return cls(one_way, one_way, mtu, congestion, seed, tuned)

    def as_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def parse_spec(text: str) -> float:
    """A number with a unit in its base unit: 80ms -> 0.08, 1gbit -> 1e9, 0.1% -> 0.001."""
    factors = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "%": 0.01, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z%]*)", text.lower())
    if not match or match[2] not in factors:
        raise LinkError(f"{text!r} is no number with one of the units {', '.join(filter(None, factors))}")
    return float(match[1]) * factors[match[2]]


def _run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode != 0:
        raise LinkError(f"`{' '.join(argv)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Link:
    """A named emulated link: `with link.raised(spec): ...`, or up() and down(). Needs root and `ip`."""

    def __init__(self, name: str = "flow") -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,20}", name):
            raise LinkError(f"{name!r} is no name for a link: use a few small letters, digits and dashes")
        self.name = name
        self._state = STATE_ROOT / f"{name}.json"
        self._log = STATE_ROOT / f"{name}.log"
        self._forwarder: subprocess.Popen[bytes] | None = None

    def namespace(self, site: str) -> str:
        """The network namespace of site a or b."""
        return f"{self.name}-{site}"

    def command(self, site: str, *argv: str) -> list[str]:
        """The command line that runs argv at a site."""
        return ["ip", "netns", "exec", self.namespace(site), *argv]

    def is_up(self) -> bool:
        return self._state.exists()

    def up(self, spec: LinkSpec) -> None:
        """Make both namespaces and the link between them.

        Raises:
            LinkError: no root, no tools, or a link of this name is up already.
        """
        self._check_machine()
        if self.is_up():
            raise LinkError(f"the link {self.name!r} is up already; take it down first")
        program = _compiled()
        STATE_ROOT.mkdir(mode=0o755, exist_ok=True)
        directions = [spec.ab.argument(), spec.ba.argument()]
        try:
            for site in ADDRESSES:
                self._make_namespace(site, tuned=spec.tuned)
            with self._log.open("w") as log:
                forwarder = self._forwarder = subprocess.Popen(
                    [program, *map(self.namespace, ADDRESSES), DEVICE, *directions, str(spec.seed)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._state.write_text(json.dumps({"pid": forwarder.pid, "program": program, **spec.as_dict()}))
            self._wait_ready(forwarder)
            for site in ADDRESSES:
                self._configure(site, spec)
        except BaseException:
            self.down()
            raise

    def down(self) -> dict[str, object]:
        """Remove the link and its namespaces, if there; gives the forwarder's counters."""
        counters: dict[str, object] = {}
        if self.is_up():
            state = json.loads(self._state.read_text())
            _end_process(state["pid"], state["program"])
            if self._forwarder is not None:
                self._forwarder.wait(START_LIMIT_S)
                self._forwarder = None
            with contextlib.suppress(OSError, ValueError, IndexError):
                counters = json.loads(self._log.read_text().splitlines()[-1])
            self._state.unlink(missing_ok=True)
            self._log.unlink(missing_ok=True)
        for site in ADDRESSES:
            if Path("/run/netns", self.namespace(site)).exists():
                _run("ip", "netns", "delete", self.namespace(site))
            shutil.rmtree(Path("/etc/netns", self.namespace(site)), ignore_errors=True)
        return counters

    @contextlib.contextmanager
    def raised(self, spec: LinkSpec):  # type: ignore[no-untyped-def]
        """The link, up for the length of a with block."""
        self.up(spec)
        try:
            yield self
        finally:
            self.down()

    def spec(self) -> dict[str, object]:
        """What the link that is up is like."""
        if not self.is_up():
            raise LinkError(f"the link {self.name!r} is not up")
        return json.loads(self._state.read_text())  # type: ignore[no-any-return]

    def bytes_sent(self, site: str) -> int:
        """Bytes that a site has put on the link, headers of IP and TCP included, lost packets too."""
        text = _run("ip", "-n", self.namespace(site), "-s", "-j", "link", "show", "dev", DEVICE)
        return int(json.loads(text)[0]["stats64"]["tx"]["bytes"])

    @staticmethod
    def _check_machine() -> None:
        if os.geteuid() != 0:
            raise LinkError("an emulated link needs root, for network namespaces and TUN devices")
        if not shutil.which("ip"):
            raise LinkError("`ip` is missing; install iproute2")
        if not Path("/dev/net/tun").exists():
            raise LinkError("/dev/net/tun is missing; load the kernel's tun module")

    def _make_namespace(self, site: str, *, tuned: bool) -> None:
        name = self.namespace(site)
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        # Peers that look names up find both sites, as they would in a real network.
        hosts = Path("/etc/netns", name)
        hosts.mkdir(parents=True, exist_ok=True)
        lines = [f"{ADDRESSES[other]} {self.namespace(other)}" for other in ADDRESSES]
        lines.append(f"{ADDRESSES[site]} {os.uname().nodename}")
        (hosts / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        for key, value in HOST_SETTINGS.items() if tuned else ():
            _run("ip", "netns", "exec", name, "sysctl", "-qw", f"{key}={value}")

    def _configure(self, site: str, spec: LinkSpec) -> None:
        name, address = self.namespace(site), ADDRESSES[site]
        _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
        _run("ip", "-n", name, "link", "set", DEVICE, "mtu", str(spec.mtu), "txqueuelen", "20000", "up")
        # By route, since not every kernel lets a namespace change its default.
        route = [
            "route",
            "replace",
            "10.81.0.0/24",
            "dev",
            DEVICE,
            "src",
            address,
            "congctl",
            spec.congestion,
        ]
        _run("ip", "-n", name, *route)

    def _wait_ready(self, forwarder: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while "ready" not in self._log.read_text():
            if forwarder.poll() is not None or time.monotonic() > deadline:
                raise LinkError(
                    f"the forwarder did not start: {self._log.read_text().strip() or 'no message'}"
                )
            time.sleep(0.01)


def _compiled() -> str:
    """The forwarder's program, compiled once for each version of its source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    STATE_ROOT.mkdir(mode=0o755, exist_ok=True)
    program = STATE_ROOT / f"longlink-{digest}"
    if not program.exists():
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if not compiler:
            raise LinkError("a C compiler is missing; install gcc")
        with tempfile.TemporaryDirectory(dir=STATE_ROOT) as scratch:
            fresh = Path(scratch, "longlink")
            _run(compiler, "-O2", "-Wall", "-o", str(fresh), str(SOURCE))
            fresh.rename(program)
    return str(program)


def _end_process(pid: int, program: str) -> None:
    """End the forwarder, unless the number belongs to another program by now."""
    try:
        if os.readlink(f"/proc/{pid}/exe") != program:
            return
        os.kill(pid, signal.SIGTERM)
    except (FileNotFoundError, ProcessLookupError):
        return
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        try:
            # A forwarder of this very process stays a zombie until its Popen is waited for.
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
