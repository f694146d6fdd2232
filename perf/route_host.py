"""A site of a route as a process of its own: `python -m perf.route_host FOLDER`, told what to do by host.json there.

It listens, relays if it is to, and prints `ready PORT`. Lines on stdin are obeyed: `limit NAME BITS_PER_S`,
`pull SETTINGS` (JSON: the routes, the grant; pulls /data/ of the other end to in/), `routes WAYS`. What it passed on, or
pulled, it writes ten times a second to `passed` or `pulled` there, in bytes.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from flowengine.store.grants import GrantLedger
from flowengine.transfer.listen import Listener
from flowengine.transfer.pacing import Limits
from flowengine.transfer.passes import PassResult, TransferSettings, run_passes
from flowengine.transfer.reaching import Way
from flowengine.transfer.relay import Relay
from flowengine.transfer.routes import RoutedPeer
from flowengine.transfer.run import peer_session
from flowengine.transfer.serve import ServedRoot
from flowengine.transfer.session import Consent, Counters
from flowengine.transfer.sites import SiteIdentity, SiteTrust
from flowengine.transfer.target import TargetRoot, run_target
from flowengine.trust.relay_grant import RelayGrant

EVERY_S = 0.1


@dataclass(frozen=True)
class _Yes:
    document: bytes = b""


class _NoPolicy:
    """The gate of a site without policies."""

    async def release(self, grant: RelayGrant | None) -> Consent:
        return _Yes()

    async def relay(self, grant: RelayGrant, ticket: bytes) -> Consent:
        return _Yes()

    async def land(self, grant: RelayGrant, ticket: bytes) -> Consent:
        return _Yes()

    async def passed(self, grant: RelayGrant, consent: Consent, size_bytes: int) -> None:
        pass

    @contextlib.contextmanager
    def held(self, grant: RelayGrant, consent: Consent) -> Iterator[None]:
        yield


def way(told: dict[str, Any]) -> Way:
    return Way(tuple(told["sites"]), told["address"], base64.b64decode(told["document"]))


class Host:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told = json.loads((folder / "host.json").read_text())
        os.environ["FLOW_STATE_DIR"] = str(folder / "state")
        identity = SiteIdentity(self.told["certificate"], self.told["key"].encode(), self.told["ca"])
        keys = {name: bytes.fromhex(key) for name, key in self.told["grant_keys"].items()}
        self.trust = SiteTrust(identity, keys, GrantLedger(":memory:"))
        self.limits, self.gate = Limits(), _NoPolicy()
        self.relay: Relay | None = None
        self.peer: RoutedPeer | None = None
        self.pulled = 0

    def say(self, line: str) -> None:
        print(line, flush=True)

    async def run(self) -> None:
        if self.told["relays"]:
            self.relay = Relay(
                self.trust,
                self.gate,
                lambda grant, behind: self.limits.pacer(f"link:{behind}"),
                max_streams=64,
                log=lambda event, facts: self.say(f"{event} {facts}"),
            )
        listener = Listener(
            self.told["listen"], 0, identity=self.trust, log=self.say, gate=self.gate, relay=self.relay
        )
        listener.bind()
        self.say(f"ready {listener.port}")
        served = ServedRoot(os.fsencode(self.folder), limits=self.limits)
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            nursery.start_soon(listener.serve, served.handle)
            nursery.start_soon(self.obey)
            nursery.start_soon(self.count)

    async def obey(self) -> None:
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            command, _, rest = line.strip().partition(" ")
            if command == "limit":
                name, rate = rest.split()
                self.limits.set_rate(name, float(rate) or None)
            elif command == "routes":
                assert self.peer is not None
                self.peer.use([way(one) for one in json.loads(rest)])
            elif command == "pull":
                self.nursery.start_soon(self.pull, json.loads(rest))
        self.nursery.cancel_scope.cancel()

    async def count(self) -> None:
        while True:
            if self.relay is not None:
                passed = self.relay.passed_bytes + sum(one.passed_bytes for one in self.relay.passages())
                self.write("passed", passed)
            await trio.sleep(EVERY_S)

    def write(self, name: str, value: int) -> None:
        part = self.folder / f"{name}.part"
        part.write_text(str(value))
        part.rename(self.folder / name)

    async def pull(self, asked: dict[str, Any]) -> None:
        ways = [way(one) for one in asked["ways"]]
        peer = RoutedPeer.at(ways[-1].address, self.trust, base64.b64decode(asked["grant"]))
        assert isinstance(peer, RoutedPeer)
        peer.ways, peer.gate, peer.note = tuple(ways), self.gate, self.say
        self.peer = peer
        settings = TransferSettings(retry_for_s=20.0)
        caches = settings.caches()
        earlier = 0

        async def one_pass(counters: Counters) -> PassResult:
            nonlocal earlier
            async with peer_session(peer, "target", b"data/", settings) as session:
                async with trio.open_nursery() as nursery:

                    async def watch() -> None:
                        while True:
                            self.pulled = earlier + sum(session.carried().values())
                            self.write("pulled", self.pulled)
                            await trio.sleep(EVERY_S)

                    nursery.start_soon(watch)
                    try:
                        done = await run_target(
                            session,
                            TargetRoot(os.fsencode(self.folder / "in")),
                            caches=caches,
                            counters=counters,
                        )
                    finally:
                        earlier += sum(session.carried().values())
                    nursery.cancel_scope.cancel()
            return PassResult(
                done.state, done.version_id, done.failures, done.extras, done.bottleneck, session
            )

        report = await run_passes(one_pass, settings, self.say)
        self.write("pulled", earlier)
        self.say(f"pulled {report.state} passes {report.passes} bytes {earlier}")


if __name__ == "__main__":
    trio.run(Host(Path(sys.argv[1])).run)
