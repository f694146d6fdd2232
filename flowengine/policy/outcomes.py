"""What a use at a site comes to while facts are still open: yes, yes with duties, if ..., never.

Goal: one mechanism for "where may this be", for proofs and for comparing policies. Plan: evaluate with the open
facts unknown. If that permits already, the answer is yes. If no way to fill in the unknowns permits, it is never:
a proof, because every unknown line is taken to be free. Otherwise the answer is the unknown lines on branches that
can still become true, as alternatives. `if` may be over-cautious: lines that hang together are taken as free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from flowengine.policy.evaluate import (
    CompiledPolicy,
    Decision,
    Engine,
    Found,
    PolicyTrace,
    RuleTrace,
    Way,
    judge,
)
from flowengine.policy.merge import Collision, merge
from flowengine.policy.model import (
    FALSE,
    TRUE,
    UNKNOWN,
    Condition,
    Duty,
    Line,
    ListRef,
    Literal,
    PolicySet,
    Value,
    leaves,
)
from flowengine.policy.reasons import failing_lines, nearest_permit, true_lines, truth_of

__all__ = [
    "RANKS",
    "AtLeast",
    "Need",
    "Never",
    "Outcome",
    "is_weaker",
    "outcome",
    "policy_needs",
    "soft_evaluate",
    "where",
]

RANKS: Final = {"never": 0, "if": 1, "duties": 2, "yes": 3}
"""Kinds of outcomes, from the strictest."""

MAX_ALTERNATIVES: Final = 24
"""More alternatives than this are cut, and the outcome says so with `...`."""

Alternatives = tuple[tuple[str, ...], ...]
_OPPOSITE: Final = {
    "is": "is not", "is not": "is", "in": "not in", "not in": "in", "includes": "excludes", "excludes": "includes",
    "<": ">=", ">=": "<", ">": "<=", "<=": ">", "before": "not before", "not before": "before",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AtLeast:
    """A set of which only a part is known: what it surely holds and what it surely does not."""

    has: frozenset[str]
    lacks: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Need:
    """What has to become true for one policy: any of the alternatives, each a list of lines."""

    policy: str
    rules: tuple[str, ...]
    alternatives: Alternatives


@dataclass(frozen=True, slots=True)
class Never:
    """Why no fact can help: the policy, what denies, the lines that do."""

    policy: str
    because: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Behind:
    """A rule that could fire, for comparing policies: its duties, and its ways.

    Ways of a permit are those in which it comes to fire, of a require those in which it comes not to. The effect
    `asked` stands for a policy that has to permit too.
    """

    policy: str
    effect: str
    duties: tuple[Duty, ...]
    ways: Alternatives


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer for one use at one site.

    `rules`: the permits taken; `needs` all have to be met; `behind`: what could still fire, and with which duties.
    """

    kind: str
    rules: tuple[str, ...] = ()
    duties: tuple[Duty, ...] = ()
    needs: tuple[Need, ...] = ()
    never: tuple[Never, ...] = ()
    behind: tuple[Behind, ...] = ()


def where(
    engine: Engine,
    use: str,
    facts: Mapping[str, Value],
    can: frozenset[str] | None,
    partial: Mapping[str, AtLeast] | None = None,
) -> Outcome:
    """The outcome of a use with the facts given and all others open.

    Args:
        engine: The policies.
        use: One of the five uses.
        facts: Known facts; give `time.now`, or no policy is known to be in force.
        can: What the site's agent can do, None where that is not asked.
        partial: Sets known in part, by attribute.
    """
    traces = [
        soft_evaluate(engine.policies, compiled, facts, partial or {}) for compiled in engine.compiled[use]
    ]
    now = facts.get("time.now")
    return outcome(engine, traces, can, now if isinstance(now, int) else None)


def soft_evaluate(
    policies: PolicySet, compiled: CompiledPolicy, facts: Mapping[str, Value], partial: Mapping[str, AtLeast]
) -> PolicyTrace:
    """Like `evaluate`, for facts of which some are known in part; the scope's rules are always evaluated."""

    def truth(line: Line, leaf: object) -> int:
        if any(reference.name in partial for reference in line.references()):
            return _partial_truth(policies, compiled, line, facts, partial)
        assert callable(leaf)
        found = leaf(facts.get)
        assert isinstance(found, int)
        return found

    scope_truths = [
        truth(line, leaf) for line, leaf in zip(compiled.scope_lines, compiled.scope_leaves, strict=True)
    ]
    scope = compiled.scope(scope_truths)
    rows = [
        [truth(line, leaf) for line, leaf in zip(rule.lines, rule.leaves, strict=True)]
        for rule in compiled.rules
    ]
    return judge(compiled, scope, scope_truths, rows)


