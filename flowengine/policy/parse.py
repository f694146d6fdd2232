"""Reading a set of policy files: bytes in, a `PolicySet` out, or every problem at once.

Which file is what follows from its name: `attributes.toml`, `labels.toml`, `owners.toml`, `approvers.toml`, `authorities.toml`,
`sites.toml`, `datasets.toml`, anything in a directory `lists`, `*.test.toml`, and every other `.toml` is one policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, tzinfo
from itertools import pairwise

from flowengine.policy.conditions import LineError, Scope, parse_line
from flowengine.policy.countries import COUNTRIES
from flowengine.policy.declarations import (
    read_approvers,
    read_attributes,
    read_authorities,
    read_data,
    read_labels,
    read_lists,
    read_owners,
    read_sites,
)
from flowengine.policy.model import (
    MODES,
    USES,
    Approver,
    Attribute,
    Authority,
    Combine,
    Condition,
    Duty,
    Group,
    Label,
    Line,
    Link,
    Literal,
    NamedList,
    Owner,
    Policy,
    PolicySet,
    Reference,
    Rule,
    Site,
    Value,
)
from flowengine.policy.obligations import DutyScope, parse_duty
from flowengine.policy.problems import Problem, closest, refuse
from flowengine.policy.reader import Source, Table, read_source
from flowengine.policy.vocabulary import ATTRIBUTES
from flowengine.policy.zones import system_zone

__all__ = ["DEFAULT_MAX_OFFLINE_S", "is_test", "kind_of", "load"]

DEFAULT_MAX_OFFLINE_S = 300
"""How long an agent cut off from its coordinator goes on, where a policy says nothing."""

_POLICY_KEYS = (
    "id", "version", "title", "title_zh", "owner", "applies_to", "unlisted", "mode", "effective", "until",
    "review_by", "on_stale", "max_offline", "timezone", "source",
)  # fmt: skip
_RULE_KEYS = (
    "id", "effect", "on", "when", "unless", "then", "why", "why_zh", "stop", "effective", "until",
)  # fmt: skip


_DECLARATIONS = (
    "attributes.toml", "labels.toml", "owners.toml", "approvers.toml", "authorities.toml", "sites.toml",
    "datasets.toml",
)  # fmt: skip


def kind_of(path: str) -> str:
    """What a file holds by its path: attributes, labels, owners, approvers, sites, datasets, lists, test, policy or nothing ('')."""
    parts = path.split("/")
    name = parts[-1]
    if not name.endswith(".toml"):
        return ""
    if name in _DECLARATIONS:
        return name.removesuffix(".toml")
    if "lists" in parts[:-1]:
        return "lists"
    return "test" if is_test(path) else "policy"


def is_test(path: str) -> bool:
    """Whether a path names a test file."""
    return path.endswith(".test.toml")


class _Loader:
    """What has been read so far."""

    def __init__(self, zone_of: Callable[[str], tzinfo | None]) -> None:
        self.problems: list[Problem] = []
        self.zone_of = zone_of
        self.zones: dict[str, tzinfo] = {}
        self.attributes: dict[str, Attribute] = dict(ATTRIBUTES)
        self.labels: dict[str, Label] = {}
        self.labels_declared = False
        self.combines: tuple[Combine, ...] = ()
        self.lists: dict[str, NamedList] = {}
        self.policies: list[Policy] = []
        self.sites: dict[str, Site] = {}
        self.owners: dict[str, Owner] = {}
        self.approvers: dict[str, Approver] = {}
        self.authorities: dict[str, Authority] = {}
        self.links: tuple[Link, ...] = ()
        self.data: dict[str, dict[str, Value]] = {}
        self.copies: tuple[tuple[str, str, str], ...] = ()

    def has_zone(self, name: str) -> bool:
        if name not in self.zones:
            zone = self.zone_of(name)
            if zone is None:
                return False
            self.zones[name] = zone
        return True


def load(files: Mapping[str, bytes], zone_of: Callable[[str], tzinfo | None] = system_zone) -> PolicySet:
    """The policies of a set of files.

    Args:
        files: Content by path relative to the policy directory; paths that are no `.toml` are passed over.
        zone_of: Time zone of an IANA name, None where there is none; by default this machine's database.

    Raises:
        PolicyInvalid: Something in them is wrong; it names every problem, and nothing is loaded.
    """
    loader = _Loader(zone_of)
    loader.has_zone("UTC")
    sources: dict[str, list[Source]] = {}
    lists_unreadable = False
    for path in sorted(files):
        kind = kind_of(path)
        if kind in ("", "test"):
            continue
        source = read_source(path, files[path], loader.problems)
        lists_unreadable = lists_unreadable or (source is None and kind == "lists")
        if source is not None:
            sources.setdefault(kind, []).append(source)
    for source in sources.get("attributes", []):
        read_attributes(source, loader.attributes)
    for source in sources.get("labels", []):
        labels, combines = read_labels(source)
        loader.labels |= labels
        loader.combines += combines
        loader.labels_declared = True
    read_lists(sources.get("lists", []), loader.lists)
    for source in sources.get("policy", []):
        _read_policy(loader, source)
    _check_ids(loader)
    for source in sources.get("sites", []):
        sites, links = read_sites(source, loader.attributes)
        loader.sites |= sites
        loader.links += links
    for source in sources.get("owners", []):
        loader.owners |= read_owners(source)
    for source in sources.get("approvers", []):
        loader.approvers |= read_approvers(source)
    for source in sources.get("authorities", []):
        loader.authorities |= read_authorities(source, loader.attributes)
    for source in sources.get("datasets", []):
        data, copies = read_data(source, loader.attributes)
        loader.data |= data
        loader.copies += copies
    if lists_unreadable:  # what they would have declared is not missing as well
        loader.problems = [problem for problem in loader.problems if "the list @" not in problem.message]
    refuse(loader.problems)
    return PolicySet(
        tuple(loader.policies), loader.lists, loader.attributes, loader.labels, loader.combines, loader.sites,
        loader.links, loader.data, loader.copies, loader.zones,
        {path: content for path, content in sorted(files.items()) if is_test(path)},
        loader.owners, loader.approvers, loader.authorities,
    )  # fmt: skip


def _check_ids(loader: _Loader) -> None:
    """One policy per id at any time: versions of one id must not be in force together."""
    by_id: dict[str, list[Policy]] = {}
    for policy in loader.policies:
        by_id.setdefault(policy.id, []).append(policy)
    for group in by_id.values():
        group.sort(key=lambda policy: policy.effective)
        for first, second in pairwise(group):
            if first.until is None or first.until > second.effective:
                message = f"policy {second.id!r} is also in {first.file}, in force at the same time"
                hint = f"give the older one `until`, or rename: {second.id}-2"
                loader.problems.append(Problem(second.file, second.line, message, hint))


def _read_policy(loader: _Loader, source: Source) -> None:
    root = source.root(("policy", "rule", "lists"))
    if "policy" not in root.data:
        root.problem(
            (), "the file has no [policy] header", "start with [policy], id, version, title, owner, ..."
        )
        return
    header = root.table("policy", _POLICY_KEYS)
    zone = header.text("timezone", "UTC")
    if not loader.has_zone(zone):
        header.problem(("timezone",), f"{zone!r} is no IANA time zone", "write it like 'Asia/Shanghai'")
    inline = _inline_lists(loader, root)
    # A draft has no dates yet: who adopts it gives them, with its mode.
    in_use = header.data.get("mode", "enforce") != "draft"
    effective, until = header.day("effective", in_use), header.day("until")

    def find(name: str) -> NamedList | None:
        return inline.get(name) or loader.lists.get(name)

    def names() -> list[str]:
        return [*inline, *loader.lists]

    scope = Scope(
        loader.attributes, find, names, frozenset(loader.labels) if loader.labels_declared else None, zone
    )
    if "applies_to" not in header.data:
        header.problem((), "[policy] lacks 'applies_to'", "write applies_to = [] for data of every kind")
    in_scope = [*_in_force(effective, until), *_conditions(header, "applies_to", scope)]
    name = header.text("id")
    duty_scope = DutyScope(
        lambda list_name: None if (found := find(list_name)) is None else found.members & COUNTRIES,
        names, loader.has_zone, zone,
    )  # fmt: skip
    rules = _rules(root, name, scope, duty_scope)
    title = header.text("title")
    loader.policies.append(
        Policy(
            name, header.text("version"), title, header.text("title_zh", title), header.text("owner"),
            tuple(in_scope), header.text("unlisted", "deny", ("deny", "permit")),
            header.text("mode", "enforce", MODES), header.text("on_stale", "warn", ("warn", "unknown")),
            effective or 0, until, header.day("review_by", in_use) or 0,
            header.seconds("max_offline", DEFAULT_MAX_OFFLINE_S), zone, tuple(rules), inline, source.path,
            header.line(),
        )
    )  # fmt: skip


def _inline_lists(loader: _Loader, root: Table) -> dict[str, NamedList]:
    inline: dict[str, NamedList] = {}
    table = root.table("lists")
    for name, raw in table.data.items():
        if name in loader.lists:
            table.problem(
                (name,), f"the list {name!r} also exists in {loader.lists[name].file}", "rename one of them"
            )
        if isinstance(raw, dict):
            table.problem((name,), f"{name!r} is a list of texts here", "lists with dates live in lists/")
            continue
        members = frozenset(table.texts(name))
        inline[name] = NamedList(
            name, members, root.source.path, table.line(name), reviewed=True, inline=True
        )
    return inline


def _rules(root: Table, policy: str, scope: Scope, duty_scope: DutyScope) -> list[Rule]:
    rules: list[Rule] = []
    seen: dict[str, int] = {}
    for table in root.tables("rule", _RULE_KEYS):
        name = table.text("id")
        if name in seen:
            table.problem(("id",), f"rule {name!r} is also on line {seen[name]}", f"rename: {name}-2")
        seen.setdefault(name, table.line("id"))
        effect = table.text("effect", choices=("permit", "forbid", "require"), example='"permit"')
        when = _conditions(table, "when", scope)
        start = table.day("effective")
        when = [*_in_force(start, table.day("until")), *when] if start or "until" in table.data else when
        duties = _duties(table, f"{policy}/{name}", duty_scope)
        if effect == "forbid" and duties:
            table.problem(("then",), "a forbid has no duties", "move 'then' to a permit or a require")
        if effect == "require" and "then" not in table.data:
            table.problem((), f"rule {name!r} requires nothing", "add then = [{log = {evidence = 'full'}}]")
        why = table.text("why", example='"the reason, for people"')
        stop = table.text("stop", "stop-now", ("stop-now", "finish-file", "drain"))
        rules.append(
            Rule(
                policy, name, effect, _uses(table), tuple(when), tuple(_conditions(table, "unless", scope)),
                tuple(duties), why, table.text("why_zh", ""), stop, root.source.path, table.line(),
            )
        )  # fmt: skip
    if not rules and "rule" not in root.data:
        root.problem((), "the policy has no rules", "add [[rule]]")
    return rules


def _uses(table: Table) -> tuple[str, ...]:
    uses = table.texts("on", required=True)
    for index, use in enumerate(uses):
        if use not in USES:
            table.problem(
                ("on", index), f"{use!r} is no use", closest(use, USES) or "uses: " + ", ".join(USES)
            )
    return tuple(use for use in USES if use in uses)


def _duties(table: Table, origin: str, scope: DutyScope) -> list[Duty]:
    entries = table.data.get("then", [])
    if not isinstance(entries, list):
        table.problem(("then",), "'then' is a list of tables", "write then = [{log = {evidence = 'full'}}]")
        return []
    duties = []
    for index, entry in enumerate(entries):
        try:
            if not isinstance(entry, dict):
                raise LineError(
                    f"an obligation is a table, not {entry!r}", "write {log = {evidence = 'full'}}"
                )
            duties.append(parse_duty(entry, origin, scope))
        except LineError as error:
            table.problem(("then", index), error.message, error.hint)
    return duties


def _conditions(table: Table, key: str, scope: Scope) -> list[Condition]:
    entries = table.data.get(key, [])
    if not isinstance(entries, list):
        hint = f"write {key} = [{entries!r}]" if isinstance(entries, str) else f'write {key} = ["..."]'
        table.problem((key,), f"{key!r} is a list of conditions", hint)
        return []
    found = []
    for index, entry in enumerate(entries):
        condition = _condition(table, (key, index), entry, scope)
        if condition is not None:
            found.append(condition)
    return found


def _condition(table: Table, path: tuple[str | int, ...], entry: object, scope: Scope) -> Condition | None:
    if isinstance(entry, str):
        try:
            return parse_line(entry, scope)
        except LineError as error:
            table.problem(path, error.message, error.hint)
            return None
    if not isinstance(entry, dict):
        table.problem(path, f"a condition is a text or a group, not {entry!r}", "write it in quotes")
        return None
    kinds = [key for key in entry if key in ("any", "all", "not")]
    for key in entry:
        if key not in ("any", "all", "not", "owner", "until"):
            hint = (
                closest(key, ("any", "all", "not", "owner", "until"))
                or "groups are {any = [...]}, {all = ...}, {not = ...}"
            )
            table.problem((*path, key), f"unknown key {key!r} in a group of conditions", hint)
    if len(kinds) != 1:
        table.problem(path, "a group has exactly one of 'any', 'all', 'not'", "nest groups instead")
        return None
    kind = kinds[0]
    raw = entry[kind]
    items = raw if isinstance(raw, list) else [raw]
    if not items:
        table.problem((*path, kind), f"the group {kind!r} is empty", "give it conditions or remove it")
        return None
    parsed = [_condition(table, (*path, kind, index), item, scope) for index, item in enumerate(items)]
    inner = tuple(item for item in parsed if item is not None)
    if len(inner) != len(items):
        return None
    group = Group(kind, inner)
    if kind == "not" and len(inner) > 1:
        group = Group("not", (Group("all", inner),))
    inner_table = Table(table.source, (*table.path, *path), entry, None)
    if "until" in entry and (until := inner_table.day("until")) is not None:
        return Group("all", (group, *_in_force(None, until)))
    return group


def _in_force(start: int | None, until: int | None) -> list[Condition]:
    """The lines that dates of a policy, rule or exception stand for."""
    now = Reference("time.now", ATTRIBUTES["time.now"], "time.now")
    lines: list[Condition] = []
    for op, at in (("not before", start), ("before", until)):
        if at is not None:
            shown = _day_text(at)
            lines.append(Line(f"time.now {op} {shown}", now, op, Literal(at, shown, "time")))
    return lines


def _day_text(at: int) -> str:
    moment = datetime.fromtimestamp(at, UTC)
    return moment.date().isoformat() if at % 86400 == 0 else moment.strftime("%Y-%m-%dT%H:%M:%SZ")
