"""What parties have agreed on, and what their controllers are: signed statements as facts of one transfer.

An agreement is an authority's signed word (`authorities.toml` of the bundle says who may sign which facts for whose
data). It covers roots of sites, with all below them, and the sites that receive data from there; what it says are
facts that agreements may give: `agreement.*`, `controller.*`, and whatever a bundle declares so.

Invariants
    - An agreement counts for a transfer only if it covers all that moves, and the recipient has proved the key that
      the bundle pins: a coordinator cannot mint a party to it.
    - Of an authority's statements with one id the highest number counts, and no lower one ever again.
    - Agreements that contradict each other leave it unknown what was agreed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flowengine.policy.asking import Place, pinned_site
from flowengine.policy.facts import Statement
from flowengine.policy.labels import covers
from flowengine.policy.model import Authority, PolicySet, Value

__all__ = ["ANYBODY", "Agreement", "agreement_statements", "may_say", "speaks_for"]

ANYBODY = "*"
"""For recipients: whoever receives, as what a controller is does not depend on it."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """A statement whose signature was checked.

    Args:
        id: what the parties call it.
        authority: as the bundle names it.
        key: with which it was signed (Ed25519, raw).
        number: counts this authority's statements with this id.
        roots: whose data it covers, as (site, path); `*` for any site.
        recipients: sites that receive under it; `ANYBODY` for all.
        facts: what was agreed, by attribute.
        issued, expires: seconds since 1970; None: until a later one.
        withdrawn: it says nothing any more.
        digest: SHA-256 of the document, hexadecimal.
    """

    id: str
    authority: str
    key: bytes
    number: int
    roots: tuple[tuple[str, str], ...]
    recipients: frozenset[str]
    facts: Mapping[str, Value]
    issued: int
    expires: int | None = None
    withdrawn: bool = False
    digest: str = ""


def may_say(authority: Authority, attribute: str) -> bool:
    """Whether an authority's word on an attribute counts: `agreement.*` stands for all of that group."""
    return any(
        attribute == said or (said.endswith(".*") and attribute.startswith(said[:-1]))
        for said in authority.facts
    )


def speaks_for(authority: Authority, site: str, path: str) -> bool:
    """Whether an authority may speak of data at a path of a site."""
    return any(at in (ANYBODY, site) and covers(root, path) for at, root in authority.roots)


def agreement_statements(
    policies: PolicySet, agreements: Iterable[Agreement], source: tuple[str, str], recipient: Place, now: int
) -> list[Statement]:
    """What agreements say of data that move to a recipient.

    Args:
        source: site and path of the data.
        recipient: the site that receives them in the end.
    """
    known = pinned_site(policies, recipient) is not None
    said: list[Statement] = []
    for one in agreements:
        authority = policies.authorities.get(one.authority)
        if authority is None or authority.key != one.key or one.withdrawn or one.issued > now:
            continue
        if one.expires is not None and one.expires <= now:
            continue
        if not (ANYBODY in one.recipients or (known and recipient.name in one.recipients)):
            continue
        site, path = source
        if not speaks_for(authority, site, path):
            continue
        if not any(at in (ANYBODY, site) and covers(root, path) for at, root in one.roots):
            continue
        facts = dict(one.facts)
        if one.expires is not None and any(name.startswith("agreement.") for name in facts):
            facts.setdefault("agreement.expires", one.expires)
        said += [
            Statement(name, value, f"agreement:{one.id}", one.issued, one.expires)
            for name, value in sorted(facts.items())
            if may_say(authority, name)
        ]
    return said
