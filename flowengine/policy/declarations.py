"""Reading what is not a policy: attributes, labels, lists, sites, data sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from flowengine.policy.conditions import LineError
from flowengine.policy.countries import COUNTRIES, NOT_COUNTRIES
from flowengine.policy.model import (
    Approver,
    Attribute,
    Authority,
    Combine,
    Label,
    Link,
    NamedList,
    Owner,
    Site,
    Value,
)
from flowengine.policy.obligations import CAPABILITIES
from flowengine.policy.problems import closest
from flowengine.policy.reader import Source, Table, fact_value
from flowengine.policy.vocabulary import ATTRIBUTES, SOURCES

__all__ = [
    "read_approvers",
    "read_attributes",
    "read_authorities",
    "read_data",
    "read_labels",
    "read_lists",
    "read_named_list",
    "read_owners",
    "read_sites",
    "subject_facts",
]

_HEX_64 = re.compile(r"[0-9a-f]{64}")
_UNITS = ("bytes", "seconds", "rate", "bits", "percent", "count")


def read_attributes(source: Source, attributes: dict[str, Attribute]) -> None:
    """Add the declarations of `attributes.toml`: new attributes, and who alone may assert standard ones."""
    root = source.root(("attribute", "authority"))
    declared = root.table("attribute")
    for name in declared.data:
        keys = ("type", "unit", "domain", "by", "title", "title_zh", "secret", "nonempty")
        table = declared.table(name, keys)
        if name in ATTRIBUTES:
            table.problem(
                (), f"{name!r} is a standard attribute and keeps its meaning", "choose another name"
            )
            continue
        if "." not in name:
            table.problem((), f"{name!r} names no subject", f'write it like "recipient.{name}"')
            continue
        kind = table.text("type", choices=("text", "set", "number", "flag", "time"), example='"text"')
        title = table.text("title")
        attributes[name] = Attribute(
            name, kind, title, table.text("title_zh", title), _sources(table, "by"),
            unit=table.text("unit", "count", _UNITS) if kind == "number" else "",
            domain=table.text("domain", "", ("", "country", "label")),
            secret=table.flag("secret"), nonempty=table.flag("nonempty"),
        )  # fmt: skip
    authority = root.table("authority")
    for name in authority.data:
        if name not in attributes:
            authority.problem((name,), f"{name!r} is not a declared attribute", closest(name, attributes))
            continue
        by = _sources(authority, name)
        more = [kind for kind in by if kind not in attributes[name].by]
        if more:
            allowed = ", ".join(attributes[name].by)
            authority.problem(
                (name,), f"{name!r} cannot be asserted by {more[0]!r}", f"narrow this list: {allowed}"
            )
        else:
            attributes[name] = replace(attributes[name], by=by)


def _sources(table: Table, key: str) -> tuple[str, ...]:
    kinds = table.texts(key, required=True)
    for index, kind in enumerate(kinds):
        if kind not in SOURCES:
            table.problem(
                (key, index), f"{kind!r} is no kind of source", closest(kind, SOURCES) or ", ".join(SOURCES)
            )
    return tuple(kind for kind in kinds if kind in SOURCES)


def read_labels(source: Source) -> tuple[dict[str, Label], tuple[Combine, ...]]:
    """The labels of `labels.toml` and the combinations that make further ones."""
    root = source.root(("label", "combine"))
    declared = root.table("label")
    labels: dict[str, Label] = {}
    for name in declared.data:
        table = declared.table(name, ("title", "implies"))
        labels[name] = Label(name, table.text("title", ""), tuple(table.texts("implies")))
    combines = []
    for table in root.tables("combine", ("all", "adds", "source")):
        combines.append(Combine(frozenset(table.texts("all", True)), frozenset(table.texts("adds", True))))
        for key in ("all", "adds"):
            for index, name in enumerate(table.texts(key)):
                if name not in labels:
                    table.problem((key, index), f"the label {name!r} is not declared", closest(name, labels))
    for name, label in labels.items():
        for index, other in enumerate(label.implies):
            if other not in labels:
                path = ("label", name, "implies", index)
                source.problem(path, f"the label {other!r} is not declared", closest(other, labels))
    return labels, tuple(combines)


def read_named_list(table: Table, name: str, parts: Mapping[str, NamedList]) -> NamedList:
    """One list with its header; `union` takes the members of other lists in."""
    keys = ("title", "domain", "as_of", "source", "review_by", "reviewed", "secret", "members", "union")
    table = Table(table.source, table.path, table.data, keys)
    members = set(table.texts("members"))
    as_of = table.day("as_of", required=True)
    review_by = table.day("review_by")
    secret = table.flag("secret")
    domain = table.text("domain", "", ("", "country", "label", "org"))
    reviews = [] if review_by is None else [review_by]
    for index, part in enumerate(table.texts("union")):
        found = parts.get(part.removeprefix("@"))
        if found is None:
            table.problem(
                ("union", index), f"the list {part} does not exist", closest(part.removeprefix("@"), parts)
            )
            continue
        members |= found.members
        secret = secret or found.secret
        reviews += [] if found.review_by is None else [found.review_by]
    if "members" not in table.data and "union" not in table.data:
        table.problem((), f"the list {name!r} has neither 'members' nor 'union'", 'add members = ["..."]')
    if domain == "country":
        for index, code in enumerate(table.texts("members")):
            if code not in COUNTRIES:
                hint = NOT_COUNTRIES.get(code.upper()) or closest(code, COUNTRIES)
                table.problem(("members", index), f"{code!r} is no ISO 3166-1 country code", hint)
    return NamedList(
        name, frozenset(members), table.source.path, table.line(), table.text("title", ""), domain,
        "" if as_of is None else datetime.fromtimestamp(as_of, UTC).date().isoformat(),
        table.text("source"), min(reviews, default=None), table.flag("reviewed"), secret,
    )  # fmt: skip


def read_lists(sources: list[Source], lists: dict[str, NamedList]) -> None:
    """All shared lists; a list may only take in lists that hold members of their own."""
    later: list[tuple[Table, str]] = []
    for source in sources:
        declared = source.root(("list",)).table("list")
        for name in declared.data:
            table = declared.table(name)
            if name in lists or any(name == other for _, other in later):
                table.problem((), f"the list {name!r} is declared twice", "keep one of them")
            elif "union" in table.data:
                later.append((table, name))
            else:
                lists[name] = read_named_list(table, name, {})
    base = dict(lists)
    for table, name in later:
        lists[name] = read_named_list(table, name, base)


def subject_facts(
    table: Table, subject: str, attributes: Mapping[str, Attribute], extra: tuple[str, ...] = ()
) -> dict[str, Value]:
    """Facts of one subject from a table whose keys are attribute names without the subject."""
    facts: dict[str, Value] = {}
    known = [name.split(".", 1)[1] for name in attributes if name.startswith(subject + ".")]
    for key, raw in table.data.items():
        if key in extra:
            continue
        attribute = attributes.get(f"{subject}.{key}")
        if attribute is None:
            hint = closest(key, [*known, *extra]) or f"known: {', '.join([*known, *extra])}"
            table.problem((key,), f"'{subject}.{key}' is not a declared attribute", hint)
            continue
        try:
            facts[attribute.name] = fact_value(attribute, raw)
        except LineError as error:
            table.problem((key,), error.message, error.hint)
    return facts


def read_capabilities(table: Table) -> frozenset[str] | None:
    """What a site's agent can do, None where nothing is said."""
    if "can" not in table.data:
        return None
    words = table.texts("can")
    for index, word in enumerate(words):
        if word not in CAPABILITIES and word != "everything":
            table.problem(("can", index), f"{word!r} is no capability", closest(word, CAPABILITIES))
    return CAPABILITIES if "everything" in words else frozenset(words)


