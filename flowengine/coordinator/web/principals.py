"""Who asks: a user by an API token, an agent by its TLS client certificate."""

from __future__ import annotations

import weakref
from typing import Final

from aiohttp import web
from sqlalchemy import Connection, select

from flowengine.api.people import User
from flowengine.coordinator.database.people import find_token, touch_token
from flowengine.coordinator.database.tables import certificates, sites
from flowengine.coordinator.routes.route import Route
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.calls import AgentWho, UserWho
from flowengine.errors import AuthenticationError, UsageError
from flowengine.trust.certificate_facts import SKEW_S
from flowengine.trust.certificates import parse_certificate
from flowengine.trust.tokens import UserToken

__all__ = ["Principals", "check_agent"]

_SCHEME: Final = "bearer"


class Principals:
    """Tells who asks; asked for each request, because tokens and certificates can be revoked at any time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._known: weakref.WeakKeyDictionary[object, AgentWho] = weakref.WeakKeyDictionary()

    async def __call__(self, request: web.BaseRequest, route: Route) -> UserWho | AgentWho | None:
        """Who asks; None where the route is for anybody."""
        if route.who == "any":
            return None
        if route.who == "agent":
            return await self._agent(request)
        return await self._user(request)

    async def _user(self, request: web.BaseRequest) -> UserWho:
        scheme, _, text = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != _SCHEME or not text:
            raise AuthenticationError(
                "this needs an API token (Authorization: Bearer flowt_…)", hint="flow login"
            )
        try:
            token = UserToken.parse(text)
        except UsageError as error:
            raise AuthenticationError(error.message, hint=error.hint) from None
        now = self._service.clock()

        def look(connection: Connection) -> tuple[User, float | None] | None:
            found = find_token(connection, token.id)
            if found is None or not token.matches(found[0].secret_sha256) or found[0].expires <= now:
                return None
            return found[1], found[0].last_used

        found = await self._service.database.read(look)
        if found is None or found[0].disabled:
            raise AuthenticationError(
                "this API token is not valid: unknown, revoked or expired",
                hint="flow login with a new one",
            )
        user, used = found
        if used is None or used < now - 60:
            await self._service.database.write(lambda w: touch_token(w.connection, token.id, w.now))
        return UserWho(user.name, user.role, user.tenant)

    async def _agent(self, request: web.BaseRequest) -> AgentWho:
        transport = request.transport
        who = self._known.get(transport) if transport is not None else None
        if who is None:
            tls = None if transport is None else transport.get_extra_info("ssl_object")
            certificate = None if tls is None else tls.getpeercert(binary_form=True)
            if not certificate:
                raise AuthenticationError(
                    "this needs a site's client certificate", hint="join first: POST /v1/agent/join"
                )
            facts = parse_certificate(certificate)
            if facts.kind != "site":
                raise AuthenticationError("this certificate is not a site's", reason="certificate-unknown")
            who = AgentWho(facts.site, facts.key_sha256, facts.serial)
            if transport is not None:
                self._known[transport] = who
        agent = who
        now = self._service.clock()
        await self._service.database.read(lambda connection: check_agent(connection, agent, now))
        return who


def check_agent(connection: Connection, who: AgentWho, now: float) -> None:
    """Refuse a site whose certificate was revoked or that was removed; or whose connection outlived the certificate."""
    row = connection.execute(
        select(certificates.c.revoked, certificates.c.not_after, sites.c.state)
        .join(sites, sites.c.name == certificates.c.site)
        .where(certificates.c.serial == who.serial, certificates.c.site == who.site)
    ).first()
    if row is None or row.revoked is not None or row.state == "revoked":
        raise AuthenticationError(
            f"the certificate of site {who.site} (serial {who.serial}) was revoked",
            hint="an operator makes a new join token: flow site token " + who.site,
            reason="certificate-revoked",
        )
    if row.not_after + SKEW_S < now:
        raise AuthenticationError(
            f"the certificate of site {who.site} (serial {who.serial}) has expired",
            hint="connect again with the renewed one; without one the site joins again: flow site token "
            + who.site,
            reason="certificate-expired",
        )
