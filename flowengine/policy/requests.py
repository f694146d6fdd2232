"""What has to be approved, and whether it was: the same question at the coordinator and at every agent.

Goal
    A yes counts for exactly what was shown when it was given.
Plan
    Suppose that everybody had approved and decide: the duties that the recipient would then take on, with data set,
    recipient, purpose and requester, are what an approval is about. What was given for just that becomes facts, and the
    decision is made again with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256

import msgspec

from flowengine.policy.approvals import Approval, Request, approval_facts, duties_digest
from flowengine.policy.asking import Judged, Matter, Place, ask
from flowengine.policy.evaluate import Engine
from flowengine.policy.facts import Statement
from flowengine.policy.model import PolicySet, leaves

__all__ = ["approval_groups", "approval_statements", "dataset_digest", "what_to_approve"]

_PLENTY = 1_000_000
"""More approvals than any rule asks for."""


def dataset_digest(site: str, path: str, labels: frozenset[str], contracts: frozenset[str]) -> str:
    """How an approval names a data set: SHA-256 over where it lies and what it carries.

    >>> dataset_digest("a", "/x/", frozenset("l"), frozenset()) == dataset_digest("a", "/x", frozenset("l"), frozenset())
    True
    """
    said = [site, path.rstrip("/") or "/", sorted(labels), sorted(contracts)]
    return "sha256:" + sha256(msgspec.json.encode(said)).hexdigest()


def approval_groups(policies: PolicySet) -> list[str]:
    """The groups whose approvals some rule asks for, as a condition or as a duty."""
    groups: set[str] = set()
    for policy in policies.policies:
        for rule in policy.rules:
            for line in (line for part in (*rule.when, *rule.unless) for line in leaves(part)):
                for reference in line.references():
                    if reference.name.startswith("approvals."):
                        groups.update(reference.arguments)
            for duty in rule.duties:
                asked = duty.get("from") if duty.type == "approve" else None
                groups.update(map(str, asked) if isinstance(asked, tuple) else ())
    return sorted(groups)


def what_to_approve(
    engine: Engine, source: tuple[str, str], target: Place, matter: Matter, now: int
) -> tuple[Request, Judged]:
    """What approvals have to be about, and the decision on the landing if all were given.

    Args:
        source: site and path of the data.
    """
    plenty = [
        Statement(f"approvals.valid_from_group('{group}')", _PLENTY, "approval:supposed", now)
        for group in approval_groups(engine.policies)
    ]
    supposed = ask(engine, "land", target, replace(matter, also=(*matter.also, *plenty)), now)
    facts = supposed.known.facts
    labels, contracts = facts.get("data.labels"), facts.get("data.contracts")
    digest = dataset_digest(
        *source,
        labels if isinstance(labels, frozenset) else frozenset(),
        contracts if isinstance(contracts, frozenset) else frozenset(),
    )
    duties = duties_digest(supposed.decision.duties)
    return Request(digest, target.name, matter.purpose, duties, matter.requester), supposed


def approval_statements(
    groups: Iterable[str], given: Sequence[Approval], request: Request, now: int
) -> list[Statement]:
    """What was approved, as facts."""
    facts = approval_facts(groups, given, request, now)
    return [Statement(name, value, "approval:signed", now) for name, value in facts.items()]
