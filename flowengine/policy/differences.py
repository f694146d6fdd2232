"""What differs between two sets of policies beside the outcomes themselves: lists, who may say what, time off line.

A line over an open fact reads the same before and after, though its list has grown; so lists are compared too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from flowengine.policy.model import Line, ListRef, Literal, PolicySet, leaves
from flowengine.policy.outcomes import Outcome

__all__ = ["Difference", "ListChange", "contracts_named", "differences", "list_changes", "list_effect"]

_USE_OF_LIST: Final = re.compile(
    r"(?P<not>not: )?.*?(?P<op>not in|includes any of|includes all of|subset of|in) @(?P<name>\S+)$"
)


@dataclass(frozen=True, slots=True)
class ListChange:
    """Members that a list gained and lost, over all policies that have one of that name."""

    gained: frozenset[str]
    lost: frozenset[str]


@dataclass(frozen=True, slots=True)
class Difference:
    """Something declared otherwise than before; `weaker` if it may let more happen whatever the table says."""

    what: str
    weaker: bool


def list_changes(before: PolicySet, after: PolicySet) -> dict[str, ListChange]:
    """The lists that hold other members than before."""
    found: dict[str, ListChange] = {}
    old, new = _members(before), _members(after)
    for key in old.keys() | new.keys():
        gained = new.get(key, frozenset()) - old.get(key, frozenset())
        lost = old.get(key, frozenset()) - new.get(key, frozenset())
        if gained or lost:
            known = found.get(key[1], ListChange(frozenset(), frozenset()))
            found[key[1]] = ListChange(known.gained | gained, known.lost | lost)
    return dict(sorted(found.items()))


def _members(policies: PolicySet) -> dict[tuple[str, str], frozenset[str]]:
    members = {("", name): found.members for name, found in policies.lists.items()}
    for policy in policies.policies:
        members |= {(policy.id, name): found.members for name, found in policy.lists.items()}
    return members


def list_effect(outcome: Outcome, lists: Mapping[str, ListChange]) -> tuple[bool, bool]:
    """Whether the open lines of an outcome speak of lists that changed, and whether that lets more happen."""
    changed = weaker = False
    for need in outcome.needs:
        for line in (line for way in need.alternatives for line in way):
            match = _USE_OF_LIST.fullmatch(line)
            if match is None or match["name"] not in lists:
                continue
            changed = True
            change = lists[match["name"]]
            shrinking = match["op"] in ("not in", "includes all of")
            if match["not"]:
                shrinking = not shrinking
            weaker = weaker or bool(change.lost if shrinking else change.gained)
    return changed, weaker


def differences(before: PolicySet, after: PolicySet) -> list[Difference]:
    """Declarations that changed, in words."""
    found: list[Difference] = []
    for name, change in list_changes(before, after).items():
        gained = f" gained {', '.join(sorted(change.gained))}" if change.gained else ""
        lost = f" lost {', '.join(sorted(change.lost))}" if change.lost else ""
        # Whether that lets more happen depends on the lines that use it: the table says.
        found.append(Difference(f"list {name}{gained}{' and' if gained and lost else ''}{lost}", False))
    for name, attribute in after.attributes.items():
        old = before.attributes.get(name)
        if old is None or set(old.by) == set(attribute.by):
            continue
        more, fewer = set(attribute.by) - set(old.by), set(old.by) - set(attribute.by)
        if more:
            found.append(Difference(f"{name} may now also be stated by {', '.join(sorted(more))}", True))
        if fewer:
            found.append(Difference(f"{name} may no longer be stated by {', '.join(sorted(fewer))}", False))
    for policy in after.policies:
        was = before.policy(policy.id)
        if was is not None and was.mode == "enforce" != policy.mode:
            found.append(
                Difference(f"policy {policy.id} is no longer enforced but in mode {policy.mode}", True)
            )
        if was is not None and (was.unlisted, policy.unlisted) == ("deny", "permit"):
            found.append(
                Difference(f"policy {policy.id} no longer has to permit what its rules do not list", True)
            )
        if was is not None and policy.max_offline_s != was.max_offline_s:
            what = f"policy {policy.id}: max_offline {was.max_offline_s} s becomes {policy.max_offline_s} s"
            found.append(Difference(what, policy.max_offline_s > was.max_offline_s))
        if was is not None and (was.on_stale, policy.on_stale) == ("unknown", "warn"):
            found.append(Difference(f"policy {policy.id}: overdue lists only warn now", True))
    for name, site in after.sites.items():
        pinned = before.sites.get(name)
        if pinned is None:
            found.append(Difference(f"site {name} is new", False))
        elif pinned.key != site.key:
            found.append(Difference(f"site {name} has another identity key", True))
    return found


def contracts_named(policies: PolicySet) -> list[str]:
    """The contracts that conditions speak of: data under one of them is a case of its own."""
    found: dict[str, None] = {}
    for policy in policies.policies:
        parts = [*policy.scope, *(part for rule in policy.rules for part in (*rule.when, *rule.unless))]
        lines: list[Line] = [line for part in parts for line in leaves(part)]
        for line in lines:
            if line.left.name != "data.contracts":
                continue
            if isinstance(line.right, Literal):
                found[str(line.right.value)] = None
            elif isinstance(line.right, ListRef):
                found |= dict.fromkeys(sorted(policies.find_list(policy, line.right.name).members))
    return list(found)
