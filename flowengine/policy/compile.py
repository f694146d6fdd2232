"""Conditions as Python functions.

Goal: a decision in microseconds with the truth of every line kept. Plan: each line becomes one expression over
`get` (a `dict.get` of the facts) that gives 0, 1 or 2; a rule becomes one function that evaluates its lines and
combines them by `min` and `max`. Closures calling closures took three times as long.

Nothing of a file becomes code: constants are bound by name, names of facts appear as quoted literals of declared
attributes, operators come from the table below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from flowengine.policy.model import FALSE, TRUE, Condition, Line, ListRef, Literal, Policy, PolicySet, leaves

__all__ = ["Namespace", "all_expression", "any_expression", "line_expression"]

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


class Namespace:
    """The constants that expressions speak of, by the names they have there."""

    def __init__(self, **names: object) -> None:
        self._names: dict[str, object] = {"min": min, "max": max, "__builtins__": {}, **names}

    def bind(self, value: object) -> str:
        """A name for a constant."""
        name = f"k{len(self._names)}"
        self._names[name] = value
        return name

    def function(self, expression: str) -> Callable[..., Any]:
        """The function that a `lambda` of this module's making stands for."""
        made: Callable[..., Any] = eval(expression, self._names)  # noqa: S307  (see the module's docstring)
        return made


def line_expression(policies: PolicySet, policy: Policy, line: Line, certain: bool, names: Namespace) -> str:
    """The truth of a line as an expression over `get`.

    Args:
        policies: Where the shared lists are.
        policy: Whose line it is: its own lists come first, and its `on_stale` rules.
        line: The line.
        certain: Whether truth of this line permits, so that a stale list makes it unknown.
        names: Takes the constants.
    """
    one, right, test = line.left, line.right, _TESTS[line.op]
    known_one = f"(a := get({one.name!r}))"
    if isinstance(right, (ListRef, Literal)):
        review_by = None
        if isinstance(right, ListRef):
            found = policies.find_list(policy, right.name)
            constant, review_by = names.bind(found.members), found.review_by
        else:
            constant = names.bind(right.value)
        answer = test.format(a="a", b=constant)
        unknown = f"not {known_one}" if one.attribute.nonempty else f"{known_one} is None"
        truth = f"(1 if {unknown} else 2 if {answer} else 0)"
        if certain and policy.on_stale == "unknown" and review_by is not None:
            return f"({truth} if (n := get('time.now')) is not None and n < {review_by} else 1)"
        return truth
    unknown_one = f"not {known_one}" if one.attribute.nonempty else f"{known_one} is None"
    known_two = f"(b := get({right.name!r}))"
    unknown_two = f"not {known_two}" if right.attribute.nonempty else f"{known_two} is None"
    return f"(1 if {unknown_one} or {unknown_two} else 2 if {test.format(a='a', b='b')} else 0)"


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
