"""Can a label ever reach a site? A fixpoint over the site graph with all facts about the request open.

*Never* is a proof for the policies, sites and time given: unknown lines are free, data may carry any further
labels, and whether a site has the key is open. *Possible* may be over-cautious.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowengine.policy.evaluate import Engine
from flowengine.policy.model import USES, Value
from flowengine.policy.outcomes import AtLeast, Outcome, where

__all__ = ["Reach", "can_reach"]

_ARRIVALS = ("hold", "land", "process")


@dataclass(frozen=True, slots=True)
class Reach:
    """The answer for one use at the site: whether it is possible, by which sites, under which conditions."""

    use: str
    possible: bool
    path: tuple[str, ...]
    outcome: Outcome


def can_reach(
    engine: Engine, labels: frozenset[str], site: str, now: int, origins: Sequence[str] = ()
) -> list[Reach]:
    """Whether data with these labels, and any others, can be relayed by, held, landed or processed at a site.

    Args:
        engine: The policies, with their sites and links; without links every site reaches every other.
        labels: Labels the data surely carries.
        site: The site asked about.
        now: The time; dates of policies and agreements count.
        origins: Where the data may be at first; all other sites that may release it, if empty.
    """
    policies = engine.policies
    partial = {"data.labels": AtLeast(policies.close_labels(labels))}
    outcomes: dict[tuple[str, str], Outcome] = {}

    def ask(use: str, name: str) -> Outcome:
        if (use, name) not in outcomes:
            known = policies.sites[name]
            facts = _pinned(engine, known.facts)
            outcomes[use, name] = where(engine, use, {**facts, "time.now": now}, known.can, partial)
        return outcomes[use, name]

    def can(use: str, name: str) -> bool:
        return ask(use, name).kind != "never"

    edges: dict[str, list[str]] = {name: [] for name in policies.sites}
    for link in policies.links:
        edges[link.source].append(link.target)
    if not policies.links:
        edges = {name: [other for other in policies.sites if other != name] for name in policies.sites}
    starts = [name for name in (origins or policies.sites) if name != site and can("release", name)]
    # A state is a site and whether the data is there, or only passes through.
    paths: dict[tuple[str, bool], tuple[str, ...]] = {(name, True): (name,) for name in starts}
    todo = list(paths)
    while todo:
        name, stays = todo.pop(0)
        if stays and not can("release", name):
            continue
        for after in edges[name]:
            for there, possible in (
                ((after, True), any(can(use, after) for use in _ARRIVALS)),
                ((after, False), can("relay", after)),
            ):
                if possible and there not in paths:
                    paths[there] = (*paths[name, stays], after)
                    todo.append(there)
    answers = []
    for use in USES:
        if use == "release":
            continue
        path = paths.get((site, use in _ARRIVALS), ())
        possible = bool(path) and can(use, site)
        answers.append(Reach(use, possible, path if possible else (), ask(use, site)))
    return answers


def _pinned(engine: Engine, facts: Mapping[str, Value]) -> dict[str, Value]:
    """The facts that are pinned for good; what the protocol derives anew each time is open."""
    attributes = engine.policies.attributes
    return {name: value for name, value in facts.items() if "engine" not in attributes[name].by}
