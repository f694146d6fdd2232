"""What an agent decides by: bundles that never go back, labels of owners, facts by pins; without a network."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import structlog
import trio
from liars import PolicyKeys
from parties import Federation, party_of
from support import until

from flowengine.api.agents import AgentLabels
from flowengine.errors import AuthenticationError, Denied, FlowError, PolicyInvalid, UsageError
from flowengine.policy import Engine, PolicySet, Statement, load, resolve
from flowengine.policy.asking import AGENT_CAN, Matter, Place, ask, can_do
from flowengine.policy.labels import Inherited, Labelling, data_statements, relevant, uncovered
from flowengine.transfer.sites import SiteTrust
from flowengine.trust.labels import sign_labels, verify_labels
from flowengine_agent.config import OfferedFolder
from flowengine_agent.gate import Gate
from flowengine_agent.policies import Policies
from flowengine_agent.policy_follower import PolicyFollower
from flowengine_agent.roots import Roots

NOW = 1_780_000_000
KEY, OTHER = "ab" * 32, "cd" * 32
OWNER, ARCHIVE = bytes.fromhex("01" * 32), bytes.fromhex("02" * 32)
POLICY = """
[policy]
id = "home"
version = "1"
title = "Stays in France"
owner = "dpo@example.org"
applies_to = ["data.labels includes 'secret'"]
effective = 2026-01-01
review_by = 2100-01-01
[[rule]]
id = "france"
effect = "permit"
on = ["release", "land"]
when = ["site.country is 'FR'"]
why = "Inside France"
"""
SITES = f"""
[site.paris]
country = "FR"
key = "{KEY}"
can = ["encrypt.flight", "log"]
[site.paris.recipient]
org = "ror:1"
"""
OWNERS = f"""
[owner.hospital]
key = "{OWNER.hex()}"
roots = ["paris:/data/cohort", "*:/clinical"]
[owner.archive]
key = "{ARCHIVE.hex()}"
roots = ["paris:/data/cohort/old"]
"""


def policies(**more: str) -> PolicySet:
    texts = {"home.toml": POLICY, "sites.toml": SITES, "owners.toml": OWNERS} | more
    return load({name: text.encode() for name, text in texts.items()})


def matter(*data: Statement, at: Place | None = None) -> Matter:
    return Matter(
        data or (Statement("data.labels", frozenset(["secret"]), "label:x", NOW),), at or Place("paris", KEY)
    )


# --- the facts of a site ----------------------------------------------------------------------------------------------


def test_another_key_is_another_site() -> None:
    engine = Engine(policies())
    assert ask(engine, "land", Place("paris", KEY), matter(), NOW).decision.permit
    for key in ("", OTHER):
        found = ask(engine, "land", Place("paris", key), matter(at=Place("paris", key)), NOW)
        assert not found.decision.permit
        assert not {"site.id", "site.country", "recipient.org"} & set(found.known.facts)
        assert can_do(engine.policies, Place("paris", key, can=frozenset({"log"}))) == frozenset()


def test_pins_beat_what_others_say_and_a_site_may_narrow_them() -> None:
    lie = Statement("site.country", "FR", "registry:catalogue", NOW)
    own = Statement("site.certs", frozenset(), "site:lyon", NOW)
    pins = (
        f'[site.moscow]\ncountry = "RU"\nkey = "{KEY}"\n[site.lyon]\ncountry = "FR"\ncerts = ["iso27001"]\n'
    )
    engine = Engine(policies(**{"sites.toml": pins}))
    found = ask(engine, "land", Place("moscow", KEY, (lie,)), matter(), NOW)
    assert (found.decision.permit, found.known.facts["site.country"]) == (False, "RU")
    assert (
        ask(engine, "land", Place("lyon", OTHER, (own,)), matter(), NOW).known.facts["site.certs"]
        == frozenset()
    )
    # Of a site that is not pinned the catalogue is heard; an agent, which has none, knows nothing of it.
    assert ask(engine, "land", Place("nice", KEY, (lie,)), matter(), NOW).decision.permit
    assert not ask(engine, "land", Place("nice", KEY), matter(), NOW).decision.permit


def test_what_a_site_can_is_what_it_says_and_what_is_pinned() -> None:
    found = policies()
    assert can_do(found, Place("paris", KEY)) == {"encrypt.flight", "log"}
    assert can_do(found, Place("paris", KEY, can=frozenset({"log", "window"}))) == {"log"}
    assert can_do(found, Place("nice", KEY)) == AGENT_CAN
    assert can_do(found, Place("nice", KEY, can=frozenset())) == frozenset()


def test_who_has_the_key_cannot_be_pinned() -> None:
    pins = f'[site.paris]\ncountry = "FR"\nhas_key = true\nspill = "memory-only"\nkey = "{KEY}"\n'
    engine = Engine(policies(**{"sites.toml": pins}))
    known = ask(engine, "relay", Place("paris", KEY), matter(), NOW).known.facts
    assert (known["site.has_key"], known["site.spill"]) == (False, "memory-only")
    assert ask(engine, "land", Place("paris", KEY), matter(), NOW).known.facts["site.has_key"] is True


# --- labels -----------------------------------------------------------------------------------------------------------


def said(path: str, *labels: str, owner: str = "hospital", **more: object) -> Labelling:
    key = OWNER if owner == "hospital" else ARCHIVE
    fields = {"number": 1, "issued": NOW - 10} | more
    return Labelling(owner, key, "paris", path, labels=frozenset(labels), **fields)  # type: ignore[arg-type]


def known(
    path: str, *one: Labelling, inherited: list[Inherited] | None = None, **added: list[str]
) -> dict[str, object]:
    found = policies()
    valid = relevant(found, one, "paris", path, NOW)
    words = data_statements(found, valid, "paris", path, NOW, inherited=inherited or [], **added)
    return dict(resolve(found, words, NOW).facts)


def test_owned_data_without_a_word_of_its_owner_has_unknown_labels() -> None:
    whole, part = said("/data/cohort", "a"), said("/data/cohort/old", "b", owner="archive")
    for path in ("/data/cohort", "/data/cohort/new", "/data", "/"):
        assert known(path, added=["public"]) == {}
        assert known(path, part, added=["public"]) == {}
    assert known("/data/cohort/new", whole)["data.labels"] == {"a"}
    assert known("/data", whole) == {}, "what the archive owns below is still unlabelled"
    assert known("/data/", whole, part)["data.labels"] == {"a", "b"}
    assert known("/data/cohort/old/x", part) == {}, "both own it: both have to say what it is"
    assert known("/data/cohorts", added=["public"])["data.labels"] == {"public"}
    assert uncovered(policies(), [], "berlin", "/clinical/x") == ["hospital's word on berlin:/clinical/x"]


def test_a_statement_counts_from_its_owner_on_its_root_in_its_time_alone() -> None:
    good = said("/data/cohort/new", "a")
    path = "/data/cohort/new"
    assert known(path, good)["data.labels"] == {"a"}
    for bad in (
        said(path, "a", expires=NOW),
        said(path, "a", issued=NOW + 1),
        said(path, "a", withdrawn=True),
        said("/data", "a"),  # no root of its own
        Labelling("hospital", ARCHIVE, "paris", path, 1, NOW - 10, frozenset("a")),
        Labelling("nobody", OWNER, "paris", path, 1, NOW - 10, frozenset("a")),
        Labelling("hospital", OWNER, "berlin", path, 1, NOW - 10, frozenset("a")),
    ):
        assert known(path, bad, added=["public"]) == {}


def test_nothing_takes_a_label_away() -> None:
    whole = said("/data/cohort", "a", contracts=frozenset(["c1"]))
    old = said("/data/cohort/old", "b", owner="archive")
    copies = [Inherited(frozenset(["i"]), frozenset(["c3"]))]
    found = known("/data/cohort", whole, old, inherited=copies, added=["r"], contracts=["c2"])
    assert found["data.labels"] == {"a", "b", "i", "r"}
    assert found["data.contracts"] == {"c1", "c2", "c3"}


def test_further_facts_are_known_of_the_whole_path_alone() -> None:
    facts = {"data.persons": 10, "data.collected_in": frozenset(["FR"]), "data.embargo_until": 5}
    more = {"data.persons": 7, "data.collected_in": frozenset(["DE"]), "data.embargo_until": 9}
    whole = said("/data/cohort", "a", facts=facts)
    old = said("/data/cohort/old", "b", owner="archive", facts=more)
    found = known("/data/cohort", whole, old)
    assert (found["data.persons"], found["data.embargo_until"]) == (17, 9)
    assert found["data.collected_in"] == {"FR", "DE"}
    assert "data.persons" not in known("/data", whole, old), "of the rest of /data nobody says anything"
    assert "data.persons" not in known("/data/cohort", whole, old, inherited=[Inherited()])
    one = said("/data/cohort", "a", facts={"data.controller": "x"})
    two = said("/data/cohort/old", "b", owner="archive", facts={"data.controller": "y"})
    assert "data.controller" not in known("/data/cohort", one, two), "they contradict each other"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[owner.a]\nkey = 'xy'\nroots = ['p:/x']", "no Ed25519 public key"),
        (f"[owner.a]\nkey = '{KEY}'\nroots = ['/x']", "is no root"),
        (f"[owner.a]\nkey = '{KEY}'\nroots = ['p:/x/../y']", "is no root"),
        (f"[owner.a]\nkey = '{KEY}'\nroots = ['p:/x']\nroot = ['p:/x']", "did you mean 'roots'"),
        (
            f"[owner.a]\nkey = '{KEY}'\nroots = ['p:/x']\n[owner.b]\nkey = '{KEY}'\nroots = ['p:/y']",
            "the same key",
        ),
    ],
)
def test_owners_are_read_strictly(text: str, wrong: str) -> None:
    with pytest.raises(PolicyInvalid, match=r"owners\.toml:\d") as caught:
        policies(**{"owners.toml": text})
    assert wrong in str(caught.value)


def test_a_pinned_key_is_read_strictly() -> None:
    with pytest.raises(PolicyInvalid, match="64 hexadecimal digits"):
        policies(**{"sites.toml": '[site.paris]\nkey = "short"\n'})


# --- documents --------------------------------------------------------------------------------------------------------


def test_no_bit_of_a_statement_can_be_changed() -> None:
    keys = PolicyKeys()
    document = keys.statement("paris:/data/cohort", "a", facts={"data.persons": 3})
    owners = {"hospital": keys.owner.public_key().public_bytes_raw()}
    assert verify_labels(document, owners).facts == {"data.persons": 3}
    reasons = set()
    for bit in range(0, 8 * len(document), 3):
        changed = bytearray(document)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = verify_labels(bytes(changed), owners)
        except AuthenticationError as error:
            reasons.add(error.reason)
        else:  # what is not signed: the name of the key
            assert (found.labels, found.path, found.number) == ({"a"}, "/data/cohort", 1)
    assert reasons == {"label-forged", "label-unknown-owner"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": "data"},
        {"path": "/a/../b"},
        {"path": "/a//b"},
        {"number": 0},
        {"facts": {"site.country": "FR"}},
        {"expires": 1 << 61},  # no calendar shows it
        {"issued": 1 << 61},
    ],
)
def test_a_statement_that_nobody_would_accept_is_not_made(wrong: dict[str, object]) -> None:
    from flowengine.trust.labels import LabelStatement

    fields: dict[str, object] = {
        "owner": "a",
        "site": "paris",
        "path": "/a",
        "number": 1,
        "issued": 1,
        "labels": [],
    }
    with pytest.raises(UsageError):
        sign_labels(LabelStatement(**(fields | wrong)), PolicyKeys().owner)  # type: ignore[arg-type]


# --- an agent's memory ------------------------------------------------------------------------------------------------


def kept(folder: Path, keys: PolicyKeys) -> Policies:
    return Policies(str(folder), {role: [key.public_key()] for role, key in keys.roles.items()})


def files(keys: PolicyKeys) -> dict[str, str]:
    owners = f"[owner.hospital]\nkey = '{keys.owner_public}'\nroots = ['paris:/data/cohort']\n"
    return {"home.toml": POLICY, "sites.toml": SITES, "owners.toml": owners}


def test_versions_never_go_back(tmp_path: Path) -> None:
    keys, now = PolicyKeys(), time.time()
    one, two, three = (keys.bundle(files(keys), version) for version in (1, 2, 3))
    agent = kept(tmp_path / "p", keys)
    assert agent.take(one, now).bundle.version == 1
    backup = (tmp_path / "p" / "bundle").read_bytes()
    agent.take(two, now)
    for old in (one, two):
        with pytest.raises(Denied, match="not newer"):
            agent.take(old, now)
    agent.close()
    again = kept(tmp_path / "p", keys)
    assert again.in_force is not None
    assert again.in_force.bundle.version == 2
    again.close()
    (tmp_path / "p" / "bundle").write_bytes(backup)  # somebody restores an old one
    restored = kept(tmp_path / "p", keys)
    assert restored.in_force is None
    assert "2 was in force" in restored.problem
    with pytest.raises(Denied, match="not newer"):
        restored.take(one, now)
    assert restored.take(two, now).bundle.version == 2  # the very one that was lost
    assert restored.take(three, now).bundle.version == 3
    restored.close()


def test_what_both_roles_have_not_signed_is_not_taken(tmp_path: Path) -> None:
    keys, now = PolicyKeys(), time.time()
    agent = kept(tmp_path / "p", keys)
    others = PolicyKeys(roles=keys.roles | {"security": PolicyKeys().roles["security"]})
    for wrong in (others.bundle(files(keys), 1), keys.bundle(files(keys), 1, valid_s=-1), b"", b"x" * 5000):
        with pytest.raises(FlowError):
            agent.take(wrong, now)
    with pytest.raises(PolicyInvalid):
        agent.take(keys.bundle({"home.toml": "x"}, 1), now)
    assert agent.in_force is None
    assert agent.version == 0
    agent.close()


def test_numbers_of_statements_never_go_back(tmp_path: Path) -> None:
    keys, now = PolicyKeys(), time.time()
    agent = kept(tmp_path / "p", keys)
    first, second = (
        keys.statement("paris:/data/cohort", label, number=number)
        for number, label in ((1, "public"), (2, "secret"))
    )
    assert agent.take_statements([(1, first)])[0].reason == "label-unknown-owner"  # no bundle names it yet
    agent.take(keys.bundle(files(keys), 1), now)
    assert agent.labels_heard == 0
    forged = PolicyKeys().statement("paris:/data/cohort", "public", number=9)
    assert [error.reason for error in agent.take_statements([(1, forged), (2, second), (3, first)])] == [
        "label-forged"
    ]

    def labels(at: Policies) -> list[set[str]]:
        return [set(one.labels) for one in at.labellings("paris", "/data/cohort/x", now)]

    assert labels(agent) == [{"secret"}]
    agent.close()
    again = kept(tmp_path / "p", keys)
    assert again.take_statements([(1, first)]) == []
    assert labels(again) == [{"secret"}]
    # An owner that is none any more says nothing; its numbers stay.
    again.take(keys.bundle({"home.toml": POLICY}, 2), now)
    assert labels(again) == []
    again.take(keys.bundle(files(keys), 3), now)
    again.take_statements([(1, first)])
    assert labels(again) == [{"secret"}]
    again.close()


def test_a_statement_that_is_told_while_another_is_fetched_is_not_passed_over(tmp_path: Path) -> None:
    keys = PolicyKeys()
    agent = kept(tmp_path / "p", keys)
    agent.take(keys.bundle(files(keys), 1), time.time())
    statements = [
        (n, keys.statement("paris:/data/cohort", word, number=n)) for n, word in ((1, "a"), (2, "b"))
    ]

    class Link:
        """The coordinator, where the second statement is made just behind the first answer."""

        made = 1

        async def get(self, path: str, kind: object, query: dict[str, int]) -> AgentLabels:
            found = AgentLabels(
                statements=[one for one in statements[: self.made] if one[0] > query["after"]], last=True
            )
            self.made = 2
            follower.told(1, 2)
            return found

    async def main() -> None:
        follower.told(1, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.run)
            await until(lambda: agent.labels_heard >= 2, "the second label")
            nursery.cancel_scope.cancel()

    gate, log = SimpleNamespace(policies=agent), structlog.get_logger()
    follower = PolicyFollower(gate, Link(), log, lambda: None, lambda what: None)  # type: ignore[arg-type]
    trio.run(main)
    assert [set(one.labels) for one in agent.labellings("paris", "/data/cohort/x", time.time())] == [{"b"}]
    agent.close()


def test_what_lands_keeps_its_labels_over_a_restart(tmp_path: Path) -> None:
    keys = PolicyKeys()
    agent = kept(tmp_path / "p", keys)
    agent.inherit("/data/in/", ["b", "a"], ["c"])
    agent.inherit("/data/in", ["a", "b"], ["c"])
    agent.close()
    again = kept(tmp_path / "p", keys)
    for path in ("/data/in/x", "/data/in/", "/data", "/"):
        assert again.inherited(path) == [Inherited(frozenset("ab"), frozenset("c"))]
    assert again.inherited("/data/inn") == []
    again.close()


# --- one folder under several names ---------------------------------------------------------------------------------


def test_all_names_of_a_folder_are_found(tmp_path: Path) -> None:
    (tmp_path / "srv/cohort/old").mkdir(parents=True)
    (tmp_path / "srv/other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "srv/cohort")
    offered = {"/all": "srv", "/cohort": "link", "/old": "srv/cohort/old", "/other": "srv/other"}
    roots = Roots([OfferedFolder(str(tmp_path / path), name) for name, path in offered.items()])
    found = {
        path: sorted(roots.other_names(path))
        for path in ("/cohort/", "/cohort/new/x", "/all/cohort/old", "/all", "/all/cohorts", "/other")
    }
    assert found == {
        "/cohort/": ["/all/cohort", "/old"],
        "/cohort/new/x": ["/all/cohort/new/x"],
        "/all/cohort/old": ["/cohort/old", "/old"],
        "/all": ["/cohort", "/old", "/other"],
        "/all/cohorts": [],
        "/other": ["/all/other"],
    }
    for root in roots.roots:
        root.close()


def test_a_label_counts_under_every_name_of_its_folder(tmp_path: Path) -> None:
    federation, keys = Federation(), PolicyKeys()
    source, target = federation.site("paris"), federation.site("lyon")
    pins = "".join(
        f'[site.{name}]\ncountry = "{country}"\nkey = "{party_of(trust).key_sha256}"\n'
        for name, country, trust in (("paris", "FR", source), ("lyon", "US", target))
    )
    open_ = POLICY.replace('"home"', '"open"').replace("secret", "public").replace("site.country is 'FR'", "")
    policies = kept(tmp_path / "p", keys)
    texts = files(keys) | {"sites.toml": pins, "open.toml": open_.replace('when = [""]', "when = []")}
    policies.take(keys.bundle(texts, 1), time.time())
    gate = Gate(source, policies, structlog.get_logger())
    grant = federation.grant(source, target, source_path="/pub/", labels=["public"])

    async def released() -> list[str]:
        permit = await gate.release(grant)
        assert permit.document
        known = permit.judged[0].known.facts["data.labels"]
        assert isinstance(known, frozenset)
        return sorted(known)

    async def main() -> None:
        assert await released() == ["public"]
        gate.other_names = lambda path: ["/data/cohort/x"]
        with pytest.raises(Denied):  # its owner has not said what it is
            await released()
        policies.take_statements([(1, keys.statement("paris:/data/cohort", "harmless", issued=1))])
        assert await released() == ["harmless", "public"]
        policies.take_statements([(2, keys.statement("paris:/data/cohort", "secret", number=2, issued=1))])
        with pytest.raises(Denied):
            await released()
        policies.close()

    trio.run(main)


# --- the gate itself --------------------------------------------------------------------------------------------------


def test_without_policies_everything_passes_unless_they_are_required_or_have_expired(tmp_path: Path) -> None:
    federation = Federation()
    source, target = federation.site("paris"), federation.site("lyon")
    grant = federation.grant(source, target, labels=["secret"])
    keys = PolicyKeys()
    pins = "".join(
        f'[site.{name}]\ncountry = "FR"\nkey = "{party_of(trust).key_sha256}"\n'
        for name, trust in (("paris", source), ("lyon", target))
    )
    bundle = keys.bundle({"home.toml": POLICY, "sites.toml": pins}, 1)

    def gate(trust: SiteTrust, policies: Policies, ahead_s: float = 0.0) -> Gate:
        return Gate(trust, policies, structlog.get_logger(), clock=lambda: time.time() + ahead_s)

    async def main() -> None:
        open_ = await gate(source, Policies(None)).release(grant)
        assert (open_.document, open_.bundle) == (b"", None)
        await gate(target, Policies(None)).land(grant, b"")
        with pytest.raises(Denied) as caught:
            await gate(source, Policies(None, required=True)).release(grant)
        assert caught.value.reason == "policy-missing"
        one, two = kept(tmp_path / "one", keys), kept(tmp_path / "two", keys)
        for policies in (one, two):
            policies.take(bundle, time.time())
        with pytest.raises(AuthenticationError) as missing:
            await gate(target, two).land(grant, b"")
        assert missing.value.reason == "release-missing"
        permit = await gate(source, one).release(grant)
        landed = await gate(target, two).land(grant, permit.document)
        assert landed.release is not None
        assert landed.release.labels == ["secret"]
        assert two.inherited("/in")[0].labels == {"secret"}
        with pytest.raises(Denied) as expired:
            await gate(source, one, 3700.0).release(grant)
        assert expired.value.reason == "policy-expired"
        with pytest.raises(AuthenticationError) as old:
            await gate(target, two, 400.0).land(grant, permit.document)
        assert old.value.reason == "release-expired"
        one.close()
        two.close()

    trio.run(main)
