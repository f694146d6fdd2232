"""Reading test files: named cases, properties that must never be possible, golden tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flowengine.policy.conditions import LineError
from flowengine.policy.countries import COUNTRIES
from flowengine.policy.declarations import read_capabilities, subject_facts
from flowengine.policy.model import USES, Attribute, Line, Policy, PolicySet, Site, Value, leaves
from flowengine.policy.obligations import OBLIGATIONS
from flowengine.policy.outcomes import RANKS, AtLeast
from flowengine.policy.problems import Problem, closest
from flowengine.policy.reader import Table, fact_value, read_source

__all__ = ["Case", "Matrix", "NeverCase", "TestFile", "close_labels", "counter_names", "read_test_file"]

_TEST_KEYS = (
    "name",
    "ask",
    "facts",
    "expect",
    "because",
    "obliges",
    "failing",
    "missing",
    "now",
    "can",
    "why",
)
_CONSTRAINTS = {
    "in": "text", "not_in": "text", "is": "any", "is_not": "any", "include": "set", "exclude": "set",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One named decision and what is expected of it."""

    name: str
    line: int
    use: str
    facts: Mapping[str, Value]
    can: frozenset[str] | None
    now: int | None
    expect: str
    because: tuple[str, ...]
    obliges: tuple[str, ...]
    failing: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NeverCase:
    """A use that no fact may ever allow: what is known of the data, and the sites it is about."""

    name: str
    line: int
    use: str
    facts: Mapping[str, Value]
    partial: Mapping[str, AtLeast]
    sites: Mapping[str, Mapping[str, Value]]


@dataclass(frozen=True, slots=True)
class Matrix:
    """A golden table of outcomes, data sets by sites."""

    name: str
    line: int
    use: str
    rows: tuple[str, ...]
    cols: tuple[str, ...]
    table: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class TestFile:
    """A test file: which policies it loads, the clock, its data sets and sites, its tests."""

    __test__ = False

    path: str
    policies: tuple[str, ...]
    now: int
    data: Mapping[str, Mapping[str, Value]]
    sites: Mapping[str, Site]
    cases: tuple[Case, ...]
    never: tuple[NeverCase, ...]
    matrices: tuple[Matrix, ...]


