"""Asking a site's agent something that it answers at once: a folder, a count, a probe."""

from __future__ import annotations

import asyncio
import os

import msgspec
from sqlalchemy import delete, select

from flowengine.api.agents import Answer
from flowengine.coordinator.actions.enrolment import no_site
from flowengine.coordinator.database.catalogue import find_site
from flowengine.coordinator.database.tables import looks
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.service import Service
from flowengine.errors import TemporaryError

__all__ = ["ask_agent", "for_whom"]


def for_whom(user: str, tenant: str) -> str:
    """Whom a look or count is for, as its command says it: a site may map accounts to requesters."""
    return msgspec.json.encode({"requester": user, "tenant": tenant}).decode()


async def ask_agent(
    service: Service, site: str, kind: str, path: str, user: str, within_s: float, body: str = "{}"
) -> Answer:
    """Ask the site's agent, wherever its stream is, and wait for its answer.

    Args:
        kind: "look", "measure" or "probe".
        body: JSON of what else the command says: `for_whom`, or of a probe.

    Raises:
        NotFound: there is no such site.
        TemporaryError: its agent is not connected (reason "agent-offline"), or does not answer (reason "stalled").
    """
    look = os.urandom(16).hex()

    def ask(writing: Writing) -> None:
        found = find_site(writing.connection, site)
        if found is None:
            raise no_site(site)
        if found.state not in ("online", "draining"):
            raise TemporaryError(
                f"the agent of site {site} is not connected",
                hint="flow site show tells since when",
                reason="agent-offline",
            )
        expires = writing.now + within_s
        writing.connection.execute(
            looks.insert().values(id=look, site=site, path=path, expires=expires, kind=kind, body=body)
        )
        verb = {"look": "looked", "measure": "measured", "probe": "probed"}[kind]
        writing.emit(f"site.{verb}", site=site, user=user, wake=[site], path=path)

    await service.database.write(ask)
    try:
        return await _answer(service, look, within_s)
    finally:
        await service.database.write(lambda w: w.connection.execute(delete(looks).where(looks.c.id == look)))


async def _answer(service: Service, look: str, within_s: float) -> Answer:
    query = select(looks.c.answer).where(looks.c.id == look)
    try:
        async with asyncio.timeout(within_s):
            while True:
                news = service.hub.news()
                text = await service.database.read(lambda c: c.execute(query).scalar())
                if text is not None:
                    return msgspec.json.decode(text, type=Answer)
                try:
                    async with asyncio.timeout(service.settings.poll_s):
                        await news.wait()
                except TimeoutError:
                    continue
    except TimeoutError:
        raise TemporaryError(
            f"the site's agent did not answer within {within_s:.0f} s",
            hint="try again; flow site show tells how the agent is",
            reason="stalled",
        ) from None
