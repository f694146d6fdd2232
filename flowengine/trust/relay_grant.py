"""Relay grants: the coordinator's signed permission to carry one task's sealed streams over one route.

Goal
    A relay passes on only what the coordinator permitted between just its two neighbours, and can tell so without
    asking anybody; and whoever holds the document learns nothing that opens a stream.
Plan
    One document serves every site of a route, in the order in which they are dialled. Each finds itself in it by name
    and key, lets in whoever stands before it, and dials whoever stands behind it. The last one may have no address:
    then it dials the relay before it, which lets it in and has it wait for the other end. It is signed like a grant,
    under the domain "flowengine relay grant 1". The two ends hold a `Grant` besides, with the secret that keys their session.
Invariants
    - There is no secret in it.
    - No site stands in a route twice, so a site has one place and one pair of neighbours.
    - What is wrong first is the reason, in the order of `trust.grant`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from flowengine.errors import UsageError
from flowengine.trust.grant import MAX_ROUTE, End, GrantKey, Party
from flowengine.trust.grant_checks import (
    HOLD,
    check_conditions,
    check_fence,
    check_time,
    problem_of_permit,
    read_grant,
    refused,
)
from flowengine.units import is_name

__all__ = [
    "RELAY_GRANT_DOMAIN",
    "RelayGrant",
    "Stop",
    "check_relay_grant",
    "peek_relay_grant",
    "sign_relay_grant",
]

RELAY_GRANT_DOMAIN: Final = "flowengine relay grant 1"
MAX_ADDRESS: Final = 300
_KNOWN_REQUIREMENTS: Final = frozenset({HOLD})


class Stop(msgspec.Struct, frozen=True, omit_defaults=True):
    """One site of a route: its name, its key's name, and where it is dialled.

    The address is empty for the first, which dials, and for a last one that waits at the relay before it.
    """

    site: str
    key_sha256: str
    address: str = ""

    @property
    def party(self) -> Party:
        """The site as certificates show it."""
        return Party(self.site, self.key_sha256)


class RelayGrant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Permission to carry the streams of one task over one route. Times are Unix seconds.

    Attributes:
        id: 16 random bytes.
        transfer, task, fence, epoch: as in the grant that the two ends hold.
        stops: the sites in the order in which they are dialled: an end, relays, the other end.
        dial: which end dials, so which is first.
        source_path, target_path: site paths, as "/data/sets/a/".
        labels, contracts, purpose, requester, policy_digest: what the policy decision was made on.
        tenant: for whom it is.
        byte_limit: most payload bytes that may cross; None for no bound.
        required: conditions that whoever checks must know; unknown ones refuse the grant.
    """

    id: bytes
    transfer: str
    task: str
    fence: int
    epoch: int
    issued: int
    expires: int
    stops: list[Stop]
    dial: End
    source_path: str
    target_path: str
    labels: list[str] = []
    contracts: list[str] = []
    purpose: str = ""
    policy_digest: bytes = b""
    tenant: str = ""
    requester: str = ""
    byte_limit: int | None = None
    required: list[str] = []

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all sites, in the order in which they are dialled."""
        return tuple(stop.site for stop in self.stops)

    @property
    def route(self) -> tuple[Party, ...]:
        """All sites, from the source to the target."""
        parties = tuple(stop.party for stop in self.stops)
        return parties if self.dial == "source" else parties[::-1]

    @property
    def source(self) -> Party:
        """Whose data it is."""
        return self.route[0]

    @property
    def target(self) -> Party:
        """Where it goes to."""
        return self.route[-1]

    @property
    def shown(self) -> str:
        """What it is for, for messages and logs."""
        return f"{' -> '.join(party.site for party in self.route)} (task {self.task}, fence {self.fence})"

    def place(self, me: Party) -> int | None:
        """Where a site stands in `stops`; None for nowhere."""
        return next((at for at, stop in enumerate(self.stops) if stop.party == me), None)

    @property
    def meets(self) -> bool:
        """Whether the last site cannot be dialled and waits at the relay before it."""
        return not self.stops[-1].address

    @property
    def passage(self) -> tuple[object, ...]:
        """What grants for the same claim and route have in common, whenever they were signed."""
        return (self.transfer, self.task, self.fence, self.dial, *(stop.party for stop in self.stops),
                self.source_path, self.target_path)  # fmt: skip

    def neighbour(self, at: int, side: Literal["source", "target"]) -> str:
        """The site next to that of place `at`, towards an end; empty where there is none."""
        step = -1 if (side == "source") == (self.dial == "source") else 1
        return self.stops[at + step].site if 0 <= at + step < len(self.stops) else ""


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(RelayGrant)


def sign_relay_grant(key: GrantKey, grant: RelayGrant) -> bytes:
    """The signed relay grant, as it travels.

    Raises:
        UsageError: it says something that no checker would accept, or is too large.
    """
    problem = _problem(grant)
    if problem:
        raise UsageError(f"this relay grant cannot be given: {problem}")
    return key.sign_payload(RELAY_GRANT_DOMAIN, _encode(grant))


def check_relay_grant(
    document: bytes,
    keys: Mapping[str, bytes],
    now: float,
    *,
    me: Party,
    before: Party | None,
    highest_fence: int = 0,
    spent: bool = False,
) -> RelayGrant:
    """The relay grant in a document, if it lets `me` carry or end a stream now.

    Args:
        document: as it came.
        keys: the coordinator's public Ed25519 keys by id.
        now: Unix seconds.
        me: this agent.
        before: who dialled it over the mutually authenticated connection; None where nobody did: this agent begins
            the route, or is a last one that waits at the relay before it.
        highest_fence: highest fence seen of the task; `peek_relay_grant` tells the task.
        spent: whether the task ended here already under this fence.

    Raises:
        AuthenticationError: with the reasons of `trust.grant.check_grant`.
    """
    grant = peek_relay_grant(document, keys)
    what = f"relay grant for {grant.shown}"
    check_conditions(grant.required, _KNOWN_REQUIREMENTS, "relay grant")
    check_time(grant.issued, grant.expires, now, what)
    at = grant.place(me)
    if at is None:
        raise refused(f"the {what} is not for this site and key (this is {me.site})", "grant-other-party")
    last = len(grant.stops) - 1
    dialled = at != 0 and not (at == last and grant.meets)
    if (before is not None) != dialled:
        raise refused(f"by the {what} this site is number {at + 1} to be dialled", "grant-other-party")
    waits = grant.meets and at == last - 1 and grant.stops[last].party == before
    if before is not None and grant.stops[at - 1].party != before and not waits:
        raise refused(
            f"{before.site} (key {before.key_sha256[:16]}…) showed a {what}, in which it does not stand before this site",
            "grant-other-party",
            "a site that was enrolled anew has another key: the coordinator gives a new grant",
        )
    check_fence(grant.fence, highest_fence, what, spent=spent)
    return grant


def peek_relay_grant(document: bytes, keys: Mapping[str, bytes]) -> RelayGrant:
    """What a relay grant says once its signature was verified and nothing else: to look up its task's fence.

    Raises:
        AuthenticationError: reason "grant-forged", or "incompatible" where it cannot be understood.
    """
    return read_grant(document, RELAY_GRANT_DOMAIN, keys, "relay grant", _decoder.decode, _problem)


def _problem(grant: RelayGrant) -> str:
    """What makes a relay grant unusable for anybody; empty for nothing."""
    if not 3 <= len(grant.stops) <= MAX_ROUTE or not all(is_name(stop.site) for stop in grant.stops):
        return f"its route is no list of 3 to {MAX_ROUTE} sites"
    if len(set(grant.sites)) < len(grant.stops):
        return "a site stands in its route twice"
    dialled = grant.stops[1:-1] if grant.meets else grant.stops[1:]
    if grant.stops[0].address or not all(_is_address(stop.address) for stop in dialled):
        return "the sites of its route have not the addresses that are needed to dial them"
    return problem_of_permit(grant)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return (
        bool(host)
        and len(text) <= MAX_ADDRESS
        and text.isprintable()
        and port.isascii()
        and port.isdigit()
        and 0 < int(port) < 65_536
    )
