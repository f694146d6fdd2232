"""Bundles, windows, conditions, lint, remedies, reach: the parts that pitfalls do not cover."""

from __future__ import annotations

import io
import pathlib
import tarfile
import time
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from flowengine.errors import AuthenticationError, Denied, Exit, IntegrityError, UsageError, exit_code
from flowengine.policy.bundle import build, open_bundle, sign, verify
from flowengine.policy.conditions import LineError, Scope, parse_line
from flowengine.policy.differences import differences, list_changes
from flowengine.policy.evaluate import Engine
from flowengine.policy.explain import record, remedies
from flowengine.policy.ledger import Ledger, Movement, counters_of, window_start
from flowengine.policy.lint import lint, overdue
from flowengine.policy.model import NamedList, Site
from flowengine.policy.parse import load
from flowengine.policy.reach import can_reach
from flowengine.policy.reasons import reasons
from flowengine.policy.tables import Change, changes, table
from flowengine.policy.vocabulary import ATTRIBUTES

ROOT = pathlib.Path(__file__).parents[2] / "policies"
FILES = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sorted(ROOT.rglob("*.toml"))}
POLICIES = load(FILES)
AT = 1_772_452_800  # 2026-03-02T12:00:00Z
DAY = 86400
OWNER, SECURITY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3))
TRUST = {"policy-owner": [OWNER.public_key()], "security": [SECURITY.public_key()]}


def signed(version: int = 7, not_after: int = AT + DAY) -> bytes:
    bundle = build(FILES, version, not_after)
    return sign(sign(bundle, "policy-owner", OWNER), "security", SECURITY)


def test_a_bundle_is_deterministic_and_signing_order_does_not_matter() -> None:
    assert build(FILES, 7, AT) == build(dict(reversed(list(FILES.items()))), 7, AT)
    other = sign(sign(build(FILES, 7, AT + DAY), "security", SECURITY), "policy-owner", OWNER)
    assert other == signed()
    opened = verify(signed(), TRUST, AT, newest_version=6)
    assert (opened.version, opened.files) == (7, FILES)
    assert [policy.id for policy in load(opened.files).policies] == [
        policy.id for policy in POLICIES.policies
    ]


