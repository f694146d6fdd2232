"""The known pitfalls of residency rules, one by one."""

from __future__ import annotations

import json
import pathlib
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from flowengine.errors import AuthenticationError, PolicyInvalid
from flowengine.policy.approvals import Approval, Request, duties_digest, open_approvals, valid_approvals
from flowengine.policy.evaluate import Engine
from flowengine.policy.explain import explain, record, valid_until
from flowengine.policy.facts import Statement, clock_statement, has_key, inherit_labels, resolve
from flowengine.policy.ledger import Ledger, Movement, counters_of
from flowengine.policy.lint import lint
from flowengine.policy.merge import open_intervals
from flowengine.policy.model import Duty, PolicySet
from flowengine.policy.obligations import OBLIGATIONS
from flowengine.policy.outcomes import where
from flowengine.policy.parse import load
from flowengine.policy.phrases import duty_text, line_text
from flowengine.policy.reasons import reasons
from flowengine.policy.tables import changes, table

ROOT = pathlib.Path(__file__).parents[2] / "policies"
FILES = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sorted(ROOT.rglob("*.toml"))}
POLICIES = load(FILES)
AT = 1_772_452_800  # 2026-03-02T12:00:00Z
DAY = 86400
EU = {"data.labels": frozenset(["personal.eu"]), "data.contracts": frozenset[str](), "time.now": AT}
VIRGINIA = dict(POLICIES.sites["virginia"].facts)
PARIS = dict(POLICIES.sites["paris"].facts)
CLAUSES = {"agreement.mechanism": "scc-2021", "agreement.tia_done": True, "agreement.expires": AT + DAY}


def only(*names: str) -> Engine:
    return Engine(POLICIES, enforce=names)


def changed(path: str, old: str, new: str) -> PolicySet:
    text = FILES[path].decode()
    assert old in text
    return load({**FILES, path: text.replace(old, new).encode()})


def policy_text(rules: str, header: str = "", name: str = "x") -> bytes:
    return f"""[policy]
id = "{name}"
version = "1"
title = "x"
owner = "x"
applies_to = []
effective = 2026-01-01
review_by = 2027-01-01
{header}
{rules}
""".encode()


PERMIT = '[[rule]]\nid = "ok"\neffect = "permit"\non = ["land"]\nwhen = [{}]\nthen = [{}]\nwhy = "x"\n'


@pytest.mark.parametrize(
    ("statements", "why"),
    [
        ([], None),
        ([Statement("agreement.mechanism", "scc-2021", "agreement:1", AT - DAY, until=AT)], "expired"),
        ([Statement("agreement.mechanism", "scc-2021", "request:u", AT - DAY)], "not entitled"),
        ([Statement("agreement.mechanism", "scc-2021", "agreement:1", AT + 60)], "from the future"),
        (
            [
                Statement("agreement.mechanism", "scc-2021", "agreement:1", AT - DAY),
                Statement("agreement.mechanism", "none", "agreement:2", AT - DAY),
            ],
            "contradict",
        ),
        ([Statement("agreement.mechanism", True, "agreement:1", AT - DAY)], "no text"),
    ],
)
def test_01_unknown_fails_closed_whatever_makes_it_unknown(
    statements: list[Statement], why: str | None
) -> None:
    rest = [
        Statement("agreement.tia_done", True, "agreement:1", AT - DAY),
        Statement("agreement.expires", AT + DAY, "agreement:1", AT - DAY),
    ]
    resolved = resolve(POLICIES, [*statements, *rest], AT)
    assert "agreement.mechanism" not in resolved.facts
    assert (why or "") in resolved.unknown.get("agreement.mechanism", "")
    decision = only("eu-personal").decide("land", {**EU, **VIRGINIA, **resolved.facts}, None)
    assert not decision.permit
    assert "agreement.mechanism" in reasons(decision).missing


def test_01_forbids_fire_on_unknown_also_when_nested() -> None:
    rule = '[[rule]]\nid = "no"\neffect = "forbid"\non = ["land"]\nwhy = "x"\nwhen = ['
    rule += '{any = [{all = ["data.persons > 5", {not = "site.has_key is false"}]}]}]\n'
    engine = Engine(load({"x.toml": policy_text(rule + PERMIT.format("", ""))}))
    for facts, permit in (
        ({}, False),
        ({"data.persons": 6}, False),
        ({"site.has_key": True}, False),
        ({"data.persons": 6, "site.has_key": True}, False),
        ({"data.persons": 5}, True),
        ({"site.has_key": False}, True),
    ):
        assert engine.decide("land", {"time.now": AT, **facts}, None).permit is permit