class _Reader:
    def __init__(self, root: Table, policies: PolicySet, names: tuple[str, ...]) -> None:
        self.root = root
        self.policies = policies
        self.attributes = policies.attributes
        self.chosen = [policy for policy in policies.policies if policy.id in names]
        self.now = root.day("now", required=True) or 0
        self.subjects: dict[str, dict[str, dict[str, Value]]] = {}
        self.sites: dict[str, Site] = {}
        for subject in dict.fromkeys(attribute.subject for attribute in self.attributes.values()):
            declared = root.table(subject)
            self.subjects[subject] = {}
            for name in declared.data:
                table = declared.table(name)
                extra = ("can",) if subject == "site" else ()
                facts = subject_facts(table, subject, self.attributes, extra)
                if subject == "site":
                    facts.setdefault("site.id", name)
                    self.sites[name] = Site(name, facts, read_capabilities(table))
                self.subjects[subject][name] = close_labels(policies, facts)

    def case(self, table: Table) -> Case | None:
        name = table.text("name")
        facts: dict[str, Value] = {}
        ask = table.table("ask")
        can: frozenset[str] | None = None
        use = ask.text("use", choices=USES, example='"land"')
        for subject, chosen in ask.data.items():
            if subject == "use":
                continue
            known = self.subjects.get(subject)
            if known is None:
                ask.problem(
                    (subject,), f"unknown key {subject!r} in ask", closest(subject, [*self.subjects, "use"])
                )
            elif chosen not in known:
                hint = closest(str(chosen), known) or f"declare it as [{subject}.{chosen}]"
                ask.problem((subject,), f"{subject} {chosen!r} is not declared in this file", hint)
            else:
                facts |= known[str(chosen)]
                can = self.sites[str(chosen)].can if subject == "site" else can
        facts |= self._overrides(table.table("facts"))
        facts = close_labels(self.policies, facts)
        if "can" in table.data:
            can = read_capabilities(table)
        expect = table.text("expect", choices=("permit", "deny"), example='"deny"')
        because = table.texts("because")
        if expect == "deny" and not because:
            table.problem(
                (), f"the deny test {name!r} does not name what decides", 'add because = ["policy/rule"]'
            )
        self._check_because(table, because)
        for index, duty in enumerate(table.texts("obliges")):
            if duty not in OBLIGATIONS:
                table.problem(("obliges", index), f"{duty!r} is no obligation", closest(duty, OBLIGATIONS))
        return Case(
            name, table.line(), use, facts, can, table.day("now"), expect, tuple(because),
            tuple(table.texts("obliges")), tuple(table.texts("failing")), tuple(table.texts("missing")),
        )  # fmt: skip

    def _check_because(self, table: Table, because: list[str]) -> None:
        rules = [rule.name for policy in self.chosen for rule in policy.rules]
        for index, item in enumerate(because):
            if "/" in item and " " not in item and item not in rules:
                hint = closest(item, rules) or "rules: " + ", ".join(rules)
                table.problem(
                    ("because", index), f"there is no rule {item!r} among the loaded policies", hint
                )

    def _overrides(self, table: Table) -> dict[str, Value]:
        facts: dict[str, Value] = {}
        counters = counter_names(self.chosen)
        for name, raw in table.data.items():
            attribute = self.attributes.get(name)
            if attribute is None and (keys := counters.get(name.replace(" ", ""))):
                for key in keys:
                    facts[key] = self._value(
                        table, name, Attribute(key, "number", "", "", (), unit="count"), raw
                    )
                continue
            if attribute is None:
                hint = closest(name, [*self.attributes, *counters])
                table.problem((name,), f"{name!r} is not a declared attribute or a counter in use", hint)
                continue
            facts[name] = self._value(table, name, attribute, raw)
        return facts

    def _value(self, table: Table, key: str, attribute: Attribute, raw: object) -> Value:
        try:
            return fact_value(attribute, raw)
        except LineError as error:
            table.problem((key,), error.message, error.hint)
            return 0

    def never(self, table: Table) -> NeverCase:
        facts: dict[str, Value] = {"time.now": self.now}
        partial: dict[str, AtLeast] = {}
        for subject in ("data", "recipient", "agreement", "controller", "request"):
            fixed, some, _, _ = self._constraints(table, subject)
            facts |= fixed
            partial |= some
        if labels := partial.get("data.labels"):
            partial["data.labels"] = AtLeast(self.policies.close_labels(labels.has), labels.lacks)
        if isinstance(labels_known := facts.get("data.labels"), frozenset):
            facts["data.labels"] = self.policies.close_labels(labels_known)
        fixed, some, one_of, none_of = self._constraints(table, "site")
        partial |= some
        use = table.text("use", choices=USES, example='"process"')
        sites = self._sites(fixed, one_of, none_of)
        return NeverCase(table.text("name"), table.line(), use, facts, partial, sites)

    def _sites(
        self, fixed: dict[str, Value], one_of: dict[str, frozenset[str]], none_of: dict[str, frozenset[str]]
    ) -> dict[str, dict[str, Value]]:
        """The sites a property is about: one that is only a country for every country, and the file's own."""
        wanted = dict(fixed)
        countries = {str(fixed["site.country"])} if "site.country" in fixed else set(COUNTRIES)
        countries &= one_of.get("site.country", frozenset(COUNTRIES))
        countries -= none_of.get("site.country", frozenset())
        about_country = any("site.country" in group for group in (fixed, one_of, none_of))
        sites: dict[str, dict[str, Value]] = {}
        for country in sorted(countries) if about_country else ():
            sites[f"any site in {country}"] = {**wanted, "site.country": country}
        if not about_country:
            sites["any site"] = wanted
        for site in self.sites.values():
            fits = all(site.facts.get(name) == value for name, value in fixed.items())
            fits = fits and all(site.facts.get(name) in group for name, group in one_of.items())
            if fits and not any(site.facts.get(name) in group for name, group in none_of.items()):
                sites[site.name] = dict(site.facts)
        return sites

    def _constraints(
        self, table: Table, subject: str
    ) -> tuple[dict[str, Value], dict[str, AtLeast], dict[str, frozenset[str]], dict[str, frozenset[str]]]:
        inner = table.table(subject)
        fixed: dict[str, Value] = {}
        partial: dict[str, AtLeast] = {}
        one_of: dict[str, frozenset[str]] = {}
        none_of: dict[str, frozenset[str]] = {}
        for key, raw in inner.data.items():
            found = self._constraint(inner, subject, key)
            if found is None:
                continue
            attribute, op = found
            if op == "is" and attribute.type != "set" and not isinstance(raw, list):
                fixed[attribute.name] = self._value(inner, key, attribute, raw)
            elif op in ("include", "exclude"):
                members = frozenset([raw] if isinstance(raw, str) else raw if isinstance(raw, list) else ())
                before = partial.get(attribute.name, AtLeast(frozenset()))
                has, lacks = (members, frozenset[str]()) if op == "include" else (frozenset[str](), members)
                partial[attribute.name] = AtLeast(before.has | has, before.lacks | lacks)
            elif op in ("in", "is"):
                one_of[attribute.name] = self._members(inner, key, raw)
            else:
                none_of[attribute.name] = none_of.get(attribute.name, frozenset()) | self._members(
                    inner, key, raw
                )
        return fixed, partial, one_of, none_of

    def _constraint(self, table: Table, subject: str, key: str) -> tuple[Attribute, str] | None:
        for op in sorted(_CONSTRAINTS, key=len, reverse=True):
            for ending in (op, op + "s"):
                attribute = self.attributes.get(f"{subject}.{key.removesuffix('_' + ending)}")
                if attribute is not None and key.endswith("_" + ending):
                    if attribute.type == "set" and op not in ("include", "exclude"):
                        table.problem(
                            (key,), f"{attribute.name} is a set", f"write {key.rsplit('_', 1)[0]}_include"
                        )
                        return None
                    return attribute, op
        known = [
            f"{name.split('.', 1)[1]}_{op}"
            for name in self.attributes
            if name.startswith(subject)
            for op in _CONSTRAINTS
        ]
        table.problem(
            (key,), f"{key!r} is no constraint", closest(key, known) or "write it like country_not_in"
        )
        return None

    def _members(self, table: Table, key: str, raw: object) -> frozenset[str]:
        if isinstance(raw, str) and raw.startswith("@"):
            for policy in self.chosen:
                if found := policy.lists.get(raw[1:]):
                    return found.members
            if raw[1:] in self.policies.lists:
                return self.policies.lists[raw[1:]].members
            table.problem((key,), f"the list {raw} does not exist", closest(raw[1:], self.policies.lists))
            return frozenset()
        return frozenset([raw] if isinstance(raw, str) else table.texts(key))

    def matrix(self, table: Table, number: int) -> Matrix:
        names = {
            subject: tuple(table.table(key).texts(subject, required=True))
            for key, subject in (("rows", "data"), ("cols", "site"))
        }
        for key, subject in (("rows", "data"), ("cols", "site")):
            for index, name in enumerate(names[subject]):
                if name not in self.subjects[subject]:
                    hint = closest(name, self.subjects[subject])
                    table.problem(
                        (key, subject, index), f"{subject} {name!r} is not declared in this file", hint
                    )
        raw = table.data.get("table")
        rows = raw if isinstance(raw, list) else []
        golden = tuple(tuple(str(cell) for cell in row) if isinstance(row, list) else () for row in rows)
        right_shape = len(golden) == len(names["data"]) and all(
            len(row) == len(names["site"]) for row in golden
        )
        if not right_shape:
            expected = f"{len(names['data'])} rows of {len(names['site'])} cells"
            table.problem(
                ("table",), f"the table has not {expected}", "one row per data set, one cell per site"
            )
        for row_index, row in enumerate(golden):
            for cell in row:
                if cell not in RANKS:
                    table.problem(
                        ("table", row_index),
                        f"{cell!r} is no outcome",
                        closest(cell, RANKS) or ", ".join(RANKS),
                    )
        name = table.text("name", f"table {number}")
        use = table.text("use", choices=USES, example='"land"')
        return Matrix(name, table.line(), use, names["data"], names["site"], golden if right_shape else ())


