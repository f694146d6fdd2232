"""From what is known of a transfer to the facts of one decision: the same at the coordinator and at every agent.

Whoever decides brings what it holds: the bundle with its pins, the sites as they proved themselves, what label
statements say of the data, the request. What comes out are statements, each with its source, and the engine's
decision on them.

Invariants
    - Pins beat everything that is said of a pinned site; only a site's own word may narrow them.
    - Whoever's key is not the pinned one is not that site: nothing is known of it, its name included, and it can do
      nothing.
    - Nothing that a requester or a coordinator says takes a label away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from flowengine.policy.duties import AGENT_CAN, NOT_AT
from flowengine.policy.evaluate import Decision, Engine
from flowengine.policy.facts import Resolved, Statement, clock_statement, has_key, resolve
from flowengine.policy.model import PolicySet, Site, Value

__all__ = ["Crypto", "Judged", "Matter", "Place", "ask", "can_do", "pinned_site", "said_of"]


@dataclass(frozen=True, slots=True)
class Place:
    """A site as whoever decides sees it.

    Args:
        name: What it is called.
        key_sha256: Of the identity key that it has proved, or that is registered for it.
        said: What others than the bundle say of it; pins beat it.
        can: What its agent says it can do; None where that is not known to whoever decides.
    """

    name: str
    key_sha256: str = ""
    said: tuple[Statement, ...] = ()
    can: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class Crypto:
    """How bytes travel."""

    end_to_end: bool = True
    strength_bits: int = 256
    suite: str = "aes-256-gcm"


@dataclass(frozen=True, slots=True)
class Matter:
    """What is to move, for whom, and what else is known of that.

    Args:
        data: What is said about the data (`flowengine.policy.labels.data_statements`).
        recipient: The site that receives it in the end.
        requester: Who asked.
        purpose: What for.
        also: Whatever else whoever decides holds: approvals, counters, agreements, sizes.
    """

    data: tuple[Statement, ...]
    recipient: Place
    requester: str = ""
    purpose: str = ""
    also: tuple[Statement, ...] = ()
    crypto: Crypto = Crypto()


@dataclass(frozen=True, slots=True)
class Judged:
    """A decision, and the facts with their sources that it rests on."""

    decision: Decision
    known: Resolved
    place: Place


def pinned_site(policies: PolicySet, place: Place) -> Site | None:
    """What the bundle pins of a site, None where it pins nothing of it or something of another that has its name."""
    pinned = policies.sites.get(place.name)
    return None if pinned is None or _is_other(pinned, place) else pinned


def _is_other(pinned: Site, place: Place) -> bool:
    return bool(pinned.key) and pinned.key != place.key_sha256


def can_do(policies: PolicySet, place: Place) -> frozenset[str]:
    """What a site's agent can do: what it says, narrowed by what the bundle pins; nothing of an impostor.

    Where it has said nothing to whoever decides, the pins count, and without these what every agent can.
    """
    pinned = policies.sites.get(place.name)
    if pinned is None or pinned.can is None:
        known = AGENT_CAN if place.can is None else place.can
    else:
        known = pinned.can if place.can is None else pinned.can & place.can
    return frozenset() if pinned is not None and _is_other(pinned, place) else known


def said_of(policies: PolicySet, place: Place, now: int) -> list[Statement]:
    """Everything that is said of a site: pins, and what others say of what is not pinned."""
    pinned = policies.sites.get(place.name)
    if pinned is None:
        return [Statement("site.id", place.name, "registry", now), *place.said]
    if _is_other(pinned, place):
        return []
    said = list(_pins(policies, pinned.facts, now))
    said += [word for word in place.said if word.kind == "site" or word.attribute not in pinned.facts]
    return said


_PINNED_BY: Final = ("registry", "attestation")
"""In whose place those who sign a bundle speak."""


def _pins(policies: PolicySet, facts: Mapping[str, Value], now: int) -> Iterable[Statement]:
    """Pinned facts as statements. What only the protocol can tell, as who has the key, cannot be pinned."""
    for name, value in facts.items():
        by = policies.attributes[name].by
        kind = next((kind for kind in _PINNED_BY if kind in by), None)
        if kind is not None:
            yield Statement(name, value, f"{kind}:policies", now)


def _said_of_recipient(policies: PolicySet, place: Place, now: int) -> Iterable[Statement]:
    pinned = pinned_site(policies, place)
    if pinned is not None:
        yield from _pins(policies, pinned.recipient, now)


def _said_of_link(policies: PolicySet, before: Place, place: Place, now: int) -> Iterable[Statement]:
    if pinned_site(policies, before) is None or pinned_site(policies, place) is None:
        return
    for link in policies.links:
        if (link.source, link.target) == (before.name, place.name):
            yield from _pins(policies, link.facts, now)


def ask(
    engine: Engine,
    use: str,
    place: Place,
    matter: Matter,
    now: int,
    *,
    before: Place | None = None,
    clock_error_ms: int = 0,
) -> Judged:
    """Decide one use at one site.

    Args:
        use: One of `USES`.
        place: Where the use happens.
        matter: What moves.
        now: Seconds since 1970.
        before: The site that sends to it on this hop; None where that is not known, or at the source.
        clock_error_ms: How far the clock may be off.
    """
    policies = engine.policies
    crypto = matter.crypto
    statements = [
        *matter.data,
        *matter.also,
        *said_of(policies, place, now),
        *_said_of_recipient(policies, matter.recipient, now),
        Statement("site.has_key", has_key(use, crypto.end_to_end), "engine", now),
        Statement("crypto.end_to_end", crypto.end_to_end, "engine", now),
        Statement("crypto.strength_bits", crypto.strength_bits, "engine", now),
        Statement("crypto.suite", crypto.suite, "engine", now),
        *clock_statement(now, clock_error_ms),
    ]
    if matter.requester:
        statements.append(Statement("request.requester", matter.requester, "request", now))
    if matter.purpose:
        statements.append(Statement("request.purpose", matter.purpose, "request", now))
    if before is not None:
        statements += _said_of_link(policies, before, place, now)
    known = resolve(policies, statements, now)
    can = can_do(policies, place) - NOT_AT.get(use, frozenset())
    return Judged(engine.decide(use, known.facts, can), known, place)