def test_02_unlabelled_data_is_denied() -> None:
    engine = Engine(
        POLICIES,
        enforce=[policy.id for policy in POLICIES.policies if policy.id not in ("erasure", "sanctions")],
    )
    facts = {"time.now": AT, "data.labels": frozenset[str](), "data.contracts": frozenset[str]()}
    facts |= {"data.cases": frozenset[str](), "data.collected_in": frozenset(["FR"])}
    decision = engine.decide("land", {**facts, **PARIS}, None)
    assert not decision.permit
    assert reasons(decision).because == ("no policy permits",)
    assert not Engine(POLICIES).decide("land", {"time.now": AT, **PARIS}, None).permit


def test_03_location_is_not_jurisdiction() -> None:
    names = (
        "country",
        "operator_countries",
        "owner_countries",
        "admin_countries",
        "admin_nationalities",
        "key_countries",
    )
    assert all(f"site.{name}" in POLICIES.attributes for name in names)
    foreign = {**PARIS, "site.operator_countries": frozenset(["US"])}
    assert only("eu-personal").decide("process", {**EU, **PARIS}, None).permit
    assert not only("eu-personal").decide("process", {**EU, **foreign}, None).permit
    # Nobody answers to no law: an empty set is no answer.
    nobody = {**PARIS, "site.operator_countries": frozenset[str]()}
    assert not only("eu-personal").decide("process", {**EU, **nobody}, None).permit


def test_04_country_codes_are_not_legal_territories() -> None:
    eea = POLICIES.lists["eea"].members
    assert {"RE", "GP", "MQ", "GF", "YT"} <= eea
    assert not {"GL", "FO", "NC"} & eea
    assert {"HK", "MO"} <= POLICIES.lists["us_concern"].members
    outside = next(ref for ref in counters_of(POLICIES) if "outside:CN" in ref.arguments)
    move = Movement("t", "c", "p", "HK", frozenset(["personal.cn"]), 7, 0)
    assert Ledger().after(outside, move, AT, UTC) == 7
    with pytest.raises(PolicyInvalid, match="the EU is no country; use a list: @eea"):
        load({"x.toml": policy_text(PERMIT.format("\"site.country is 'EU'\"", ""))})


def test_05_store_and_forward_is_storage_and_an_unknown_path_is_excluded() -> None:
    assert not has_key("relay", end_to_end=True)
    assert has_key("relay", end_to_end=True, recompresses=True)
    assert has_key("relay", end_to_end=False)
    crypto = {"crypto.end_to_end": True, "crypto.strength_bits": 256, "crypto.fips140": True}
    facts = {
        "data.labels": frozenset(["itar"]),
        "time.now": AT,
        "site.country": "CY",
        "site.has_key": False,
        **crypto,
    }
    itar = only("itar")
    assert itar.decide("relay", {**facts, "site.spill": "memory-only"}, None).permit
    assert not itar.decide("relay", {**facts, "site.spill": "encrypted-disk"}, None).permit
    assert not itar.decide("relay", facts, None).permit  # nobody says what it writes


def test_06_encryption_does_not_always_help() -> None:
    counter = "ledger.persons_after('us.genomic','covered_person','rolling_12_months')"
    facts = {"data.labels": frozenset(["us.genomic", "public"]), "time.now": AT, counter: 101}
    facts |= {"site.country": "CN", "site.has_key": False, "site.operator_countries": frozenset(["CN"])}
    facts |= {"crypto.end_to_end": True, "recipient.covered_person": False, "recipient.foreign": True}
    decision = only("us-bulk", "public-data").decide("hold", facts, None)
    assert reasons(decision).because == ("us-bulk/omic",)


def test_07_a_dedup_hit_is_a_new_copy() -> None:
    facts = {**EU, **VIRGINIA, "transfer.bytes": 0}
    assert not only("eu-personal").decide("land", facts, None).permit
    persons = next(
        ref for ref in counters_of(POLICIES) if ref.counter and ref.counter.name == "ledger.persons_after"
    )
    label = persons.arguments[0]
    hit = Movement("t", "c", "p", "HK", frozenset([label]), 400, 0)
    assert Ledger().after(persons, hit, AT, UTC) == 400


def test_08_derived_data_inherits_and_joins_make_new_labels() -> None:
    health, genomic = frozenset(["us.health", "clinical"]), frozenset(["us.genomic"])
    assert inherit_labels(POLICIES, [health, genomic]) == health | genomic | {"us.identifiers"}
    assert POLICIES.close_labels(frozenset(["cn.core"])) == {"cn.core", "cn.important"}
    resolved = resolve(
        POLICIES, [Statement("data.labels", frozenset(["personal.cn.sensitive"]), "label:o", AT)], AT
    )
    assert resolved.facts["data.labels"] == {"personal.cn.sensitive", "personal.cn"}


