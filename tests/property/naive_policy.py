"""A second evaluator, slow and obvious, written from the specification alone; and random policies to compare on.

Policies here are plain tuples and dicts. `as_toml` writes them in the language, so that the real loader reads them;
the naive evaluator never sees the text. Unknown is None.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

USES = ("release", "relay", "hold", "land", "process")
NOW = 1_772_452_800  # 2026-03-02T12:00:00Z
DAY = 86400

LISTS: dict[str, dict[str, Any]] = {
    "west": {"members": ["FR", "DE", "US"], "review_by": None},
    "east": {"members": ["CN", "JP"], "review_by": None},
    "stale": {"members": ["FR", "BR"], "review_by": NOW - DAY},
    "fresh": {"members": ["US", "BR"], "review_by": NOW + DAY},
    "mechanisms": {"members": ["scc", "bcr"], "review_by": None},
    "labels": {"members": ["a", "b"], "review_by": None},
    "nothing": {"members": [], "review_by": None},
}
COUNTER = "ledger.persons_after('a','recipient','rolling_30_days')"
NONEMPTY = {"site.operator_countries"}
LABELS = ["a", "b", "c", "unheard-of"]
COUNTRIES = ["FR", "DE", "US", "CN", "JP", "BR"]
CAPABILITIES = [
    "encrypt.flight", "encrypt.rest", "log", "onward", "spill", "rate_max", "delete", "retain", "window",
]  # fmt: skip


@dataclass
class Rule:
    id: str
    effect: str
    on: list[str]
    when: list[Any]
    unless: list[Any]
    then: list[tuple[str, Any]]


@dataclass
class Policy:
    id: str
    scope: list[Any]
    unlisted: str
    on_stale: str
    mode: str
    effective: int
    rules: list[Rule] = field(default_factory=list)


# --- the evaluator ---------------------------------------------------------------------------------------------


def truth(condition: Any, facts: dict[str, Any], stale_matters: bool) -> bool | None:
    """The truth of a condition, None for unknown."""
    kind = condition[0]
    if kind == "all":
        return conjunction([truth(item, facts, stale_matters) for item in condition[1]])
    if kind == "any":
        return disjunction([truth(item, facts, stale_matters) for item in condition[1]])
    if kind == "not":
        inner = truth(condition[1], facts, stale_matters)
        return None if inner is None else not inner
    _, attribute, op, operand = condition
    value = facts.get(attribute)
    if value is None or (attribute in NONEMPTY and not value):
        return None
    if isinstance(operand, tuple):
        if operand[0] == "list":
            review_by = LISTS[operand[1]]["review_by"]
            if stale_matters and review_by is not None:
                now = facts.get("time.now")
                if now is None or now >= review_by:
                    return None
            operand = set(LISTS[operand[1]]["members"])
        elif operand[0] == "fact":
            operand = facts.get(operand[1])
            if operand is None:
                return None
        else:
            operand = operand[1]
    answers = {
        "is": lambda: value == operand,
        "is not": lambda: value != operand,
        "in": lambda: value in operand,
        "not in": lambda: value not in operand,
        "includes": lambda: operand in value,
        "excludes": lambda: operand not in value,
        "includes any of": lambda: bool(set(value) & set(operand)),
        "includes all of": lambda: set(operand) <= set(value),
        "subset of": lambda: set(value) <= set(operand),
        "<": lambda: value < operand,
        ">=": lambda: value >= operand,
        "before": lambda: value < operand,
        "after": lambda: value > operand,
    }
    return bool(answers[op]())


def conjunction(truths: list[bool | None]) -> bool | None:
    if any(item is False for item in truths):
        return False
    return None if any(item is None for item in truths) else True


def disjunction(truths: list[bool | None]) -> bool | None:
    if any(item is True for item in truths):
        return True
    return None if any(item is None for item in truths) else False


def fires(rule: Rule, facts: dict[str, Any], stale: bool) -> bool:
    permit = rule.effect == "permit"
    when = conjunction([truth(item, facts, stale and permit) for item in rule.when])
    unless = disjunction([truth(item, facts, stale and not permit) for item in rule.unless])
    if permit:
        return when is True and unless is False
    return when is not False and unless is not True


def scope_of(policy: Policy, facts: dict[str, Any]) -> bool | None:
    now = facts.get("time.now")
    in_force = None if now is None else now >= policy.effective
    return conjunction([in_force, *(truth(item, facts, False) for item in policy.scope)])


def decide(
    policies: list[Policy], use: str, facts: dict[str, Any], can: frozenset[str] | None
) -> tuple[bool, list[str], list[str]]:
    """Permit or not, the permits taken, and all rules whose duties come with them."""
    alternatives: list[list[Rule | None]] = []
    scopes: list[bool | None] = []
    requires: list[tuple[str, Rule]] = []
    owner: dict[int, str] = {}
    for policy in policies:
        if policy.mode != "enforce":
            continue
        scope = scope_of(policy, facts)
        if scope is False:
            continue
        firing = [
            rule
            for rule in policy.rules
            if use in rule.on and fires(rule, facts, policy.on_stale == "unknown")
        ]
        for rule in firing:
            owner[id(rule)] = f"{policy.id}/{rule.id}"
        if any(rule.effect == "forbid" for rule in firing):
            return False, [], []
        permits: list[Rule | None] = [rule for rule in firing if rule.effect == "permit"]
        requires += [(policy.id, rule) for rule in firing if rule.effect == "require"]
        if policy.unlisted == "deny" and not permits:
            return False, [], []
        if permits:
            alternatives.append([*permits, *([None] if policy.unlisted == "permit" else [])])
            scopes.append(scope)
    for choice in itertools.product(*alternatives):
        if not any(rule is not None and scope is True for rule, scope in zip(choice, scopes, strict=True)):
            continue
        duties = [duty for _, rule in requires for duty in rule.then]
        duties += [duty for rule in choice if rule is not None for duty in rule.then]
        if possible(duties, facts.get("time.now")) and able(duties, can):
            taken = [owner[id(rule)] for rule in choice if rule is not None]
            return True, taken, sorted({name for name, _ in duties})
    return False, [], []


def possible(duties: list[tuple[str, Any]], now: int | None) -> bool:
    """Whether all duties can be met together."""
    regions = [
        set(LISTS[value]["members"]) for name, value in duties if name == "encrypt" and value is not None
    ]
    if regions and not set.intersection(*regions):
        return False
    deletions = [value for name, value in duties if name == "delete_after"]
    keeps = [value for name, value in duties if name == "retain"]
    if deletions and keeps and (now is None or min(deletions) < max(keeps)):
        return False
    windows = {value for name, value in duties if name == "window"}
    if len(windows) > 1:
        if now is None:
            return False
        return any(all(is_open(window, minute) for window in windows) for minute in range(24 * 60))
    return True


def is_open(window: tuple[int, int], minute: int) -> bool:
    start, end = window[0] * 60, window[1] * 60
    return start <= minute < end if start < end else minute >= start or minute < end


def able(duties: list[tuple[str, Any]], can: frozenset[str] | None) -> bool:
    if can is None:
        return True
    words = {"encrypt": "encrypt.flight", "delete_after": "delete"}
    return all(words.get(name, name) in can for name, _ in duties)


# --- random policies and requests ------------------------------------------------------------------------------


def random_line(rng: random.Random) -> Any:
    lists = ["west", "east", "stale", "fresh", "nothing"]
    choices = [
        lambda: ("line", "data.labels", rng.choice(["includes", "excludes"]), rng.choice(LABELS)),
        lambda: ("line", "data.labels", rng.choice(["includes any of", "includes all of"]), ("list", "labels")),
        lambda: ("line", "site.country", rng.choice(["is", "is not"]), rng.choice(COUNTRIES)),
        lambda: ("line", "site.country", rng.choice(["in", "not in"]), ("list", rng.choice(lists))),
        lambda: ("line", "site.operator_countries", rng.choice(["subset of", "includes any of"]), ("list", rng.choice(lists))),
        lambda: ("line", "site.has_key", "is", ("flag", rng.random() < 0.5)),
        lambda: ("line", "agreement.tia_done", "is", ("flag", rng.random() < 0.5)),
        lambda: ("line", "agreement.mechanism", rng.choice(["in", "not in"]), ("list", "mechanisms")),
        lambda: ("line", "agreement.expires", rng.choice(["after", "before"]), ("fact", "time.now")),
        lambda: ("line", "data.persons", rng.choice(["<", ">="]), ("number", rng.choice([10, 100, 1000]))),
        lambda: ("line", COUNTER, rng.choice(["<", ">="]), ("number", rng.choice([10, 100, 1000]))),
        lambda: ("line", "site.country", rng.choice(["in", "not in"]), ("fact", "data.collected_in")),
    ]  # fmt: skip
    return rng.choice(choices)()


def random_condition(rng: random.Random, depth: int = 2) -> Any:
    if depth == 0 or rng.random() < 0.7:
        return random_line(rng)
    kind = rng.choice(["all", "any", "not"])
    if kind == "not":
        return ("not", random_condition(rng, depth - 1))
    return (kind, [random_condition(rng, depth - 1) for _ in range(rng.randint(1, 3))])


def random_duty(rng: random.Random) -> tuple[str, Any]:
    kind = rng.choice(["encrypt", "log", "onward", "spill", "rate_max", "delete_after", "retain", "window"])
    return {
        "encrypt": lambda: ("encrypt", rng.choice([None, "west", "east", "fresh"])),
        "log": lambda: ("log", None),
        "onward": lambda: ("onward", None),
        "spill": lambda: ("spill", None),
        "rate_max": lambda: ("rate_max", rng.randint(1, 9)),
        "delete_after": lambda: ("delete_after", rng.choice([1, 30, 90])),
        "retain": lambda: ("retain", rng.choice([7, 60])),
        "window": lambda: ("window", rng.choice([(20, 6), (8, 18), (0, 7), (5, 9)])),
    }[kind]()


def random_rule(rng: random.Random, number: int) -> Rule:
    effect = rng.choices(["permit", "forbid", "require"], [5, 2, 2])[0]
    then = [] if effect == "forbid" else [random_duty(rng) for _ in range(rng.choice([0, 0, 1, 1, 2]))]
    if effect == "require" and not then:
        then = [random_duty(rng)]
    kinds = [name for name, _ in then]
    then = [duty for index, duty in enumerate(then) if duty[0] not in kinds[:index]]
    return Rule(
        f"r{number}",
        effect,
        rng.sample(USES, rng.randint(1, 5)),
        [random_condition(rng) for _ in range(rng.choice([0, 1, 1, 2, 3]))],
        [random_condition(rng) for _ in range(rng.choice([0, 0, 0, 1, 2]))],
        then,
    )


def random_policies(rng: random.Random) -> list[Policy]:
    policies = []
    for number in range(rng.randint(1, 4)):
        scope = [("line", "data.labels", "includes", rng.choice(LABELS[:3]))] if rng.random() < 0.7 else []
        if rng.random() < 0.3:
            scope.append(random_condition(rng, 1))
        policy = Policy(
            f"p{number}",
            scope,
            rng.choice(["deny", "deny", "permit"]),
            rng.choice(["warn", "unknown"]),
            rng.choice(["enforce", "enforce", "enforce", "enforce", "shadow", "draft"]),
            rng.choice([0, NOW - DAY, NOW + DAY]) if rng.random() < 0.4 else 86400,
        )
        policy.rules = [random_rule(rng, index) for index in range(rng.randint(1, 5))]
        policies.append(policy)
    return policies


def random_facts(rng: random.Random) -> dict[str, Any]:
    """Facts of a request; each is missing one time in six."""
    everything: dict[str, Any] = {
        "data.labels": frozenset(rng.sample(LABELS, rng.randint(0, 3))),
        "data.collected_in": frozenset(rng.sample(COUNTRIES, rng.randint(1, 2))),
        "data.persons": rng.choice([5, 50, 500, 5000]),
        "site.country": rng.choice(COUNTRIES),
        "site.operator_countries": frozenset(rng.sample(COUNTRIES, rng.randint(0, 2))),
        "site.has_key": rng.random() < 0.5,
        "agreement.tia_done": rng.random() < 0.5,
        "agreement.mechanism": rng.choice(["scc", "bcr", "none"]),
        "agreement.expires": NOW + rng.choice([-DAY, DAY]),
        COUNTER: rng.choice([5, 50, 500, 5000]),
        "time.now": NOW,
    }
    missing = rng.choice([0.0, 0.1, 0.3])
    return {name: value for name, value in everything.items() if rng.random() >= missing}


def random_can(rng: random.Random) -> frozenset[str] | None:
    if rng.random() < 0.3:
        return None
    return frozenset(word for word in CAPABILITIES if rng.random() < 0.85)


# --- the same policies in the language -------------------------------------------------------------------------


def line_toml(condition: Any) -> str:
    kind = condition[0]
    if kind in ("all", "any"):
        return "{" + kind + " = [" + ", ".join(line_toml(item) for item in condition[1]) + "]}"
    if kind == "not":
        return "{not = " + line_toml(condition[1]) + "}"
    _, attribute, op, operand = condition
    if isinstance(operand, tuple):
        shown = {
            "list": lambda: "@" + operand[1],
            "fact": lambda: operand[1],
            "flag": lambda: str(operand[1]).lower(),
            "number": lambda: str(operand[1]),
        }[operand[0]]()
    else:
        shown = f"'{operand}'"
    return f'"{attribute} {op} {shown}"'


def duty_toml(duty: tuple[str, Any]) -> str:
    name, value = duty
    regions = f", keys_in = '@{value}'" if name == "encrypt" and value else ""
    return {
        "encrypt": "{encrypt = {at = ['flight']" + regions + "}}",
        "log": "{log = {evidence = 'full'}}",
        "onward": "{onward = 'forbid'}",
        "spill": "{spill = 'memory-only'}",
        "rate_max": "{rate_max = '" + str(value) + " Gbit/s'}",
        "delete_after": "{delete_after = '" + str(value) + " days'}",
        "retain": "{retain = '" + str(value) + " days'}",
        "window": f"{{window = {{tz = 'UTC', from = '{value[0]:02}:00', to = '{value[1]:02}:00'}}}}" if name == "window" else "",
    }[name]  # fmt: skip


def as_toml(policies: list[Policy]) -> dict[str, bytes]:
    """The policies as files."""
    files = {"lists/lists.toml": lists_toml()}
    for policy in policies:
        scope = ", ".join(line_toml(item) for item in policy.scope)
        text = f"""[policy]
id = "{policy.id}"
version = "1"
title = "random"
owner = "nobody"
mode = "{policy.mode}"
applies_to = [{scope}]
unlisted = "{policy.unlisted}"
on_stale = "{policy.on_stale}"
effective = {stamp(policy.effective)}
review_by = 2030-01-01
"""
        for rule in policy.rules:
            text += f"""
[[rule]]
id = "{rule.id}"
effect = "{rule.effect}"
on = {rule.on}
when = [{", ".join(line_toml(item) for item in rule.when)}]
unless = [{", ".join(line_toml(item) for item in rule.unless)}]
then = [{", ".join(duty_toml(duty) for duty in rule.then)}]
why = "random"
"""
        if not any(rule.then for rule in policy.rules):
            text = text.replace("then = []\n", "")
        files[f"{policy.id}.toml"] = text.encode()
    return files


def stamp(at: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def lists_toml() -> bytes:
    text = ""
    for name, entry in LISTS.items():
        text += f'[list.{name}]\nas_of = 2026-01-01\nsource = "test"\nmembers = {entry["members"]}\n'
        if entry["review_by"] is not None:
            text += f"review_by = {stamp(entry['review_by'])}\n"
    return text.encode()
