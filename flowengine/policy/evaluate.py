"""Deciding: policies compiled once, then (use, facts) in, a `Decision` with every line's truth out.

Goal: fail closed in the right direction. Plan: Kleene's three values. A permit fires when its condition is true and
no exception may hold; a forbid and a require fire when their condition is true *or unknown* and no exception surely
holds. A policy whose scope is unknown forbids and requires, but permits nothing to others.

Invariant: removing a known fact never turns a deny into a permit. It rests on: lines are monotone in information,
permits need certainty, forbids and requires act on doubt, a choice among permits is over a set that only shrinks,
and more duties never merge where fewer collide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from functools import cached_property, partial
from typing import Final

from flowengine.policy.compile import (
    Namespace,
    all_expression,
    any_expression,
    line_expression,
    policy_function,
)
from flowengine.policy.merge import Collision, Merged, merge, timed_collision
from flowengine.policy.model import (
    FALSE,
    TRUE,
    USES,
    Duty,
    Policy,
    PolicySet,
    Rule,
    Value,
    leaves,
)

__all__ = ["CompiledRule", "Decision", "Engine", "Found", "PolicyTrace", "RuleTrace", "evaluate", "judge"]

Facts = Mapping[str, Value]
Getter = Callable[[str], Value | None]
Leaf = Callable[[Getter], int]
"""Gives a line's truth from `facts.get`."""
Combiner = Callable[[Sequence[int]], int]

_MERGE_CACHE_ENTRIES: Final = 8192
"""Merged duties kept by the rules they come from; duties are constants, so this is compilation done late."""


