"""The evaluator against a naive second one, and the promises that must hold for every policy and every request."""

from __future__ import annotations

import copy
import itertools
import pathlib
import random
from typing import Any

import naive_policy as naive
import pytest

from flowengine.policy.evaluate import Engine
from flowengine.policy.merge import merge
from flowengine.policy.model import Duty, PolicySet, Site
from flowengine.policy.obligations import DutyScope, parse_duty
from flowengine.policy.outcomes import is_weaker, where
from flowengine.policy.parse import load
from flowengine.policy.tables import table

ROOT = pathlib.Path(__file__).parents[2] / "policies"


def shipped() -> PolicySet:
    return load(
        {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sorted(ROOT.rglob("*.toml"))}
    )


def agree_on(seed: int, sets: int, requests: int) -> tuple[int, int, int, int]:
    """Compare on random policies; also take away every fact of each. Returns cases, permits, removals, bad ones."""
    rng = random.Random(seed)
    cases = permits = removals = loosened = 0
    for _ in range(sets):
        policies = naive.random_policies(rng)
        engine = Engine(load(naive.as_toml(policies)))
        for _ in range(requests):
            use, facts, can = rng.choice(naive.USES), naive.random_facts(rng), naive.random_can(rng)
            decision = engine.decide(use, facts, can)
            expected = naive.decide(policies, use, facts, can)
            found = (
                decision.permit,
                [rule.rule.name for rule in decision.chosen],
                sorted({duty.type for duty in decision.duties}),
            )
            assert found == expected, (policies, use, facts, can)
            cases += 1
            permits += decision.permit
            for name in facts:
                without = {key: value for key, value in facts.items() if key != name}
                removals += 1
                loosened += engine.decide(use, without, can).permit and not decision.permit
    return cases, permits, removals, loosened


@pytest.mark.slow
def test_both_evaluators_agree_and_removing_a_fact_never_permits() -> None:
    cases, permits, removals, loosened = agree_on(seed=1, sets=50, requests=40)
    assert cases == 2000
    assert permits > cases // 20  # the cases are not all denied
    assert removals > 12_500
    assert loosened == 0


@pytest.mark.full
@pytest.mark.parametrize("seed", range(10))
def test_both_evaluators_agree_on_a_hundred_thousand_cases(seed: int) -> None:
    cases, permits, removals, loosened = agree_on(seed=1000 + seed, sets=200, requests=50)
    assert cases == 10_000
    assert permits > cases // 20
    assert removals > 60_000
    assert loosened == 0


def random_request(rng: random.Random, policies: PolicySet) -> dict[str, Any]:
    """Facts that the shipped policies speak about, with values from their own lines."""
    facts: dict[str, Any] = {"time.now": rng.choice([1_745_000_000, 1_772_452_800, 1_900_000_000])}
    labels = list(policies.labels)
    facts["data.labels"] = policies.close_labels(frozenset(rng.sample(labels, rng.randint(0, 3))))
    countries = ["FR", "DE", "US", "CN", "HK", "BR", "RU", "SG", "IN", "AU", "AE", "CY"]
    texts = {
        "agreement.mechanism": [
            "scc-2021",
            "cac-security-assessment",
            "cn-standard-contract",
            "restricted-transaction",
        ],
        "site.operator": ["hosp-a", "ror:02catss52", "archive-north", "cloud"],
        "recipient.org": ["ror:02catss52", "example-sanctioned-1", "other"],
        "request.purpose": ["research", "care", "operations", "DUO:0000006"],
        "site.spill": ["memory-only", "encrypted-disk"],
        "site.id": ["vault-1", "other"],
    }
    sets = {
        "data.contracts": ["EGA-DAA-1042", "DEF-17", "PARTNER-NET"],
        "site.certs": ["iso27001", "nist-800-171", "cisa-202-security"],
        "recipient.certifications": ["eu-us-dpf"],
        "agreement.kinds": ["baa", "cms-dua"],
        "data.cases": ["case-2231"],
    }
    for name, attribute in policies.attributes.items():
        if name in facts or rng.random() < 0.15:
            continue
        if attribute.domain == "country":
            value: Any = rng.choice(countries)
            facts[name] = frozenset([value]) if attribute.type == "set" else value
        elif attribute.type == "set":
            pool = sets.get(name, ["x"])
            facts[name] = frozenset(rng.sample(pool, rng.randint(0, len(pool))))
        elif attribute.type == "text":
            facts[name] = rng.choice(texts.get(name, ["x", "none"]))
        elif attribute.type == "flag":
            facts[name] = rng.random() < 0.5
        else:
            facts[name] = rng.choice([0, 12, 101, 20_000, 2_000_000_000, 2_000_000_000_000])
    for name in (
        "ledger.persons_after('personal.cn','outside:CN','calendar_year')",
        "ledger.persons_after('us.genomic','covered_person','rolling_12_months')",
        "ledger.persons_after('us.health','covered_person','rolling_12_months')",
        "approvals.valid_from_group('dac')",
    ):
        if rng.random() < 0.8:
            facts[name] = rng.choice([0, 2, 101, 50_000, 5_000_000])
    return facts


