"""What a set of policy files says, once read: attributes, lists, conditions, rules, policies.

Everything here is data; nothing evaluates. A truth is one of three small integers, so that Kleene's *and* is
`min`, *or* is `max` and *not* is `2 - x`. Instants are whole seconds since 1970 in UTC: no floats anywhere, a
decision has to come out the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import tzinfo
from typing import Final

__all__ = [
    "FALSE",
    "MODES",
    "TRUE",
    "TRUTH_NAMES",
    "UNKNOWN",
    "USES",
    "Approver",
    "Attribute",
    "Combine",
    "Condition",
    "Counter",
    "Duty",
    "Group",
    "Label",
    "Line",
    "Link",
    "ListRef",
    "Literal",
    "NamedList",
    "Owner",
    "Policy",
    "PolicySet",
    "Reference",
    "Rule",
    "Site",
    "Value",
    "leaves",
]

FALSE: Final = 0
UNKNOWN: Final = 1
TRUE: Final = 2
TRUTH_NAMES: Final = ("false", "unknown", "true")

USES: Final = ("release", "relay", "hold", "land", "process")
MODES: Final = ("draft", "shadow", "enforce")

Value = str | int | bool | frozenset[str]
"""A known fact: text, number or instant, flag, set. An unknown fact is absent from its mapping."""


@dataclass(frozen=True, slots=True)
class Attribute:
    """A declared fact: its type, who may say it, how people call it.

    Args:
        name: Subject and fact, like `site.country`.
        type: text, set, number, flag or time.
        unit: Of a number: bytes, seconds, rate, bits, percent or count.
        domain: What its texts are: country, label or anything.
        by: Kinds of sources that may assert it (`registry`, `label`, ...); others are not heard.
        secret: Whether only auditors see its value.
        nonempty: An empty set is no answer: it counts as unknown.
        narrow: How a site's word about itself may narrow the pinned value: `intersect`, `union` or not at all.
    """

    name: str
    type: str
    en: str
    zh: str
    by: tuple[str, ...]
    unit: str = ""
    domain: str = ""
    secret: bool = False
    nonempty: bool = False
    narrow: str = ""

    @property
    def subject(self) -> str:
        """What the fact is about: data, site, recipient, ..."""
        return self.name.split(".", 1)[0]


@dataclass(frozen=True, slots=True)
class Counter:
    """A declared counter, written like a call in a condition: `ledger.persons_after('x','y','z')`."""

    name: str
    parameters: tuple[str, ...]
    unit: str
    en: str
    zh: str
    by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """The left or right side of a line that names a fact; a counter's name carries its arguments and zone."""

    name: str
    attribute: Attribute
    shown: str
    counter: Counter | None = None
    arguments: tuple[str, ...] = ()
    zone: str = "UTC"


@dataclass(frozen=True, slots=True)
class Literal:
    """A constant of a condition: text, number, flag or instant."""

    value: Value
    shown: str
    type: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class ListRef:
    """A named list used by a condition."""

    name: str
    shown: str


@dataclass(frozen=True, slots=True)
class Line:
    """One condition: operand, operator, operand, as text and as parts."""

    text: str
    left: Reference
    op: str
    right: Reference | Literal | ListRef

    def references(self) -> tuple[Reference, ...]:
        """The facts that this line needs."""
        return (self.left, self.right) if isinstance(self.right, Reference) else (self.left,)


@dataclass(frozen=True, slots=True)
class Group:
    """Conditions joined by `all`, `any` or `not` (a `not` has one item)."""

    kind: str
    items: tuple[Condition, ...]


Condition = Line | Group


def leaves(condition: Condition) -> Iterator[Line]:
    """The lines of a condition, in the order of the file."""
    if isinstance(condition, Line):
        yield condition
    else:
        for item in condition.items:
            yield from leaves(item)