def read_sites(
    source: Source, attributes: Mapping[str, Attribute]
) -> tuple[dict[str, Site], tuple[Link, ...]]:
    """The pinned sites and links of `sites.toml`."""
    root = source.root(("site", "link"))
    declared = root.table("site")
    sites: dict[str, Site] = {}
    for name in declared.data:
        table = declared.table(name)
        facts = subject_facts(table, "site", attributes, ("can", "key", "recipient"))
        facts.setdefault("site.id", name)
        key = table.text("key", "")
        if key and not _HEX_64.fullmatch(key):
            table.problem(("key",), f"{key!r} is no key", "`flow site show` tells it: 64 hexadecimal digits")
        recipient = subject_facts(table.table("recipient"), "recipient", attributes)
        sites[name] = Site(name, facts, read_capabilities(table), key, recipient)
    links = []
    for table in root.tables("link", None):
        ends = table.text("from"), table.text("to")
        for key, end in zip(("from", "to"), ends, strict=True):
            if end and end not in sites:
                table.problem((key,), f"the site {end!r} is not declared here", closest(end, sites))
        links.append(Link(*ends, subject_facts(table, "link", attributes, ("from", "to"))))
    return sites, tuple(links)


def read_owners(source: Source) -> dict[str, Owner]:
    """The data owners of `owners.toml`: whose key gives labels to what lies below which roots."""
    declared = source.root(("owner",)).table("owner")
    owners: dict[str, Owner] = {}
    for name in declared.data:
        table = declared.table(name, ("title", "key", "roots"))
        key = _public_key(table, owners.values(), "give each owner its own")
        owners[name] = Owner(name, key, _roots(table), table.text("title", ""))
    return owners