def test_09_counters_reserve_and_windows_reset_in_the_zone_of_the_law() -> None:
    shanghai = ZoneInfo("Asia/Shanghai")
    year = next(
        ref
        for ref in counters_of(POLICIES)
        if ref.zone == "Asia/Shanghai" and ref.arguments[0] == "personal.cn"
    )
    new_year = int(datetime(2026, 1, 1, tzinfo=shanghai).timestamp())
    labels = frozenset(["personal.cn"])

    def move(name: str) -> Movement:
        return Movement(name, "ctl", "partner", "DE", labels, 60_000, 1)

    # Two plans at the same time: the second sees the reservation of the first.
    ledger = Ledger().reserve(move("one"), AT, AT + 600)
    assert ledger.after(year, move("one"), AT, shanghai) == 60_000
    assert ledger.after(year, move("two"), AT, shanghai) == 120_000
    assert ledger.release("one").after(year, move("two"), AT, shanghai) == 60_000
    assert ledger.after(year, move("two"), AT + 600, shanghai) == 60_000  # the reservation has expired
    # What landed stays, until the year begins anew at midnight in Shanghai.
    landed = Ledger().reserve(move("one"), new_year - 60, new_year + 60).commit("one", new_year - 30)
    assert landed.release("one") == landed
    assert landed.after(year, move("two"), new_year - 1, shanghai) == 120_000
    assert landed.after(year, move("two"), new_year, shanghai) == 60_000
    assert landed.after(year, replace(move("two"), persons=None), new_year, shanghai) is None


def test_10_permits_are_leases_and_a_changed_fact_changes_the_decision() -> None:
    engine = only("eu-personal")
    facts = {**EU, **VIRGINIA, **CLAUSES, "recipient.certifications": frozenset[str]()}
    decision = engine.decide("land", facts, None)
    assert decision.permit
    assert valid_until(decision) == AT + 300
    soon = engine.decide("land", {**facts, "agreement.expires": AT + 20}, None)
    assert valid_until(soon) == AT + 20
    assert not engine.decide(
        "land", {**facts, "agreement.expires": AT + 20, "time.now": AT + 20}, None
    ).permit
    policy = POLICIES.policy("erasure")
    assert policy is not None
    assert policy.rules[0].stop == "stop-now"


def test_11_clocks_and_daylight_saving() -> None:
    assert clock_statement(AT, error_ms=1001) == []
    facts = {"data.labels": frozenset(["public", "embargo"]), "data.embargo_until": AT - DAY}
    engine = only("embargo", "public-data")
    assert engine.decide("land", {**facts, "time.now": AT}, None).permit
    assert not engine.decide("land", facts, None).permit  # no trusted clock: the embargo holds
    zones = {"Europe/Berlin": ZoneInfo("Europe/Berlin")}
    spring = int(datetime(2026, 3, 28, 12, tzinfo=UTC).timestamp())
    hours = [
        (end - start) / 3600 for start, end in open_intervals(["Europe/Berlin 20:00-06:00"], spring, zones, 3)
    ]
    assert hours == [9.0, 10.0, 10.0]
    autumn = int(datetime(2026, 10, 24, 12, tzinfo=UTC).timestamp())
    hours = [
        (end - start) / 3600 for start, end in open_intervals(["Europe/Berlin 20:00-06:00"], autumn, zones, 2)
    ]
    assert hours == [11.0, 10.0]


def test_12_what_a_coordinator_or_site_claims_for_itself_is_not_heard() -> None:
    claims = [
        Statement("site.country", "FR", "site:x", AT),
        Statement("site.country", "FR", "request:coordinator", AT),
        Statement("site.has_key", False, "registry", AT),
        Statement("data.labels", frozenset(["public"]), "request:u", AT),
    ]
    assert resolve(POLICIES, claims, AT).facts == {}
    pinned = Statement("site.operator_countries", frozenset(["FR"]), "registry", AT)
    own = Statement("site.operator_countries", frozenset(["FR", "US"]), "site:x", AT)
    assert resolve(POLICIES, [pinned, own], AT).facts["site.operator_countries"] == {
        "FR",
        "US",
    }  # worse: believed
    certs = Statement("site.certs", frozenset(["iso27001"]), "registry", AT)
    more = Statement("site.certs", frozenset(["iso27001", "nist-800-171"]), "site:x", AT)
    assert resolve(POLICIES, [certs, more], AT).facts["site.certs"] == {"iso27001"}  # better: not believed
    zone = [
        Statement("site.country", "FR", "registry", AT),
        Statement("site.country", "DE", "attestation:a", AT),
    ]
    assert "contradict" in resolve(POLICIES, zone, AT).unknown["site.country"]


