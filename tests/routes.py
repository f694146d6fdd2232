"""Sites of one process that pass streams on, for tests of the engine: listeners, relays and an end that dials."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from flowengine.errors import Denied, FlowError
from flowengine.transfer.listen import Listener
from flowengine.transfer.pacing import Limits
from flowengine.transfer.reaching import Way
from flowengine.transfer.relay import Relay
from flowengine.transfer.routes import RoutedPeer
from flowengine.transfer.serve import ServedRoot
from flowengine.transfer.session import Consent
from flowengine.transfer.sites import SiteTrust
from flowengine.trust.relay_grant import RelayGrant, Stop, sign_relay_grant
from tests.parties import Federation, party_of

__all__ = ["Host", "Hosts", "Say"]


def fill(folder: Path, size: int) -> bytes:
    """Bytes that nothing can compress, in two files."""
    data = os.urandom(size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "big").write_bytes(data)
    (folder / "small").write_bytes(data[:1000])
    return data


@dataclass(frozen=True)
class Say:
    """What a site's gate said: a ticket."""

    document: bytes = b""


@dataclass
class NotingGate:
    """A site's policy that permits and keeps account, or denies one use.

    Attributes:
        asked: (use, sites, ticket) in order.
        denies: uses that are denied.
    """

    asked: list[tuple[str, tuple[str, ...], bytes]] = field(default_factory=list)
    denies: frozenset[str] = frozenset()

    def _say(self, use: str, grant: RelayGrant | None, ticket: bytes) -> Say:
        sites = tuple(party.site for party in grant.route) if grant is not None else ()
        self.asked.append((use, sites, ticket))
        if use in self.denies:
            raise Denied(f"no {use} here", reason="policy-denied")
        return Say(b"ticket of " + ">".join(sites).encode() if use == "release" else b"")

    async def release(self, grant: RelayGrant | None) -> Consent:
        return self._say("release", grant, b"")

    async def relay(self, grant: RelayGrant, ticket: bytes) -> Consent:
        return self._say("relay", grant, ticket)

    async def land(self, grant: RelayGrant, ticket: bytes) -> Consent:
        return self._say("land", grant, ticket)

    @contextlib.contextmanager
    def held(self, grant: RelayGrant, consent: Consent) -> Iterator[None]:
        yield


@dataclass
class Host:
    """A site.

    Attributes:
        listens: whether it can be dialled.
        log: what its listener refused, and what its relay told.
    """

    name: str
    trust: SiteTrust
    gate: NotingGate
    limits: Limits
    folder: Path
    listens: bool = True
    listener: Listener | None = None
    relay: Relay | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    log: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Empty for a site that cannot be dialled."""
        assert self.listener is not None
        return f"127.0.0.1:{self.listener.port}" if self.listens else ""

    def passed_bytes(self) -> int:
        """Bytes that passed through its relay so far."""
        assert self.relay is not None
        return self.relay.passed_bytes + sum(one.passed_bytes for one in self.relay.passages())


@dataclass
class Hosts:
    """A federation's sites in this process, with what signs their grants."""

    nursery: trio.Nursery
    folder: Path
    federation: Federation = field(default_factory=Federation)
    sites: dict[str, Host] = field(default_factory=dict)

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, folder: Path, *names: str, relays: Sequence[str] = ()) -> AsyncIterator[Hosts]:
        async with trio.open_nursery() as nursery:
            hosts = cls(nursery, folder)
            for name in names:
                hosts.add(name, relays=name in relays)
            yield hosts
            nursery.cancel_scope.cancel()

    def __getitem__(self, name: str) -> Host:
        return self.sites[name]

    def add(self, name: str, *, relays: bool = False, max_streams: int = 64, listens: bool = True) -> Host:
        folder = self.folder / name
        (folder / "data").mkdir(parents=True, exist_ok=True)
        trust, gate, limits = self.federation.site(name), NotingGate(), Limits()
        host = Host(name, trust, gate, limits, folder, listens)
        if relays:
            host.relay = Relay(
                trust,
                gate,
                lambda grant, behind: limits.pacer(f"link:{name}>{behind}"),
                max_streams=max_streams,
                log=lambda event, facts: host.log.append(f"{event} {facts}"),
            )
        host.listener = Listener(
            "127.0.0.1", 0, identity=trust, log=host.log.append, gate=gate, relay=host.relay
        )
        self.sites[name] = host
        if listens:
            host.listener.bind()
            self.nursery.start_soon(self._serve, host)
        return host

    def meet(self, way: Way) -> None:
        """Have the last site of a route, which cannot be dialled, wait at the relay before it, again and again."""
        self.nursery.start_soon(self._meet, self[way.sites[-1]], way.document)

    async def _meet(self, host: Host, document: bytes) -> None:
        while True:
            taken = trio.Event()
            self.nursery.start_soon(self._meet_one, host, document, taken)
            await taken.wait()

    async def _meet_one(self, host: Host, document: bytes, taken: trio.Event) -> None:
        assert host.listener is not None
        served = ServedRoot(os.fsencode(host.folder), limits=host.limits)
        try:
            await host.listener.meet(document, served.handle, taken.set)
        except FlowError as error:
            host.log.append(error.message)
        finally:
            taken.set()

    async def _serve(self, host: Host) -> None:
        assert host.listener is not None
        served = ServedRoot(os.fsencode(host.folder), limits=host.limits)
        with host.scope:
            await host.listener.serve(served.handle)

    def relay_grant(self, *sites: str, dial: str = "target", **changes: Any) -> RelayGrant:
        """A relay grant for sites in the order in which they are dialled."""
        now = int(time.time())
        first, *rest = sites
        stops = [Stop(first, party_of(self[first].trust).key_sha256)]
        stops += [Stop(name, party_of(self[name].trust).key_sha256, self[name].address) for name in rest]
        fields: dict[str, Any] = {
            "id": os.urandom(16), "transfer": "transfer-1", "task": "task-1", "fence": 1_000, "epoch": 1,
            "issued": now, "expires": now + 300, "stops": stops, "dial": dial, "source_path": "/data/",
            "target_path": "/in",
        }  # fmt: skip
        return RelayGrant(**(fields | changes))

    def way(self, *sites: str, **changes: Any) -> Way:
        """A route as the dialling site has it."""
        if len(sites) == 2:
            return Way(sites, self[sites[1]].address)
        document = sign_relay_grant(self.federation.grant_key, self.relay_grant(*sites, **changes))
        return Way(sites, self[sites[1]].address, document)

    def peer(self, *ways: Way, push: bool = False, **changes: Any) -> RoutedPeer:
        """The other end of the routes, as the first site of them sees it."""
        me, other = self[ways[0].sites[0]], self[ways[0].sites[-1]]
        source, target = (me, other) if push else (other, me)
        document = self.federation.signed(
            source.trust, target.trust, **({"dial": "source" if push else "target"} | changes)
        )
        peer = RoutedPeer.at(other.address or ways[0].address, me.trust, document)
        assert isinstance(peer, RoutedPeer)
        peer.ways, peer.gate, peer.sends = ways, me.gate, push
        peer.note = me.log.append
        return peer
