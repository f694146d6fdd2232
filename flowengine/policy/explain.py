"""One decision for people and records: sentences, lines with their truths, what is missing, what would permit.

For the requester, facts and lists marked secret show neither value nor truth; an auditor sees all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from flowengine.policy.evaluate import CompiledPolicy, CompiledRule, Decision, Engine, PolicyTrace, judge
from flowengine.policy.model import (
    FALSE,
    TRUE,
    TRUTH_NAMES,
    UNKNOWN,
    Duty,
    Line,
    ListRef,
    Literal,
    PolicySet,
    Value,
    leaves,
)
from flowengine.policy.outcomes import Outcome, negated, outcome, product
from flowengine.policy.phrases import KINDS, LANGUAGES, duty_text, line_text, moment_text
from flowengine.policy.reasons import failing_lines, nearest_permit, reasons, unknown_lines

__all__ = [
    "ENGINE",
    "Remedy",
    "duty_record",
    "explain",
    "is_secret",
    "record",
    "remedies",
    "valid_until",
    "without_secrets",
]

ENGINE: Final = "flowengine-policy/1.0"
_MAX_REMEDIES: Final = 3
_APPROVABLE: Final = frozenset(("agreement", "approvals"))
_HIDDEN: Final = ("a condition only auditors see", "仅审计人员可见的条件")


@dataclass(frozen=True, slots=True)
class Remedy:
    """A smallest set of lines that, were they to hold, would permit; `kind` is `assert` or `change`.

    `assert`: facts that are unknown or that somebody may approve. `change`: another site, recipient or request.
    """

    kind: str
    lines: tuple[str, ...]
    who: tuple[tuple[str, ...], ...]
    secret: tuple[bool, ...]


def is_secret(line: Line, policies: PolicySet) -> bool:
    """Whether only auditors may see a line's truth."""
    if any(reference.attribute.secret for reference in line.references()):
        return True
    return (
        isinstance(line.right, ListRef)
        and line.right.name in policies.lists
        and policies.lists[line.right.name].secret
    )


def without_secrets(found: Outcome, policies: PolicySet) -> Outcome:
    """An outcome as a requester may see it: lines over secret facts and lists are not spelled out."""
    secret: set[str] = set()
    for policy in policies.policies:
        for part in (*policy.scope, *(part for rule in policy.rules for part in (*rule.when, *rule.unless))):
            for line in leaves(part):
                if is_secret(line, policies):
                    secret.update((line.text, negated(line)))

    def shown(texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_HIDDEN[0] if text in secret else text for text in texts))

    needs = tuple(
        replace(need, alternatives=tuple(dict.fromkeys(shown(way) for way in need.alternatives)))
        for need in found.needs
    )
    never = tuple(replace(one, lines=shown(one.lines)) for one in found.never)
    return replace(found, needs=needs, never=never)


def remedies(engine: Engine, decision: Decision) -> list[Remedy]:
    """The smallest changes that would turn a deny into a permit, at most three, empty where there is none."""
    if decision.permit:
        return []
    for kind, subjects in (
        ("assert", _APPROVABLE),
        (
            "change",
            _APPROVABLE | {"request", "recipient", "transfer", "crypto", "controller", "link", "site"},
        ),
    ):
        found = _remedies(engine, decision, kind, subjects)
        if found:
            return found
    return []


def _remedies(
    engine: Engine, decision: Decision, kind: str, subjects: frozenset[str] | set[str]
) -> list[Remedy]:
    """Take the lines about some subjects as open, see what would be needed, leave out what holds already."""
    holding: set[str] = set()
    sources: dict[str, tuple[str, ...]] = {}
    secret: set[str] = set()

    def soften(lines: Sequence[Line], truths: Sequence[int]) -> list[int]:
        softened = []
        for line, truth in zip(lines, truths, strict=True):
            if truth != UNKNOWN:
                holding.add(line.text if truth == TRUE else negated(line))
            by = tuple(
                dict.fromkeys(
                    kind for ref in line.references() for kind in ref.attribute.by if kind != "clock"
                )
            )
            sources[line.text] = sources[negated(line)] = by
            if is_secret(line, engine.policies):
                secret.update((line.text, negated(line)))
            open_line = line.left.attribute.subject in subjects or line.left.name.startswith("approvals.")
            softened.append(UNKNOWN if open_line else truth)
        return softened

    traces = []
    for trace in decision.traces:
        scope_truths = soften(trace.compiled.scope_lines, trace.scope_truths)
        scope = trace.compiled.scope(scope_truths)
        if trace.scope == FALSE:
            traces.append(trace)
            continue
        rows = [soften(rule.lines, truths) for rule, truths, _, _ in trace.rows]
        traces.append(judge(trace.compiled, scope, scope_truths, rows))
    now = decision.facts.get("time.now")
    found = outcome(engine, traces, decision.can, now if isinstance(now, int) else None)
    if found.kind != "if":
        return []
    ways = product([need.alternatives for need in found.needs])
    lines_of = {tuple(text for text in way if text not in holding) for way in ways if "..." not in way}
    candidates = sorted(lines_of, key=lambda way: (len(way), way))
    good = [way for way in candidates if way and _would_permit(engine, decision, way)]
    smallest = [way for way in good if not any(set(other) < set(way) for other in good)]
    return [
        Remedy(kind, way, tuple(sources.get(text, ()) for text in way), tuple(text in secret for text in way))
        for way in smallest[:_MAX_REMEDIES]
    ]


