"""Residency policies: what may be where, decided the same way by everyone, explained, tested and proved.

Pure: bytes and values in, values out. Time, sites and facts are arguments; only `zones.system_zone` touches the
machine, and callers may pass another function.

>>> policies = load({"p.toml": b'''
... [policy]
... id = "home"
... version = "1"
... title = "Stays in France"
... owner = "dpo@example.org"
... applies_to = ["data.labels includes 'secret'"]
... effective = 2026-01-01
... review_by = 2027-01-01
...
... [[rule]]
... id = "france"
... effect = "permit"
... on = ["land"]
... when = ["site.country is 'FR'"]
... why = "Inside France"
... '''})
>>> facts = {"data.labels": frozenset(["secret"]), "site.country": "DE", "time.now": 1772452800}
>>> decision = Engine(policies).decide("land", facts, can=frozenset())
>>> decision.permit, reasons(decision).failing
(False, ("site.country is 'FR'",))
"""

from __future__ import annotations

from flowengine.policy.evaluate import Decision, Engine
from flowengine.policy.facts import Statement, resolve
from flowengine.policy.model import USES, Duty, PolicySet, Value
from flowengine.policy.outcomes import Outcome, where
from flowengine.policy.parse import load
from flowengine.policy.reasons import Reasons, reasons
from flowengine.policy.tables import Table, table

__all__ = [
    "USES",
    "Decision",
    "Duty",
    "Engine",
    "Outcome",
    "PolicySet",
    "Reasons",
    "Statement",
    "Table",
    "Value",
    "load",
    "reasons",
    "resolve",
    "table",
    "where",
]
