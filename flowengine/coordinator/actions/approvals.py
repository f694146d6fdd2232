"""Requests for approval, the yeses that were given, and what a yes that is taken back stops."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from hashlib import sha256
from typing import Literal

import msgspec
from sqlalchemy import Connection, delete, select, update

from flowengine.api.policies import ApprovalRequest, GivenApproval
from flowengine.api.transfers import TransferRequest
from flowengine.coordinator.database.evidence import Chain
from flowengine.coordinator.database.people import moment
from flowengine.coordinator.database.tables import (
    AnyRow,
    approval_requests,
    approvals,
    tasks,
    transfers,
)
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.coordinator.database.transfers import settle
from flowengine.coordinator.decisions import Verdict
from flowengine.coordinator.knowledge import handle_of
from flowengine.errors import AuthenticationError, Denied, FlowError, NotFound
from flowengine.evidence.bodies import approval_body
from flowengine.policy.approvals import Approval
from flowengine.policy.duties import dump_duties, load_duties
from flowengine.policy.explain import duty_record
from flowengine.policy.model import Approver, Duty
from flowengine.trust.approval import verify_approval

__all__ = ["ask_for_approval", "give", "list_requests", "show_request", "withdraw"]

KEPT_S = 30 * 86_400.0
"""How long a request stays that nobody answers."""


def ask_for_approval(
    writing: Writing, request: TransferRequest, verdict: Verdict, user: str, tenant: str
) -> list[str]:
    """Keep what people have to approve, one request for each recipient; their handles."""
    handles: list[str] = []
    for about in verdict.about.values():
        if about.request is None or about.supposed is None:
            continue
        handle = handle_of(about.request)
        handles.append(handle)
        duties = about.supposed.duties
        asked = [duty for duty in duties if duty.type == "approve"]
        people = max((number for duty in asked if isinstance(number := duty.get("people"), int)), default=0)
        writing.connection.execute(
            delete(approval_requests).where(
                approval_requests.c.expires < writing.now,
                approval_requests.c.handle.not_in(select(approvals.c.handle)),
            )
        )
        there = writing.connection.execute(
            update(approval_requests)
            .where(approval_requests.c.handle == handle)
            .values(expires=writing.now + KEPT_S)
        )
        if there.rowcount:
            continue
        writing.connection.execute(
            approval_requests.insert().values(
                handle=handle,
                created=writing.now,
                expires=writing.now + KEPT_S,
                source=request.source.site,
                path=request.source.path,
                recipient=about.request.recipient,
                purpose=request.purpose,
                requester=user,
                tenant=tenant,
                dataset_digest=about.request.dataset_digest,
                duties_digest=about.request.duties_digest,
                duties=json_text(dump_duties(duties)),
                groups=json_text(list(about.groups)),
                people=people,
                text=", ".join(rule.rule.name for rule in about.supposed.chosen),
            )
        )
        writing.emit(
            "approval.requested", user=user, tenant=tenant, site=about.request.recipient, handle=handle,
            groups=list(about.groups),
        )  # fmt: skip
    return handles


def _row(connection: Connection, handle: str, tenant: str | None) -> AnyRow:
    query = select(approval_requests).where(approval_requests.c.handle == handle)
    if tenant is not None:
        query = query.where(approval_requests.c.tenant == tenant)
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(
            f"there is no request for approval {handle}", hint="flow approval ls lists those you may see"
        )
    return row


def show_request(connection: Connection, row: AnyRow) -> ApprovalRequest:
    """A request as the API shows it."""
    given = connection.execute(
        select(approvals).where(approvals.c.handle == row.handle).order_by(approvals.c.given)
    )
    duties = [
        msgspec.json.encode(duty_record(duty)).decode()
        for duty in _duties(row.duties)
        if duty.type != "approve"
    ]
    return ApprovalRequest(
        handle=row.handle,
        created=moment(row.created),
        source=row.source,
        path=row.path,
        recipient=row.recipient,
        purpose=row.purpose,
        requester=row.requester,
        dataset=row.dataset_digest,
        duties_digest=row.duties_digest,
        duties=duties,
        groups=msgspec.json.decode(row.groups, type=list[str]),
        people=row.people,
        rules=row.text,
        given=[GivenApproval(who=one.who, given=moment(one.given), until=moment(one.until)) for one in given],
    )


def _duties(text: str) -> tuple[Duty, ...]:
    return load_duties(msgspec.json.decode(text))


def list_requests(connection: Connection, tenant: str | None, limit: int) -> list[ApprovalRequest]:
    """Requests, newest first."""
    query = select(approval_requests).order_by(approval_requests.c.created.desc()).limit(limit)
    if tenant is not None:
        query = query.where(approval_requests.c.tenant == tenant)
    return [show_request(connection, row) for row in connection.execute(query).all()]


def give(
    writing: Writing, chain: Chain, handle: str, document: bytes, approvers: Mapping[str, Approver], user: str
) -> ApprovalRequest:
    """Take a signed yes.

    Raises:
        AuthenticationError: it is not signed with the key of an approver of the policies (reason "approval-forged").
        Denied: the requester approves the own request.
        FlowError: it is about something else, or over already (reason "conflict").
    """
    row = _row(writing.connection, handle, None)
    said, approval = verify_approval(document, approvers)
    about = (said.dataset, said.recipient, said.purpose, said.duties, said.requester)
    if about != (row.dataset_digest, row.recipient, row.purpose, row.duties_digest, row.requester):
        raise FlowError(
            f"the approval of {said.who} is about something else than {handle} asks",
            hint="sign what flow approval ls shows now: flow approve",
            reason="conflict",
        )
    if said.who in (row.requester, user) and user == row.requester:
        raise Denied(f"{user} asked for this and cannot approve it", hint="somebody else has to")
    if not said.given <= writing.now + 60 < said.until:
        raise FlowError(f"the approval of {said.who} does not hold now", reason="conflict")
    writing.connection.execute(
        delete(approvals).where(approvals.c.handle == handle, approvals.c.who == said.who)
    )
    writing.connection.execute(
        approvals.insert().values(
            handle=handle, who=said.who, given=said.given, until=said.until, document=document.hex(),
            added_by=user,
        )
    )  # fmt: skip
    chain.append(writing, "approval", _record(document, approval, "given"))
    writing.emit(
        "approval.given", user=user, tenant=row.tenant, site=row.recipient, handle=handle, who=said.who,
        groups=sorted(approval.groups),
    )  # fmt: skip
    return show_request(writing.connection, row)


def _record(document: bytes, approval: Approval, state: Literal["given", "withdrawn"]) -> dict[str, object]:
    """The body of a record of a yes, by the name that agents give it too."""
    return approval_body(
        sha256(document).hexdigest()[:16],
        state,
        group=", ".join(sorted(approval.groups)),
        by=approval.who,
        binds=approval.binds,
        until=approval.until,
    )


def withdraw(
    writing: Writing, chain: Chain, handle: str, who: str, approvers: Mapping[str, Approver], user: str
) -> ApprovalRequest:
    """Take a yes back: what runs on it is stopped, and asked for anew it is decided anew.

    Raises:
        NotFound: there is no such yes.
    """
    row = _row(writing.connection, handle, None)
    there = (approvals.c.handle == handle) & (approvals.c.who == who)
    text = writing.connection.execute(select(approvals.c.document).where(there)).scalar()
    if text is None:
        raise NotFound(f"{who} has not approved {handle}", hint="flow approval ls tells who has")
    writing.connection.execute(delete(approvals).where(there))
    document = bytes.fromhex(text)
    with contextlib.suppress(
        AuthenticationError
    ):  # of somebody who may not approve any more: it did not count
        chain.append(
            writing, "approval", _record(document, verify_approval(document, approvers)[1], "withdrawn")
        )
    writing.emit(
        "approval.withdrawn", user=user, tenant=row.tenant, site=row.recipient, handle=handle, who=who
    )
    why = f"the approval of {who} ({handle}) was taken back"
    live = (
        select(tasks.c.id, tasks.c.transfer, tasks.c.driver, tasks.c.target_site, tasks.c.source_site)
        .join(transfers, transfers.c.id == tasks.c.transfer)
        .where(
            tasks.c.state.in_(["waiting", "running"]),
            tasks.c.source_site == row.source,
            tasks.c.target_site == row.recipient,
            transfers.c.user == row.requester,
        )
    )
    found = [
        task
        for task in writing.connection.execute(live).all()
        if _path_of(writing.connection, task.transfer) == row.path
    ]
    for task in found:
        values = {
            "state": "failed",
            "reason": "policy-stopped",
            "message": why,
            "hint": "it needs another approval",
        }
        writing.connection.execute(update(tasks).where(tasks.c.id == task.id).values(**values))
        writing.emit(
            "task.failed", transfer=task.transfer, site=task.driver, tenant=row.tenant, task=task.id,
            reason="policy-stopped", message=why, wake=[task.driver, task.source_site, task.target_site],
        )  # fmt: skip
        settle(writing, task.transfer)
    return show_request(writing.connection, row)


def _path_of(connection: Connection, transfer: str) -> str:
    text = connection.execute(select(transfers.c.request).where(transfers.c.id == transfer)).scalar_one()
    return msgspec.json.decode(text, type=TransferRequest).source.path
