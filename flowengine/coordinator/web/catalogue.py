"""Handlers for health, sites, links and limits."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

import msgspec
from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite

import flowengine
from flowengine.api.agents import Answer
from flowengine.api.resources import (
    Health,
    JoinToken,
    Limit,
    Link,
    Listing,
    ListingEntry,
    Page,
    Site,
)
from flowengine.coordinator.actions import enrolment
from flowengine.coordinator.database import catalogue as stored
from flowengine.coordinator.database.people import moment
from flowengine.coordinator.database.tables import limits, links, looks, sites
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.coordinator.openapi import document
from flowengine.coordinator.rules.windows import check_windows
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.calls import Call
from flowengine.errors import NotFound, PeerError, TemporaryError
from flowengine.trust.tokens import make_join_secret

__all__ = ["Catalogue", "page"]

LOOK_S = 10.0
T = TypeVar("T")


class Catalogue:
    """Health, sites, links, limits."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database
        self._document = msgspec.json.encode(document())

    async def health(self, call: Call) -> Health:
        service = self._service
        await self._db.read(lambda connection: connection.execute(select(1)).scalar())
        return Health(
            status="stopping" if service.stopping else "ok",
            version=flowengine.__version__,
            api="v1",
            database=self._db.kind,
            leader=service.leader,
            epoch=service.epoch,
            now=moment(service.clock()),
        )

    async def ca(self, call: Call) -> str:
        return self._service.secrets.ca_pem

    async def openapi(self, call: Call) -> bytes:
        return self._document

    async def list_sites(self, call: Call) -> Page:
        query = call.query
        found = await self._db.read(lambda c: stored.list_sites(c, query.after, query.limit + 1))
        return page(found, query.limit, lambda site: site.name)

    async def create_site(self, call: Call) -> Site | bytes:
        return await self._service.create(call, lambda w: enrolment.create_site(w, call.body, call.user.name))

    async def get_site(self, call: Call) -> Site:
        site = await self._db.read(lambda c: stored.find_site(c, call.path["site"]))
        if site is None:
            raise enrolment.no_site(call.path["site"])
        return site

    async def change_site(self, call: Call) -> Site:
        return await self._db.write(
            lambda w: enrolment.change_site(w, call.path["site"], call.body, call.user.name)
        )

    async def remove_site(self, call: Call) -> None:
        await self._db.write(lambda w: enrolment.remove_site(w, call.path["site"], call.user.name))

    async def create_join_token(self, call: Call) -> JoinToken | bytes:
        service, asked = self._service, call.body
        secret = make_join_secret(
            service.settings.url, service.secrets.authority.fingerprint, asked.site, os.urandom
        )

        def work(writing: Writing) -> JoinToken:
            expires = writing.now + asked.valid_s
            enrolment.keep_join_token(writing, secret, expires, call.user.name)
            return JoinToken(token=secret.format_secret(), site=asked.site, expires=moment(expires))

        return await service.create(call, work, secret=True)

    async def list_files(self, call: Call) -> Listing:
        """Ask the site's agent, wherever its stream is, and wait for its answer."""
        site, path = call.path["site"], call.query.path
        look = os.urandom(16).hex()

        def ask(writing: Writing) -> None:
            found = stored.find_site(writing.connection, site)
            if found is None:
                raise enrolment.no_site(site)
            if found.state not in ("online", "draining"):
                raise TemporaryError(
                    f"the agent of site {site} is not connected",
                    hint="flow site show tells since when",
                    reason="agent-offline",
                )
            writing.connection.execute(
                looks.insert().values(id=look, site=site, path=path, expires=writing.now + LOOK_S)
            )
            writing.emit("site.looked", site=site, user=call.user.name, wake=[site], path=path)

        await self._db.write(ask)
        try:
            answer = await self._answer(look)
        finally:
            await self._db.write(lambda w: w.connection.execute(delete(looks).where(looks.c.id == look)))
        return _listing(site, path, answer)

    async def _answer(self, look: str) -> Answer:
        query = select(looks.c.answer).where(looks.c.id == look)
        try:
            async with asyncio.timeout(LOOK_S):
                while True:
                    news = self._service.hub.news()
                    text = await self._db.read(lambda c: c.execute(query).scalar())
                    if text is not None:
                        return msgspec.json.decode(text, type=Answer)
                    try:
                        async with asyncio.timeout(self._service.settings.poll_s):
                            await news.wait()
                    except TimeoutError:
                        continue
        except TimeoutError:
            raise TemporaryError(
                f"the site's agent did not answer within {LOOK_S:.0f} s",
                hint="try again; flow site show tells how the agent is",
                reason="stalled",
            ) from None

    async def list_links(self, call: Call) -> Page:
        query = call.query
        found = await self._db.read(lambda c: stored.list_links(c, query.after, query.limit + 1))
        return page(found, query.limit, lambda link: f"{link.source}>{link.target}")

    async def put_link(self, call: Call) -> Link:
        source, target = call.path["source"], call.path["target"]
        said = call.body

        def work(writing: Writing) -> Link:
            for name in (source, target):
                known = writing.connection.execute(select(sites.c.name).where(sites.c.name == name)).first()
                if known is None:
                    raise enrolment.no_site(name)
            values = {name: getattr(said, name) for name in said.__struct_fields__}
            values |= {"as_of": writing.now, "source_of_values": f"user:{call.user.name}"}
            insert = (postgresql.insert if writing.locks_rows else sqlite.insert)(links)
            writing.connection.execute(
                insert.values(source=source, target=target, **values).on_conflict_do_update(
                    index_elements=["source", "target"], set_=values
                )
            )
            writing.emit("link.changed", user=call.user.name, source=source, target=target)
            row = writing.connection.execute(
                select(links).where(links.c.source == source, links.c.target == target)
            ).one()
            return stored.show_link(row)

        return await self._db.write(work)

    async def remove_link(self, call: Call) -> None:
        source, target = call.path["source"], call.path["target"]

        def work(writing: Writing) -> None:
            gone = writing.connection.execute(
                delete(links).where(links.c.source == source, links.c.target == target)
            )
            if not gone.rowcount:
                raise NotFound(f"nothing is declared for the link {source} > {target}")
            writing.emit("link.removed", user=call.user.name, source=source, target=target)

        await self._db.write(work)

    async def list_limits(self, call: Call) -> Page:
        query, now = call.query, self._service.clock()
        found = await self._db.read(lambda c: stored.list_limits(c, now, query.after, query.limit + 1))
        return page(found, query.limit, lambda limit: limit.scope)

    async def put_limit(self, call: Call) -> Limit:
        scope, said = call.path["scope"], call.body
        check_windows(said.windows)

        def work(writing: Writing) -> Limit:
            values = {
                "rate_bits_per_s": said.rate_bits_per_s,
                "windows": json_text(said.windows),
                "changed": writing.now,
                "changed_by": call.user.name,
            }
            insert = (postgresql.insert if writing.locks_rows else sqlite.insert)(limits)
            writing.connection.execute(
                insert.values(scope=scope, **values).on_conflict_do_update(
                    index_elements=["scope"], set_=values
                )
            )
            _tell_limit(writing, scope, call.user.name, "limit.changed")
            row = writing.connection.execute(select(limits).where(limits.c.scope == scope)).one()
            return stored.show_limit(row, writing.now)

        return await self._db.write(work)

    async def remove_limit(self, call: Call) -> None:
        scope = call.path["scope"]

        def work(writing: Writing) -> None:
            if not writing.connection.execute(delete(limits).where(limits.c.scope == scope)).rowcount:
                raise NotFound(f"there is no limit for {scope}", hint="flow limit lists them")
            _tell_limit(writing, scope, call.user.name, "limit.removed")

        await self._db.write(work)


