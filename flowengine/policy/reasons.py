"""Why a decision came out as it did: the deciding rules, the lines that failed, the facts that are missing.

Kinds of denial are kept apart: `forbidden`, `not permitted`, `undetermined` (facts are missing), `colliding
obligations` and `unsupported obligation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flowengine.policy.evaluate import Decision, PolicyTrace, RuleTrace
from flowengine.policy.merge import Collision
from flowengine.policy.model import FALSE, TRUE, UNKNOWN, Condition, Line, leaves

__all__ = ["Reasons", "failing_lines", "live_unknowns", "nearest_permit", "reasons"]


@dataclass(frozen=True, slots=True)
class Reasons:
    """Why, in the words of the files.

    Args:
        kind: `permitted` or one of the kinds of denial.
        because: Deciding rules as `policy/rule`, or what was not found.
        failing: Lines that kept the nearest permit from firing, or made a forbid fire.
        missing: Facts that are unknown and could matter.
    """

    kind: str
    because: tuple[str, ...]
    failing: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def reasons(decision: Decision) -> Reasons:
    """Why a decision came out as it did."""
    if decision.permit:
        requires = [rule for trace in decision.traces for rule in trace.requires]
        return Reasons("permitted", tuple(rule.rule.name for rule in (*decision.chosen, *requires)))
    because: list[str] = []
    failing: list[Line] = []
    missing: list[Line] = []
    sure = False
    forbidden = False
    for trace in decision.traces:
        if trace.scope == FALSE:
            continue
        for rule in sorted(trace.forbids, key=lambda rule: not rule.sure):
            because.append(rule.rule.name)
            failing += true_lines(rule)
            missing += unknown_lines(rule)
            forbidden = forbidden or (rule.sure and trace.scope == TRUE)
        if trace.compiled.unlisted_deny and not trace.permits:
            because.append(f"{trace.policy.id}: no rule permits")
            missing += [line for rule in possible_permits(trace) for line in unknown_lines(rule)]
            sure = sure or (trace.scope == TRUE and not possible_permits(trace))
            nearest = nearest_permit(trace)
            failing += failing_lines(nearest) if nearest else []
        if trace.denies and trace.scope == UNKNOWN:
            missing += _scope_unknowns(trace)
    if not because:
        return _no_denier(decision)
    kind = "forbidden" if forbidden else "not permitted" if sure else "undetermined"
    return Reasons(kind, tuple(because), _texts(failing), _names(missing))


def _no_denier(decision: Decision) -> Reasons:
    if isinstance(decision.failure, Collision):
        return Reasons("colliding obligations", (str(decision.failure),))
    if decision.failure:
        return Reasons(
            "unsupported obligation", tuple(f"unsupported obligation: {word}" for word in decision.failure)
        )
    unknown = [line for trace in decision.traces if trace.scope != FALSE for line in _scope_unknowns(trace)]
    for trace in decision.traces:
        if trace.scope != FALSE:
            unknown += [line for rule in possible_permits(trace) for line in unknown_lines(rule)]
    kind = "undetermined" if unknown else "not permitted"
    return Reasons(kind, ("no policy permits",), (), _names(unknown))


def possible_permits(trace: PolicyTrace) -> list[RuleTrace]:
    """The permits of a policy that fire or that more facts could make fire."""
    return [rule for rule in trace.rules if rule.rule.effect == "permit" and rule.possible]


def nearest_permit(trace: PolicyTrace) -> RuleTrace | None:
    """The permit that came closest: the smallest share of lines in its way, then the fewest, then the first."""
    permits = [rule for rule in trace.rules if rule.rule.effect == "permit" and not rule.fires]

    def distance(rule: RuleTrace) -> tuple[float, int]:
        against = len(failing_lines(rule)) + len(unknown_lines(rule))
        return against / max(1, len(rule.truths)), against

    return min(permits, key=distance, default=None)


def live_unknowns(parts: Sequence[Condition], truths: Sequence[int], start: int) -> list[Line]:
    """The unknown lines on branches that are unknown as a whole, so could still matter."""
    return [line for line, _ in _live(parts, truths, start, UNKNOWN)]


def _live(
    parts: Sequence[Condition], truths: Sequence[int], start: int, wanted: int
) -> Iterator[tuple[Line, int]]:
    """Lines of that truth that make, or keep, their branch at that truth."""
    at = start
    for part in parts:
        if isinstance(part, Line):
            if truths[at] == wanted:
                yield part, at
            at += 1
            continue
        inner = wanted if part.kind != "not" else TRUE - wanted
        if truth_of(part, truths, at) == wanted:
            yield from _live(part.items, truths, at, inner)
        at += sum(1 for _ in leaves(part))


def truth_of(part: Condition, truths: Sequence[int], at: int) -> int:
    """The truth of a condition whose first line has index `at`."""
    if isinstance(part, Line):
        return truths[at]
    found = []
    for item in part.items:
        found.append(truth_of(item, truths, at))
        at += sum(1 for _ in leaves(item))
    if part.kind == "not":
        return TRUE - found[0]
    return min(found) if part.kind == "all" else max(found)


def failing_lines(rule: RuleTrace) -> list[Line]:
    """The lines that keep a rule from firing: false ones of its condition, true ones of its exceptions."""
    compiled = rule.compiled
    found = [line for line, _ in _live(compiled.rule.when, rule.truths, 0, FALSE)]
    if rule.unless == TRUE:
        found += [line for line, _ in _live(compiled.rule.unless, rule.truths, compiled.when_count, TRUE)]
    return found


def true_lines(rule: RuleTrace) -> list[Line]:
    """The lines that make a rule fire."""
    return [line for line, _ in _live(rule.rule.when, rule.truths, 0, TRUE)]


def unknown_lines(rule: RuleTrace) -> list[Line]:
    """The unknown lines of a rule that could change whether it fires."""
    compiled = rule.compiled
    found: list[Line] = []
    if rule.when == UNKNOWN:
        found += live_unknowns(compiled.rule.when, rule.truths, 0)
    if rule.unless == UNKNOWN and rule.when != FALSE:
        found += live_unknowns(compiled.rule.unless, rule.truths, compiled.when_count)
    return found


def _scope_unknowns(trace: PolicyTrace) -> list[Line]:
    return live_unknowns(trace.policy.scope, trace.scope_truths, 0) if trace.scope == UNKNOWN else []


def _texts(lines: Sequence[Line]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(line.text for line in lines))


def _names(lines: Sequence[Line]) -> tuple[str, ...]:
    """The facts that lines need; of a comparison with the clock only the other side is what people look for."""
    names: dict[str, None] = {}
    for line in lines:
        for reference in line.references():
            names[reference.shown] = None
    return tuple(names)