def remove_from_shipped(seed: int, requests: int) -> tuple[int, int, int]:
    policies = shipped()
    rng = random.Random(seed)
    everyone = [policy.id for policy in policies.policies]
    engines = [
        Engine(policies),
        *(Engine(policies, enforce=rng.sample(everyone, rng.randint(1, 6))) for _ in range(20)),
    ]
    denied = removals = loosened = 0
    for _ in range(requests):
        engine, use = rng.choice(engines), rng.choice(naive.USES)
        facts = random_request(rng, policies)
        if engine.decide(use, facts, None).permit:
            continue
        denied += 1
        for name in facts:
            without = {key: value for key, value in facts.items() if key != name}
            removals += 1
            loosened += engine.decide(use, without, None).permit
    return denied, removals, loosened


@pytest.mark.slow
def test_removing_a_fact_never_permits_under_the_shipped_policies() -> None:
    denied, removals, loosened = remove_from_shipped(seed=2, requests=150)
    assert denied > 50
    assert removals > 2500
    assert loosened == 0


@pytest.mark.full
def test_a_hundred_thousand_removals_under_the_shipped_policies_permit_nothing() -> None:
    _, removals, loosened = remove_from_shipped(seed=3, requests=3500)
    assert removals > 100_000
    assert loosened == 0


@pytest.mark.slow
def test_never_and_yes_hold_for_every_completion_of_the_facts() -> None:
    rng = random.Random(4)
    seen = {"yes": 0, "duties": 0, "if": 0, "never": 0}
    for _ in range(100):
        policies = naive.random_policies(rng)
        engine = Engine(load(naive.as_toml(policies)))
        for _ in range(10):
            use, can = rng.choice(naive.USES), naive.random_can(rng)
            full = {"time.now": naive.NOW, **naive.random_facts(rng)}
            known = {name: value for name, value in full.items() if name == "time.now" or rng.random() < 0.5}
            outcome = where(engine, use, known, can)
            seen[outcome.kind] += 1
            for _ in range(4):
                permit = engine.decide(use, {**naive.random_facts(rng), **known}, can).permit
                assert not (outcome.kind == "never" and permit)
                assert permit or outcome.kind not in ("yes", "duties")
    assert min(seen.values()) > 8


@pytest.mark.slow
def test_the_table_says_what_where_says_one_by_one() -> None:
    rng = random.Random(5)
    compared = 0
    for _ in range(25):
        policies = naive.random_policies(rng)
        engine = Engine(load(naive.as_toml(policies)))
        data = {}
        sites = {}
        for number in range(6):
            facts = naive.random_facts(rng)
            data[f"d{number}"] = {name: value for name, value in facts.items() if name.startswith("data.")}
            site = {name: value for name, value in facts.items() if name.startswith("site.")}
            sites[f"s{number}"] = Site(f"s{number}", site, naive.random_can(rng))
        request = {"time.now": naive.NOW, "agreement.tia_done": True}
        found = table(engine, data, sites, request)
        for use, (name, facts), site in itertools.product(naive.USES, data.items(), sites.values()):
            expected = where(engine, use, {**request, **facts, **site.facts}, site.can)
            got = found.outcome(use, name, site.name)
            assert (got.kind, got.rules, got.duties, got.needs, got.behind) == (
                expected.kind, expected.rules, expected.duties, expected.needs, expected.behind,
            )  # fmt: skip
            compared += 1
    assert compared == 25 * 5 * 36


