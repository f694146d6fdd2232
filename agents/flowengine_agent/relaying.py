"""Routes as this agent takes part in them: as an end that dials over several, as one that is reached, and as a relay."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, cast

from flowengine.api.agents import HopTraffic, RelayedTask, RelayState, TaskGrant, TaskRoute
from flowengine.errors import FlowError, TemporaryError, UsageError
from flowengine.store.filesystem import raise_descriptor_limit
from flowengine.transfer.reaching import Way
from flowengine.transfer.relay import Passed, Relay
from flowengine.transfer.routes import RoutedPeer
from flowengine.transfer.session import Consent
from flowengine.trust.grant import Grant
from flowengine.trust.relay_grant import RelayGrant
from flowengine_agent.permits import Permit
from flowengine_agent.recording import EVERYWHERE
from flowengine_agent.running import End

if TYPE_CHECKING:
    from flowengine_agent.site import Site

__all__ = ["RelayMeter", "RouteGate", "make_relay", "routed_peer", "usable_ways"]

_LEAST_S: Final = 0.5
MAX_TOLD_TASKS: Final = 256
"""Passages that a heartbeat tells of."""


class RouteGate:
    """This site's policy, asked for each route; what it permitted is watched as long as the route is used.

    Args:
        grant: of the task, where this site is an end of it and knows.
    """

    def __init__(self, site: Site, grant: Grant | None = None) -> None:
        self._site = site
        self.grant = grant

    async def release(self, grant: RelayGrant | None) -> Permit:
        if self.grant is not None:
            return await self._site.gate.release(self.grant, grant.route if grant is not None else ())
        assert grant is not None
        return await self._site.gate.release(grant, grant.route)

    async def relay(self, grant: RelayGrant, ticket: bytes) -> Permit:
        return await self._site.gate.relay(grant, grant.route, ticket)

    async def land(self, grant: RelayGrant, ticket: bytes) -> Permit:
        return await self._site.gate.arrive(grant, grant.route, ticket)

    async def passed(self, grant: RelayGrant, consent: Consent, size_bytes: int) -> None:
        permit = cast("Permit", consent)
        if permit.bundle is None:
            return
        try:
            await self._site.gate.recorder.moved(
                "passed",
                grant,
                f"{grant.source.site}:{grant.source_path}",
                permit.owed,
                size_bytes=size_bytes,
                proofs={**EVERYWHERE, "spill": {"disk": "none"}},
                to=f"{grant.target.site}:{grant.target_path}",
            )
        except FlowError as error:
            self._site.log.warning("what passed is not on the record", task=grant.task, why=error.message)

    @contextlib.contextmanager
    def held(self, grant: RelayGrant, consent: Consent) -> Iterator[None]:
        at = next((n for n, party in enumerate(grant.route) if party == self._site.gate.me), 0)
        end: End = "source" if at == 0 else "target" if at == len(grant.route) - 1 else "relay"
        with self._site.duties.passing(grant, cast("Permit", consent), end):
            yield


def make_relay(site: Site) -> Relay | None:
    """What carries other sites' streams here, where the operator lets it."""
    config = site.config
    if not config.relay_enabled:
        return None
    raise_descriptor_limit()  # two sockets and a pipe for each stream

    def log(event: str, facts: dict[str, object]) -> None:
        site.log.info(event, **facts)

    return Relay(
        site.trust,
        RouteGate(site),
        lambda grant, behind: site.limits.relay_pacer(grant.task, behind, grant.transfer, grant.tenant),
        max_streams=config.relay_max_streams,
        log=log,
    )


class RelayMeter:
    """What a relay tells of itself in heartbeats."""

    def __init__(self, site: str, relay: Relay, max_bits_per_s: int | None) -> None:
        self._site = site
        self._relay = relay
        self._max = max_bits_per_s
        self._at = time.monotonic()
        self._before: dict[bytes, int] = {}
        self._rates: dict[bytes, float] = {}

    def state(self) -> RelayState:
        """Streams and rates now, over the time since this was asked last."""
        relay, passed = self._relay, self._relay.passages()
        now = time.monotonic()
        if now - self._at >= _LEAST_S:
            seconds, self._at = now - self._at, now
            self._rates = {
                one.hop_id: 8 * (one.passed_bytes - self._before.get(one.hop_id, 0)) / seconds
                for one in passed
            }
            self._before = {one.hop_id: one.passed_bytes for one in passed}
        return RelayState(
            streams=relay.streams,
            max_streams=relay.max_streams,
            rate_bits_per_s=sum(self._rates.values()),
            max_bits_per_s=self._max,
            tasks=[self._told(one) for one in passed[:MAX_TOLD_TASKS]],
        )

    def _told(self, one: Passed) -> RelayedTask:
        links = ((one.before, self._site), (self._site, one.behind))
        return RelayedTask(
            task=one.grant.task,
            transfer=one.grant.transfer,
            hops=[
                HopTraffic(
                    sender=sender,
                    receiver=receiver,
                    size_bytes=one.passed_bytes,
                    rate_bits_per_s=self._rates.get(one.hop_id, 0.0),
                    streams=one.streams,
                )
                for sender, receiver in links
            ],
        )


def routed_peer(site: Site, granted: TaskGrant, grant: Grant, document: bytes) -> RoutedPeer:
    """The other end of a held task, over the routes that it was given.

    Raises:
        TemporaryError: there is no way to it: it only dials out, and no relay was given (reason "no-route").
    """
    ways = usable_ways(site, granted, granted.routes)
    address = granted.peer_address or (ways[0].address if ways else "")
    if not address:
        raise TemporaryError(
            f"site {_other(granted)} cannot be dialled, and no relay that both could dial was given",
            hint="it is tried again; flow why tells whether a way is planned",
            reason="no-route",
        )
    peer = RoutedPeer.at(address, site.trust, document)
    assert isinstance(peer, RoutedPeer)
    peer.sends = granted.role == "source"
    peer.gate = RouteGate(site, grant)
    peer.ways = ways or (Way((site.name, _other(granted)), address),)
    peer.note = lambda line: site.log.warning("route", task=granted.task, why=line)
    return peer


def usable_ways(site: Site, granted: TaskGrant, routes: Sequence[TaskRoute]) -> tuple[Way, ...]:
    """The routes of a task that make sense to this agent; the others are told to the log."""
    from flowengine_agent.site import decode_grant

    ways = []
    for route in routes:
        try:
            document = decode_grant(route.grant) if route.grant else b""
            ends = (route.sites[0], route.sites[-1]) if route.sites else ()
            if ends != (site.name, _other(granted)) or (len(route.sites) > 2) != bool(document):
                raise UsageError("it does not lead from this site to the other end")
            ways.append(Way(tuple(route.sites), route.address, document))
        except FlowError as error:
            site.log.warning("a route is of no use", task=granted.task, sites=route.sites, why=error.message)
    return tuple(ways)


def _other(granted: TaskGrant) -> str:
    return granted.source.site if granted.role == "target" else granted.target.site
