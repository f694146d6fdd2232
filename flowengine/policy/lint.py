"""What is suspicious about policies that load: rules that cannot fire, facts nobody states, lists nobody reviews.

Everything here is a warning with a code; what must not be loaded at all is an error of the loader.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import combinations
from math import prod
from typing import Final

from flowengine.policy.merge import merge, missing_capabilities, timed_collision
from flowengine.policy.model import (
    USES,
    Condition,
    Group,
    Line,
    ListRef,
    Literal,
    NamedList,
    Policy,
    PolicySet,
    Rule,
    leaves,
)
from flowengine.policy.problems import Problem
from flowengine.policy.runner import Report

__all__ = ["REVIEW_WARNING_S", "lint", "overdue"]

REVIEW_WARNING_S: Final = 30 * 86400
"""How long before a review is due it is announced."""

_MANY_COMBINATIONS: Final = 10_000


def lint(policies: PolicySet, now: int, report: Report | None = None) -> list[Problem]:
    """Warnings about policies, in the order of files and lines.

    Args:
        policies: What was loaded.
        now: The time that reviews are compared with.
        report: What the tests covered; without it, untested rules are not looked for.
    """
    found: list[Problem] = []
    for policy in policies.policies:
        found += _policy_dates(policy, now)
        for rule in policy.rules:
            found += _never_fires(policies, policy, rule, now)
            found += _nobody_states(policies, policy, rule)
            found += _nobody_can(policies, rule)
    found += _lists(policies, now)
    found += _collisions(policies, now)
    found += _combinations(policies)
    if report is not None:
        found += _untested(policies, report)
    return sorted(found)


def overdue(policies: PolicySet, now: int) -> list[str]:
    """Policies in force and lists they use whose review date has passed: a bundle with them has to say so."""
    late = [
        f"policy {policy.id}"
        for policy in policies.policies
        if policy.mode != "draft" and policy.review_by <= now
    ]
    used = _used_lists([policy for policy in policies.policies if policy.mode != "draft"])
    return late + [
        f"list {name}"
        for name, found in sorted(policies.lists.items())
        if name in used and found.review_by is not None and found.review_by <= now
    ]


def _warn(owner: Policy | Rule | NamedList, code: str, message: str, hint: str = "") -> Problem:
    return Problem(owner.file, owner.line, message, hint, "warning", code)


def _day(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).date().isoformat()


def _policy_dates(policy: Policy, now: int) -> Iterator[Problem]:
    if policy.mode == "draft":
        return
    if policy.review_by <= now:
        message = f"policy {policy.id} was to be reviewed by {_day(policy.review_by)}"
        yield _warn(policy, "policy-overdue", message, "review it, then set the next review_by")
    elif policy.review_by <= now + REVIEW_WARNING_S:
        days = (policy.review_by - now) // 86400
        message = f"policy {policy.id} has to be reviewed by {_day(policy.review_by)}, in {days} days"
        yield _warn(policy, "policy-review-soon", message)
    if policy.until is not None and policy.until <= now:
        yield _warn(policy, "policy-ended", f"policy {policy.id} ended on {_day(policy.until)}", "remove it")
    if policy.mode == "shadow":
        days = max(0, (now - policy.effective) // 86400)
        message = f"policy {policy.id} is in shadow and denies nothing, {days} days after it took effect"
        yield _warn(policy, "shadow", message, 'set mode = "enforce" or "draft"')


def _used_lists(chosen: Sequence[Policy]) -> set[str]:
    used: set[str] = set()
    for policy in chosen:
        for line in _lines(
            [policy.scope, *(part for rule in policy.rules for part in (rule.when, rule.unless))]
        ):
            if isinstance(line.right, ListRef) and line.right.name not in policy.lists:
                used.add(line.right.name)
    return used


def _lines(groups: Iterable[Sequence[Condition]]) -> list[Line]:
    return [line for group in groups for part in group for line in leaves(part)]


def _lists(policies: PolicySet, now: int) -> Iterator[Problem]:
    active = [policy for policy in policies.policies if policy.mode != "draft"]
    used, anywhere = _used_lists(active), _used_lists(policies.policies)
    for name, found in policies.lists.items():
        if name not in used:
            if name not in anywhere and not _in_a_duty(policies, name):
                yield _warn(found, "list-unused", f"the list {name} is used nowhere")
            continue
        if found.review_by is not None and found.review_by <= now:
            message = (
                f"the list {name} was to be reviewed by {_day(found.review_by)}; it is as of {found.as_of}"
            )
            yield _warn(found, "list-overdue", message, f"compare it with its source: {found.source}")
        elif found.review_by is not None and found.review_by <= now + REVIEW_WARNING_S:
            message = f"the list {name} has to be reviewed by {_day(found.review_by)}"
            yield _warn(found, "list-review-soon", message)
        lacks = [] if found.reviewed else ["reviewed = true"]
        lacks += ["a review_by date"] if found.review_by is None else []
        if lacks:
            message = f"nobody has adopted the list {name} (as of {found.as_of})"
            hint = f"compare it with its source ({found.source}), then give it {' and '.join(lacks)}"
            yield _warn(found, "list-not-adopted", message, hint)


def _in_a_duty(policies: PolicySet, name: str) -> bool:
    members = tuple(sorted(policies.lists[name].members))
    rules = [rule for policy in policies.policies for rule in policy.rules]
    return any(value == members for rule in rules for duty in rule.duties for _, value in duty.params)


def _never_fires(policies: PolicySet, policy: Policy, rule: Rule, now: int) -> Iterator[Problem]:
    for part in rule.when:
        for line in leaves(part):
            if line.left.name == "time.now" and line.op == "before" and isinstance(line.right, Literal):
                end = line.right.value
                if isinstance(end, int) and end <= now and part is line:
                    message = f"rule {rule.name} fires no more: {line.text}"
                    yield _warn(rule, "never-fires", message, "remove it or give it a new date")
    lines = [line for part in (*policy.scope, *rule.when) for line in _certain(part)]
    by_fact: dict[str, list[Line]] = {}
    for line in lines:
        by_fact.setdefault(line.left.name, []).append(line)
    for group in by_fact.values():
        if why := _contradiction(policies, policy, group):
            message = f"rule {rule.name} can never fire: {why}"
            yield _warn(rule, "never-fires", message, "one of these lines is not meant so")


def _certain(part: Condition) -> Iterator[Line]:
    """The lines that must hold for a part to hold."""
    if isinstance(part, Line):
        yield part
    elif isinstance(part, Group) and part.kind == "all":
        for item in part.items:
            yield from _certain(item)


def _contradiction(policies: PolicySet, policy: Policy, lines: list[Line]) -> str:
    """Why lines about one fact cannot hold together, empty if they can."""
    one_of: frozenset[str] | None = None
    none_of: set[str] = set()
    has: set[str] = set()
    low, high = None, None
    shown = " and ".join(dict.fromkeys(line.text for line in lines))
    for line in lines:
        value = _constant(policies, policy, line)
        if value is None:
            continue
        if line.op in ("is", "in") and isinstance(value, (str, frozenset)):
            members = frozenset([value]) if isinstance(value, str) else value
            one_of = members if one_of is None else one_of & members
        elif line.op in ("is not", "not in") and isinstance(value, (str, frozenset)):
            none_of |= {value} if isinstance(value, str) else value
        elif line.op == "includes" and isinstance(value, str):
            has.add(value)
        elif line.op == "excludes" and isinstance(value, str):
            none_of.add(value)
        elif line.op == "includes any of" and isinstance(value, frozenset) and not value:
            return f"{line.text}: the list is empty"
        elif line.op in ("<", "<=", "before") and isinstance(value, int):
            top = value if line.op == "<=" else value - 1
            high = top if high is None else min(high, top)
        elif line.op in (">", ">=", "after", "not before") and isinstance(value, int):
            bottom = value if line.op in (">=", "not before") else value + 1
            low = bottom if low is None else max(low, bottom)
    if one_of is not None and not one_of - none_of:
        return shown if one_of or len(lines) > 1 else f"{shown}: the list is empty"
    if has & none_of or (low is not None and high is not None and low > high):
        return shown
    return ""


def _constant(policies: PolicySet, policy: Policy, line: Line) -> object:
    if isinstance(line.right, ListRef):
        return policies.find_list(policy, line.right.name).members
    return line.right.value if isinstance(line.right, Literal) else None


def _nobody_states(policies: PolicySet, policy: Policy, rule: Rule) -> Iterator[Problem]:
    if policy.mode == "draft":
        return
    pinned = {name for site in policies.sites.values() for name in site.facts}
    for line in _lines([rule.when, rule.unless]):
        for reference in line.references():
            attribute = reference.attribute
            effect = "so it fires everywhere" if rule.effect == "forbid" else "so this line is never true"
            if not attribute.by:
                message = f"rule {rule.name}: nobody may assert {reference.shown}, {effect}"
                yield _warn(rule, "nobody-asserts", message, "name a source in attributes.toml")
            elif (
                attribute.subject == "site"
                and policies.sites
                and "engine" not in attribute.by
                and attribute.name not in pinned
            ):
                message = f"rule {rule.name}: no pinned site states {reference.shown}, {effect}"
                yield _warn(rule, "nobody-asserts", message, "add it to sites.toml")


def _nobody_can(policies: PolicySet, rule: Rule) -> Iterator[Problem]:
    able = [site.can for site in policies.sites.values() if site.can is not None]
    if not able or not rule.duties:
        return
    lacking = [missing_capabilities(rule.duties, can) for can in able]
    if all(lacking):
        fewest = min(lacking, key=len)
        message = f"rule {rule.name}: no pinned site can do its duties; nearest lacks {', '.join(fewest)}"
        yield _warn(rule, "nobody-can", message, "see `can` in sites.toml")


def _collisions(policies: PolicySet, now: int) -> Iterator[Problem]:
    """Pairs of rules that can fire together and whose duties never merge; permits of one policy are alternatives."""
    rules = [(policy, rule) for policy in policies.policies for rule in policy.rules if rule.duties]
    for (first_policy, first), (second_policy, second) in combinations(rules, 2):
        alternatives = first_policy is second_policy and first.effect == second.effect == "permit"
        if alternatives or not set(first.uses) & set(second.uses):
            continue
        both = merge([*first.duties, *second.duties])
        collision = both.collision or timed_collision(both, now, policies.zones)
        if collision is None or collision.first == collision.second:
            continue
        if _apart(policies, (first_policy, first), (second_policy, second)):
            continue
        yield _warn(
            first, "collision", f"duties of {first.name} and {second.name} never merge: {collision.what}"
        )


def _apart(policies: PolicySet, one: tuple[Policy, Rule], two: tuple[Policy, Rule]) -> bool:
    """Whether two rules can never fire for the same request."""
    lines: dict[str, list[Line]] = {}
    for policy, rule in (one, two):
        for part in (*policy.scope, *rule.when):
            for line in _certain(part):
                lines.setdefault(line.left.name, []).append(line)
    return any(bool(_contradiction(policies, one[0], group)) for group in lines.values())


def _combinations(policies: PolicySet) -> Iterator[Problem]:
    active = [policy for policy in policies.policies if policy.mode == "enforce"]
    for use in USES:
        counts = [
            sum(rule.effect == "permit" and use in rule.uses for rule in policy.rules) for policy in active
        ]
        if active and prod(count for count in counts if count) > _MANY_COMBINATIONS:
            message = f"{use}: more than {_MANY_COMBINATIONS} combinations of permits, if all applied at once"
            yield _warn(active[0], "combinations", message, "give policies narrower scopes")


def _untested(policies: PolicySet, report: Report) -> Iterator[Problem]:
    known = {rule.name: rule for policy in policies.policies for rule in policy.rules}
    tested = report.coverage.decided | report.coverage.silent
    for name, rule in known.items():
        if name not in tested:
            yield _warn(
                rule, "untested", f"rule {name} has no test", "add cases where it decides and where not"
            )
    for line in report.untested:
        name, _, what = line.partition(": ")
        if name in known and name in tested:
            yield _warn(known[name], "untested", f"rule {name}: {what}")