def _would_permit(engine: Engine, decision: Decision, way: Sequence[str]) -> bool:
    """Whether the decision is a permit when the lines of `way` hold and all others stay as they are."""
    wanted = set(way)

    def changed(lines: Sequence[Line], truths: Sequence[int]) -> list[int]:
        return [
            TRUE if line.text in wanted else FALSE if negated(line) in wanted else truth
            for line, truth in zip(lines, truths, strict=True)
        ]

    traces = []
    for trace in decision.traces:
        if trace.scope == FALSE:
            traces.append(trace)
            continue
        scope_truths = changed(trace.compiled.scope_lines, trace.scope_truths)
        rows = [changed(rule.lines, truths) for rule, truths, _, _ in trace.rows]
        traces.append(judge(trace.compiled, trace.compiled.scope(scope_truths), scope_truths, rows))
    now = decision.facts.get("time.now")
    return outcome(engine, traces, decision.can, now if isinstance(now, int) else None).kind in (
        "yes",
        "duties",
    )


def duty_record(duty: Duty) -> dict[str, object]:
    """A duty as JSON-able data."""
    plain: dict[str, object] = {"type": duty.type, "from": list(duty.origins)}
    for key, value in duty.params:
        if key == "generalise":
            assert isinstance(value, tuple)
            plain[key] = dict(value)
        else:
            plain[key] = list(value) if isinstance(value, tuple) else value
    return plain


def explain(engine: Engine, decision: Decision, language: str = "en") -> str:
    """One sentence or two: what was decided, why, and with which duties or what is missing."""
    column = LANGUAGES.index(language)
    why = reasons(decision)
    head = KINDS[why.kind][column]
    colon, stop, join = (": ", ". ", "; ") if column == 0 else ("：", "。", "；")
    if decision.permit:
        parts = [_rule_why(engine.policies, rule.compiled, language) for rule in decision.chosen]
        text = head + colon + join.join(parts) + stop
        if decision.duties:
            duties = join.join(duty_text(duty, language) for duty in decision.duties)
            text += (f"Duties: {duties}. ", f"义务：{duties}。")[column]
        return text.strip()
    parts = []
    for trace in decision.traces:
        parts += [_rule_why(engine.policies, rule.compiled, language) for rule in trace.forbids]
        if trace.scope != FALSE and trace.compiled.unlisted_deny and not trace.permits:
            parts.append(_no_rule(engine.policies, trace, language))
    if not parts:
        parts = (
            [("no policy permits this", "没有任何政策允许")[column]]
            if "no policy permits" in why.because
            else list(why.because)
        )
    text = head + colon + join.join(parts) + stop
    if why.missing:
        names = [_fact_name(engine.policies, name, column) for name in why.missing]
        text += (f"Not known: {', '.join(names)}. ", f"未知：{'、'.join(names)}。")[column]
    return text.strip()


def _fact_name(policies: PolicySet, name: str, column: int) -> str:
    attribute = policies.attributes.get(name)
    return name if attribute is None else (attribute.en, attribute.zh)[column]


def _rule_why(policies: PolicySet, compiled: CompiledRule, language: str) -> str:
    if language == "en":
        return compiled.rule.why
    if compiled.rule.why_zh:
        return compiled.rule.why_zh
    return "，".join(line_text(line, policies, "zh") for line in compiled.lines[: compiled.when_count])


def _no_rule(policies: PolicySet, trace: PolicyTrace, language: str) -> str:
    nearest = nearest_permit(trace)
    title = trace.policy.title if language == "en" else trace.policy.title_zh
    lines = [*failing_lines(nearest), *unknown_lines(nearest)] if nearest is not None else []
    shown = [
        _HIDDEN[LANGUAGES.index(language)]
        if is_secret(line, policies)
        else line_text(line, policies, language)
        for line in lines
    ]
    if language == "en":
        near = (
            f"; nearest is rule {nearest.rule.id!r}, which needs: {', '.join(shown)}"
            if nearest and shown
            else ""
        )
        return f"no rule of “{title}” permits it{near}"
    near = f"；最接近的规则“{nearest.rule.id}”要求：{'，'.join(shown)}" if nearest and shown else ""
    return f"“{title}”中没有规则允许{near}"


def _line_rows(
    policies: PolicySet, lines: Sequence[Line], truths: Sequence[int], auditor: bool
) -> list[list[str]]:
    return [
        [line.text, TRUTH_NAMES[truth]]
        if auditor or not is_secret(line, policies)
        else [_HIDDEN[0], "hidden"]
        for line, truth in zip(lines, truths, strict=True)
    ]


