"""What the coordinator knows of a request besides labels and sites: counters over transfers, approvals.

The exporting site counts for itself too, and reads the approvals' signatures itself: what is known here can only make a
decision stricter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256

import msgspec
from sqlalchemy import Connection, delete, select, update

from flowengine.coordinator.database.ledger import RESERVED_S
from flowengine.coordinator.database.tables import AnyRow, approval_requests, approvals, ledger
from flowengine.coordinator.database.transactions import Writing, json_text
from flowengine.errors import AuthenticationError
from flowengine.policy.approvals import Approval, Request, open_approvals
from flowengine.policy.asking import Matter, Place, ask
from flowengine.policy.counting import counters, larger, movement_of
from flowengine.policy.evaluate import Decision, Engine
from flowengine.policy.ledger import Entry, Ledger, Movement, counters_of
from flowengine.policy.model import Value
from flowengine.policy.requests import approval_groups, approval_statements, what_to_approve
from flowengine.trust.approval import verify_approval

__all__ = ["Known", "approvals_for", "counts_of", "handle_of", "know", "reserve"]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a request for one recipient.

    Attributes:
        matter: with counters and approvals among its facts.
        movement: what it would add to the counters; None where nothing counts.
        request: what approvals have to be about; None where none are asked for.
        given: valid signatures among those that were given for it.
        supposed: the decision on the landing if everybody approved.
    """

    matter: Matter
    movement: Movement | None = None
    counts: Mapping[str, Value] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    request: Request | None = None
    given: tuple[Approval, ...] = ()
    supposed: Decision | None = None
    plenty: Matter | None = None

    def missing(self, decision: Decision, now: int) -> list[str]:
        """What the duties to approve of a permit still lack, in words."""
        if self.request is None:
            return []
        found: list[str] = []
        for duty in decision.duties:
            if duty.type == "approve":
                found += open_approvals(duty, self.given, self.request, now)
        return found


def know(
    connection: Connection,
    engine: Engine,
    source: tuple[str, str],
    target: Place,
    matter: Matter,
    now: int,
    task: str = "",
) -> Known:
    """Add counters and approvals to a matter.

    Args:
        source: site and path of the data.
        target: the recipient.
        task: whose own row in the counters is left out; empty for what is new.
    """
    movement: Movement | None = None
    counts: dict[str, Value] = {}
    if counters_of(engine.policies):
        movement = movement_of(task, source[0], ask(engine, "land", target, matter, now))
        counts = counters(engine.policies, _ledger(connection, movement.controller), movement, now)
        matter = replace(matter, also=(*matter.also, *larger([counts], now)))
    groups = approval_groups(engine.policies)
    if not groups:
        return Known(matter, movement, counts)
    request, supposed = what_to_approve(engine, source, target, matter, now)
    given: list[Approval] = []
    query = (
        select(approvals.c.document)
        .join(approval_requests)
        .where(
            approval_requests.c.dataset_digest == request.dataset_digest,
            approval_requests.c.recipient == request.recipient,
            approval_requests.c.requester == request.requester,
        )
    )
    for text in connection.execute(query).scalars():
        try:
            said, approval = verify_approval(bytes.fromhex(text), engine.policies.approvers)
        except AuthenticationError:
            continue  # by somebody who may not approve any more
        if said.requester == request.requester:
            given.append(approval)
    said_now = approval_statements(groups, given, request, now)
    plenty = tuple(replace(one, value=1_000_000) for one in approval_statements(groups, (), request, now))
    return Known(
        replace(matter, also=(*matter.also, *said_now)),
        movement,
        counts,
        tuple(groups),
        request,
        tuple(given),
        supposed.decision,
        replace(matter, also=(*matter.also, *plenty)),
    )


# --- counters ---------------------------------------------------------------------------------------------------


def _ledger(connection: Connection, controller: str) -> Ledger:
    rows = connection.execute(select(ledger).where(ledger.c.controller == controller))
    return Ledger(tuple(_entry(row) for row in rows))


def _entry(row: AnyRow) -> Entry:
    labels = frozenset(msgspec.json.decode(row.labels, type=list[str]))
    movement = Movement(row.task, row.controller, row.party, row.country, labels, row.persons, row.size_bytes)
    return Entry(movement, int(row.at), None if row.expires is None else int(row.expires))


def reserve(writing: Writing, task: str, known: Known) -> None:
    """Count what a task would add, until it is settled; what has moved of it before counts on as it did."""
    one = known.movement
    if one is None:
        return
    counts = json_text(dict(known.counts))
    final = update(ledger).where(ledger.c.task == task, ledger.c.expires.is_(None)).values(counts=counts)
    if writing.connection.execute(final).rowcount:
        return
    writing.connection.execute(delete(ledger).where(ledger.c.task == task))
    writing.connection.execute(
        ledger.insert().values(
            task=task,
            transfer=task.rpartition(".")[0],
            controller=one.controller,
            party=one.party,
            country=one.country,
            labels=json_text(sorted(one.labels)),
            persons=one.persons,
            size_bytes=one.size_bytes,
            at=writing.now,
            expires=writing.now + RESERVED_S,
            counts=counts,
        )
    )


def counts_of(connection: Connection, task: str) -> dict[str, int]:
    """What the counters came to when a task was decided, for its grant."""
    text = connection.execute(select(ledger.c.counts).where(ledger.c.task == task)).scalar()
    return msgspec.json.decode(text, type=dict[str, int]) if text else {}


# --- approvals --------------------------------------------------------------------------------------------------


def handle_of(request: Request) -> str:
    """The name of a request for approval: the same question has the same name."""
    said = [
        request.dataset_digest,
        request.recipient,
        request.purpose,
        request.duties_digest,
        request.requester,
    ]
    return "ap-" + sha256(msgspec.json.encode(said)).hexdigest()[:16]


def approvals_for(
    connection: Connection, source: tuple[str, str], recipient: str, requester: str, most: int = 8
) -> list[bytes]:
    """Approvals that were given for data at a path to a recipient; who checks them finds which of them count."""
    query = (
        select(approvals.c.document)
        .join(approval_requests)
        .where(
            approval_requests.c.source == source[0],
            approval_requests.c.path == source[1],
            approval_requests.c.recipient == recipient,
            approval_requests.c.requester == requester,
        )
        .order_by(approvals.c.given.desc())
        .limit(most)
    )
    return [bytes.fromhex(text) for text in connection.execute(query).scalars()]
