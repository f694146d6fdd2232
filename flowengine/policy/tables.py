"""Outcomes of many data sets at many sites at once, exactly as `where` gives them one by one.

Goal: a thousand sites by a thousand label sets by five uses in seconds. Plan: what a policy says depends only on
the truth of its lines; the truth of a line depends on the data, on the site, or on both. So data sets are grouped
by the truths of the lines that a policy has about data, sites by those about sites, each pair of groups is
evaluated once, and sites with the same results of all policies share one outcome. Sets of sites are bits of an
integer. Invariant: no approximation; a property test compares with `where`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flowengine.policy.differences import ListChange, list_effect
from flowengine.policy.evaluate import CompiledPolicy, Engine, PolicyTrace
from flowengine.policy.model import FALSE, USES, Line, Site, Value
from flowengine.policy.obligations import required_capabilities
from flowengine.policy.outcomes import (
    AtLeast,
    Outcome,
    is_weaker,
    outcome,
    policy_needs,
    soft_evaluate,
    what_is_behind,
)

__all__ = ["Change", "Table", "changes", "table"]

Key = tuple[object, ...]
Cell = tuple[Outcome, int]


@dataclass(frozen=True, slots=True)
class Table:
    """Outcomes by use and data set; each with the sites it holds for, as bits in the order of `sites`."""

    sites: tuple[str, ...]
    data: tuple[str, ...]
    cells: Mapping[tuple[str, str], list[Cell]]

    def names(self, mask: int) -> list[str]:
        """The sites of a set of bits."""
        return [name for index, name in enumerate(self.sites) if mask >> index & 1]

    def allowed(self, use: str, data: str, kinds: Iterable[str] = ("yes", "duties")) -> list[str]:
        """The sites where the outcome is one of the kinds: the planner's input."""
        wanted = set(kinds)
        mask = 0
        for found, sites in self.cells[use, data]:
            if found.kind in wanted:
                mask |= sites
        return self.names(mask)

    def outcome(self, use: str, data: str, site: str) -> Outcome:
        """One cell."""
        bit = 1 << self.sites.index(site)
        return next(found for found, sites in self.cells[use, data] if sites & bit)


@dataclass(frozen=True, slots=True)
class Change:
    """Sites at which a use of a data set came to another outcome."""

    use: str
    data: str
    sites: tuple[str, ...]
    old: Outcome
    new: Outcome
    weaker: bool


@dataclass
class _PolicyTable:
    """One policy for one use: sites grouped by what its lines about sites say, results kept by pair of groups."""

    compiled: CompiledPolicy
    site_groups: list[tuple[Mapping[str, Value], int]]
    data_lines: list[tuple[Line, object]]
    mixed: list[str]
    results: dict[Key, list[tuple[PolicyTrace, int]]] = field(default_factory=dict)


