"""Handlers for approvals."""

from __future__ import annotations

from flowengine.api.resources import ApprovalRequest, Page
from flowengine.coordinator.actions import approvals as actions
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.calls import Call

__all__ = ["Approvals"]


class Approvals:
    """Requests for approval."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._db = service.database

    async def list_approvals(self, call: Call) -> Page:
        tenant = call.user.sees
        found = await self._db.read(lambda c: actions.list_requests(c, tenant, call.query.limit))
        return Page(items=found)

    async def approve(self, call: Call) -> ApprovalRequest:
        def work(writing: Writing) -> ApprovalRequest:
            engine = self._service.decider.at(writing.connection).engine
            approvers = {} if engine is None else engine.policies.approvers
            return actions.give(writing, call.path["handle"], call.body.document, approvers, call.user.name)

        return await self._db.write(work)

    async def withdraw_approval(self, call: Call) -> ApprovalRequest:
        return await self._db.write(
            lambda w: actions.withdraw(w, call.path["handle"], call.path["approver"], call.user.name)
        )
