"""Handlers for transfers, plans, and the people who ask for them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Final, Literal, TypeVar

import msgspec
from sqlalchemy import Connection, delete, select

from flowengine.api.people import Tenant, Token, User
from flowengine.api.plans import Plan
from flowengine.api.schema import Page
from flowengine.api.transfers import LandedObject, Transfer, Wait, Why
from flowengine.coordinator.actions import transfers as actions
from flowengine.coordinator.actions.people import (
    change_tenant,
    change_user,
    create_tenant,
    create_user,
    make_token,
)
from flowengine.coordinator.database import people as stored_people
from flowengine.coordinator.database import transfers as stored
from flowengine.coordinator.database.people import moment
from flowengine.coordinator.database.tables import plans, tokens
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.database.work import read_board
from flowengine.coordinator.planning.asking import Asking
from flowengine.coordinator.planning.chosen import chosen_feeds
from flowengine.coordinator.planning.stored import read_task_plans
from flowengine.coordinator.rules.queue import waiting_for
from flowengine.coordinator.rules.why import explain
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.calls import Call
from flowengine.coordinator.web.catalogue import page
from flowengine.errors import Denied, FlowError, NotFound, TemporaryError, UsageError
from flowengine.trust.tokens import make_user_token

__all__ = ["People", "Transfers"]

T = TypeVar("T")
MAX_ADMISSIONS: Final = 5


def cursor_number(text: str) -> int | None:
    """The cursor of a listing that is ordered by a number; None at its beginning."""
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise UsageError("after is no cursor of this listing", hint="take `next` of the page before")
    return int(text)


class Transfers:
    """Asking, watching, steering."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database
        self._asking = Asking(service)
        self._admitting = asyncio.Lock()
        """One promise at a time in this process; between processes the counter of promises decides."""

    async def list_transfers(self, call: Call) -> Page:
        query, user = call.query, call.user
        tenant = query.tenant
        if user.sees is not None:
            if tenant not in (None, user.sees):
                raise Denied(f"you may see the transfers of tenant {user.sees} only")
            tenant = user.sees
        before = cursor_number(query.after)
        found, following = await self._db.read(
            lambda c: stored.list_transfers(
                c,
                before=before,
                limit=query.limit,
                state=query.state,
                site=query.site,
                user=query.user,
                tenant=tenant,
            )
        )
        return Page(items=found, next="" if following is None else str(following))

    async def create_transfer(self, call: Call) -> Transfer | bytes:
        service, user = self._service, call.user
        transfer = service.new_transfer_id()
        request = call.body
        if (kept := await service.kept(call)) is not None:
            return kept  # asked again: what it was promised then counts against it now
        plan = await self._asking.chosen(request, user.name, user.tenant)
        if plan is not None and request.size_bytes is None and plan.size_bytes is not None:
            request = msgspec.structs.replace(request, size_bytes=plan.size_bytes, objects=plan.objects)
        for _ in range(MAX_ADMISSIONS):
            async with self._admitting if request.deadline is not None else contextlib.nullcontext():
                admitted = await self._asking.admit(request, user.name, user.tenant)
                if plan is None:
                    feeds = await self._asking.feeds(request, user.name)
                else:
                    feeds = chosen_feeds(request, plan)
                admitted = replace(admitted, feeds=feeds)
                work = partial(
                    actions.create,
                    transfer=transfer,
                    request=request,
                    user=user.name,
                    tenant=user.tenant,
                    decide=service.decider.decide,
                    may_relay=service.decider.may_relay,
                    chain=service.chain,
                    admitted=admitted,
                )
                with contextlib.suppress(actions.PromisesChanged):
                    return await service.create(call, work)
        raise TemporaryError(
            "promises change faster than this one can be made", hint="try again", reason="busy"
        )

    async def get_transfer(self, call: Call) -> Transfer:
        async def look() -> Transfer:
            return await self._db.read(
                lambda c: stored.find_transfer(c, call.path["transfer"], call.user.sees)
            )

        async def ended() -> Transfer | None:
            found = await look()
            return found if found.ended is not None else None

        return await self._wait(ended, call.query.wait_s) or await look()

    async def list_landed(self, call: Call) -> Page:
        query = call.query
        after = cursor_number(query.after) or 0

        async def landed() -> list[LandedObject] | None:
            transfer = await self._db.read(
                lambda c: stored.find_transfer(c, call.path["transfer"], call.user.sees)
            )
            found = await self._db.read(lambda c: stored.landed_after(c, transfer.id, after, query.limit + 1))
            return found if found or transfer.ended is not None else None

        found = await self._wait(landed, query.wait_s) or []
        return page(found, query.limit, lambda row: str(row.seq))

    async def list_receipts(self, call: Call) -> Page:
        query = call.query
        skip = cursor_number(query.after) or 0
        transfer = await self._db.read(
            lambda c: stored.find_transfer(c, call.path["transfer"], call.user.sees)
        )
        found = await self._db.read(lambda c: stored.receipts_of(c, transfer.id, skip, query.limit + 1))
        return Page(
            items=found[: query.limit], next=str(skip + query.limit) if len(found) > query.limit else ""
        )

    async def _wait(self, look: Callable[[], Awaitable[T | None]], wait_s: float) -> T | None:
        """What `look` finds, as soon as it finds something; None after `wait_s`."""
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            news = self._service.hub.news()
            found = await look()
            left = deadline - asyncio.get_running_loop().time()
            if found is not None or left <= 0 or self._service.stopping:
                return found
            try:
                async with asyncio.timeout(min(left, self._service.settings.poll_s)):
                    await news.wait()
            except TimeoutError:
                continue

    async def why_transfer(self, call: Call) -> Why:
        def read(connection: Connection) -> Why:
            found = stored.find_transfer(connection, call.path["transfer"], call.user.sees)
            _name_waits(connection, found, self._service.clock())
            told = read_task_plans(connection, [task.id for task in found.tasks])
            lines = {task.target.site: told[task.id].plan.lines for task in found.tasks if task.id in told}
            return explain(found, self._service.clock(), lines)

        return await self._db.read(read)

    async def pause_transfer(self, call: Call) -> Transfer:
        return await self._steer(call, "pause")

    async def resume_transfer(self, call: Call) -> Transfer:
        return await self._steer(call, "resume")

    async def cancel_transfer(self, call: Call) -> Transfer:
        return await self._steer(call, "cancel")

    async def retry_transfer(self, call: Call) -> Transfer:
        return await self._steer(call, "retry")

    async def _steer(self, call: Call, verb: Literal["pause", "resume", "cancel", "retry"]) -> Transfer:
        service = self._service
        found = await self._db.write(
            lambda w: actions.steer(
                w, call.path["transfer"], verb, call.user.name, call.user.sees, service.decider, service.chain
            )
        )
        if isinstance(found, FlowError):
            raise found
        return found

    async def create_plan(self, call: Call) -> Plan:
        id_ = "p-" + self._service.new_transfer_id().removeprefix("t-")
        return await self._asking.plan(call.body, call.user.name, call.user.tenant, id_)

    async def get_plan(self, call: Call) -> Plan:
        row = await self._db.read(
            lambda c: c.execute(select(plans).where(plans.c.id == call.path["plan"])).first()
        )
        if row is None or (call.user.sees is not None and row.tenant != call.user.sees):
            raise NotFound(
                f"there is no plan {call.path['plan']}", hint="plans are kept for an hour: plan again"
            )
        return msgspec.json.decode(row.body, type=Plan)


