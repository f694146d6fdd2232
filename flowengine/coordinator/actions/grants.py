"""What a claimed task is given to show: the grant of its two ends, and a relay grant for each route that has relays."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flowengine.api.agents import TaskRoute
from flowengine.coordinator.database.catalogue import decode_addresses
from flowengine.coordinator.database.tables import AnyRow
from flowengine.coordinator.database.transfers import decode_decisions, decode_request
from flowengine.coordinator.rules.feeding import source_of
from flowengine.errors import UsageError
from flowengine.trust.grant import Grant, Party
from flowengine.trust.grant_checks import FED, HOLD
from flowengine.trust.relay_grant import RelayGrant, Stop

__all__ = ["Terms", "task_grant", "task_routes"]


@dataclass(frozen=True, slots=True)
class Terms:
    """What claims are given: the lease's term, and who signs.

    Attributes:
        sign: a grant as the bytes that agents check.
        sign_relay: the same for a relay grant.
        rng: random bytes.
    """

    lease_s: int
    sign: Callable[[Grant], bytes]
    sign_relay: Callable[[RelayGrant], bytes]
    rng: Callable[[int], bytes]
    renew_certificate_at: float = 0.5

    @property
    def grant_s(self) -> int:
        """How long a grant is good: longer than a lease, so that a link may be dialled anew without a claim."""
        return max(900, 2 * self.lease_s)


def task_grant(
    row: AnyRow,
    transfer: AnyRow,
    known: Mapping[str, AnyRow],
    fence: int,
    epoch: int,
    now: float,
    terms: Terms,
    *,
    approvals: Sequence[bytes] = (),
    counts: Mapping[str, int] | None = None,
    version: bytes = b"",
) -> Grant:
    """The grant of a task under a fence.

    Args:
        row, transfer: of the task, and of its transfer.
        known: rows of the sites, by name; both ends must be among them.
        approvals: signed, that were given for it.
        counts: what the counters come to with it.
        version: that the task's feeder landed, and that it may give; empty where the transfer's source serves it.
    """
    request = decode_request(transfer.request)
    target = request.targets[int(row.id.rpartition(".")[2]) - 1]
    return Grant(
        id=terms.rng(16),
        transfer=row.transfer,
        task=row.id,
        fence=fence,
        epoch=epoch,
        issued=int(now),
        expires=int(now) + terms.grant_s,
        source=Party(row.source_site, known[row.source_site].key_sha256 or ""),
        target=Party(row.target_site, known[row.target_site].key_sha256 or ""),
        dial="target" if row.driver == row.target_site else "source",
        route=[row.source_site, row.target_site],
        source_path=source_of(row.fed_by, request).path,
        target_path=target.path,
        mode=row.mode,
        secret=terms.rng(32),
        may_delete=request.options.delete,
        dry_run=request.options.dry_run,
        labels=request.labels,
        contracts=request.contracts,
        purpose=request.purpose,
        policy_digest=bytes.fromhex(transfer.policy_digest),
        tenant=row.tenant,
        requester=transfer.user,
        approvals=list(approvals),
        counts=dict(counts or {}),
        version=version,
        required=[*_conditions(row, transfer), *([FED] if row.fed_by else [])],
    )


def task_routes(
    row: AnyRow,
    transfer: AnyRow,
    known: Mapping[str, AnyRow],
    ways: Sequence[tuple[Sequence[str], int | None]],
    fence: int,
    epoch: int,
    now: float,
    terms: Terms,
) -> list[TaskRoute]:
    """The routes of a task as its driver is told them, each with the relay grant that its sites check.

    A way is left out where one of its sites is unknown, has no certificate, or no address to be dialled at; only the
    last one behind a relay needs none, for it can wait there.

    Args:
        row, transfer: of the task, and of its transfer.
        known: rows of the sites, by name; relays as well.
        ways: (sites from the source to the target, bits per second that the plan gives to it or None), in the order
            in which they are to be given; the first carries the control connection.
        fence: of the claim that holds the task.
    """
    request = decode_request(transfer.request)
    target = request.targets[int(row.id.rpartition(".")[2]) - 1]
    routes: list[TaskRoute] = []
    for way, rate in ways:
        sites = list(way if row.driver == row.source_site else reversed(way))
        last = len(sites) - 1
        stops = [
            _stop(known.get(site), row, dials=at == 0, may_wait=at == last > 1)
            for at, site in enumerate(sites)
        ]
        if len(sites) < 2 or not all(stops):
            continue
        document = b""
        if len(sites) > 2:
            grant = RelayGrant(
                id=terms.rng(16),
                transfer=row.transfer,
                task=row.id,
                fence=fence,
                epoch=epoch,
                issued=int(now),
                expires=int(now) + terms.grant_s,
                stops=[stop for stop in stops if stop],
                dial="target" if row.driver == row.target_site else "source",
                source_path=source_of(row.fed_by, request).path,
                target_path=target.path,
                labels=request.labels,
                contracts=request.contracts,
                purpose=request.purpose,
                policy_digest=bytes.fromhex(transfer.policy_digest),
                tenant=row.tenant,
                requester=transfer.user,
                required=_conditions(row, transfer),
            )
            try:
                document = terms.sign_relay(grant)
            except UsageError:
                continue  # too long for a document: long paths and many labels leave room for few relays
        address = stops[1].address if stops[1] else ""
        routes.append(
            TaskRoute(
                sites=sites,
                address=address,
                grant=base64.b64encode(document).decode("ascii"),
                rate_bits_per_s=rate,
            )
        )
    return routes


def _conditions(row: AnyRow, transfer: AnyRow) -> list[str]:
    """What the ends of a task have to keep to: by the decisions on its transfer its target may only hold the data."""
    decided = decode_decisions(transfer.decisions)
    holds = any(one.use == "hold" and one.site == row.target_site for one in decided)
    return [HOLD] if holds else []


def _stop(site: AnyRow | None, row: AnyRow, *, dials: bool, may_wait: bool) -> Stop | None:
    if site is None or not site.key_sha256:
        return None
    if dials:
        return Stop(site.name, site.key_sha256)
    addresses = decode_addresses(site.addresses)
    if not addresses:
        return Stop(site.name, site.key_sha256) if may_wait else None
    return Stop(site.name, site.key_sha256, addresses[row.attempts % len(addresses)])
