"""Handlers for agents: enrolment, heartbeats, claims, reports, answers."""

from __future__ import annotations

from sqlalchemy import update

from flowengine.api.agents import Claimed, Enrolled, HeartbeatReply, ReportReply, Taken, check_required
from flowengine.coordinator.actions import agents as actions
from flowengine.coordinator.actions import duties, enrolment
from flowengine.coordinator.database.tables import looks
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.calls import AgentWho, Call
from flowengine.errors import AuthenticationError, NotFound, UsageError
from flowengine.trust.certificates import check_request
from flowengine.trust.tokens import JoinSecret

__all__ = ["Agents"]


class Agents:
    """What agents ask."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database

    async def join(self, call: Call) -> Enrolled:
        said = call.body
        check_required(said)
        try:
            token = JoinSecret.parse(said.token)
        except UsageError as error:
            raise AuthenticationError(error.message, hint=error.hint) from None
        check_request(said.request_pem)
        secrets, now = self._service.secrets, self._service.clock()
        site, certificate = await self._db.write(
            lambda w: enrolment.redeem(
                w, token, lambda name: secrets.issue(said.request_pem, name, now), said.software[:128]
            )
        )
        return self._enrolled(site, certificate)

    async def renew(self, call: Call) -> Enrolled:
        said = call.body
        check_required(said)
        assert isinstance(call.who, AgentWho)
        if check_request(said.request_pem) != call.who.key_sha256:
            raise AuthenticationError(
                "the request is for another key than the certificate's",
                hint="a site keeps its key; for a new one it joins again with a token",
            )
        secrets, now = self._service.secrets, self._service.clock()
        certificate = await self._db.write(
            lambda w: enrolment.renew(w, call.site, lambda name: secrets.issue(said.request_pem, name, now))
        )
        return self._enrolled(call.site, certificate)

    def _enrolled(self, site: str, certificate: str) -> Enrolled:
        secrets = self._service.secrets
        return Enrolled(
            site=site,
            certificate_pem=certificate,
            ca_pem=secrets.ca_pem,
            grant_keys=secrets.grant_keys,
        )

    async def heartbeat(self, call: Call) -> HeartbeatReply:
        check_required(call.body)
        service = self._service
        return await self._db.write(
            lambda w: actions.heartbeat(w, call.site, call.body, service.secrets.grant_keys, service.terms)
        )

    async def claim(self, call: Call) -> Claimed:
        check_required(call.body)
        return await self._db.write(lambda w: actions.claim(w, call.site, call.body, self._service.terms))

    async def report(self, call: Call) -> ReportReply:
        check_required(call.body)
        return await self._db.write(
            lambda w: actions.report(w, call.site, call.path["task"], call.body, self._service.terms)
        )

    async def dispose(self, call: Call) -> Taken:
        check_required(call.body)
        await self._db.write(lambda w: duties.dispose(w, call.site, call.body))
        return Taken()

    async def answer(self, call: Call) -> None:
        check_required(call.body)
        look = call.path["answer"]
        text = json_text(call.body)

        def work(writing: Writing) -> None:
            taken = writing.connection.execute(
                update(looks)
                .where(looks.c.id == look, looks.c.site == call.site, looks.c.answer.is_(None))
                .values(answer=text)
            )
            if not taken.rowcount:
                raise NotFound("nobody waits for this answer", hint="it came too late; drop it")
            writing.landed.add(look)  # wakes who waits for it

        await self._db.write(work)
