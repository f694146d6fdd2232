"""Handlers for policy bundles, label statements and agreements, for people and for agents."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, select

from flowengine.api.agents import AgentLabels
from flowengine.api.policies import AgreementInfo, LabelInfo, PolicyBundle, PolicyBundleContent
from flowengine.api.schema import Page
from flowengine.coordinator.actions import policies as actions
from flowengine.coordinator.database import policies as stored
from flowengine.coordinator.database.tables import bundles
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.calls import Call
from flowengine.coordinator.web.transfers import cursor_number
from flowengine.errors import NotFound

__all__ = ["PolicyFiles"]

LABELS_AT_ONCE: Final = 40
"""A statement has at most 12 KiB, an answer should stay below a mebibyte."""


class PolicyFiles:
    """Bundles and label statements."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database

    async def activate_bundle(self, call: Call) -> PolicyBundle | bytes:
        return await self._service.create(
            call,
            lambda w: actions.activate(w, call.body.content, self._service.policy_keys, call.user.name),
        )

    async def list_bundles(self, call: Call) -> Page:
        before = cursor_number(call.query.after)
        limit = call.query.limit

        def look(connection: Connection) -> list[PolicyBundle]:
            in_force, _ = stored.newest(connection)
            query = select(*stored.ABOUT_BUNDLES).order_by(bundles.c.version.desc()).limit(limit + 1)
            if before is not None:
                query = query.where(bundles.c.version < before)
            return [stored.show_bundle(row, in_force) for row in connection.execute(query)]

        found = await self._db.read(look)
        return Page(items=found[:limit], next=str(found[limit - 1].version) if len(found) > limit else "")

    async def get_bundle(self, call: Call) -> PolicyBundleContent:
        return await self._content(int(call.path["version"]), call.query.offset)

    async def agent_policy(self, call: Call) -> PolicyBundleContent:
        version = call.query.version
        if not version:
            version, _ = await self._db.read(stored.newest)
        return await self._content(version, call.query.offset)

    async def _content(self, version: int, offset: int) -> PolicyBundleContent:
        def look(connection: Connection) -> PolicyBundleContent:
            row = stored.bundle_part(connection, version, offset)
            if row is None:
                raise NotFound(
                    f"there is no bundle of version {version}" if version else "no policy bundle is in force",
                    hint="flow policy bundle status lists them",
                )
            return PolicyBundleContent(
                version=row.version,
                digest=row.digest,
                content=row.content,
                offset=offset,
                size_bytes=row.size_bytes,
            )

        return await self._db.read(look)

    async def set_label(self, call: Call) -> LabelInfo | bytes:
        decider = self._service.decider
        return await self._service.create(
            call,
            lambda w: actions.keep_label(
                w, call.body.document, decider.at(w.connection).owners(), call.user.name
            ),
        )

    async def list_labels(self, call: Call) -> Page:
        after, limit = cursor_number(call.query.after) or 0, call.query.limit

        def look(connection: Connection) -> list[LabelInfo]:
            rows = stored.label_rows(connection, after, limit + 1, call.query.site)
            return [stored.show_label(row) for row in rows]

        found = await self._db.read(look)
        return Page(items=found[:limit], next=str(found[limit - 1].serial) if len(found) > limit else "")

    async def set_agreement(self, call: Call) -> AgreementInfo | bytes:
        decider = self._service.decider

        def keep(writing: Writing) -> AgreementInfo:
            engine = decider.at(writing.connection).engine
            policies = None if engine is None else engine.policies
            return actions.keep_agreement(writing, call.body.document, policies, call.user.name)

        return await self._service.create(call, keep)

    async def list_agreements(self, call: Call) -> Page:
        after, limit = cursor_number(call.query.after) or 0, call.query.limit
        rows = await self._db.read(lambda c: stored.agreement_rows(c, after, limit + 1))
        found = [stored.show_agreement(row) for row in rows]
        return Page(items=found[:limit], next=str(found[limit - 1].serial) if len(found) > limit else "")

    async def agent_labels(self, call: Call) -> AgentLabels:
        after = call.query.after
        rows = await self._db.read(lambda c: stored.statement_rows(c, after, LABELS_AT_ONCE + 1))
        return AgentLabels(
            statements=[(row.serial, row.document) for row in rows[:LABELS_AT_ONCE]],
            last=len(rows) <= LABELS_AT_ONCE,
        )