def close_labels(policies: PolicySet, facts: dict[str, Value]) -> dict[str, Value]:
    """Facts with the labels that follow from the stated ones."""
    for name in ("data.labels", "data.source_labels"):
        labels = facts.get(name)
        if isinstance(labels, frozenset):
            facts[name] = policies.close_labels(labels)
    return facts


def counter_names(policies: list[Policy]) -> dict[str, list[str]]:
    """Names of facts behind each counter as the files write it: one per zone in which it is used."""
    names: dict[str, list[str]] = {}
    for policy in policies:
        parts = [*policy.scope, *(part for rule in policy.rules for part in (*rule.when, *rule.unless))]
        lines: list[Line] = [line for part in parts for line in leaves(part)]
        for line in lines:
            for reference in line.references():
                if reference.counter is not None and reference.name not in names.setdefault(
                    reference.shown, []
                ):
                    names[reference.shown].append(reference.name)
    return names


def read_test_file(
    path: str, content: bytes, policies: PolicySet, problems: list[Problem]
) -> TestFile | None:
    """Read one test file; None, and problems, where it cannot be read."""
    source = read_source(path, content, problems)
    if source is None:
        return None
    before = len(problems)
    subjects = dict.fromkeys(attribute.subject for attribute in policies.attributes.values())
    root = source.root(("policies", "now", "test", "never", "matrix", *subjects))
    names = tuple(root.texts("policies", required=True))
    ids = [policy.id for policy in policies.policies]
    for index, name in enumerate(names):
        if name not in ids:
            root.problem(
                ("policies", index), f"there is no policy {name!r}", closest(name, ids) or ", ".join(ids)
            )
    reader = _Reader(root, policies, names)
    cases = [reader.case(table) for table in root.tables("test", _TEST_KEYS)]
    never_keys = ("name", "data", "site", "recipient", "agreement", "controller", "request", "use")
    never = [reader.never(table) for table in root.tables("never", never_keys)]
    tables = root.tables("matrix", ("name", "rows", "cols", "use", "table"))
    matrices = [reader.matrix(table, index + 1) for index, table in enumerate(tables)]
    if not cases and not never and not matrices:
        root.problem((), "the file tests nothing", "add [[test]]")
    if len(problems) > before:
        return None
    data = reader.subjects.get("data", {})
    return TestFile(
        path, names, reader.now, data, reader.sites, tuple(case for case in cases if case is not None),
        tuple(never), tuple(matrices),
    )  # fmt: skip
