"""Conditions as Python functions.

Goal: a decision in microseconds with the truth of every line kept. Plan: each line becomes one expression that gives
0, 1 or 2; a policy becomes one function for each use, of straight code: it reads every fact once from `get` (a
`dict.get` of the facts), its lines' truths are local names, and how they combine is spelled out instead of calling
`min` and `max`. A function for each rule took a third longer, closures calling closures three times as long.

Nothing of a file becomes code: constants are bound by name, names of facts appear as quoted literals of declared
attributes, operators come from the table below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from flowengine.policy.model import (
    FALSE,
    TRUE,
    UNKNOWN,
    Condition,
    Line,
    ListRef,
    Literal,
    Policy,
    PolicySet,
    Rule,
    leaves,
)

__all__ = ["Namespace", "all_expression", "any_expression", "line_expression", "policy_function"]

_TESTS: Final = {
    "is": "{a} == {b}",
    "is not": "{a} != {b}",
    "in": "{a} in {b}",
    "not in": "{a} not in {b}",
    "includes": "{b} in {a}",
    "excludes": "{b} not in {a}",
    "includes any of": "not {b}.isdisjoint({a})",
    "includes all of": "{b} <= {a}",
    "subset of": "{a} <= {b}",
    "<": "{a} < {b}",
    "<=": "{a} <= {b}",
    ">": "{a} > {b}",
    ">=": "{a} >= {b}",
    "before": "{a} < {b}",
    "after": "{a} > {b}",
    "not before": "{a} >= {b}",
}
"""What each operator says of two known values."""
NOW: Final = "time.now"


class Namespace:
    """The constants that expressions speak of, by the names they have there."""

    def __init__(self, **names: object) -> None:
        self._names: dict[str, object] = {"min": min, "max": max, "__builtins__": {}, **names}

    def bind(self, value: object) -> str:
        """A name for a constant."""
        name = f"k{len(self._names)}"
        self._names[name] = value
        return name

    def bind_item(self, name: str, index: int) -> str:
        """A name for an item of a constant."""
        return self.bind(self._names[name][index])  # type: ignore[index]

    def function(self, expression: str) -> Callable[..., Any]:
        """The function that a `lambda` of this module's making stands for."""
        made: Callable[..., Any] = eval(expression, self._names)  # noqa: S307  (see the module's docstring)
        return made

    def defined(self, lines: Sequence[str]) -> Callable[..., Any]:
        """The function `run` that lines of this module's making define."""
        found: dict[str, Callable[..., Any]] = {}
        exec("\n".join(lines), self._names, found)  # noqa: S102  (see the module's docstring)
        return found["run"]


def line_expression(
    policies: PolicySet,
    policy: Policy,
    line: Line,
    certain: bool,
    names: Namespace,
    read: Mapping[str, str] = {},
) -> str:
    """The truth of a line as an expression over `get`.

    Args:
        policies: Where the shared lists are.
        policy: Whose line it is: its own lists come first, and its `on_stale` rules.
        line: The line.
        certain: Whether truth of this line permits, so that a stale list makes it unknown.
        names: Takes the constants.
        read: Under which local names facts were read already.
    """
    one, right, test = line.left, line.right, _TESTS[line.op]
    left = read.get(one.name, "a")
    known_one = left if one.name in read else f"(a := get({one.name!r}))"
    if isinstance(right, (ListRef, Literal)):
        review_by = None
        if isinstance(right, ListRef):
            found = policies.find_list(policy, right.name)
            constant, review_by = names.bind(found.members), found.review_by
        else:
            constant = names.bind(right.value)
        answer = test.format(a=left, b=constant)
        unknown = f"not {known_one}" if one.attribute.nonempty else f"{known_one} is None"
        truth = f"(1 if {unknown} else 2 if {answer} else 0)"
        if certain and policy.on_stale == "unknown" and review_by is not None:
            now = read.get(NOW, "n")
            known = now if NOW in read else f"(n := get({NOW!r}))"
            return f"({truth} if {known} is not None and {now} < {review_by} else 1)"
        return truth
    unknown_one = f"not {known_one}" if one.attribute.nonempty else f"{known_one} is None"
    other = read.get(right.name, "b")
    known_two = other if right.name in read else f"(b := get({right.name!r}))"
    unknown_two = f"not {known_two}" if right.attribute.nonempty else f"{known_two} is None"
    return f"(1 if {unknown_one} or {unknown_two} else 2 if {test.format(a=left, b=other)} else 0)"


def all_expression(parts: Sequence[Condition], at: int, lines: int) -> str:
    """How the truths `t` of `lines` lines combine when all parts, from index `at` on, must hold."""
    if not parts:
        return str(TRUE)
    if at == 0 and len(parts) == lines > 1 and all(isinstance(part, Line) for part in parts):
        return "min(t)"
    return _combined("min", parts, at)


def any_expression(parts: Sequence[Condition], at: int) -> str:
    """How truths combine when one part that holds is enough; false for no parts."""
    return _combined("max", parts, at) if parts else str(FALSE)


def _combined(how: str, parts: Sequence[Condition], at: int) -> str:
    found = []
    for part in parts:
        if isinstance(part, Line):
            found.append(f"t[{at}]")
        elif part.kind == "not":
            found.append(f"({TRUE} - {_combined('min', part.items, at)})")
        else:
            found.append(_combined("min" if part.kind == "all" else "max", part.items, at))
        at += sum(1 for _ in leaves(part))
    return f"{how}({', '.join(found)})" if len(found) > 1 else found[0]


