"""Event streams (SSE): commands to agents, events to users."""

from __future__ import annotations

import asyncio
import difflib
from collections import Counter
from functools import partial
from typing import Final

import msgspec
from aiohttp import web
from sqlalchemy import Connection

from flowengine.api.agents import Greeting, WorkCommand
from flowengine.api.events import EVENT_TYPES, Event
from flowengine.api.schema import Page
from flowengine.coordinator.actions.agents import agent_view
from flowengine.coordinator.database.events import events_after, last_event, show_event
from flowengine.coordinator.database.transactions import EventRow
from flowengine.coordinator.rules.commands import NOTHING_TOLD, AgentView, commands
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.calls import AgentWho, Call
from flowengine.coordinator.web.principals import check_agent
from flowengine.coordinator.web.transfers import cursor_number
from flowengine.errors import AuthenticationError, Denied, FlowError, UsageError

__all__ = ["Streams"]

MAX_STREAMS: Final = 2000
"""Of users; those of agents are not counted, so that no user can take an agent's place."""
MAX_STREAMS_OF_USER: Final = 100
CLAIM_FIRST_S: Final = 0.05
"""After a hint at new work the claim that follows goes before a look at everything else."""
_PING: Final = b": ping\n\n"
_RIGHTS: Final = ("token.removed", "user.changed")
"""Events after which a user may have lost the right to the stream."""
_encode = msgspec.json.Encoder().encode


class Streams:
    """Agents' and users' streams; each ends when its client goes, its right ends, or the coordinator stops."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database
        self._open: Counter[str] = Counter()

    async def agent_events(self, call: Call) -> web.StreamResponse:
        response = _response()
        await response.prepare(call.request)
        service = self._service
        assert isinstance(call.who, AgentWho)
        told = NOTHING_TOLD
        try:
            with service.hub.agent(call.site) as waiter:
                await response.write(_message(_encode(Greeting(epoch=service.epoch))))
                while not service.stopping:
                    woken = await waiter.wait(service.settings.ping_s)
                    if _gone(call):
                        break
                    if waiter.work:
                        waiter.work = False
                        await response.write(_message(_encode(WorkCommand())))
                        await asyncio.sleep(CLAIM_FIRST_S)
                    elif not woken:
                        await response.write(_PING)
                    try:
                        view = await self._db.read(partial(_view, who=call.who, now=service.clock()))
                    except AuthenticationError:
                        break  # revoked: its next request tells it why
                    for command in commands(told, view):
                        await response.write(_message(_encode(command)))
                    told = view
        except (ConnectionError, OSError):
            pass  # the agent went; it comes back
        return response

    async def list_events(self, call: Call) -> object:
        query, user = call.query, call.user
        if user.sees is not None and query.site is not None:
            raise Denied("users see the events of their transfers", hint="leave out the site")
        types = _types(query.types)
        after = cursor_number(call.request.headers.get("Last-Event-ID", "") or query.after)
        if "text/event-stream" not in call.request.headers.get("Accept", ""):
            found = await self._db.read(
                lambda c: events_after(
                    c, after or 0, query.limit + 1, query.transfer, query.site, types, user.sees
                )
            )
            more = len(found) > query.limit
            shown = [show_event(row) for row in found[: query.limit]]
            return Page(items=shown, next=str(shown[-1].seq) if more else "")
        return await self._stream(call, after, types)

    async def _stream(self, call: Call, after: int | None, types: tuple[str, ...]) -> web.StreamResponse:
        query, user, service = call.query, call.user, self._service
        cursor = await self._db.read(last_event) if after is None else after
        response = _response()
        if self._open.total() >= MAX_STREAMS or self._open[user.name] >= MAX_STREAMS_OF_USER:
            raise FlowError("too many event streams are open", hint="close some", reason="busy")
        self._open[user.name] += 1
        try:
            await response.prepare(call.request)
            await response.write(b": stream\n\n")
            loop = asyncio.get_running_loop()
            ping_at = loop.time() + service.settings.ping_s
            while not service.stopping:
                news = service.hub.news()
                rows = service.hub.since(cursor)
                if rows is None:
                    rows = await self._db.read(partial(events_after, after=cursor, limit=1000))
                for row in rows:
                    if row.type.startswith(_RIGHTS) and not await _still(call):
                        return response
                    cursor = row.seq
                    if _wanted(row, query.transfer, query.site, types, user.sees):
                        event: Event = show_event(row)
                        await response.write(b"id: %d\n" % row.seq + _message(_encode(event)))
                if rows:
                    continue
                left = ping_at - loop.time()
                if left <= 0:
                    if not await _still(call):
                        break  # its token expired: its next request tells it why
                    await response.write(_PING)
                    ping_at = loop.time() + service.settings.ping_s
                    continue
                if _gone(call):
                    break
                try:
                    async with asyncio.timeout(left):
                        await news.wait()
                except TimeoutError:
                    continue
        except (ConnectionError, OSError):
            pass
        finally:
            self._open[user.name] -= 1
            if not self._open[user.name]:
                del self._open[user.name]
        return response


def _response() -> web.StreamResponse:
    return web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
        }
    )


def _view(connection: Connection, who: AgentWho, now: float) -> AgentView:
    check_agent(connection, who, now)
    return agent_view(connection, now, who.site)


def _message(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _gone(call: Call) -> bool:
    transport = call.request.transport
    return transport is None or transport.is_closing()


async def _still(call: Call) -> bool:
    """Whether who asked may still see what it saw when it asked."""
    assert call.again is not None
    try:
        return await call.again() == call.who
    except AuthenticationError:
        return False


def _types(text: str) -> tuple[str, ...]:
    """The beginnings of types of a filter.

    Raises:
        UsageError: no event begins so: whoever waited for one would wait for ever.
    """
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for part in found:
        if not any(known.startswith(part) for known in EVENT_TYPES):
            groups = list(dict.fromkeys(known.partition(".")[0] for known in EVENT_TYPES))
            group = part.partition(".")[0] + "."
            own = [known for known in EVENT_TYPES if known.startswith(group)]
            close = difflib.get_close_matches(part, own or [*groups, *EVENT_TYPES], n=3)
            meant = f"did you mean {' or '.join(close)}? " if close else ""
            raise UsageError(
                f"no event is of a type that begins with {part[:60]!r}",
                hint=f"{meant}there are {', '.join(own or groups)}; docs/reference/events.md lists them all",
            )
    return found


def _wanted(
    row: EventRow, transfer: str, site: str | None, types: tuple[str, ...], tenant: str | None
) -> bool:
    return (
        (not transfer or row.transfer == transfer)
        and (site is None or row.site == site)
        and (not types or row.type.startswith(types))
        and (tenant is None or (row.tenant == tenant and bool(row.transfer)))
    )
