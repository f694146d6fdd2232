"""Handlers for approvals."""

from __future__ import annotations

from collections.abc import Mapping

from flowengine.api.policies import ApprovalRequest
from flowengine.api.schema import Page
from flowengine.coordinator.actions import approvals as actions
from flowengine.coordinator.database.transactions import Writing
from flowengine.coordinator.service import Service
from flowengine.coordinator.web.calls import Call
from flowengine.policy.model import Approver

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
        chain = self._service.chain

        def work(writing: Writing) -> ApprovalRequest:
            approvers = self._approvers(writing)
            return actions.give(
                writing, chain, call.path["handle"], call.body.document, approvers, call.user.name
            )

        return await self._db.write(work)

    def _approvers(self, writing: Writing) -> Mapping[str, Approver]:
        engine = self._service.decider.at(writing.connection).engine
        return {} if engine is None else engine.policies.approvers

    async def withdraw_approval(self, call: Call) -> ApprovalRequest:
        chain, path, user = self._service.chain, call.path, call.user.name
        return await self._db.write(
            lambda w: actions.withdraw(w, chain, path["handle"], path["approver"], self._approvers(w), user)
        )
