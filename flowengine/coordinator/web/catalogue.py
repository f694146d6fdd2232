"""Handlers for health, sites and limits."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

import msgspec
from sqlalchemy import Connection, delete, select

import flowengine
from flowengine.api.agents import Answer
from flowengine.api.events import Health
from flowengine.api.links import Limit
from flowengine.api.schema import Page
from flowengine.api.sites import JoinToken, Listing, ListingEntry, Site
from flowengine.coordinator.actions import enrolment
from flowengine.coordinator.database import catalogue as stored
from flowengine.coordinator.database.people import moment
from flowengine.coordinator.database.tables import limits, sites, tenants
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.coordinator.openapi import document
from flowengine.coordinator.rules.windows import check_windows
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.answers import ask_agent, for_whom
from flowengine.coordinator.web.calls import Call
from flowengine.errors import Denied, NotFound, PeerError
from flowengine.trust.tokens import make_join_secret

__all__ = ["Catalogue", "page"]

LOOK_S = 10.0
T = TypeVar("T")


class Catalogue:
    """Health, sites, limits."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database

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
        return await asyncio.to_thread(_encoded_document)

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
        site, path = call.path["site"], call.query.path
        user = call.user
        body = for_whom(user.name, user.tenant)
        answer = await ask_agent(self._service, site, "look", path, user.name, LOOK_S, body)
        return _listing(site, path, answer)

    async def list_limits(self, call: Call) -> Page:
        query, now = call.query, self._service.clock()
        found = await self._db.read(lambda c: stored.list_limits(c, now, query.after, query.limit + 1))
        return page(found, query.limit, lambda limit: limit.scope)

    async def put_limit(self, call: Call) -> Limit:
        scope, said = call.path["scope"], call.body
        check_windows(said.windows)

        def work(writing: Writing) -> Limit:
            _check_scope(writing.connection, scope)
            values = {
                "rate_bits_per_s": said.rate_bits_per_s,
                "windows": json_text(said.windows),
                "changed": writing.now,
                "changed_by": call.user.name,
            }
            writing.connection.execute(
                writing.insert(limits)
                .values(scope=scope, **values)
                .on_conflict_do_update(index_elements=["scope"], set_=values)
            )
            _tell_limit(writing, scope, call.user.name, "limit.changed")
            row = writing.connection.execute(select(limits).where(limits.c.scope == scope)).one()
            return stored.show_limit(row, writing.now)

        return await self._db.write(work)

    async def remove_limit(self, call: Call) -> None:
        scope = call.path["scope"]

        def work(writing: Writing) -> None:
            if not writing.connection.execute(delete(limits).where(limits.c.scope == scope)).rowcount:
                raise NotFound(f"there is no limit for {scope}", hint="flow limit ls lists them")
            _tell_limit(writing, scope, call.user.name, "limit.removed")

        await self._db.write(work)


@functools.cache
def _encoded_document() -> bytes:
    """Made when it is first asked for: that takes as long as a tenth of a coordinator's start."""
    return msgspec.json.encode(document())


def _check_scope(connection: Connection, scope: str) -> None:
    """Refuse a limit of a site, a tenant or a root that is not there: nothing would ever be held to it."""
    kind, _, name = scope.partition(":")
    if kind == "tenant":
        if connection.execute(select(tenants.c.name).where(tenants.c.name == name)).first() is None:
            raise NotFound(f"there is no tenant {name}", hint="flow tenant ls lists the tenants")
        return
    if kind in ("read", "write"):
        site, _, root = name.partition(":")
        _check_storage(connection, site, root)
        return
    for site in name.split(">") if kind in ("site", "link") else ():
        if connection.execute(select(sites.c.name).where(sites.c.name == site)).first() is None:
            raise enrolment.no_site(site)


def _check_storage(connection: Connection, site: str, root: str) -> None:
    row = connection.execute(select(sites.c.roots, sites.c.last_seen).where(sites.c.name == site)).first()
    if row is None:
        raise enrolment.no_site(site)
    offered = [one.name for one in stored.decode_roots(row.roots)]
    # What a site that has not come yet offers nobody knows.
    if root not in offered and row.last_seen is not None:
        raise NotFound(
            f"site {site} offers no root {root}",
            hint=f"it offers {', '.join(offered) or 'nothing'}: name one of these exactly",
        )


def _tell_limit(writing: Writing, scope: str, user: str, kind: str) -> None:
    everybody = writing.connection.execute(select(sites.c.name)).scalars()
    writing.emit(kind, user=user, wake=everybody, scope=scope)


def _listing(site: str, path: str, answer: Answer) -> Listing:
    if answer.reason:
        if answer.reason.startswith("policy-"):
            raise Denied(f"site {site}: {answer.message}", reason="policy-denied", path=path)
        if answer.reason == "account-unmapped":
            raise Denied(f"site {site}: {answer.message}", reason=answer.reason, path=path)
        told = f"site {site}: {answer.message or answer.reason}"
        if answer.reason == "not-found":
            raise NotFound(told, hint=f"flow ls {site}:/ begins at what the site offers", path=path)
        if answer.reason in ("not-offered", "denied"):
            raise Denied(told, hint=f"flow ls {site}:/ begins at what the site offers", path=path)
        raise PeerError(told, hint="the log of the site's agent says more", reason="peer", path=path)
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