def read_approvers(source: Source) -> dict[str, Approver]:
    """Who may approve, of `approvers.toml`: key and groups of each."""
    declared = source.root(("approver",)).table("approver")
    approvers: dict[str, Approver] = {}
    for name in declared.data:
        table = declared.table(name, ("title", "key", "groups"))
        key = _public_key(table, approvers.values(), "one person, one key: else one counts as two")
        groups = tuple(table.texts("groups", required=True))
        approvers[name] = Approver(name, key, groups, table.text("title", ""))
    return approvers


def read_authorities(source: Source, attributes: Mapping[str, Attribute]) -> dict[str, Authority]:
    """Who may sign agreements, of `authorities.toml`: key, whose data, and which facts of each."""
    declared = source.root(("authority",)).table("authority")
    said = [name for name, attribute in attributes.items() if "agreement" in attribute.by]
    groups = {name.partition(".")[0] + ".*" for name in said}
    authorities: dict[str, Authority] = {}
    for name in declared.data:
        table = declared.table(name, ("title", "key", "roots", "facts"))
        key = _public_key(table, authorities.values(), "give each authority its own")
        facts = tuple(table.texts("facts", required=True))
        for index, fact in enumerate(facts):
            if fact not in said and fact not in groups:
                table.problem(
                    ("facts", index), f"an agreement cannot say {fact!r}", closest(fact, [*said, *groups])
                )
        authorities[name] = Authority(name, key, _roots(table), facts, table.text("title", ""))
    return authorities


def _public_key(table: Table, others: Iterable[Owner | Approver | Authority], hint: str) -> bytes:
    """The Ed25519 key of somebody whose word counts, which nobody else there has."""
    key = table.text("key", example="'64 hexadecimal digits'")
    if key and not _HEX_64.fullmatch(key):
        again = "`flow policy bundle keygen` prints it: 64 hexadecimal digits"
        table.problem(("key",), f"{key!r} is no Ed25519 public key", again)
        key = ""
    for other in others:
        if key and other.key == bytes.fromhex(key):
            table.problem(("key",), f"{other.name!r} has the same key", hint)
    return bytes.fromhex(key)


def _roots(table: Table) -> tuple[tuple[str, str], ...]:
    roots = []
    for index, text in enumerate(table.texts("roots", required=True)):
        site, colon, path = text.partition(":")
        parts = path.strip("/").split("/")
        if not site or not colon or not path.startswith("/") or ".." in parts or "." in parts:
            table.problem(("roots", index), f"{text!r} is no root", "write it like 'paris:/data/cohort'")
            continue
        roots.append((site, "/" + "/".join(part for part in parts if part)))
    return tuple(roots)


def read_data(
    source: Source, attributes: Mapping[str, Attribute]
) -> tuple[dict[str, dict[str, Value]], tuple[tuple[str, str, str], ...]]:
    """Data sets and existing copies (data, site, use) of `datasets.toml`."""
    root = source.root(("data", "copy"))
    declared = root.table("data")
    data = {name: subject_facts(declared.table(name), "data", attributes) for name in declared.data}
    copies = []
    for table in root.tables("copy", ("data", "site", "use")):
        name = table.text("data")
        if name and name not in data:
            table.problem(("data",), f"the data set {name!r} is not declared here", closest(name, data))
        copies.append((name, table.text("site"), table.text("use", "hold", ("hold", "land", "process"))))
    return data, tuple(copies)