class CompiledRule:
    """A rule whose parts can be evaluated apart, which tables and analyses do; they are compiled when first asked for."""

    def __init__(self, policies: PolicySet, policy: Policy, rule: Rule, index: int) -> None:
        self.rule = rule
        self.index = index
        self.is_forbid = rule.effect == "forbid"
        self.is_permit = rule.effect == "permit"
        self.lines = tuple(line for part in (*rule.when, *rule.unless) for line in leaves(part))
        self.when_count = sum(1 for part in rule.when for _ in leaves(part))
        self._policies = policies
        self._policy = policy

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The truth of one line each."""
        names = Namespace()
        # Staleness matters where truth permits: in a permit's condition, in the exception of the others.
        truths = [
            line_expression(
                self._policies, self._policy, line, self.is_permit == (position < self.when_count), names
            )
            for position, line in enumerate(self.lines)
        ]
        return tuple(names.function(f"lambda get: {truth}") for truth in truths)

    @cached_property
    def when(self) -> Combiner:
        """The truth of the condition by those of all lines."""
        return _combiner(all_expression(self.rule.when, 0, len(self.lines)))

    @cached_property
    def unless(self) -> Combiner:
        """The truth of the exceptions by those of all lines."""
        return _combiner(any_expression(self.rule.unless, self.when_count))


def _combiner(expression: str) -> Combiner:
    made: Combiner = Namespace().function(f"lambda t: {expression}")
    return made


Row = tuple[CompiledRule, Sequence[int], int, int]
"""A rule, the truths of its lines, of `when` and of `unless`: what the evaluator writes down for every rule."""


class RuleTrace:
    """What came out of one rule: the truth of each line, of `when`, of `unless`."""

    __slots__ = ("_row",)

    def __init__(self, row: Row) -> None:
        self._row = row

    @property
    def compiled(self) -> CompiledRule:
        """The rule with its lines in order."""
        return self._row[0]

    @property
    def rule(self) -> Rule:
        """The rule."""
        return self._row[0].rule

    @property
    def truths(self) -> Sequence[int]:
        """The truth of every line, of the condition first and then of the exceptions."""
        return self._row[1]

    @property
    def when(self) -> int:
        """The truth of the condition."""
        return self._row[2]

    @property
    def unless(self) -> int:
        """The truth of the exceptions, false where there is none."""
        return self._row[3]

    @property
    def fires(self) -> bool:
        """Whether it fires: a permit when surely, the others unless surely not."""
        return self.sure if self._row[0].is_permit else self.possible

    @property
    def possible(self) -> bool:
        """Whether its condition holds or more facts could make it hold."""
        return self._row[2] != FALSE and self._row[3] != TRUE

    @property
    def sure(self) -> bool:
        """Whether no further fact could make its condition fail."""
        return self._row[2] == TRUE and self._row[3] == FALSE


class CompiledPolicy:
    """The rules of a policy for one use; `run` makes the trace of it from `facts.get`."""

    def __init__(self, policies: PolicySet, policy: Policy, rules: tuple[CompiledRule, ...]) -> None:
        self.policy = policy
        self.rules = rules
        self.unlisted_deny = policy.unlisted == "deny"
        self.scope_lines = tuple(line for part in policy.scope for line in leaves(part))
        self._policies = policies
        self.run: Callable[[Getter], PolicyTrace] = policy_function(
            policies,
            policy,
            [rule.rule for rule in rules],
            Namespace(
                rules=rules,
                fires=RuleTrace,
                silent=_Silent(self).__getitem__,
                trace=partial(PolicyTrace, self),
            ),
        )

    @cached_property
    def scope_leaves(self) -> tuple[Leaf, ...]:
        """The truth of one line of the scope each."""
        names = Namespace()
        truths = [
            line_expression(self._policies, self.policy, line, False, names) for line in self.scope_lines
        ]
        return tuple(names.function(f"lambda get: {truth}") for truth in truths)

    @cached_property
    def scope(self) -> Combiner:
        """The truth of the scope by those of its lines."""
        return _combiner(all_expression(self.policy.scope, 0, len(self.scope_lines)))


class _Silent(dict[tuple[int, ...], "PolicyTrace"]):
    """The traces of a policy that is out of scope: one for each combination of truths of its scope."""

    def __init__(self, compiled: CompiledPolicy) -> None:
        self._compiled = compiled

    def __missing__(self, truths: tuple[int, ...]) -> PolicyTrace:
        found = self[truths] = PolicyTrace(self._compiled, FALSE, truths, _NO_ROWS, _NONE, _NONE, _NONE)
        return found


class PolicyTrace:
    """What came out of one policy. Rules are evaluated only where the scope is not false."""

    __slots__ = ("compiled", "denies", "forbids", "permits", "requires", "rows", "scope", "scope_truths")

    def __init__(
        self,
        compiled: CompiledPolicy,
        scope: int,
        scope_truths: Sequence[int],
        rows: Sequence[Row],
        permits: Sequence[RuleTrace],
        forbids: Sequence[RuleTrace],
        requires: Sequence[RuleTrace],
    ) -> None:
        self.compiled = compiled
        self.scope = scope
        self.scope_truths = scope_truths
        self.rows = rows
        self.permits = permits
        self.forbids = forbids
        self.requires = requires
        self.denies = scope != FALSE and (bool(forbids) or (compiled.unlisted_deny and not permits))
        """Whether this policy alone denies."""

    @property
    def policy(self) -> Policy:
        """The policy."""
        return self.compiled.policy

    @property
    def rules(self) -> list[RuleTrace]:
        """The rules for this use, in the order of the file."""
        return [RuleTrace(row) for row in self.rows]


class Decision:
    """Permit or deny with every line's truth; words for it come from `flowengine.policy.explain`.

    `failure` says why duties stand in the way: a collision, or words of capabilities that the agent lacks.
    """

    __slots__ = ("can", "chosen", "duties", "facts", "failure", "notes", "permit", "shadow", "traces", "use")

    def __init__(
        self,
        use: str,
        facts: Facts,
        can: frozenset[str] | None,
        traces: list[PolicyTrace],
        shadow: list[PolicyTrace],
    ) -> None:
        self.use = use
        self.facts = facts
        self.can = can
        self.traces = traces
        self.shadow = shadow
        self.permit = False
        self.chosen: tuple[RuleTrace, ...] = ()
        self.duties: tuple[Duty, ...] = ()
        self.notes: tuple[str, ...] = ()
        self.failure: Collision | tuple[str, ...] | None = None


_NO_ROWS: Final[tuple[Row, ...]] = ()
_NONE: Final[tuple[RuleTrace, ...]] = ()
Failure = Collision | tuple[str, ...] | None
Option = RuleTrace | None
Way = tuple[bool, list[Option]]


@dataclass(frozen=True, slots=True)
class Found:
    """A choice of permits and the duties that come with it."""

    chosen: tuple[RuleTrace, ...]
    merged: Merged


class Engine:
    """Policies compiled for deciding; keeps nothing of what it is asked.

    Args:
        policies: What the files say. Drafts are left out; policies in shadow are evaluated and cannot deny.
        enforce: Ids of policies to treat as enforced whatever their mode, None for the modes of the files.
    """

    def __init__(self, policies: PolicySet, enforce: Iterable[str] | None = None) -> None:
        self.policies = policies
        self.zones: Mapping[str, tzinfo] = policies.zones
        forced = None if enforce is None else set(enforce)
        self.enforced: list[Policy] = []
        self.shadowed: list[Policy] = []
        for policy in policies.policies:
            if policy.id in forced if forced is not None else policy.mode == "enforce":
                self.enforced.append(policy)
            elif forced is None and policy.mode == "shadow":
                self.shadowed.append(policy)
        self._count = 0
        self.compiled = {use: [self._compile(policy, use) for policy in self.enforced] for use in USES}
        self._compiled_shadow = {
            use: [self._compile(policy, use) for policy in self.shadowed] for use in USES
        }
        self._runs = {use: [compiled.run for compiled in found] for use, found in self.compiled.items()}
        self._merged: dict[tuple[int, ...], Merged] = {}

    def _compile(self, policy: Policy, use: str) -> CompiledPolicy:
        rules = []
        for rule in policy.rules:
            if use in rule.uses:
                self._count += 1
                rules.append(CompiledRule(self.policies, policy, rule, self._count))
        return CompiledPolicy(self.policies, policy, tuple(rules))

    def decide(self, use: str, facts: Facts, can: frozenset[str] | None) -> Decision:
        """Permit or deny one use.

        Args:
            use: One of `USES`.
            facts: Known facts by attribute name, resolved and with closed labels; what is absent is unknown.
            can: What the agent that would carry out the duties can do; None where that is not asked (analysis).
        """
        get = facts.get
        traces = [run(get) for run in self._runs[use]]
        shadowed = self._compiled_shadow[use]
        shadow = [evaluate(compiled, facts) for compiled in shadowed] if shadowed else []
        decision = Decision(use, facts, can, traces, shadow)
        for trace in traces:
            if trace.denies:
                return decision
        for trace in traces:
            if trace.permits and trace.scope == TRUE:
                self.choose(decision)
                break
        return decision

    def choose(self, decision: Decision) -> None:
        """Take the first combination of permits whose duties merge and can be done; none: deny."""
        options: list[Sequence[RuleTrace]] = []
        requires: list[RuleTrace] = []
        has_duties = False
        for trace in decision.traces:
            if trace.scope == FALSE:
                continue
            if trace.permits:
                options.append(trace.permits)
                has_duties = has_duties or bool(trace.permits[0].compiled.rule.duties)
            if trace.requires:
                requires += trace.requires
        if not has_duties and not requires:
            decision.chosen = tuple([permits[0] for permits in options])
            decision.permit = True
            return
        # A policy that only takes away (unlisted = "permit") may permit too, but need not be asked.
        ways: list[Way] = []
        for trace in decision.traces:
            if trace.scope != FALSE and trace.permits:
                extra: list[Option] = [] if trace.compiled.unlisted_deny else [None]
                ways.append((trace.scope == TRUE, [*trace.permits, *extra]))
        now = decision.facts.get("time.now")
        found = self.search(ways, requires, decision.can, now if isinstance(now, int) else None)
        if isinstance(found, Found):
            decision.permit, decision.chosen = True, found.chosen
            decision.duties, decision.notes = found.merged.duties, found.merged.notes
        else:
            decision.failure = found

    def search(
        self,
        ways: Sequence[Way],
        requires: Sequence[RuleTrace],
        can: frozenset[str] | None,
        now: int | None,
        check_times: bool = True,
    ) -> Found | Failure:
        """The first choice, in file order, whose duties merge with all requires and can be done.

        Args:
            ways: Per policy, whether its scope is certain, and its permits (None: it need not be asked).
            requires: Requires that fire.
            can: What the agent can do, None where that is not asked.
            now: The time, None where it is not known.
            check_times: Whether duties with dates have to fit the time.
        """
        first: Failure = None
        base = tuple(requires)

        def descend(depth: int, taken: tuple[RuleTrace, ...], certain: bool) -> Found | None:
            nonlocal first
            merged, failure = self._feasible((*base, *taken), can, now, check_times)
            if failure is not None:
                first = first or failure
                return None
            if depth == len(ways):
                return Found(taken, merged) if certain else None
            surely, choices = ways[depth]
            for choice in choices:
                if choice is None:
                    found = descend(depth + 1, taken, certain)
                else:
                    found = descend(depth + 1, (*taken, choice), certain or surely)
                if found:
                    return found
            return None

        return descend(0, (), False) or first

    def _feasible(
        self, rules: tuple[RuleTrace, ...], can: frozenset[str] | None, now: int | None, check_times: bool
    ) -> tuple[Merged, Failure]:
        key = tuple([rule.compiled.index for rule in rules])
        merged = self._merged.get(key)
        if merged is None:
            merged = merge([duty for rule in rules for duty in rule.compiled.rule.duties])
            if len(self._merged) >= _MERGE_CACHE_ENTRIES:
                self._merged.clear()
            self._merged[key] = merged
        if merged.collision is not None:
            return merged, merged.collision
        if check_times and merged.timed and (collision := timed_collision(merged, now, self.zones)):
            return merged, collision
        if can is not None and merged.needs:
            missing = [" or ".join(group) for group in merged.needs if can.isdisjoint(group)]
            if missing:
                return merged, tuple(missing)
        return merged, None


def evaluate(compiled: CompiledPolicy, facts: Facts) -> PolicyTrace:
    """One policy on facts: the truth of every line of its scope and, unless that is false, of its rules."""
    return compiled.run(facts.get)


def judge(
    compiled: CompiledPolicy,
    scope: int,
    scope_truths: Sequence[int],
    truths_of_rules: Sequence[Sequence[int]],
) -> PolicyTrace:
    """What a policy comes to when the lines of its rules have these truths."""
    rules = zip(compiled.rules, truths_of_rules, strict=True)
    rows = [(rule, truths, rule.when(truths), rule.unless(truths)) for rule, truths in rules]
    return _fire(compiled, scope, scope_truths, rows)


def _fire(compiled: CompiledPolicy, scope: int, scope_truths: Sequence[int], rows: list[Row]) -> PolicyTrace:
    """Which rules fire: permits that are sure, others unless surely not."""
    permits: list[RuleTrace] = []
    forbids: list[RuleTrace] = []
    requires: list[RuleTrace] = []
    for row in rows:
        rule, _, when, unless = row
        if rule.is_permit:
            if when == TRUE and unless == FALSE:
                permits.append(RuleTrace(row))
        elif when != FALSE and unless != TRUE:
            (forbids if rule.is_forbid else requires).append(RuleTrace(row))
    return PolicyTrace(compiled, scope, scope_truths, rows, permits, forbids, requires)
