"""Handlers for links: what is declared, measured and under maintenance."""

from __future__ import annotations

import secrets
from datetime import datetime

from sqlalchemy import delete, select

from flowengine.api.links import Link, Maintenance
from flowengine.api.schema import Page
from flowengine.coordinator.database import catalogue as stored
from flowengine.coordinator.database.tables import link_states, links, maintenance
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.planning.prober import know_sites, run_probe
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.calls import Call
from flowengine.coordinator.web.catalogue import page
from flowengine.coordinator.web.transfers import cursor_number
from flowengine.errors import NotFound, UsageError

__all__ = ["Links"]


class Links:
    """Links and their maintenance."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database

    async def list_links(self, call: Call) -> Page:
        query, now = call.query, self._service.clock()
        found = await self._db.read(lambda c: stored.list_links(c, query.after, query.limit + 1, now))
        return page(found, query.limit, lambda link: f"{link.source}>{link.target}")

    async def get_link(self, call: Call) -> Link:
        now = self._service.clock()
        found = await self._db.read(
            lambda c: stored.find_link(c, call.path["source"], call.path["target"], now)
        )
        if found is None:
            raise _unknown(call)
        return found

    async def list_link_looks(self, call: Call) -> Page:
        query = call.query
        before = cursor_number(query.after)
        rows = await self._db.read(
            lambda c: stored.link_looks(c, call.path["source"], call.path["target"], before, query.limit + 1)
        )
        shown = [stored.show_look(row) for row in rows[: query.limit]]
        return Page(items=shown, next=str(rows[query.limit - 1].seq) if len(rows) > query.limit else "")

    async def put_link(self, call: Call) -> Link:
        source, target = call.path["source"], call.path["target"]
        said = call.body

        def work(writing: Writing) -> Link:
            know_sites(writing.connection, source, target)
            values = {name: getattr(said, name) for name in said.__struct_fields__}
            values |= {"as_of": writing.now, "source_of_values": f"user:{call.user.name}"}
            writing.connection.execute(
                writing.insert(links)
                .values(source=source, target=target, **values)
                .on_conflict_do_update(index_elements=["source", "target"], set_=values)
            )
            writing.emit("link.changed", user=call.user.name, source=source, target=target)
            found = stored.find_link(writing.connection, source, target, writing.now)
            assert found is not None
            return found

        return await self._db.write(work)

    async def remove_link(self, call: Call) -> None:
        source, target = call.path["source"], call.path["target"]

        def work(writing: Writing) -> None:
            gone = sum(
                writing.connection.execute(
                    delete(table).where(table.c.source == source, table.c.target == target)
                ).rowcount
                for table in (links, link_states)
            )
            if not gone:
                raise _unknown(call)
            writing.emit("link.removed", user=call.user.name, source=source, target=target)

        await self._db.write(work)

    async def probe_link(self, call: Call) -> Link:
        """Have the source's agent send a burst to the target's."""
        source, target = call.path["source"], call.path["target"]
        await run_probe(self._service, source, target, call.body, call.user.name)
        return await self.get_link(call)

    async def list_maintenance(self, call: Call) -> Page:
        query = call.query
        chosen = select(maintenance).where(maintenance.c.id > query.after).order_by(maintenance.c.id)
        rows = await self._db.read(lambda c: c.execute(chosen.limit(query.limit + 1)).all())
        return page([stored.show_maintenance(row) for row in rows], query.limit, lambda one: str(one.id))

    async def create_maintenance(self, call: Call) -> Maintenance | bytes:
        said = call.body
        starts, ends = _instant(said.starts), _instant(said.ends)
        if ends <= starts:
            raise UsageError("maintenance ends before it starts", hint="give an end after the start")
        id_ = "m-" + secrets.token_hex(6)

        def work(writing: Writing) -> Maintenance:
            if ends <= writing.now:
                raise UsageError("that time has passed", hint="give an end in the future")
            name = said.scope.partition(":")[2]
            know_sites(writing.connection, *name.split(">"))
            writing.connection.execute(
                maintenance.insert().values(
                    id=id_,
                    scope=said.scope,
                    starts=starts,
                    ends=ends,
                    drain_s=said.drain_s,
                    comment=said.comment,
                    created_by=call.user.name,
                )
            )
            writing.emit("maintenance.created", user=call.user.name, scope=said.scope, id=id_)
            row = writing.connection.execute(select(maintenance).where(maintenance.c.id == id_)).one()
            return stored.show_maintenance(row)

        return await self._service.create(call, work)

    async def remove_maintenance(self, call: Call) -> None:
        id_ = call.path["maintenance"]

        def work(writing: Writing) -> None:
            gone = writing.connection.execute(delete(maintenance).where(maintenance.c.id == id_))
            if not gone.rowcount:
                raise NotFound(f"there is no maintenance {id_}", hint="flow maintain ls lists them")
            writing.emit("maintenance.removed", user=call.user.name, id=id_)

        await self._db.write(work)


def _instant(when: datetime) -> float:
    if when.tzinfo is None:
        raise UsageError("a time without its zone can mean many", hint="write 2026-12-01T18:00:00Z")
    return when.timestamp()


def _unknown(call: Call) -> NotFound:
    return NotFound(
        f"nothing is known of the link {call.path['source']} > {call.path['target']}",
        hint="flow link ls lists what is known",
    )