@pytest.mark.parametrize(
    ("bundle", "now", "newest", "error", "code", "match"),
    [
        (build(FILES, 7, AT + DAY), AT, 0, AuthenticationError, Exit.AUTHENTICATION, "no key trusted for policy-owner"),
        (
            sign(build(FILES, 7, AT + DAY), "policy-owner", OWNER),
            AT, 0, AuthenticationError, Exit.AUTHENTICATION, "no key trusted for security",
        ),
        (sign(signed(), "security", OTHER), AT, 0, AuthenticationError, Exit.AUTHENTICATION, "security"),
        (signed(), AT + DAY, 0, Denied, Exit.DENIED, "has expired"),
        (signed(), AT, 7, Denied, Exit.DENIED, "not newer than 7"),
    ],
)  # fmt: skip
def test_a_bundle_is_refused(
    bundle: bytes, now: int, newest: int, error: type[Exception], code: Exit, match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        verify(bundle, TRUST, now, newest)
    assert exit_code(caught.value) == code


def test_one_key_is_not_two_roles() -> None:
    bundle = sign(sign(build(FILES, 7, AT + DAY), "policy-owner", OWNER), "security", OWNER)
    with pytest.raises(AuthenticationError, match="one key signed for both roles"):
        verify(bundle, {"policy-owner": [OWNER.public_key()], "security": [OWNER.public_key()]}, AT)


def test_every_changed_byte_of_content_is_noticed() -> None:
    good = signed()
    for needle in (b"eu-personal", b'"version":7', b'members = ["AT"', b"not_after"):
        at = good.index(needle)
        bad = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        with pytest.raises(IntegrityError):
            verify(bad, TRUST, AT)
    with pytest.raises(IntegrityError, match=r"no archive|lock"):
        open_bundle(b"")
    with pytest.raises(IntegrityError):
        open_bundle(good[:5000])


def test_a_bundle_with_odd_members_is_refused() -> None:
    def repacked(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(signed())) as old, tarfile.open(fileobj=out, mode="w") as new:
            for member in old:
                new.addfile(member, old.extractfile(member))
            info = tarfile.TarInfo(name)
            info.size, info.type = len(content) if kind == tarfile.REGTYPE else 0, kind
            new.addfile(info, io.BytesIO(content))
        return out.getvalue()

    for name, kind in (
        ("../escape.toml", tarfile.REGTYPE), ("/etc/x.toml", tarfile.REGTYPE), ("extra.toml", tarfile.REGTYPE),
        ("labels.toml", tarfile.REGTYPE), ("link.toml", tarfile.SYMTYPE), (".hidden.toml", tarfile.REGTYPE),
    ):  # fmt: skip
        with pytest.raises(IntegrityError):
            open_bundle(repacked(name, kind=kind))
    with pytest.raises(UsageError, match="cannot be a file"):
        build({"../x.toml": b""}, 1, AT)


@pytest.mark.parametrize(
    ("window", "start"),
    [
        ("calendar_year", "2026-01-01T00:00:00+00:00"),
        ("calendar_month", "2026-03-01T00:00:00+00:00"),
        ("calendar_day", "2026-03-02T00:00:00+00:00"),
        ("rolling_12_months", "2025-03-02T12:00:00+00:00"),
        ("rolling_30_days", "2026-01-31T12:00:00+00:00"),
    ],
)
def test_windows_begin(window: str, start: str) -> None:
    assert window_start(window, AT, UTC) == int(datetime.fromisoformat(start).timestamp())


def test_a_rolling_year_from_a_leap_day() -> None:
    leap = int(datetime(2028, 2, 29, 12, tzinfo=UTC).timestamp())
    assert window_start("rolling_12_months", leap, UTC) == int(
        datetime(2027, 2, 28, 12, tzinfo=UTC).timestamp()
    )


def test_a_ledger_commits_only_what_it_reserved_and_only_once() -> None:
    reference = next(ref for ref in counters_of(POLICIES) if ref.arguments[:1] == ("us.genomic",))
    move = Movement("t1", "c", "p", "CN", frozenset(["us.genomic"]), 60, 5)
    with pytest.raises(UsageError, match="holds no reservation"):
        Ledger().commit("t1", AT)
    with pytest.raises(UsageError, match="holds no reservation"):
        Ledger().reserve(move, AT, AT + 60).commit("t1", AT + 60)
    landed = Ledger().reserve(move, AT, AT + 60).commit("t1", AT + 30)
    assert landed.commit("t1", AT + 40) == landed
    assert landed.reserve(move, AT + 50, AT + 99) == landed
    other = Movement("t2", "c", "p", "CN", frozenset(["us.genomic"]), 60, 5)
    assert landed.after(reference, other, AT + 100, UTC) == 120
    elsewhere = Movement("t3", "c", "q", "CN", frozenset(["us.genomic"]), 60, 5)
    assert landed.after(reference, elsewhere, AT + 100, UTC) == 60  # per pair of parties
    assert landed.after(reference, other, AT + 366 * DAY, UTC) == 60  # a year later it is forgotten


def scope() -> Scope:
    lists = {
        "eea": NamedList("eea", frozenset(["FR"]), "f", 1, domain="country"),
        "orgs": NamedList("orgs", frozenset(["a"]), "f", 2),
    }
    return Scope(ATTRIBUTES, lists.get, lambda: list(lists), frozenset(["personal.eu"]), "UTC")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("'FR' is site.country", "does not begin with a declared attribute", "put the fact on the left"),
        ("country in @eea", "does not begin with a declared attribute", "write it like"),
        ("sites.country in @eea", "not a declared attribute", "did you mean 'site.country'?"),
        ("site.country == 'FR'", "no operator '=='", "did you mean 'is'?"),
        ("data.labels contains 'personal.eu'", "no operator 'contains'", "did you mean 'includes'?"),
        ("site.country in @eaa", "the list @eaa does not exist", "did you mean '@eea'?"),
        ("site.country in eea", "cannot read 'eea'", "did you mean @eea?"),
        ("site.country is FR", "cannot read 'FR'", "texts stand in single quotes: 'FR'"),
        ("site.country is 'EU'", "no ISO 3166-1 country code", "use a list: @eea"),
        ("site.country in @orgs", "@orgs holds 'a', which is no country", ""),
        ("site.country is @eea", "'is' cannot take a list", "'in'"),
        ("site.has_key is True", "True is not a flag", "did you mean true?"),
        ("data.labels in @eea", "data.labels is a set", "did you mean 'includes any of'?"),
        ("transfer.bytes > 500", "in bytes, not a plain number", "500 GiB"),
        ("data.persons > 500 GiB", "in count, not bytes", "plain number"),
        ("time.now before 2026-13-01", "is no date", "2026-12-31"),
        ("agreement.expires < time.now", "which '<' cannot compare", "did you mean 'before'?"),
        ("site.country exists", "asks whether a fact is known", "already keeps permits from firing"),
        ("ledger.persons('x','y','z') > 1", "not a declared counter", "ledger.persons_after"),
        ("ledger.persons_after('any','recipient') > 1", "takes 3 texts", "ledger.persons_after("),
        ("ledger.persons_after('any','outside:UK','calendar_year') > 1", "no direction", "outside:CN"),
        (
            "ledger.persons_after('personal.us','any','calendar_year') > 1",
            "label 'personal.us' is not declared",
            "personal.eu",
        ),
    ],
)
def test_conditions_are_refused_with_a_suggestion(text: str, message: str, hint: str) -> None:
    with pytest.raises(LineError) as caught:
        parse_line(text, scope())
    assert message in caught.value.message
    assert hint in caught.value.hint