def test_13_evidence_about_data_may_have_to_stay_too() -> None:
    facts = {"data.labels": frozenset(["in.traffic"]), "time.now": AT, "site.country": "IN"}
    decision = only("india-sdf").decide("land", facts, None)
    assert dict(decision.duties[0].params) == {"evidence": "digest", "stays_in": ("IN",)}


def test_14_a_duty_with_proof_needs_an_agent_that_can_prove() -> None:
    facts = {"data.labels": frozenset(["personal.eu"]), "time.now": AT, **PARIS, "site.operator": "partner-x"}
    engine = only("house-personal", "eu-gdpr")
    assert engine.decide("land", facts, frozenset(["delete", "proof.certificate"])).permit
    decision = engine.decide("land", facts, frozenset(["delete"]))
    assert reasons(decision) == replace(
        reasons(decision),
        kind="unsupported obligation",
        because=("unsupported obligation: proof.certificate",),
    )


def test_15_other_columns_are_other_duties() -> None:
    one = Duty("columns", (("drop", ("name",)),), ("a/b",))
    two = Duty("columns", (("drop", ("name", "phone")),), ("a/b",))
    assert duties_digest([one]) == duties_digest([replace(one, origins=("c/d",))])
    assert duties_digest([one]) != duties_digest([two])


def test_16_a_loosened_cell_is_found() -> None:
    looser = changed("1-eu-personal.toml", '"agreement.tia_done is true", ', "")
    data = {"eu": {"data.labels": frozenset(["personal.eu"]), "data.contracts": frozenset[str]()}}
    tables = [
        table(Engine(policies), data, POLICIES.sites, {"time.now": AT}) for policies in (POLICIES, looser)
    ]
    found = list(changes(*tables))
    assert {change.use for change in found} == {"hold", "land"}
    assert all(change.weaker for change in found)
    back = list(changes(tables[1], tables[0]))
    assert len(back) == len(found)
    assert not any(change.weaker for change in back)


def test_17_two_regimes_in_conflict_deny_and_name_both() -> None:
    delete = PERMIT.format("", '{delete_after = "30 days"}')
    keep = '[[rule]]\nid = "keep"\neffect = "require"\non = ["land"]\nwhen = []\nthen = [{retain = "10 years"}]\nwhy = "x"\n'
    files = {
        "a.toml": policy_text(delete, name="law-a"),
        "b.toml": policy_text(keep, 'unlisted = "permit"', "law-b"),
    }
    decision = Engine(load(files)).decide("land", {"time.now": AT}, None)
    why = reasons(decision)
    assert (decision.permit, why.kind) == (False, "colliding obligations")
    assert "law-a/ok" in why.because[0]
    assert "law-b/keep" in why.because[0]


def test_18_stale_lists_turn_permits_unknown_where_the_policy_says_so() -> None:
    lists = b'[list.ok]\nas_of = 2026-01-01\nsource = "s"\nreview_by = 2026-02-01\ndomain = "country"\nmembers = ["FR"]\n'
    rules = PERMIT.format('"site.country in @ok"', "")
    rules += (
        '[[rule]]\nid = "no"\neffect = "forbid"\non = ["relay"]\nwhen = ["site.country in @ok"]\nwhy = "x"\n'
    )
    rules += '[[rule]]\nid = "r"\neffect = "permit"\non = ["relay"]\nwhen = []\nwhy = "x"\n'
    early, late = AT - 60 * DAY, AT
    for on_stale, permits_late in (("warn", True), ("unknown", False)):
        engine = Engine(
            load({"lists/l.toml": lists, "x.toml": policy_text(rules, f'on_stale = "{on_stale}"')})
        )
        assert engine.decide("land", {"time.now": early + 20 * DAY, "site.country": "FR"}, None).permit
        assert engine.decide("land", {"time.now": late, "site.country": "FR"}, None).permit is permits_late
        assert not engine.decide("relay", {"time.now": late, "site.country": "FR"}, None).permit
        assert engine.decide("relay", {"time.now": late, "site.country": "DE"}, None).permit


