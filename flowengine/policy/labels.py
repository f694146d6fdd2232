"""What is known about data: label statements of its owners, what its copies inherited, what a requester added.

A statement is an owner's signed word on a root at a site: it covers the root and everything below. Which owners there
are and for which roots they speak stands in the bundle (`owners.toml`). Signatures are checked before anything comes
here (`flowengine.trust.labels`); here is what statements mean together.

Invariants
    - Of one owner's statements on one root the highest number counts, and no lower one ever again.
    - Data below an owned root that no valid statement covers has unknown labels, whatever anybody adds.
    - What inherits, is added or lies deeper only adds labels; numbers of persons add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flowengine.policy.facts import Statement
from flowengine.policy.model import Owner, PolicySet, Value

__all__ = [
    "FACTS",
    "Inherited",
    "Labelling",
    "covers",
    "data_statements",
    "find_owner",
    "overlaps",
    "relevant",
    "uncovered",
]

FACTS = frozenset(
    {
        "data.collected_in",
        "data.source_labels",
        "data.source_collected_in",
        "data.persons",
        "data.controller",
        "data.category",
        "data.tenant",
        "data.embargo_until",
    }
)
"""What a statement may say besides labels and contracts."""


@dataclass(frozen=True, slots=True)
class Labelling:
    """A label statement whose signature was checked.

    Args:
        owner: As the bundle names it.
        key: With which it was signed (Ed25519, raw).
        site, path: The root that it covers, with all below it.
        number: Counts this owner's statements on this root.
        issued, expires: Seconds since 1970; None: until a later one.
        withdrawn: It says nothing any more: the data is unlabelled until the next one.
        digest: SHA-256 of the document, hexadecimal: its name.
    """

    owner: str
    key: bytes
    site: str
    path: str
    number: int
    issued: int
    labels: frozenset[str]
    contracts: frozenset[str] = frozenset()
    facts: Mapping[str, Value] = field(default_factory=dict)
    expires: int | None = None
    withdrawn: bool = False
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a copy has from where it came from; the word of whoever let it land, and only ever more labels."""

    labels: frozenset[str] = frozenset()
    contracts: frozenset[str] = frozenset()
    by: str = "label:inherited"


def covers(root: str, path: str) -> bool:
    """Whether a path is a root or lies below it.

    >>> covers("/data/a", "/data/a/b"), covers("/data/a", "/data/ab"), covers("/", "/x")
    (True, False, True)
    """
    top = root.rstrip("/")
    bare = path.rstrip("/") or "/"
    return bare == (top or "/") or bare.startswith(top + "/")


def overlaps(one: str, other: str) -> bool:
    """Whether one of two paths covers the other: what moves the one may move something of the other."""
    return covers(one, other) or covers(other, one)


def find_owner(policies: PolicySet, site: str, path: str) -> list[Owner]:
    """The owners one of whose roots covers a path at a site."""
    return [
        owner
        for owner in policies.owners.values()
        if any(at in ("*", site) and covers(root, path) for at, root in owner.roots)
    ]


def relevant(
    policies: PolicySet, labellings: Iterable[Labelling], site: str, path: str, now: int
) -> list[Labelling]:
    """The statements that hold for a path: of a declared owner with its key, on a root of its own, not expired."""
    found: list[Labelling] = []
    for one in labellings:
        owner = policies.owners.get(one.owner)
        if one.site != site or not overlaps(one.path, path) or owner is None or owner.key != one.key:
            continue
        if one.withdrawn or one.issued > now or (one.expires is not None and one.expires <= now):
            continue
        if any(at in ("*", site) and covers(root, one.path) for at, root in owner.roots):
            found.append(one)
    return sorted(found, key=lambda one: (one.path, one.owner))


def uncovered(policies: PolicySet, valid: Iterable[Labelling], site: str, path: str) -> list[str]:
    """Owned roots of which a transfer of `path` would move something that no valid statement covers."""
    valid = list(valid)
    missing = []
    for owner in policies.owners.values():
        for at, root in owner.roots:
            if at not in ("*", site) or not overlaps(root, path):
                continue
            moved = path if covers(root, path) else root
            if not any(one.owner == owner.name and covers(one.path, moved) for one in valid):
                missing.append(f"{owner.name}'s word on {site}:{moved}")
    return missing


def data_statements(
    policies: PolicySet,
    valid: Iterable[Labelling],
    site: str,
    path: str,
    now: int,
    *,
    added: Iterable[str] = (),
    contracts: Iterable[str] = (),
    inherited: Iterable[Inherited] = (),
) -> list[Statement]:
    """Everything that is said about the data at a path of a site.

    Args:
        valid: As `relevant` gives them.
        added, contracts: What the requester adds.
        inherited: What copies have from where they came from.
    """
    valid, inherited = list(valid), list(inherited)
    if uncovered(policies, valid, site, path):
        return []  # nobody who may say it has said what this is
    labels = frozenset(added).union(*(one.labels for one in valid), *(one.labels for one in inherited))
    agreed = frozenset(contracts).union(
        *(one.contracts for one in valid), *(one.contracts for one in inherited)
    )
    by = "label:" + ("+".join(sorted({one.owner for one in valid})) or "request")
    said = [
        Statement("data.labels", labels, by, now),
        Statement("data.contracts", agreed, by, now),
    ]
    if inherited:
        return said  # of what came from elsewhere nobody here can say more
    return said + _facts(valid, path, by, now)


def _facts(valid: list[Labelling], path: str, by: str, now: int) -> list[Statement]:
    """Facts that a statement on the whole path gives: sets unite, persons add up, times take the latest."""
    said: list[Statement] = []
    for name in sorted({name for one in valid if covers(one.path, path) for name in one.facts}):
        values = [(one, one.facts[name]) for one in valid if name in one.facts]
        sets = [value for _, value in values if isinstance(value, frozenset)]
        numbers = [value for _, value in values if isinstance(value, int) and not isinstance(value, bool)]
        if len(sets) == len(values):
            said.append(Statement(name, frozenset().union(*sets), by, now))
        elif len(numbers) == len(values):
            said.append(Statement(name, sum(numbers) if name == "data.persons" else max(numbers), by, now))
        else:  # where they contradict each other nothing is known
            said += [Statement(name, value, f"label:{one.owner}", now) for one, value in values]
    return said
