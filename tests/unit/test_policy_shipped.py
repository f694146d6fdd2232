"""The policies that come with the project: they load, their tests pass, all forty rules are there, named."""

from __future__ import annotations

import pathlib
import re

import pytest

from flowengine.policy.cases import read_test_file
from flowengine.policy.duties import AGENT_CAN, NOT_AT
from flowengine.policy.evaluate import Engine
from flowengine.policy.model import PolicySet
from flowengine.policy.outcomes import where
from flowengine.policy.parse import load
from flowengine.policy.problems import Problem
from flowengine.policy.runner import Report, run

ROOT = pathlib.Path(__file__).parents[2] / "policies"
AT = 1_772_452_800  # 2026-03-02T12:00:00Z


@pytest.fixture(scope="module")
def policies() -> PolicySet:
    return load({path.relative_to(ROOT).as_posix(): path.read_bytes() for path in ROOT.rglob("*.toml")})


@pytest.fixture(scope="module")
def report(policies: PolicySet) -> Report:
    problems: list[Problem] = []
    files = [read_test_file(path, content, policies, problems) for path, content in policies.tests.items()]
    assert problems == []
    return run(policies, [file for file in files if file is not None])


@pytest.mark.slow
def test_all_their_tests_pass(report: Report) -> None:
    assert [(result.file, result.name, result.problems) for result in report.failed] == []
    assert len(report.results) > 150
    assert report.removals > 1000


def test_every_rule_has_a_test_where_it_decides_and_one_where_not(
    policies: PolicySet, report: Report
) -> None:
    assert report.untested == []
    assert report.unseen_lines == []  # every line was seen true, false and unknown
    rules = {rule.name for policy in policies.policies for rule in policy.rules}
    assert rules == report.coverage.decided & report.coverage.silent


@pytest.mark.parametrize("number", range(1, 41))
def test_each_of_the_forty_rules_has_named_tests(report: Report, number: int) -> None:
    named = [result for result in report.results if re.search(rf"rule {number}\b", result.name)]
    assert named, f"no test is named after rule {number}"
    assert all(result.passed for result in named)


def test_the_six_are_in_force_and_the_packs_are_drafts(policies: PolicySet) -> None:
    assert [policy.id for policy in policies.policies if policy.mode == "enforce"] == [
        "eu-personal", "cn-export", "us-bulk", "ega-study-1042", "itar", "house-clinical",
    ]  # fmt: skip
    assert all(policy.file.startswith("packs/") for policy in policies.policies if policy.mode != "enforce")
    assert sum(len(policy.rules) for policy in policies.policies if policy.mode == "enforce") == 24


def test_every_list_says_since_when_whence_and_that_nobody_reviewed_it(policies: PolicySet) -> None:
    for found in policies.lists.values():
        assert found.as_of, found.name
        assert found.source, found.name
        assert not found.reviewed, found.name


EXPECTED = {
    ("paris", "land"): "yes",
    ("paris", "relay"): "yes",
    ("sao-paulo", "land"): "yes",
    ("sao-paulo", "relay"): "never",
    ("virginia", "land"): "if",
    ("frankfurt-usop", "land"): "if",
    ("singapore-relay", "relay"): "duties",
    ("moscow-relay", "relay"): "never",
}
CLAUSES = (
    "agreement.mechanism in @gdpr_art46",
    "agreement.tia_done is true",
    "agreement.expires after time.now",
)


def test_where_answers_for_data_with_only_the_label_personal_eu(policies: PolicySet) -> None:
    engine = Engine(policies)
    data = {"data.labels": frozenset(["personal.eu"]), "data.contracts": frozenset[str](), "time.now": AT}
    found = {
        (site, use): where(engine, use, {**data, **policies.sites[site].facts}, policies.sites[site].can)
        for site, use in EXPECTED
    }
    assert {key: outcome.kind for key, outcome in found.items()} == EXPECTED
    (need,) = found["virginia", "land"].needs
    # No Canada-only line for a site in the US.
    assert set(need.alternatives) == {CLAUSES, ("recipient.certifications includes 'eu-us-dpf'",)}
    (need,) = found["frankfurt-usop", "land"].needs
    assert need.alternatives == (CLAUSES,)
    relay = found["singapore-relay", "relay"]
    assert [duty.type for duty in relay.duties] == ["encrypt", "spill"]
    assert dict(relay.duties[0].params) == {"at": ("flight",), "end_to_end": True}
    assert found["moscow-relay", "relay"].never[0].lines == ("site.country not in @never_relay",)


def test_the_tests_run_at_another_date_show_what_expires(policies: PolicySet) -> None:
    problems: list[Problem] = []
    name = "1-eu-personal.test.toml"
    file = read_test_file(name, policies.tests[name], policies, problems)
    assert file is not None
    later = run(policies, [file], at=AT + 365 * 86400)
    assert [result.name for result in later.failed] == ["US with clauses and TIA"]


def test_what_agents_can_do_permits_sealed_copies_under_clauses_and_nothing_in_the_clear(
    policies: PolicySet,
) -> None:
    """The rules that ask for sealing at rest: an agent can hold and relay so; where data land they lie as they are."""
    engine = Engine(policies, enforce=["eu-personal"])
    facts = {
        "data.labels": frozenset(["personal.eu"]), "data.contracts": frozenset[str](), "time.now": AT,
        "agreement.mechanism": "scc-2021", "agreement.tia_done": True, "agreement.expires": AT + 86400,
        "recipient.certifications": frozenset[str](), **policies.sites["virginia"].facts,
    }  # fmt: skip
    verdicts = {}
    for use in ("hold", "land"):
        decision = engine.decide(use, facts, AGENT_CAN - NOT_AT[use])
        verdicts[use] = decision.permit
    assert verdicts == {"hold": True, "land": False}
    assert "encrypt.rest" in AGENT_CAN - NOT_AT.get("relay", frozenset())
