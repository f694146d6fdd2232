"""From a policy decision to the body of its record, and back: the facts that a record holds, for evaluating it anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from flowengine.evidence.private import Kept, Private, is_concealed, reveal
from flowengine.evidence.suites import Suite
from flowengine.policy.evaluate import Decision, Engine
from flowengine.policy.explain import ENGINE
from flowengine.policy.explain import record as explained
from flowengine.policy.facts import Resolved, Statement
from flowengine.policy.model import Attribute, PolicySet, Value
from flowengine.policy.phrases import moment_text

__all__ = ["PERSONAL", "Asked", "Recalled", "computed", "decision_body", "recall"]

PERSONAL: Final = frozenset(("data.persons", "request.requester"))
"""Standard attributes whose values say something of persons: digested like those that a bundle marks as secret."""
_PERSONAL_COUNTERS: Final = ("ledger.persons_after(",)

_COMPUTED: Final = (
    "decision", "why", "because", "missing", "policies", "shadow", "duties", "notes", "lists", "text",
    "would_allow",
)  # fmt: skip
"""Fields that the engine computes from the facts: what evaluating anew has to come to again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked, where in a transfer's life.

    Attributes:
        point: `plan`, `source`, `relay`, `target`, `publish` or `timer`.
        phase: `plan`, `before-first-byte`, `running` or `end`.
        site: where the use happens.
        data: what, as `site:/path`.
        transfer, task: for which; empty where there is none yet.
        hop: its place on the route, from 0 at the source.
        recipient, purpose, requester: of the request; empty where unknown.
        bundle: digest of the bundle that decided.
    """

    point: str
    phase: str
    site: str
    data: str
    bundle: str
    transfer: str = ""
    task: str = ""
    hop: int | None = None
    route: Sequence[str] = ()
    recipient: str = ""
    purpose: str = ""
    requester: str = ""


def decision_body(
    engine: Engine,
    decision: Decision,
    asked: Asked,
    *,
    decision_id: str,
    resolved: Resolved | None = None,
    clock_error_ms: int | None = None,
    peer: Mapping[str, object] | None = None,
    recheck_on: Sequence[str] = ("bundle-change",),
    valid_until: int | None = None,
) -> dict[str, object]:
    """The body of a decision's record; personal and secret values are `Private` in it.

    Args:
        resolved: what the facts rest on; without it their sources are not recorded.
        clock_error_ms: how far the clock may be off.
        peer: head of the other side's chain, as `Head.as_peer` or `Checkpoint.as_peer` say it.
        recheck_on: events that end what was permitted: "bundle-change", "fact-change:…", "revocation".
        valid_until: when the permit ends, where that is sooner than the policies say.
    """
    said = explained(engine, decision)
    valid: dict[str, object] = {"recheck_on": list(recheck_on)}
    until = said["valid"]
    assert isinstance(until, dict)
    valid["until"] = until["until"] if valid_until is None else moment_text(valid_until)
    ask: dict[str, object] = {"use": decision.use, "data": asked.data, "site": asked.site}
    for name in ("recipient", "purpose"):
        if value := getattr(asked, name):
            ask[name] = value
    if asked.requester:
        ask["requester"] = Private("ask.requester", asked.requester)
    body: dict[str, object] = {
        "decision_id": decision_id,
        "point": asked.point,
        "phase": asked.phase,
        "ask": ask,
        "bundle": asked.bundle,
        "engine": ENGINE,
        "facts": _facts(engine.policies, decision, resolved),
        "can": None if decision.can is None else sorted(decision.can),
        "valid": valid,
        **computed(said),
    }
    if asked.transfer:
        body["transfer"] = asked.transfer
    if asked.task:
        body["task"] = asked.task
    if asked.hop is not None:
        body["hop"] = asked.hop
    if asked.route:
        body["route"] = list(asked.route)
    if clock_error_ms is not None:
        body["clock"] = {"source": "system", "error_ms": clock_error_ms}
    if peer is not None:
        body["peer"] = dict(peer)
    if resolved is not None and resolved.unknown:
        body["not_heard"] = dict(sorted(resolved.unknown.items()))
    return body


def computed(said: Mapping[str, object]) -> dict[str, object]:
    """Of what `flowengine.policy.explain.record` says, the fields that a record holds and a replay compares."""
    renamed = {"why": "kind", "duties": "obligations"}
    return {
        name: said[renamed.get(name, name)] for name in _COMPUTED if renamed.get(name, name) in said
    }  # fmt: skip


def _facts(policies: PolicySet, decision: Decision, resolved: Resolved | None) -> list[dict[str, object]]:
    used = {} if resolved is None else resolved.used
    return [
        _fact(policies, name, value, used.get(name, ())) for name, value in sorted(decision.facts.items())
    ]


def _fact(policies: PolicySet, name: str, value: Value, said: Sequence[Statement]) -> dict[str, object]:
    attribute = policies.attributes.get(name)
    shown = _plain(attribute, value)
    secret = attribute is not None and attribute.secret
    hidden = secret or name in PERSONAL or name.startswith(_PERSONAL_COUNTERS)
    fact: dict[str, object] = {"attr": name, "value": Private(name, shown) if hidden else shown}
    if said:
        fact["by"] = said[0].by
        fact["asof"] = moment_text(said[0].as_of)
        if said[0].until is not None:
            fact["until"] = moment_text(said[0].until)
        if len(said) > 1:
            fact["also"] = [{"by": one.by, "asof": moment_text(one.as_of)} for one in said[1:]]
    return fact


def _plain(attribute: Attribute | None, value: Value) -> object:
    if attribute is not None and attribute.type == "time" and isinstance(value, int):
        return moment_text(value)
    return sorted(value) if isinstance(value, frozenset) else value


@dataclass(frozen=True, slots=True)
class Recalled:
    """What a record holds of a decision's input.

    Attributes:
        facts: as the engine takes them.
        concealed: attributes whose values are only there as digests.
        wrong: what about the facts could not have been: a source that is not entitled, a value that is none.
    """

    facts: Mapping[str, Value]
    concealed: tuple[str, ...]
    wrong: tuple[str, ...]


def recall(
    policies: PolicySet,
    facts: object,
    *,
    suite: Suite,
    key: bytes = b"",
    kept: Mapping[str, Kept] | None = None,
) -> Recalled:
    """The facts of a record; digests become values again where key and kept values are at hand.

    Args:
        facts: the record's field.
        kept: kept values by digest.

    Raises:
        ValueError: the field is not what a record holds.
    """
    found: dict[str, Value] = {}
    concealed: list[str] = []
    wrong: list[str] = []
    now = _now_of(facts)
    for fact in _dicts(facts):
        name, value = fact.get("attr"), fact.get("value")
        if not isinstance(name, str) or name in found:
            raise ValueError("a fact has no name, or comes twice")
        if is_concealed(value):
            assert isinstance(value, dict)
            one = (kept or {}).get(str(value["digest"]))
            if one is None or not key:
                concealed.append(name)
                continue
            if one.name != name or not reveal(str(value["digest"]), one, suite, key):
                wrong.append(f"the kept value of {name} is not the one that was recorded")
                continue
            value = one.value
        attribute = policies.attributes.get(name)
        found[name] = _value(attribute, name, value)
        also = fact.get("also", [])
        sources = [fact, *_dicts(also)] if "by" in fact else []
        wrong += [why for source in sources if (why := _not_entitled(attribute, name, source, now))]
    return Recalled(found, tuple(concealed), tuple(wrong))


def _dicts(value: object) -> list[dict[str, object]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("facts are no list of objects")
    return value


def _now_of(facts: object) -> int | None:
    for fact in _dicts(facts):
        if fact.get("attr") == "time.now" and isinstance(text := fact.get("value"), str):
            return _moment(text)
    return None


def _not_entitled(
    attribute: Attribute | None, name: str, source: Mapping[str, object], now: int | None
) -> str:
    by, as_of, until = source.get("by"), source.get("asof"), source.get("until")
    if not isinstance(by, str) or not isinstance(as_of, str):
        return f"the source of {name} is not named"
    kind = by.partition(":")[0]
    if attribute is not None:
        allowed = attribute.by
    elif name.startswith("ledger."):
        allowed = ("ledger",)
    elif name.startswith("approvals."):
        allowed = ("approval",)
    else:
        return f"{name} is no attribute of the bundle"
    if kind not in allowed:
        return f"{by} is not entitled to say {name}"
    if now is not None and _moment(as_of) > now:
        return f"{by} said {name} after it was used"
    if now is not None and isinstance(until, str) and _moment(until) <= now:
        return f"what {by} said of {name} had expired"
    return ""


def _value(attribute: Attribute | None, name: str, value: object) -> Value:
    if attribute is not None and attribute.type == "time" and isinstance(value, str):
        return _moment(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return frozenset(value)
    if isinstance(value, str | int):
        return value
    raise ValueError(f"the value of {name} is none")


def _moment(text: str) -> int:
    return int(datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp())