def _partial_truth(
    policies: PolicySet,
    compiled: CompiledPolicy,
    line: Line,
    facts: Mapping[str, Value],
    partial: Mapping[str, AtLeast],
) -> int:
    known = partial.get(line.left.name)
    right = line.right
    if isinstance(right, ListRef):
        other: object = policies.find_list(compiled.policy, right.name).members
    elif isinstance(right, Literal):
        other = right.value
    else:
        other = facts.get(right.name)
    if known is None or other is None:
        return UNKNOWN
    if line.op in ("includes", "excludes"):
        truth = TRUE if other in known.has else FALSE if other in known.lacks else UNKNOWN
        return truth if line.op == "includes" else TRUE - truth
    if not isinstance(other, frozenset):
        return UNKNOWN
    if line.op == "includes any of":
        return TRUE if known.has & other else FALSE if other <= known.lacks else UNKNOWN
    if line.op == "includes all of":
        return TRUE if other <= known.has else FALSE if other & known.lacks else UNKNOWN
    if line.op == "subset of":
        return UNKNOWN if known.has <= other else FALSE
    return UNKNOWN


def outcome(
    engine: Engine, traces: Sequence[PolicyTrace], can: frozenset[str] | None, now: int | None
) -> Outcome:
    """The outcome for policies evaluated with open facts."""
    in_scope = [trace for trace in traces if trace.scope != FALSE]
    decision = Decision("", {} if now is None else {"time.now": now}, can, list(in_scope), [])
    certain = any(trace.scope == TRUE and trace.permits for trace in in_scope)
    if certain and not any(trace.denies for trace in in_scope):
        engine.choose(decision)
        if decision.permit:
            rules = tuple(rule.rule.name for rule in decision.chosen)
            kind = "duties" if decision.duties else "yes"
            return Outcome(kind, rules, decision.duties, behind=_behind(in_scope))
    if never := _never(engine, in_scope, can, now):
        return Outcome("never", never=tuple(never))
    needs = _needs(in_scope)
    if not needs:
        needs = [Need("obligations", (), ((f"duties that can be met ({_failure(decision.failure)})",),))]
    return Outcome("if", needs=tuple(needs), behind=_behind(in_scope))


def _behind(traces: Sequence[PolicyTrace]) -> tuple[Behind, ...]:
    return tuple(found for trace in traces for found in what_is_behind(trace))


def what_is_behind(trace: PolicyTrace) -> tuple[Behind, ...]:
    """The permits and requires of a policy that could fire, with their duties."""
    outside = _ways_to(trace.policy.scope, trace.scope_truths, 0, FALSE) if trace.scope == UNKNOWN else ()
    found = []
    if trace.compiled.unlisted_deny:  # it has to be asked, unless the data turns out to be out of its scope
        found.append(Behind(trace.policy.id, "asked", (), _simplify(outside)))
    for rule in trace.rules:
        effect = rule.rule.effect
        if effect != "forbid" and rule.possible and (effect == "permit" or rule.rule.duties):
            ways = _ways_to_permit(rule) if effect == "permit" else (*_ways_to_avoid(rule), *outside)
            found.append(Behind(trace.policy.id, effect, tuple(_bare(rule.rule.duties)), _simplify(ways)))
    return tuple(found)


def _never(
    engine: Engine, traces: Sequence[PolicyTrace], can: frozenset[str] | None, now: int | None
) -> list[Never]:
    """Why no facts could lead to a permit, empty where some could."""
    found: list[Never] = []
    ways: list[Way] = []
    sure_requires: list[RuleTrace] = []
    for trace in traces:
        rules = trace.rules
        possible = [rule for rule in rules if rule.rule.effect == "permit" and rule.possible]
        if trace.scope == TRUE:
            for rule in trace.forbids:
                if rule.sure:
                    lines = tuple(line.text for line in true_lines(rule))
                    found.append(Never(trace.policy.id, rule.rule.name, lines))
            if trace.compiled.unlisted_deny and not possible:
                nearest = nearest_permit(trace)
                lines = tuple(dict.fromkeys(line.text for line in failing_lines(nearest))) if nearest else ()
                found.append(Never(trace.policy.id, f"{trace.policy.id}: no rule permits", lines))
            sure_requires += [rule for rule in trace.requires if rule.sure]
        if possible:
            optional = trace.scope != TRUE or not trace.compiled.unlisted_deny
            ways.append((True, [*possible, *([None] if optional else [])]))
    if found:
        return found
    if not ways:
        return [Never("", "no policy permits", ())]
    result = engine.search(ways, sure_requires, can, now, check_times=now is not None)
    return [] if isinstance(result, Found) else [Never("", _failure(result), ())]