def _name_waits(connection: Connection, transfer: Transfer, now: float) -> None:
    """Say what its tasks wait for where that is not written down yet, as it is once a second."""
    unnamed = {task.id: task for task in transfer.tasks if task.state == "waiting" and task.wait is None}
    if not unnamed:
        return
    board = read_board(connection, now, None)
    for work in board.waiting:
        if (task := unnamed.get(work.id)) is not None:
            found = waiting_for(board, work)
            since = moment(now if found.since is None else found.since)
            task.wait = Wait(name=found.name, text=found.text, since=since, ends_when=found.ends_when)


class People:
    """Users, tokens, tenants."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database

    async def me(self, call: Call) -> User:
        user = await self._db.read(lambda c: stored_people.find_user(c, call.user.name))
        assert user is not None
        return user

    async def list_users(self, call: Call) -> Page:
        query = call.query
        found = await self._db.read(lambda c: stored_people.list_users(c, query.after, query.limit + 1))
        return page(found, query.limit, lambda user: user.name)

    async def create_user(self, call: Call) -> User | bytes:
        return await self._service.create(call, lambda w: create_user(w, call.body, call.user.name))

    async def change_user(self, call: Call) -> User:
        return await self._db.write(
            lambda w: change_user(w, call.path["user"], call.body, call.raw, call.user.name)
        )

    async def list_tokens(self, call: Call) -> Page:
        query = call.query
        mine = None if call.user.role in ("admin", "auditor") else call.user.name
        found = await self._db.read(
            lambda c: stored_people.list_tokens(c, mine, query.after, query.limit + 1)
        )
        return page(found, query.limit, lambda token: token.id)

    async def create_token(self, call: Call) -> Token | bytes:
        asked, user = call.body, call.user
        name = asked.user or user.name
        if name != user.name and user.role != "admin":
            raise Denied("only admins make tokens for others", hint="leave out the user")
        secret = make_user_token(os.urandom)
        return await self._service.create(
            call,
            lambda w: make_token(w, name, asked.valid_s, asked.comment, user.name, secret),
            secret=True,
        )

    async def remove_token(self, call: Call) -> None:
        token, user = call.path["token"], call.user

        def work(writing: Writing) -> None:
            owner = writing.connection.execute(select(tokens.c.user).where(tokens.c.id == token)).scalar()
            if owner is None or (owner != user.name and user.role != "admin"):
                raise NotFound(f"there is no token {token} of yours", hint="GET /v1/tokens lists them")
            writing.connection.execute(delete(tokens).where(tokens.c.id == token))
            writing.emit("token.removed", user=owner, token=token, by=user.name)

        await self._db.write(work)

    async def list_tenants(self, call: Call) -> Page:
        query, now = call.query, self._service.clock()
        found = await self._db.read(
            lambda c: stored_people.list_tenants(c, now, query.after, query.limit + 1)
        )
        return page(found, query.limit, lambda tenant: tenant.name)

    async def create_tenant(self, call: Call) -> Tenant | bytes:
        return await self._service.create(call, lambda w: create_tenant(w, call.body, call.user.name))

    async def change_tenant(self, call: Call) -> Tenant:
        return await self._db.write(
            lambda w: change_tenant(w, call.path["tenant"], call.body, call.raw, call.user.name)
        )