def lint_codes(extra: dict[str, bytes], at: int = AT) -> set[tuple[str, str]]:
    return {(problem.code, problem.message) for problem in lint(load({**FILES, **extra}), at)}


HEAD = b"""[policy]
id = "x"
version = "1"
title = "x"
owner = "x"
applies_to = ["data.labels includes 'personal.eu'"]
effective = 2026-01-01
review_by = 2026-03-20
"""


def rule(when: str, effect: str = "permit", then: str = "", name: str = "a") -> bytes:
    return f'[[rule]]\nid = "{name}"\neffect = "{effect}"\non = ["land"]\nwhen = [{when}]\nwhy = "x"\n{then}\n'.encode()


@pytest.mark.parametrize(
    ("rules", "code", "message"),
    [
        (
            rule('"site.country is \'FR\'", "site.country in @us_concern"'),
            "never-fires",
            "x/a can never fire",
        ),
        (rule("\"data.labels excludes 'personal.eu'\""), "never-fires", "x/a can never fire"),
        (rule('"data.persons > 10", "data.persons < 11"'), "never-fires", "x/a can never fire"),
        (rule('"site.country in @in_blacklist"'), "never-fires", "the list is empty"),
        (rule('"time.now before 2026-02-01"'), "never-fires", "fires no more"),
        (
            rule("\"site.admin_nationalities includes 'IR'\"", "forbid"),
            "nobody-asserts",
            "so it fires everywhere",
        ),
        (
            rule("", then='then = [{retain = "2 years"}]\n'),
            "collision",
            "duties of house-personal/delete-at-partners and x/a",
        ),
        (rule(""), "policy-review-soon", "in 17 days"),
    ],
)
def test_lint_finds(rules: bytes, code: str, message: str) -> None:
    found = lint_codes({"x.toml": HEAD + rules})
    assert any(code == kind and message in text for kind, text in found), found


def test_lint_on_lists_and_reviews() -> None:
    dated = FILES["lists/countries.toml"].replace(
        b"reviewed = false\n# GF", b"reviewed = true\nreview_by = 2026-03-10\n# GF", 1
    )
    found = lint_codes({"lists/countries.toml": dated})
    assert any(code == "list-review-soon" and "eea" in text for code, text in found)
    late = lint_codes({"lists/countries.toml": dated}, AT + 30 * DAY)
    assert any(
        code == "list-overdue" and "the list eea was to be reviewed by 2026-03-10" in text
        for code, text in late
    )
    assert "list eea" in overdue(load({**FILES, "lists/countries.toml": dated}), AT + 30 * DAY)
    assert overdue(POLICIES, AT) == []
    assert overdue(POLICIES, AT + 200 * DAY) == ["policy eu-personal"]