def test_19_approvals_are_bound_and_the_requester_is_none_of_them() -> None:
    duty = Duty("approve", (("from", ("lead", "privacy")), ("people", 2), ("valid", 14 * DAY)), ("a/b",))
    request = Request("d1", "org", "research", "sha256:1", "u:req")

    def yes(who: str, group: str, **other: Any) -> Approval:
        return replace(
            Approval(who, frozenset([group]), "d1", "org", "research", "sha256:1", AT - DAY, AT + 60 * DAY),
            **other,
        )

    good = [yes("u:1", "privacy"), yes("u:2", "lead")]
    assert open_approvals(duty, good, request, AT) == []
    for bad in (
        yes("u:req", "lead"),
        yes("u:2", "lead", dataset_digest="d2"),
        yes("u:2", "lead", duties_digest="sha256:2"),
        yes("u:2", "lead", given=AT + 1),
        yes("u:2", "lead", given=AT - 14 * DAY),
        yes("u:2", "lead", until=AT),
        yes("u:1", "lead"),
        yes("u:2", "privacy"),
    ):
        assert open_approvals(duty, [good[0], bad], request, AT) != []
    late = replace(request, started=AT - 2 * DAY)
    assert valid_approvals(good, late, AT) == []  # after the fact
    both = yes("u:1", "privacy", groups=frozenset(["privacy", "lead"]))
    assert open_approvals(duty, [both], request, AT) != []  # one person is not two


def test_20_explanations_hide_secret_lists_from_the_requester() -> None:
    engine = only("sanctions", "public-data")
    facts = {"data.labels": frozenset(["public"]), "time.now": AT, "data.cases": frozenset(["case-9"])}
    facts |= {"recipient.org": "example-sanctioned-1", "recipient.sanctioned_share": 0}
    decision = engine.decide("land", facts, None)
    shown, full = (json.dumps(record(engine, decision, auditor)) for auditor in (False, True))
    assert "@sanctioned_parties" not in shown
    assert "case-9" not in shown
    assert "@sanctioned_parties" in full
    assert "case-9" in full
    assert "sanctions/sanctioned" in shown  # the rule and its reason are no secret


def test_21_shadow_denies_nothing_and_its_age_is_reported() -> None:
    shadow = changed("1-eu-personal.toml", 'unlisted   = "deny"', 'mode = "shadow"\nunlisted   = "deny"')
    labels = frozenset(["personal.eu", "clinical"])
    facts = {**EU, **VIRGINIA, "data.labels": labels, "site.operator": "hosp-a", "request.purpose": "care"}
    assert not Engine(POLICIES).decide("land", facts, None).permit
    decision = Engine(shadow).decide("land", facts, None)
    assert decision.permit
    assert [(trace.policy.id, trace.denies) for trace in decision.shadow] == [("eu-personal", True)]
    (found,) = [problem for problem in lint(shadow, AT) if problem.code == "shadow"]
    assert "29 days after it took effect" in found.message


def test_22_texts_follow_from_the_rules_in_two_languages() -> None:
    for policy in POLICIES.policies:
        for rule in policy.rules:
            for duty in rule.duties:
                assert duty_text(duty, "en") != duty_text(duty, "zh")
                assert "{" not in duty_text(duty, "en") + duty_text(duty, "zh")
    for trace in only("eu-personal").decide("land", {**EU, **VIRGINIA}, None).traces:
        for rule in trace.rules:
            for line in rule.compiled.lines:
                assert line_text(line, POLICIES, "en") != line_text(line, POLICIES, "zh")
    engine = only("eu-personal")
    denied = {**EU, **PARIS, "site.operator_countries": frozenset(["US"]), "agreement.tia_done": False}
    text = explain(engine, engine.decide("process", denied, None), "en")
    assert "the countries whose law the operator answers to are all on the list" in text
    assert "未获许可" in explain(engine, engine.decide("process", denied, None), "zh")
    moved = changed(
        "1-eu-personal.toml",
        '"site.operator_countries subset of @eea_or_adequate"',
        "\"site.country is 'FR'\"",
    )
    assert "operator" not in explain(
        Engine(moved), Engine(moved).decide("process", {**denied, "site.country": "DE"}, None)
    )


def test_every_duty_type_has_a_phrase() -> None:
    tested = {duty.type for policy in POLICIES.policies for rule in policy.rules for duty in rule.duties}
    assert tested | {"retain"} == set(OBLIGATIONS)


def test_unsigned_bundles_are_nobodys_word() -> None:
    from flowengine.policy.bundle import build, verify

    with pytest.raises(AuthenticationError, match="signed by: nobody"):
        verify(build(FILES, 1, AT + DAY), {}, AT)


def test_where_may_not_guess_what_the_clock_says() -> None:
    assert (
        where(
            only("eu-personal"),
            "land",
            {key: value for key, value in {**EU, **PARIS}.items() if key != "time.now"},
            None,
        ).kind
        == "if"
    )
