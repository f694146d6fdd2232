"""Approvals: facts bound to exactly one dataset version, recipient, purpose and set of duties.

An approval that was given for something else, by the requester, by somebody not in the group, after the fact or too
long ago is none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flowengine.policy.model import Duty, Value

__all__ = ["Approval", "Request", "approval_facts", "duties_digest", "open_approvals", "valid_approvals"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be approved. `started`: when bytes began to move, None before."""

    dataset_digest: str
    recipient: str
    purpose: str
    duties_digest: str
    requester: str
    started: int | None = None


@dataclass(frozen=True, slots=True)
class Approval:
    """One person's yes, whose signature has been checked by the caller."""

    who: str
    groups: frozenset[str]
    dataset_digest: str
    recipient: str
    purpose: str
    duties_digest: str
    given: int
    until: int

    @property
    def binds(self) -> str:
        """Digest of what exactly it is about, as records have it."""
        said = "\0".join((self.dataset_digest, self.recipient, self.purpose, self.duties_digest))
        return "sha256:" + hashlib.sha256(said.encode()).hexdigest()


def duties_digest(duties: Sequence[Duty]) -> str:
    """Digest of duties as approvers saw them, without who asked for them and without the approval itself."""
    plain = sorted(
        [duty.type, [[key, value] for key, value in duty.params]] for duty in duties if duty.type != "approve"
    )
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def valid_approvals(
    approvals: Iterable[Approval], request: Request, now: int, valid_s: int | None = None
) -> list[Approval]:
    """The approvals that hold for a request now, one per person.

    Args:
        approvals: All that were given.
        request: What they have to be about.
        now: The time.
        valid_s: How long a yes holds at most.
    """
    found: dict[str, Approval] = {}
    for approval in approvals:
        same = (approval.dataset_digest, approval.recipient, approval.purpose, approval.duties_digest) == (
            request.dataset_digest, request.recipient, request.purpose, request.duties_digest,
        )  # fmt: skip
        in_time = approval.given <= now < approval.until
        in_time = in_time and (valid_s is None or now < approval.given + valid_s)
        before = request.started is None or approval.given <= request.started
        if same and in_time and before and approval.who != request.requester:
            found[approval.who] = approval
    return list(found.values())


def approval_facts(
    groups: Iterable[str], approvals: Iterable[Approval], request: Request, now: int
) -> Mapping[str, Value]:
    """`approvals.valid_from_group(...)` for each group, as facts."""
    valid = valid_approvals(approvals, request, now)
    return {
        f"approvals.valid_from_group('{group}')": sum(group in approval.groups for approval in valid)
        for group in groups
    }


def open_approvals(duty: Duty, approvals: Iterable[Approval], request: Request, now: int) -> list[str]:
    """What an `approve` duty still lacks, in words; empty when it is met.

    Every group has to be represented, by different people.
    """
    assert duty.type == "approve"
    valid_s = duty.get("valid")
    assert valid_s is None or isinstance(valid_s, int)
    valid = valid_approvals(approvals, request, now, valid_s)
    groups = duty.get("from")
    people = duty.get("people")
    assert isinstance(groups, tuple)
    assert isinstance(people, int)
    missing = (
        []
        if _represented(list(groups), valid)
        else [f"one person of each of {', '.join(groups)}, all different"]
    )
    able = [approval for approval in valid if approval.groups & set(groups)]
    if len(able) < people:
        missing.append(f"{people - len(able)} more of {people} people")
    return missing


def _represented(groups: list[str], valid: list[Approval]) -> bool:
    """Whether each group can be given a person of its own."""
    if not groups:
        return True
    first, rest = groups[0], groups[1:]
    return any(
        first in approval.groups and _represented(rest, [other for other in valid if other is not approval])
        for approval in valid
    )