def test_lint_says_which_duties_no_site_can_do() -> None:
    sites = FILES["sites.toml"].replace(b'["everything"]', b'["log", "encrypt.flight"]')
    found = lint_codes({"sites.toml": sites})
    assert any(
        code == "nobody-can" and "itar/sealed" in text and "encrypt.rest" in text for code, text in found
    )


def test_remedies_are_the_smallest_changes_and_would_permit() -> None:
    engine = Engine(POLICIES, enforce=["eu-personal"])
    facts = {"data.labels": frozenset(["personal.eu"]), "time.now": AT, **POLICIES.sites["virginia"].facts}
    decision = engine.decide("land", facts, None)
    found = remedies(engine, decision)
    assert [(remedy.kind, remedy.lines) for remedy in found] == [
        ("assert", ("recipient.certifications includes 'eu-us-dpf'",)),
        (
            "assert",
            (
                "agreement.expires after time.now",
                "agreement.mechanism in @gdpr_art46",
                "agreement.tia_done is true",
            ),
        ),
    ] or {remedy.lines for remedy in found} == {
        ("recipient.certifications includes 'eu-us-dpf'",),
        (
            "agreement.mechanism in @gdpr_art46",
            "agreement.tia_done is true",
            "agreement.expires after time.now",
        ),
    }
    assert found[0].who == (("feed",),)
    assert engine.decide("land", {**facts, "recipient.certifications": frozenset(["eu-us-dpf"])}, None).permit
    # Everything known, and no agreement: approving one is the change, another site is not needed.
    known = {**facts, "recipient.certifications": frozenset[str](), "agreement.mechanism": "none"}
    known |= {"agreement.tia_done": True, "agreement.expires": AT + DAY}
    (remedy,) = remedies(engine, engine.decide("land", known, None))
    assert remedy.lines == ("agreement.mechanism in @gdpr_art46",)
    # Nothing to approve: only another site would do.
    process = engine.decide("process", known, None)
    assert {remedy.kind for remedy in remedies(engine, process)} == {"change"}


def test_the_record_holds_texts_integers_and_flags_only() -> None:
    engine = Engine(POLICIES)
    facts = {"data.labels": frozenset(["personal.eu"]), "data.contracts": frozenset[str](), "time.now": AT}
    plain = record(engine, engine.decide("relay", {**facts, **POLICIES.sites["singapore-relay"].facts}, None))

    def check(value: object) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                assert isinstance(key, str)
                check(item)
        elif isinstance(value, list):
            for item in value:
                check(item)
        else:
            assert value is None or isinstance(value, (str, int)), value

    check(plain)
    assert plain["decision"] == "permit"
    assert plain["valid"] == {"until": "2026-03-02T12:05:00Z"}
    assert plain["because"] == ["eu-personal/sealed-relay"]


def test_can_reach_proves_never_and_shows_a_path() -> None:
    engine = Engine(POLICIES)
    moscow = {reach.use: reach for reach in can_reach(engine, frozenset(["personal.eu"]), "moscow-relay", AT)}
    assert not moscow["relay"].possible
    assert moscow["relay"].outcome.kind == "never"
    assert moscow["land"].possible  # with clauses, it may
    assert moscow["land"].path[-1] == "moscow-relay"
    itar = can_reach(engine, frozenset(["itar"]), "guizhou", AT)
    assert {reach.use: reach.possible for reach in itar} == {
        "relay": True,
        "hold": False,
        "land": False,
        "process": False,
    }
    alone = can_reach(engine, frozenset(["personal.eu"]), "paris", AT, origins=["moscow-relay"])
    assert not any(reach.possible for reach in alone)


def test_links_bound_what_can_be_reached() -> None:
    links = b'\n[[link]]\nfrom = "paris"\nto = "sao-paulo"\n\n[[link]]\nfrom = "sao-paulo"\nto = "virginia"\n'
    engine = Engine(load({**FILES, "sites.toml": FILES["sites.toml"] + links}))
    assert {reach.use: reach.path for reach in can_reach(engine, frozenset(["personal.eu"]), "virginia", AT)}["land"] == (
        "sao-paulo", "virginia",
    )  # fmt: skip
    assert not any(reach.possible for reach in can_reach(engine, frozenset(["personal.eu"]), "paris", AT))