def mutated(rng: random.Random, policies: list[naive.Policy]) -> list[naive.Policy]:
    """The same policies with one or two edits, looser or stricter."""
    policies = copy.deepcopy(policies)
    for _ in range(rng.randint(1, 2)):
        policy = rng.choice(policies)
        rule = rng.choice(policy.rules)
        edit = rng.randrange(8)
        if edit == 0 and rule.when:
            rule.when.pop(rng.randrange(len(rule.when)))
        elif edit == 1:
            rule.when.append(naive.random_condition(rng))
        elif edit == 2 and rule.unless:
            rule.unless.pop()
        elif edit == 3:
            rule.unless.append(naive.random_condition(rng))
        elif edit == 4 and len(policy.rules) > 1:
            policy.rules.remove(rule)
        elif edit == 5:
            policy.unlisted = "permit" if policy.unlisted == "deny" else "deny"
        elif edit == 6 and policy.scope:
            policy.scope.pop()
        elif edit == 7 and len(rule.then) > 1:
            rule.then.pop()
    return policies


def compare_versions(seed: int, pairs: int) -> tuple[int, int]:
    """No permit may be new where the comparison said that nothing got weaker."""
    rng = random.Random(seed)
    weaker = checked = 0
    for _ in range(pairs):
        old = naive.random_policies(rng)
        new = mutated(rng, old)
        before, after = Engine(load(naive.as_toml(old))), Engine(load(naive.as_toml(new)))
        for _ in range(8):
            use, can = rng.choice(naive.USES), naive.random_can(rng)
            facts = {**naive.random_facts(rng), "time.now": naive.NOW}
            known = {name: value for name, value in facts.items() if name == "time.now" or rng.random() < 0.5}
            if is_weaker(where(before, use, known, can), where(after, use, known, can)):
                weaker += 1
                continue
            for _ in range(10):
                full = {**naive.random_facts(rng), **known}
                checked += 1
                assert before.decide(use, full, can).permit or not after.decide(use, full, can).permit, (
                    old, new, use, full, can,
                )  # fmt: skip
    return weaker, checked


@pytest.mark.slow
def test_nothing_new_is_permitted_where_nothing_got_weaker() -> None:
    weaker, checked = compare_versions(seed=7, pairs=40)
    assert weaker > 5
    assert checked > 2000


@pytest.mark.full
def test_nothing_new_is_permitted_in_many_comparisons() -> None:
    compare_versions(seed=8, pairs=2000)


def bare(duties: tuple[Duty, ...]) -> list[tuple[str, tuple[tuple[str, object], ...]]]:
    return [(duty.type, duty.params) for duty in duties]


@pytest.mark.slow
def test_merging_duties_is_a_lattice() -> None:
    rng = random.Random(6)
    pool = [duty for policy in shipped().policies for rule in policy.rules for duty in rule.duties]
    scope = DutyScope(lambda name: None, list, lambda name: True, "UTC")
    clashing: list[dict[str, object]] = [
        {"encrypt": {"at": ["flight"], "suite": "fips"}},
        {"encrypt": {"at": ["rest"], "suite": "national"}},
        {"encrypt": {"at": ["rest"], "keys_in": ["FR", "DE"]}},
        {"encrypt": {"at": ["rest"], "keys_in": ["JP"]}},
        {"columns": {"drop": ["zip"], "generalise": {"birth_date": "decade"}}},
        {
            "columns": {
                "tokenise": ["zip"],
                "generalise": {"birth_date": "month", "name": "initial"},
                "key": "other",
            }
        },
        {"columns": {"generalise": {"name": "soundex"}}},
        {"relabel": {"remove": ["aggregate"]}},
        {"aggregate_only": {"by": ["age"], "min_group": 20}},
        {"log": {"evidence": "digest", "stays_in": ["IN"]}},
        {"log": {"evidence": "full", "stays_in": ["DE"], "keep": "2 years"}},
    ]
    pool += [parse_duty(entry, f"made-up/{index}", scope) for index, entry in enumerate(clashing)]
    collided = 0
    for _ in range(4000):
        some = rng.sample(pool, rng.randint(1, 5))
        merged = merge(some)
        shuffled = merge(rng.sample(some, len(some)))
        assert (merged.collision is None) == (shuffled.collision is None)
        if merged.collision is not None:
            collided += 1
            more = merge([*some, rng.choice(pool)])
            assert more.collision is not None  # more duties never help
            continue
        assert bare(shuffled.duties) == bare(merged.duties)
        assert bare(merge([*some, *some]).duties) == bare(merged.duties)
        half = len(some) // 2
        if half:
            parts = [*merge(some[:half]).duties, *merge(some[half:]).duties]
            assert bare(merge(parts).duties) == bare(merged.duties)
    assert 40 < collided < 3900