def record(
    engine: Engine, decision: Decision, auditor: bool = False, with_remedies: bool = True
) -> dict[str, object]:
    """The decision as canonical-JSON-able data (texts, integers, flags, lists, objects).

    Args:
        engine: What decided.
        decision: The decision.
        auditor: Whether secret facts and lists may show.
        with_remedies: Whether to look for the smallest changes that would permit.
    """
    policies = engine.policies
    why = reasons(decision)
    plain: dict[str, object] = {
        "engine": ENGINE,
        "use": decision.use,
        "decision": "permit" if decision.permit else "deny",
        "kind": why.kind,
        "because": list(why.because),
        "missing": list(why.missing),
        "policies": [_policy_record(policies, decision, trace, auditor) for trace in decision.traces],
        "shadow": [
            {"id": trace.policy.id, "result": "deny" if trace.denies else "permit"}
            for trace in decision.shadow
            if trace.scope != FALSE
        ],
        "obligations": [duty_record(duty) for duty in decision.duties],
        "notes": list(decision.notes),
        "lists": _lists_used(policies, decision),
        "facts": _facts(policies, decision.facts, auditor),
        "valid": {"until": None if (until := valid_until(decision)) is None else moment_text(until)},
        "text": {language: explain(engine, decision, language) for language in LANGUAGES},
    }
    if not decision.permit and with_remedies:
        plain["would_allow"] = [
            {
                "kind": remedy.kind,
                "lines": [
                    _HIDDEN[0] if hidden and not auditor else line
                    for line, hidden in zip(remedy.lines, remedy.secret, strict=True)
                ],
                "who": [list(by) for by in remedy.who],
            }
            for remedy in remedies(engine, decision)
        ]
    return plain


def _policy_record(
    policies: PolicySet, decision: Decision, trace: PolicyTrace, auditor: bool
) -> dict[str, object]:
    policy = trace.policy
    plain: dict[str, object] = {"id": policy.id, "version": policy.version}
    plain["scope"] = _line_rows(policies, trace.compiled.scope_lines, trace.scope_truths, auditor)
    if trace.scope == FALSE:
        return {**plain, "result": "not-applicable"}
    plain["result"] = "deny" if trace.denies else "permit"
    plain["by"] = [rule.rule.name for rule in decision.chosen if rule.rule.policy == policy.id]
    plain["rules"] = [
        {
            "rule": rule.rule.name,
            "effect": rule.rule.effect,
            "fires": rule.fires,
            "lines": _line_rows(policies, rule.compiled.lines, rule.truths, auditor),
            "unless_from": rule.compiled.when_count,
        }
        for rule in trace.rules
    ]
    nearest = nearest_permit(trace)
    if nearest is not None:
        failed = [line.text for line in failing_lines(nearest) if auditor or not is_secret(line, policies)]
        plain["nearest_other"] = [{"rule": nearest.rule.name, "failed": failed}]
    return plain


def _lists_used(policies: PolicySet, decision: Decision) -> dict[str, str]:
    used: dict[str, str] = {}
    for trace in decision.traces:
        if trace.scope == FALSE:
            continue
        for line in _all_lines(trace.compiled):
            if isinstance(line.right, ListRef) and line.right.name in policies.lists:
                used[line.right.name] = policies.lists[line.right.name].as_of
    return dict(sorted(used.items()))


def _all_lines(compiled: CompiledPolicy) -> list[Line]:
    return [*compiled.scope_lines, *(line for rule in compiled.rules for line in rule.lines)]


def _facts(policies: PolicySet, facts: Mapping[str, Value], auditor: bool) -> dict[str, object]:
    shown: dict[str, object] = {}
    for name, value in sorted(facts.items()):
        attribute = policies.attributes.get(name)
        if attribute is not None and attribute.secret and not auditor:
            shown[name] = "hidden"
        elif attribute is not None and attribute.type == "time" and isinstance(value, int):
            shown[name] = moment_text(value)
        else:
            shown[name] = sorted(value) if isinstance(value, frozenset) else value
    return shown


def valid_until(decision: Decision) -> int | None:
    """When a permit has to be asked for again: the lease of the strictest policy, or the next date that matters."""
    now = decision.facts.get("time.now")
    if not isinstance(now, int):
        return None
    ends = [now]
    in_scope = [trace for trace in decision.traces if trace.scope != FALSE]
    ends = [now + trace.policy.max_offline_s for trace in in_scope] or [now]
    for trace in decision.traces:
        for line in _all_lines(trace.compiled):
            ends += [at for at in _instants(line, decision.facts) if at > now]
    return min(ends)


def _instants(line: Line, facts: Mapping[str, Value]) -> list[int]:
    """The instants at which a line about the clock may turn."""
    if "time.now" not in [reference.name for reference in line.references()]:
        return []
    others = [reference for reference in line.references() if reference.name != "time.now"]
    values: list[object] = [facts.get(reference.name) for reference in others]
    if isinstance(line.right, Literal):
        values.append(line.right.value)
    return [value for value in values if isinstance(value, int)]