def test_reasons_keep_the_kinds_of_denial_apart() -> None:
    engine = Engine(POLICIES, enforce=["itar"])
    facts = {"data.labels": frozenset(["itar"]), "time.now": AT}
    for extra, kind in (
        ({"site.country": "RU"}, "forbidden"),
        ({"site.country": "US", "recipient.us_person": False}, "not permitted"),
        ({"site.country": "US"}, "undetermined"),
        ({}, "undetermined"),
    ):
        assert reasons(engine.decide("process", {**facts, **extra}, None)).kind == kind


@pytest.mark.slow
def test_a_decision_stays_cheap() -> None:
    """Far above the measured 20 microseconds, so that only a blunder fails it, not a busy machine."""
    engine = Engine(POLICIES)
    facts = {
        "data.labels": frozenset(["personal.eu", "us.health"]),
        "data.contracts": frozenset[str](),
        "time.now": AT,
    }
    known = {**facts, **POLICIES.sites["virginia"].facts}
    began = time.process_time()
    for _ in range(5000):
        engine.decide("land", known, None)
    assert (time.process_time() - began) / 5000 < 200e-6


@pytest.mark.slow
def test_a_table_of_many_sites_and_labels_stays_cheap() -> None:
    """300 x 200 x 5 cells take a few tenths of a second; a thousand by a thousand take one."""
    sites = {
        f"s{number}": Site(
            f"s{number}", {**list(POLICIES.sites.values())[number % 7].facts, "site.id": f"s{number}"}
        )
        for number in range(300)
    }
    names = sorted(POLICIES.labels)
    data = {
        f"d{number}": {"data.labels": frozenset([names[number % len(names)], names[number * 7 % len(names)]])}
        for number in range(200)
    }
    began = time.process_time()
    found = table(Engine(POLICIES), data, sites, {"time.now": AT})
    assert time.process_time() - began < 5
    assert len(found.cells) == 1000


def diff_of(extra: dict[str, bytes]) -> tuple[list[Change], list[str]]:
    after = load({**FILES, **extra})
    data = {
        label: {"data.labels": frozenset([label]), "data.contracts": frozenset[str]()}
        for label in POLICIES.labels
    }
    tables = [
        table(Engine(policies), data, policies.sites, {"time.now": AT}) for policies in (POLICIES, after)
    ]
    weaker = [item.what for item in differences(POLICIES, after) if item.weaker]
    return list(changes(tables[0], tables[1], list_changes(POLICIES, after))), weaker


def test_a_list_that_grows_behind_an_open_fact_is_a_weaker_cell() -> None:
    house = FILES["6-clinical-house.toml"]
    found, _ = diff_of(
        {"6-clinical-house.toml": house.replace(b'["ror:02catss52"]', b'["ror:02catss52", "ror:new"]')}
    )
    assert {(change.data, change.weaker) for change in found} == {("clinical", True)}
    found, _ = diff_of({"6-clinical-house.toml": house.replace(b'["ror:02catss52"]', b"[]")})
    assert {(change.data, change.weaker) for change in found} == {("clinical", False)}


def test_pins_authority_and_leases_that_loosen_are_found() -> None:
    sites = FILES["sites.toml"].replace(b'country            = "RU"', b'country            = "FI"')
    found, _ = diff_of({"sites.toml": sites})
    assert any("moscow-relay" in change.sites and change.use == "relay" and change.weaker for change in found)
    _, weaker = diff_of(
        {"attributes.toml": FILES["attributes.toml"].replace(b'["feed"]', b'["feed", "registry"]')}
    )
    assert weaker == ["recipient.certifications may now also be stated by registry"]
    policy = FILES["1-eu-personal.toml"].replace(b"effective  =", b'max_offline = "1 hour"\neffective  =')
    assert diff_of({"1-eu-personal.toml": policy})[1] == [
        "policy eu-personal: max_offline 300 s becomes 3600 s"
    ]
    assert diff_of({}) == ([], [])