@dataclass(frozen=True, slots=True)
class Duty:
    """An obligation as one rule states it, or as several merge into: a type and its parameters.

    Parameters are pairs in the order of their names; values are JSON-able (texts, integers, flags, and tuples
    and pairs of them), so that equal duties are equal values.
    """

    type: str
    params: tuple[tuple[str, object], ...]
    origins: tuple[str, ...]

    def get(self, name: str) -> object:
        """A parameter's value, None where it is not given."""
        return next((value for key, value in self.params if key == name), None)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `unless` entries are alternatives: one that is true switches the rule off."""

    policy: str
    id: str
    effect: str
    uses: tuple[str, ...]
    when: tuple[Condition, ...]
    unless: tuple[Condition, ...]
    duties: tuple[Duty, ...]
    why: str
    why_zh: str
    stop: str
    file: str
    line: int

    @property
    def name(self) -> str:
        """`policy/rule`, as decisions name it."""
        return f"{self.policy}/{self.id}"


@dataclass(frozen=True, slots=True)
class NamedList:
    """A list with its date and source; members of a union are the members of its parts."""

    name: str
    members: frozenset[str]
    file: str
    line: int
    title: str = ""
    domain: str = ""
    as_of: str = ""
    source: str = ""
    review_by: int | None = None
    reviewed: bool = False
    secret: bool = False
    inline: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one regime. `scope` holds the lines of `applies_to` and the dates it is in force."""

    id: str
    version: str
    title: str
    title_zh: str
    owner: str
    scope: tuple[Condition, ...]
    unlisted: str
    mode: str
    on_stale: str
    effective: int
    until: int | None
    review_by: int
    max_offline_s: int
    zone: str
    rules: tuple[Rule, ...]
    lists: Mapping[str, NamedList]
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Label:
    """A declared label; data that carries it carries what it implies."""

    name: str
    title: str
    implies: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Combine:
    """Labels that, found together, make further ones (28 CFR 202.205(g) is such a rule)."""

    all: frozenset[str]
    adds: frozenset[str]


@dataclass(frozen=True, slots=True)
class Site:
    """A pinned site: its facts, what its agent can do (None: nothing said), whose identity key counts as its own.

    `recipient` holds facts of the organisation that receives what lands there.
    """

    name: str
    facts: Mapping[str, Value]
    can: frozenset[str] | None = None
    key: str = ""
    recipient: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Owner:
    """Who speaks for data: the key (Ed25519, raw) and the roots, as (site, path), `*` for any site.

    Data below one of the roots has the labels that a statement with this key gives it; without one they are unknown.
    """

    name: str
    key: bytes
    roots: tuple[tuple[str, str], ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Approver:
    """Who may approve requests: the key (Ed25519, raw) that a yes is signed with, and the groups that it counts for."""

    name: str
    key: bytes
    groups: tuple[str, ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Authority:
    """Who may sign agreements: the key (Ed25519, raw), for whose data (roots as of `Owner`), and which facts.

    A fact is the name of an attribute, or `group.*` for all of that group.
    """

    name: str
    key: bytes
    roots: tuple[tuple[str, str], ...]
    facts: tuple[str, ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Link:
    """A directed edge of the site graph."""

    source: str
    target: str
    facts: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class PolicySet:
    """All that a directory or a bundle of policy files says."""

    policies: tuple[Policy, ...]
    lists: Mapping[str, NamedList]
    attributes: Mapping[str, Attribute]
    labels: Mapping[str, Label]
    combines: tuple[Combine, ...]
    sites: Mapping[str, Site]
    links: tuple[Link, ...]
    data: Mapping[str, Mapping[str, Value]]
    copies: tuple[tuple[str, str, str], ...]
    zones: Mapping[str, tzinfo]
    tests: Mapping[str, bytes] = field(default_factory=dict)
    owners: Mapping[str, Owner] = field(default_factory=dict)
    approvers: Mapping[str, Approver] = field(default_factory=dict)
    authorities: Mapping[str, Authority] = field(default_factory=dict)

    def policy(self, name: str) -> Policy | None:
        """The policy of that id, None where there is none."""
        return next((policy for policy in self.policies if policy.id == name), None)

    def find_list(self, policy: Policy, name: str) -> NamedList:
        """A list as that policy sees it: its own first, then the shared ones."""
        return policy.lists.get(name) or self.lists[name]

    def close_labels(self, labels: frozenset[str]) -> frozenset[str]:
        """The labels, what they imply, and what they combine to."""
        closed = set(labels)
        todo = list(labels)
        while todo:
            label = self.labels.get(todo.pop())
            new = set(label.implies if label else ()) - closed
            for combine in self.combines:
                if combine.all <= closed | new:
                    new |= combine.adds - closed
            closed |= new
            todo.extend(new)
        return frozenset(closed)
