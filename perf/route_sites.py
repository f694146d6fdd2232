"""Sites of routes as processes: `perf.route_host` with a federation's certificates and grants made up for them."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from flowengine.trust.certificates import (
    issue_site,
    make_authority,
    make_key,
    make_request,
    parse_certificate,
)
from flowengine.trust.grant import Grant, GrantKey, Party
from flowengine.trust.relay_grant import RelayGrant, Stop, sign_relay_grant

__all__ = ["RouteSite", "RouteSites", "wait_for"]

MBIT = 1_000_000


def wait_for(condition: Callable[[], Any], what: str, seconds: float) -> Any:
    """What a condition gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} within {seconds:g} s")
        time.sleep(0.02)
    return found


class RouteSite:
    """One site's process.

    Args:
        prefix: what stands before its command, to run it elsewhere.
        address: where it listens.
    """

    def __init__(
        self, sites: RouteSites, name: str, folder: Path, prefix: Sequence[str], address: str, *, relays: bool
    ) -> None:
        self.name, self.folder = name, folder
        (folder / "data").mkdir(parents=True)
        key = make_key(os.urandom)
        certificate = issue_site(sites.authority, make_request(key, name), name, time.time(), os.urandom)
        self.party = Party(name, parse_certificate(certificate).key_sha256)
        (folder / "host.json").write_text(
            json.dumps(
                {
                    "certificate": certificate,
                    "key": key.decode(),
                    "ca": sites.authority.certificate_pem,
                    "grant_keys": {sites.grant_key.id: sites.grant_key.public.hex()},
                    "listen": address,
                    "relays": relays,
                }
            )
        )
        self.log: TextIO = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "perf.route_host", str(folder)],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )
        self.address = f"{address}:{wait_for(self._port, f'word from {name}', 30)}"

    def _port(self) -> str:
        if self.process.poll() is not None:
            raise RuntimeError(f"site {self.name} ended:\n{self.said()}")
        return next((line.split()[1] for line in self.said().splitlines() if line.startswith("ready ")), "")

    def said(self) -> str:
        """All that it printed."""
        return (self.folder / "log").read_text()

    def tell(self, line: str) -> None:
        """Say a line on its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def count(self, name: str) -> int:
        """Bytes that it "passed" on or "pulled" so far."""
        path = self.folder / name
        return int(path.read_text()) if path.exists() else 0

    def rate_mbit(self, name: str, seconds: float) -> float:
        """What it counts in the next so many seconds, in Mbit/s."""
        before, began = self.count(name), time.monotonic()
        time.sleep(seconds)  # the time that is measured, not one that is waited for
        return (self.count(name) - before) * 8 / (time.monotonic() - began) / MBIT

    def peak_rss_bytes(self) -> int:
        """Largest resident memory so far."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
        return 0

    def cpu_s(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError, OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        self.log.close()


class RouteSites:
    """A federation's sites as processes; by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = make_authority(time.time(), os.urandom)
        self.grant_key = GrantKey.make(os.urandom)
        self.running: dict[str, RouteSite] = {}
        self._tasks = 0

    def __getitem__(self, name: str) -> RouteSite:
        return self.running[name]

    def add(
        self, name: str, *, prefix: Sequence[str] = (), address: str = "127.0.0.1", relays: bool = False
    ) -> None:
        """Start one."""
        self.running[name] = RouteSite(self, name, self.folder / name, prefix, address, relays=relays)

    def end(self) -> None:
        """Kill all of them."""
        for one in self.running.values():
            one.end()

    def way(self, *sites: str) -> dict[str, Any]:
        """A route for the task that is pulled next, sites in the order in which they are dialled."""
        document, now = b"", int(time.time())
        if len(sites) > 2:
            stops = [
                Stop(name, self[name].party.key_sha256, self[name].address if at else "")
                for at, name in enumerate(sites)
            ]
            grant = RelayGrant(
                id=os.urandom(16),
                transfer="transfer-1",
                task=f"task-{self._tasks}",
                fence=1_000,
                epoch=1,
                issued=now,
                expires=now + 300,
                stops=stops,
                dial="target",
                source_path="/data/",
                target_path="/in",
            )
            document = sign_relay_grant(self.grant_key, grant)
        return {
            "sites": sites,
            "address": self[sites[1]].address,
            "document": base64.b64encode(document).decode(),
        }

    def pull(self, source: str, target: str, *ways: Sequence[str]) -> None:
        """Have a target pull all of a source's data over routes."""
        self._tasks += 1
        now = int(time.time())
        grant = Grant(
            id=os.urandom(16),
            transfer="transfer-1",
            task=f"task-{self._tasks}",
            fence=1_000,
            epoch=1,
            issued=now,
            expires=now + 300,
            source=self[source].party,
            target=self[target].party,
            dial="target",
            route=[source, target],
            source_path="/data/",
            target_path="/in",
            mode="copy",
            secret=os.urandom(32),
        )
        document = base64.b64encode(self.grant_key.sign(grant)).decode()
        asked = {"ways": [self.way(*way) for way in ways], "grant": document}
        self[target].tell("pull " + json.dumps(asked))

    def use(self, target: str, *ways: Sequence[str]) -> None:
        """Give the task that runs other routes."""
        self[target].tell("routes " + json.dumps([self.way(*way) for way in ways]))
