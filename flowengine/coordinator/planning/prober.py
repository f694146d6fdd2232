"""Probes of links: on request, and by the leader where a way over a relay would otherwise never be known."""

from __future__ import annotations

import asyncio
import base64
from typing import Final

from sqlalchemy import Connection, select, update

from flowengine.api.links import ProbeRequest
from flowengine.coordinator.actions import enrolment
from flowengine.coordinator.database.catalogue import decode_addresses
from flowengine.coordinator.database.tables import AnyRow, link_states, sites, tasks
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.coordinator.planning.picture import read_picture
from flowengine.coordinator.planning.probing import next_probe, probe_grant, take_answer
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.answers import ask_agent
from flowengine.coordinator.web.calls import log
from flowengine.errors import FlowError, PeerError, TemporaryError

__all__ = ["Prober", "know_sites", "run_probe"]

GRACE_S: Final = 25.0
"""How much longer than its burst a probe may take: connections must be made first."""
LOOK_EVERY_S: Final = 20.0
BUDGET: Final = ProbeRequest(size_bytes=32 << 20, seconds=1.0)
"""What a probe that nobody asked for may take: at most 32 MiB every 20 s, and each link once in six hours."""


def know_sites(connection: Connection, *names: str) -> dict[str, AnyRow]:
    """The rows of sites; raises `NotFound`."""
    found = {row.name: row for row in connection.execute(select(sites).where(sites.c.name.in_(names)))}
    for name in names:
        if name not in found:
            raise enrolment.no_site(name)
    return found


def _check_idle(connection: Connection, source: str, target: str) -> None:
    busy = connection.execute(
        select(tasks.c.transfer)
        .where(tasks.c.state == "running", tasks.c.source_site == source, tasks.c.target_site == target)
        .limit(1)
    ).scalar()
    if busy is not None:
        raise TemporaryError(
            f"the link {source} > {target} is in use by {busy}, which measures it",
            hint="flow link show tells what it achieves",
            reason="busy",
        )


async def run_probe(service: Service, source: str, target: str, asked: ProbeRequest, user: str) -> None:
    """Have the source's agent send a burst to the target's, and believe what comes of it.

    Raises:
        FlowError: one of the sites is not known, cannot be dialled (reason "no-route"), or does not answer; the link is
            in use (reason "busy").
    """

    def begin(writing: Writing) -> str:
        rows = know_sites(writing.connection, source, target)
        _check_idle(writing.connection, source, target)
        address = next(iter(decode_addresses(rows[target].addresses)), "")
        if not address or not rows[target].key_sha256 or not rows[source].key_sha256:
            raise FlowError(
                f"site {target} cannot be dialled, so {source} cannot probe the link to it",
                hint="what transfers achieve is measured all the same",
                reason="no-route",
            )
        grant = probe_grant(rows[source], rows[target], service.epoch, asked, writing, service.terms)
        return json_text(
            {
                "site": target,
                "address": address,
                "grant": base64.b64encode(grant).decode("ascii"),
                "size_bytes": asked.size_bytes,
                "seconds": asked.seconds,
            }
        )

    body = await service.database.write(begin)
    answer = await ask_agent(service, source, "probe", f"/{target}", user, asked.seconds + GRACE_S, body)
    if answer.reason or not answer.rate_bits_per_s:
        raise PeerError(
            f"site {source} could not probe the link to {target}: {answer.message or 'nothing arrived'}",
            hint="look at both agents' logs",
        )
    await service.database.write(lambda w: take_answer(w, source, target, answer, user))


class Prober:
    """The leader's own probes: one at a time, while nothing moves."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def run(self) -> None:
        """Until cancelled."""
        service = self._service
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not service.leader:
                continue
            try:
                now = service.clock()
                picture = await service.database.read(lambda c: read_picture(c, now, service.decider))  # noqa: B023
                due = next_probe(picture)
                if due is not None:
                    await self._probe(*due)
            except FlowError as error:
                log.info("a link could not be probed: %s", error.message)
            except Exception:
                log.exception("probing failed")

    async def _probe(self, source: str, target: str) -> None:
        await self._service.database.write(lambda w: _asked(w, source, target))
        await run_probe(self._service, source, target, BUDGET, "")


def _asked(writing: Writing, source: str, target: str) -> None:
    """Note that a probe was asked for, so that one that fails is not asked for again at once."""
    changed = writing.connection.execute(
        update(link_states)
        .where(link_states.c.source == source, link_states.c.target == target)
        .values(asked=writing.now)
    )
    if not changed.rowcount:
        writing.connection.execute(
            writing.insert(link_states)
            .values(source=source, target=target, asked=writing.now)
            .on_conflict_do_nothing()
        )