def _failure(failure: Collision | tuple[str, ...] | None) -> str:
    if isinstance(failure, tuple):
        return "the agent cannot do: " + ", ".join(failure)
    return str(failure) if failure else "no combination of permits"


def _needs(traces: Sequence[PolicyTrace]) -> list[Need]:
    needs: list[Need] = []
    covered = False
    anywhere: list[tuple[str, ...]] = []
    for trace in traces:
        own, ways = policy_needs(trace)
        needs += own
        anywhere += ways
        covered = covered or (trace.scope == TRUE and (bool(trace.permits) or trace.compiled.unlisted_deny))
    if not covered and anywhere:
        needs.append(Need("any policy", (), _simplify(anywhere)))
    return list(dict.fromkeys(needs))


def policy_needs(trace: PolicyTrace) -> tuple[tuple[Need, ...], Alternatives]:
    """What one policy still asks for, and the ways in which it would permit to others, were nobody else to."""
    needs: list[Need] = []
    outside = _ways_to(trace.policy.scope, trace.scope_truths, 0, FALSE) if trace.scope == UNKNOWN else ()
    permits = [rule for rule in trace.rules if rule.rule.effect == "permit" and rule.possible]
    ways = tuple(way for rule in permits for way in _ways_to_permit(rule))
    if trace.compiled.unlisted_deny and not trace.permits:
        names = tuple(rule.rule.name for rule in permits)
        needs.append(Need(trace.policy.id, names, _simplify((*ways, *outside))))
    for rule in trace.forbids:
        if not (rule.sure and trace.scope == TRUE):
            avoid = _simplify((*_ways_to_avoid(rule), *outside))
            needs.append(Need(trace.policy.id, (rule.rule.name,), avoid))
    inside = _ways_to(trace.policy.scope, trace.scope_truths, 0, TRUE) if permits else ()
    return tuple(needs), product([inside, ways]) if permits else ()


def _ways_to_permit(rule: RuleTrace) -> Alternatives:
    compiled = rule.compiled
    when = _ways_to(compiled.rule.when, rule.truths, 0, TRUE)
    if not compiled.rule.unless:
        return when
    unless = _ways_to_none(compiled.rule.unless, rule.truths, compiled.when_count)
    return product([when, unless])


def _ways_to_avoid(rule: RuleTrace) -> Alternatives:
    compiled = rule.compiled
    found = list(_ways_to(compiled.rule.when, rule.truths, 0, FALSE))
    at = compiled.when_count
    for part in compiled.rule.unless:
        found += _ways(part, rule.truths, at, TRUE)
        at += sum(1 for _ in leaves(part))
    return _simplify(found)


def _ways_to(parts: Sequence[Condition], truths: Sequence[int], at: int, wanted: int) -> Alternatives:
    """How the conjunction of parts becomes true, or false, by unknown lines alone."""
    each: list[Alternatives] = []
    for part in parts:
        each.append(_ways(part, truths, at, wanted))
        at += sum(1 for _ in leaves(part))
    if wanted == TRUE:
        return product(each)
    return _simplify([way for ways in each for way in ways])


def _ways_to_none(parts: Sequence[Condition], truths: Sequence[int], at: int) -> Alternatives:
    each: list[Alternatives] = []
    for part in parts:
        each.append(_ways(part, truths, at, FALSE))
        at += sum(1 for _ in leaves(part))
    return product(each)


def _ways(part: Condition, truths: Sequence[int], at: int, wanted: int) -> Alternatives:
    if isinstance(part, Line):
        if truths[at] == wanted:
            return ((),)
        if truths[at] != UNKNOWN:
            return ()
        return ((part.text if wanted == TRUE else negated(part),),)
    if truth_of(part, truths, at) == wanted:
        return ((),)
    if part.kind == "not":
        return _ways(part.items[0], truths, at, TRUE - wanted)
    if (part.kind == "all") == (wanted == TRUE):
        each = []
        for item in part.items:
            each.append(_ways(item, truths, at, wanted))
            at += sum(1 for _ in leaves(item))
        return product(each)
    found: list[tuple[str, ...]] = []
    for item in part.items:
        found += _ways(item, truths, at, wanted)
        at += sum(1 for _ in leaves(item))
    return _simplify(found)


