"""Handlers for evidence: checkpoints of the agents' chains, and the coordinator's own chain."""

from __future__ import annotations

import base64

import msgspec

from flowengine.api.agents import Taken, check_required
from flowengine.api.evidence import EvidenceBundle, EvidenceCheckpoint, EvidenceRecord
from flowengine.api.schema import Page
from flowengine.coordinator.database import evidence as stored
from flowengine.coordinator.database.people import moment
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.calls import Call
from flowengine.coordinator.web.transfers import cursor_number
from flowengine.errors import NotFound, UsageError

__all__ = ["Evidence"]


class Evidence:
    """What agents hand in, and what auditors ask for."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database

    async def checkpoint(self, call: Call) -> Taken:
        check_required(call.body)
        try:
            document = base64.b64decode(call.body.document, validate=True)
        except ValueError:
            raise UsageError("the checkpoint is not in base64", hint="send the document in base64") from None
        anchors = self._service.secrets.ca_pem
        await self._db.write(lambda w: stored.take_checkpoint(w, call.site, document, anchors))
        return Taken()

    async def list_checkpoints(self, call: Call) -> Page:
        query = call.query
        skip = cursor_number(query.after) or 0
        rows = await self._db.read(lambda c: stored.list_checkpoints(c, query.agent, skip, query.limit + 1))
        items = [
            EvidenceCheckpoint(
                agent=found.agent,
                chain=found.chain,
                seq=found.seq,
                hash=found.hash,
                time=found.time,
                received=moment(at),
                document=document,
            )
            for found, document, at in rows[: query.limit]
        ]
        return Page(items=items, next=str(skip + query.limit) if len(rows) > query.limit else "")

    async def list_evidence(self, call: Call) -> Page:
        query = call.query
        after = cursor_number(query.after) or 0
        lines = await self._db.read(lambda c: stored.list_records(c, after, query.limit + 1))
        items = [
            EvidenceRecord(seq=int(msgspec.json.decode(line)["seq"]), line=line)
            for line in lines[: query.limit]
        ]
        return Page(items=items, next=str(items[-1].seq) if len(lines) > query.limit else "")

    async def get_evidence_bundle(self, call: Call) -> EvidenceBundle:
        digest = call.path["digest"]
        offset = call.query.offset
        row = await self._db.read(lambda c: stored.find_bundle(c, digest, offset))
        if row is None:
            raise NotFound(f"there is no bundle {digest}", hint="flow evidence ls coordinator names them")
        content = base64.b64encode(row.content).decode("ascii")
        return EvidenceBundle(digest=digest, content=content, offset=offset, size_bytes=row.size_bytes)