def _tell_limit(writing: Writing, scope: str, user: str, kind: str) -> None:
    everybody = writing.connection.execute(select(sites.c.name)).scalars()
    writing.emit(kind, user=user, wake=everybody, scope=scope)


def _listing(site: str, path: str, answer: Answer) -> Listing:
    if answer.reason:
        kind = NotFound if answer.reason == "not-found" else PeerError
        reason = answer.reason if answer.reason in ("not-found", "denied") else "peer"
        raise kind(f"site {site}: {answer.message or answer.reason}", reason=reason, path=path)
    entries = []
    for name, what, size, mtime_ns in answer.entries:
        try:
            mtime = datetime.fromtimestamp(mtime_ns / 1e9, UTC)
        except (ValueError, OverflowError, OSError):
            mtime = datetime.fromtimestamp(0, UTC)
        known = what if what in ("file", "directory", "link") else "other"
        entries.append(ListingEntry(name=name, kind=known, size_bytes=size, mtime=mtime))  # type: ignore[arg-type]
    return Listing(site=site, path=path, entries=entries, complete=answer.complete)


def page(found: list[T], limit: int, cursor: Callable[[T], str]) -> Page:
    """A page of what was found, one more than `limit` asked for to know whether there is another."""
    if len(found) > limit:
        return Page(items=found[:limit], next=cursor(found[limit - 1]))
    return Page(items=found)