def negated(line: Line) -> str:
    """A line's opposite, in the language of conditions where it has one.

    A line over a flag turns its value.
    """
    if isinstance(line.right, Literal) and line.right.type == "flag" and line.op == "is":
        return f"{line.left.shown} is {'false' if line.right.value else 'true'}"
    if line.op in _OPPOSITE:
        return f"{line.left.shown} {_OPPOSITE[line.op]} {line.right.shown}"
    return f"not: {line.text}"


def product(each: Sequence[Alternatives]) -> Alternatives:
    """One alternative of each, in every combination, simplified."""
    found: list[tuple[str, ...]] = [()]
    for ways in each:
        found = [tuple(dict.fromkeys((*one, *two))) for one in found for two in ways]
        if len(found) > MAX_ALTERNATIVES:
            found = list(_simplify(found))
    return _simplify(found)


def _simplify(ways: Iterable[tuple[str, ...]]) -> Alternatives:
    """Without repetitions and without alternatives that ask for more than another one."""
    unique = list(dict.fromkeys(ways))
    sets = [frozenset(way) for way in unique]
    kept = [
        way
        for index, way in enumerate(unique)
        if not any(
            other < sets[index] or (other == sets[index] and at < index) for at, other in enumerate(sets)
        )
    ]
    return tuple(kept[:MAX_ALTERNATIVES]) + ((("...",),) if len(kept) > MAX_ALTERNATIVES else ())


def is_weaker(old: Outcome, new: Outcome) -> bool:
    """Whether the new outcome lets more happen than the old one; in doubt, yes."""
    if RANKS[new.kind] != RANKS[old.kind]:
        return RANKS[new.kind] > RANKS[old.kind]
    if new.kind == "duties":
        return not _covers(new.duties, old.duties) or _requires_less(old, new)
    if new.kind == "if":
        ours = product([need.alternatives for need in new.needs])
        before = product([need.alternatives for need in old.needs])
        if any("..." in way for way in (*ours, *before)):  # cut: only what is the same is surely no weaker
            return old.needs != new.needs
        theirs = [frozenset(way) for way in before]
        if not all(any(other <= frozenset(way) for other in theirs) for way in ours):
            return True
        return _requires_less(old, new) or _permits_more(old, new)
    return False


def _covers(strict: Iterable[Duty], other: Iterable[Duty]) -> bool:
    """Whether some duties demand all that others do."""
    strict = list(strict)
    both = merge([*_bare(strict), *_bare(other)])
    return both.collision is None and _bare(both.duties) == _bare(merge(_bare(strict)).duties)


def _asks_no_less(ways: Alternatives, than: Alternatives) -> bool:
    """Whether each way includes all lines of one of the others."""
    if any("..." in way for way in (*ways, *than)):
        return ways == than
    return all(any(set(other) <= set(way) for other in than) for way in ways)


def _requires_less(old: Outcome, new: Outcome) -> bool:
    """Whether a require became milder, easier to avoid, or is gone, or a policy need no longer be asked."""
    return not all(
        any(
            (now.policy, now.effect) == (was.policy, was.effect)
            and _covers(now.duties, was.duties) and _asks_no_less(now.ways, was.ways)
            for now in new.behind
        )
        for was in old.behind
        if was.effect != "permit"
    )  # fmt: skip


def _permits_more(old: Outcome, new: Outcome) -> bool:
    """Whether a permit of a policy that was there before came in, easier to meet or with milder duties."""
    known = {was.policy for was in old.behind}
    return not all(
        any(
            was.policy == now.policy and was.effect == "permit"
            and _covers(now.duties, was.duties) and _asks_no_less((way,), was.ways)
            for was in old.behind
        )
        for now in new.behind
        if now.effect == "permit" and now.policy in known
        for way in now.ways
    )  # fmt: skip


def _bare(duties: Iterable[Duty]) -> list[Duty]:
    return sorted((Duty(duty.type, duty.params, ("",)) for duty in duties), key=lambda duty: duty.type)
