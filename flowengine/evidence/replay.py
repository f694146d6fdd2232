"""Evaluating recorded decisions anew: the recorded facts, the recorded bundle, and the same answer or a finding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from flowengine.errors import FlowError
from flowengine.evidence.canonical import canonical
from flowengine.evidence.chain import Record
from flowengine.evidence.decisions import computed, recall
from flowengine.evidence.private import Kept
from flowengine.evidence.suites import Suite
from flowengine.policy import USES, Engine, PolicySet, load
from flowengine.policy.bundle import open_bundle
from flowengine.policy.explain import ENGINE
from flowengine.policy.explain import record as explained
from flowengine.policy.model import leaves

__all__ = ["Replayer"]

Outcome = Literal["evaluated", "recorded", "refused"]
Problems = list[tuple[str, str]]


class Replayer:
    """Evaluates decisions by the bundles and values at hand.

    Args:
        bundles: archives by digest.
        key: of keyed digests; empty away from the origin.
        kept: values of digests; empty away from the origin.
    """

    def __init__(
        self, bundles: Mapping[str, bytes], key: bytes = b"", kept: Mapping[str, Kept] | None = None
    ) -> None:
        self._bundles = bundles
        self._key = key
        self._kept = kept or {}
        self._engines: dict[str, tuple[Engine, frozenset[str]] | str] = {}

    def lacks(self, digest: str) -> bool:
        """Whether policies that are named are not at hand: nothing can be said of what was decided by them."""
        return bool(digest) and digest not in self._bundles

    def bundle_problem(self, digest: str) -> str:
        """Why a bundle cannot be evaluated by; empty where it can."""
        found = self._engine(digest)
        return found if isinstance(found, str) else ""

    def _engine(self, digest: str) -> tuple[Engine, frozenset[str]] | str:
        if digest not in self._engines:
            self._engines[digest] = self._opened(digest)
        return self._engines[digest]

    def _opened(self, digest: str) -> tuple[Engine, frozenset[str]] | str:
        content = self._bundles.get(digest)
        if content is None:
            return f"the bundle {digest[:23]}… is not there"
        try:
            opened = open_bundle(content)
            if opened.digest != digest:
                return f"what is kept as bundle {digest[:23]}… is another one"
            policies = load(opened.files)
        except FlowError as error:
            return f"the bundle {digest[:23]}… cannot be used: {error.message}"
        return Engine(policies), _named(policies)

    def replay(self, record: Record, suite: Suite) -> tuple[Outcome, Problems]:
        """What became of a decision, and what is wrong with it."""
        if record.get("refused"):
            if record.get("decision") != "deny":
                return "refused", [("decision", "what was refused without a policy is no permit")]
            return "refused", []
        found = self._engine(str(record.get("bundle")))
        if isinstance(found, str):
            return "recorded", [("bundle", found)]
        engine, named = found
        ask, can = record.get("ask"), record.get("can")
        use = ask.get("use") if isinstance(ask, dict) else None
        try:
            recalled = recall(
                engine.policies, record.get("facts"), suite=suite, key=self._key, kept=self._kept
            )
            if not isinstance(use, str) or use not in USES:
                raise ValueError("it names no use")
            if can is not None and not (isinstance(can, list) and all(isinstance(word, str) for word in can)):
                raise ValueError("what the agent can do is no list of words")
        except ValueError as error:
            return "recorded", [("facts", f"it cannot be evaluated: {error}")]
        if recalled.wrong:
            return "recorded", [("facts", why) for why in recalled.wrong]
        if named.intersection(recalled.concealed):
            return "recorded", []
        decision = engine.decide(use, recalled.facts, None if can is None else frozenset(can))
        again = computed(explained(engine, decision))
        return "evaluated", _differences(record, again)


def _differences(record: Record, again: Mapping[str, object]) -> Problems:
    if record.get("decision") != again["decision"]:
        text = again["text"]
        assert isinstance(text, dict)
        return [
            (
                "decision",
                f"it says {record.get('decision')}, and by its facts and its bundle it is {again['decision']}: "
                f"{text['en']}",
            )
        ]
    # Another version may word things otherwise; what it decides and demands it may not change.
    compared = again if record.get("engine") == ENGINE else {"duties": again["duties"]}
    differing = [name for name, value in compared.items() if canonical(record.get(name)) != canonical(value)]
    if differing:
        return [("decision", f"evaluated anew, {', '.join(differing)} come out otherwise")]
    return []


def _named(policies: PolicySet) -> frozenset[str]:
    """All facts that any policy looks at."""
    return frozenset(
        reference.name
        for policy in policies.policies
        for part in (*policy.scope, *(part for rule in policy.rules for part in (*rule.when, *rule.unless)))
        for line in leaves(part)
        for reference in line.references()
    )