class _Builder:
    def __init__(
        self,
        engine: Engine,
        sites: Mapping[str, Site],
        request: Mapping[str, Value],
        partial: Mapping[str, Mapping[str, AtLeast]],
    ) -> None:
        self.engine = engine
        self.sites = list(sites.values())
        self.request = dict(request)
        self.partial = partial
        self.signatures: dict[Key, PolicyTrace] = {}
        self.outcomes: dict[Key, Outcome] = {}
        self.distinct: dict[Key, Outcome] = {}
        self.words: dict[int, frozenset[str]] = {}
        self.able: dict[frozenset[str], list[tuple[frozenset[str] | None, int]]] = {}
        now = request.get("time.now")
        self.now = now if isinstance(now, int) else None

    def policy_table(self, compiled: CompiledPolicy) -> _PolicyTable:
        """Group the sites by what the lines of a policy say about them."""
        lines = list(zip(compiled.scope_lines, compiled.scope_leaves, strict=True))
        for rule in compiled.rules:
            lines += zip(rule.lines, rule.leaves, strict=True)
        about_site, about_data, mixed = [], [], []
        for line, leaf in lines:
            subjects = {reference.attribute.subject for reference in line.references()}
            if "site" not in subjects:
                about_data.append((line, leaf))
            elif "data" in subjects:
                mixed += [reference.name for reference in line.references()]
            else:
                about_site.append(leaf)
        raw = [name for name in dict.fromkeys(mixed) if name.startswith("site.")]
        groups: dict[Key, tuple[Mapping[str, Value], int]] = {}
        for index, site in enumerate(self.sites):
            facts = {**self.request, **site.facts}
            key = (*(leaf(facts.get) for leaf in about_site), *(facts.get(name) for name in raw))
            first, mask = groups.get(key, (site.facts, 0))
            groups[key] = (first, mask | 1 << index)
        data_names = [name for name in dict.fromkeys(mixed) if name.startswith("data.")]
        return _PolicyTable(compiled, list(groups.values()), list(about_data), data_names)

    def results(
        self, table: _PolicyTable, facts: Mapping[str, Value], partial: Mapping[str, AtLeast]
    ) -> list[tuple[PolicyTrace, int]]:
        """What a policy says of a data set, per group of sites; empty where it is silent everywhere."""
        if partial:
            key: Key = (id(facts),)
        else:
            truths = tuple([leaf(facts.get) for _, leaf in table.data_lines])  # type: ignore[operator]
            key = (truths, *(facts.get(name) for name in table.mixed))
        found = table.results.get(key)
        if found is None:
            by_signature: dict[int, tuple[PolicyTrace, int]] = {}
            for site_facts, mask in table.site_groups:
                merged = {**facts, **site_facts}
                trace = self.intern(soft_evaluate(self.engine.policies, table.compiled, merged, partial))
                if trace.scope != FALSE:
                    _, before = by_signature.get(id(trace), (trace, 0))
                    by_signature[id(trace)] = (trace, before | mask)
            found = table.results[key] = list(by_signature.values())
        return found

    def intern(self, trace: PolicyTrace) -> PolicyTrace:
        """One trace for all that lead to the same outcomes, whatever lines differ."""
        if trace.scope == FALSE:
            return trace
        fired = tuple((row[0].index, row[2], row[3]) for row in trace.rows)
        key: Key = (
            trace.compiled.policy.id,
            id(trace.compiled),
            trace.scope,
            fired,
            policy_needs(trace),
            what_is_behind(trace),
        )
        return self.signatures.setdefault(key, trace)

    def cells(
        self, tables: list[_PolicyTable], facts: Mapping[str, Value], partial: Mapping[str, AtLeast]
    ) -> list[Cell]:
        """All sites for one data set and use, split by outcome."""
        parts: list[tuple[tuple[PolicyTrace, ...], int]] = [((), (1 << len(self.sites)) - 1)]
        for table in tables:
            found = self.results(table, facts, partial)
            if not found:
                continue
            split = []
            for traces, mask in parts:
                rest = mask
                for trace, sites in found:
                    if common := mask & sites:
                        split.append(((*traces, trace), common))
                        rest &= ~common
                if rest:
                    split.append((traces, rest))
            parts = split
        merged: dict[int, Cell] = {}
        for traces, mask in parts:
            words = frozenset[str]().union(*[self.needed_words(trace) for trace in traces])
            for can, able in self.sites_by_ability(words):
                if not (sites := mask & able):
                    continue
                key: Key = (can, *(id(trace) for trace in traces))
                if (result := self.outcomes.get(key)) is None:
                    result = self.outcomes[key] = self.same(outcome(self.engine, traces, can, self.now))
                _, before = merged.get(id(result), (result, 0))
                merged[id(result)] = (result, before | sites)
        return list(merged.values())

    def needed_words(self, trace: PolicyTrace) -> frozenset[str]:
        """The capabilities that duties of a policy's rules could ask for."""
        found = self.words.get(id(trace))
        if found is None:
            rules = [row[0].rule for row in trace.rows if not row[0].is_forbid and row[2] != FALSE]
            groups = [
                group for rule in rules for duty in rule.duties for group in required_capabilities(duty)
            ]
            found = self.words[id(trace)] = frozenset(word for group in groups for word in group)
        return found

    def sites_by_ability(self, words: frozenset[str]) -> list[tuple[frozenset[str] | None, int]]:
        """The sites grouped by which of some capabilities their agents have."""
        found = self.able.get(words)
        if found is None:
            groups: dict[frozenset[str] | None, int] = {}
            for index, site in enumerate(self.sites):
                can = None if site.can is None else site.can & words
                groups[can] = groups.get(can, 0) | 1 << index
            found = self.able[words] = list(groups.items())
        return found

    def same(self, found: Outcome) -> Outcome:
        """One object for equal outcomes; of `never` only who denies counts, the lines are those of one site."""
        key: Key = (found,)
        if found.kind == "never":
            key = tuple((never.policy, never.because) for never in found.never)
        return self.distinct.setdefault(key, found)


def table(
    engine: Engine,
    data: Mapping[str, Mapping[str, Value]],
    sites: Mapping[str, Site],
    request: Mapping[str, Value],
    uses: Iterable[str] = USES,
    partial: Mapping[str, Mapping[str, AtLeast]] | None = None,
) -> Table:
    """The outcome of every data set at every site.

    Args:
        engine: The policies.
        data: Facts of data sets by name, labels closed.
        sites: The sites.
        request: Facts about all else; give `time.now`. What is absent is open.
        uses: The uses asked about.
        partial: Sets of a data set known only in part.
    """
    partial = partial or {}
    builder = _Builder(engine, sites, request, partial)
    facts = {name: {**request, **known} for name, known in data.items()}
    cells: dict[tuple[str, str], list[Cell]] = {}
    for use in uses:
        tables = [builder.policy_table(compiled) for compiled in engine.compiled[use]]
        for name, known in facts.items():
            cells[use, name] = builder.cells(tables, known, partial.get(name, {}))
    return Table(tuple(site.name for site in builder.sites), tuple(data), cells)


def changes(old: Table, new: Table, lists: Mapping[str, ListChange] | None = None) -> Iterator[Change]:
    """Cells whose outcome differs between two tables over the same names of sites and data sets.

    Args:
        old: Before.
        new: After.
        lists: Lists that hold other members now; lines over open facts that use them count as changed.
    """
    verdicts: dict[tuple[int, int], tuple[bool, bool]] = {}
    for (use, data), before in old.cells.items():
        for was, was_sites in before:
            for now, now_sites in new.cells[use, data]:
                if not (common := was_sites & now_sites):
                    continue
                key = (id(was), id(now))
                if key not in verdicts:
                    verdicts[key] = _compare(was, now, lists or {})
                same, weaker = verdicts[key]
                if not same:
                    yield Change(use, data, tuple(old.names(common)), was, now, weaker)


def _compare(old: Outcome, new: Outcome, lists: Mapping[str, ListChange]) -> tuple[bool, bool]:
    """Whether two outcomes let the same happen, whichever rule said so; if not, whether the new one lets more."""
    if old.kind == new.kind and old.kind in ("never", "yes"):
        return True, False
    weaker = is_weaker(old, new)
    same = old.kind == new.kind and not weaker and not is_weaker(new, old)
    if old.kind == new.kind == "if":
        changed, grown = list_effect(new, lists)
        same, weaker = same and not changed, weaker or grown
    return same, weaker