# --- a policy as one function -----------------------------------------------------------------------------------


def policy_function(
    policies: PolicySet, policy: Policy, rules: Sequence[Rule], names: Namespace
) -> Callable[..., Any]:
    """Straight code for a policy and one use: from `get` to what `trace` makes of it, or `silent` out of scope.

    Args:
        policies: Where the shared lists are.
        policy: What is compiled.
        rules: Those of its rules that are about the use.
        names: Takes the constants. Has `rules` (what rows and traces name, in order), `fires` (takes the row of a rule
            that fires), `silent` (takes the truths of the scope), and `trace` (takes the scope's truth, its lines'
            truths, the rows, and what fired of permits, forbids and requires).
    """
    return _PolicyCode(policies, policy, names).function(rules)


class _PolicyCode:
    """The lines of one such function as they come."""

    def __init__(self, policies: PolicySet, policy: Policy, names: Namespace) -> None:
        self._policies = policies
        self._policy = policy
        self._names = names
        self._code = ["def run(get):"]
        self._read: dict[str, str] = {}
        self._made = 0

    def function(self, rules: Sequence[Rule]) -> Callable[..., Any]:
        lines = [line for part in self._policy.scope for line in leaves(part)]
        truths = self._truths(lines, len(lines), certain=False)
        scope = self._all(self._policy.scope, truths)
        self._code.append(f" if not {scope}: return silent({_tuple(truths)})")
        self._code.append(" permits = forbids = requires = ()")
        rows = [self._rule(index, rule) for index, rule in enumerate(rules)]
        self._code.append(
            f" return trace({scope}, {_tuple(truths)}, {_tuple(rows)}, permits, forbids, requires)"
        )
        return self._names.defined(self._code)

    def _rule(self, index: int, rule: Rule) -> str:
        """Evaluate a rule and take note of it where it fires; the name of its row."""
        when = [line for part in rule.when for line in leaves(part)]
        unless = [line for part in rule.unless for line in leaves(part)]
        permits = rule.effect == "permit"
        # Staleness matters where truth permits: in a permit's condition, in the exception of the others.
        truths = self._truths([*when, *unless], len(when), certain=permits)
        holds = self._all(rule.when, truths[: len(when)])
        excepted = self._any(rule.unless, truths[len(when) :])
        row = self._let(f"({self._names.bind_item('rules', index)}, {_tuple(truths)}, {holds}, {excepted})")
        fires = f"{holds} == {TRUE}" if permits else holds
        if unless:
            fires += f" and not {excepted}" if permits else f" and {excepted} != {TRUE}"
        kind = {"permit": "permits", "forbid": "forbids"}.get(rule.effect, "requires")
        self._code.append(f" if {fires}: {kind} += (fires({row}),)")
        return row

    def _truths(self, lines: Sequence[Line], first: int, *, certain: bool) -> list[str]:
        """Evaluate lines; the local names of their truths.

        Args:
            first: How many of them belong to the condition; the others are of the exceptions.
            certain: Whether truth of those of the condition permits.
        """
        found = []
        for position, line in enumerate(lines):
            needed = [reference.name for reference in line.references()]
            if isinstance(line.right, ListRef) and self._policy.on_stale == "unknown":
                needed.append(NOW)
            for name in needed:
                if name not in self._read:
                    self._read[name] = self._let(f"get({name!r})")
            truth = line_expression(
                self._policies, self._policy, line, certain == (position < first), self._names, self._read
            )
            found.append(self._let(truth))
        return found

    def _let(self, expression: str) -> str:
        """A local name for a value."""
        name = f"x{self._made}"
        self._made += 1
        self._code.append(f" {name} = {expression}")
        return name

    def _all(self, parts: Sequence[Condition], truths: Sequence[str]) -> str:
        """The local name, or number, of whether all parts hold."""
        found = self._each(parts, truths)
        if len(found) < 2:
            return found[0] if found else str(TRUE)
        return self._let(
            f"{' and '.join(found)} and ({TRUE} if {' + '.join(found)} == {TRUE * len(found)} else {UNKNOWN})"
        )

    def _any(self, parts: Sequence[Condition], truths: Sequence[str]) -> str:
        """The local name, or number, of whether one part holds."""
        found = self._each(parts, truths)
        if len(found) < 2:
            return found[0] if found else str(FALSE)
        surely = " or ".join(f"{one} == {TRUE}" for one in found)
        return self._let(f"{TRUE} if {surely} else {' or '.join(found)}")

    def _each(self, parts: Sequence[Condition], truths: Sequence[str]) -> list[str]:
        found, at = [], 0
        for part in parts:
            end = at + sum(1 for _ in leaves(part))
            if isinstance(part, Line):
                found.append(truths[at])
            elif part.kind == "not":
                found.append(self._let(f"{TRUE} - {self._all(part.items, truths[at:end])}"))
            elif part.kind == "all":
                found.append(self._all(part.items, truths[at:end]))
            else:
                found.append(self._any(part.items, truths[at:end]))
            at = end
        return found


def _tuple(names: Sequence[str]) -> str:
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"
