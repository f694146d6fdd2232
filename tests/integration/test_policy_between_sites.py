"""A federation whose agents decide for themselves: what a lying coordinator plans, and a lying source sends, goes nowhere."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from liars import LyingCoordinator, LyingGate, PolicyKeys, evidence_of, identity_of
from proxy import Proxy
from sites import Federation, SiteAgent, federation
from support import Flow, files_below, wait_until

from flowengine.api.sites import Fact, SiteRequest
from flowengine.errors import Denied, FlowError
from flowengine.store.selection import Root, Selection
from flowengine.transfer import control
from flowengine.transfer.passes import TransferSettings
from flowengine.transfer.reaching import Way
from flowengine.transfer.routes import RoutedPeer
from flowengine.transfer.run import pull, push, stat_remote
from flowengine.transfer.sites import SiteIdentity
from flowengine.trust.grant import Grant, Party
from flowengine.trust.relay_grant import RelayGrant, Stop, sign_relay_grant
from flowengine.trust.release import Release
from flowengine.trust.tokens import Login
from flowengine.wire.ticket import Ticket

pytestmark = pytest.mark.slow
SIZE = 4 << 20
CHATTER = 128 << 10
"""More than handshakes and refusals take; far less than the data."""
SETTINGS = TransferSettings(retry_for_s=0.0, streams=2)
POLICY = """
[policy]
id = "{id}"
version = "1"
title = "{title}"
owner = "dpo@example.org"
applies_to = ["data.labels includes '{label}'"]
unlisted = "deny"
effective = 2026-01-01
review_by = 2100-01-01
[[rule]]
id = "allowed"
effect = "permit"
on = ["release", "relay", "hold", "land", "process"]
when = [{when}]
why = "{title}"
"""


def files(keys: PolicyKeys, pins: dict[str, tuple[str, str]], **changed: str) -> dict[str, str]:
    """The policies: personal data stay in the Union; what is public may go anywhere."""
    sites = "".join(
        f'[site.{name}]\ncountry = "{country}"\noperator_countries = ["{country}"]\nkey = "{key}"\n'
        for name, (country, key) in pins.items()
    )
    return {
        "eu.toml": POLICY.format(
            id="eu", title="Personal data stay in the EU", label="personal.eu", when='"site.country in @eu"'
        ),
        "open.toml": POLICY.format(id="open", title="Public data", label="public", when=""),
        "counted.toml": POLICY.format(
            id="counted",
            title="Fewer than 100 persons a year leave France",
            label="counted",
            when="\"ledger.persons_after('counted', 'outside:FR', 'calendar_year') < 100\"",
        )
        + "then = [{count = {ledger = 'persons', label = 'counted', window = 'calendar_year'}}]\n",
        "labels.toml": "[label.'personal.eu']\n[label.public]\n[label.counted]\n",
        "lists/eu.toml": '[list.eu]\ndomain = "country"\nas_of = 2026-01-01\nsource = "treaty"\n'
        'review_by = 2100-01-01\nmembers = ["FR", "DE", "NL"]\n',
        "owners.toml": f"[owner.hospital]\nkey = '{keys.owner_public}'\n"
        "roots = ['paris:/data/cohort', 'paris:/data/counted']\n",
        "sites.toml": sites,
    } | changed


@dataclass
class World:
    """Four sites: paris has the data, berlin may have them, utrecht relays, boston may not have them."""

    federation: Federation
    keys: PolicyKeys
    liar: LyingCoordinator
    pins: dict[str, tuple[str, str]]

    def __getitem__(self, site: str) -> SiteAgent:
        return self.federation[site]

    def party(self, site: str) -> Party:
        return Party(site, self.pins[site][1])

    def landed(self) -> list[Path]:
        """Files at every site but the source that can hold content."""
        return [
            path
            for site in ("berlin", "utrecht", "boston")
            for path in files_below(self[site].data)
            if path.is_file() and path.stat().st_size > 1000
        ]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("federation")
    keys = PolicyKeys()
    with federation(base, options=keys.options(base)) as running:
        running.make("paris", lines=keys.site_lines)
        running.make("berlin", lines=keys.site_lines)
        running.make("utrecht", lines=["[relay]", "enabled = true", *keys.site_lines])
        running.make("boston", lines=keys.site_lines)
        for agent in running.sites.values():
            agent.start()
        (running["paris"].data / "cohort").mkdir()
        (running["paris"].data / "cohort" / "genomes").write_bytes(os.urandom(SIZE))
        (running["paris"].data / "maps").write_bytes(os.urandom(1000))
        countries = {"paris": "FR", "berlin": "DE", "utrecht": "NL"}
        pins = {}
        for site, country in countries.items():
            certificate = running.client.site(site).certificate
            assert certificate is not None
            pins[site] = (country, certificate.key_sha256)
        running.client.activate_bundle(keys.bundle(files(keys, pins), 1))
        running.client.set_label(keys.statement("paris:/data/cohort", "personal.eu"))
        persons = {"data.persons": 60, "data.controller": "hospital"}
        running.client.set_label(keys.statement("paris:/data/counted", "counted", facts=persons))
        (running["paris"].data / "counted").mkdir()
        (running["paris"].data / "counted" / "rows").write_bytes(os.urandom(SIZE))
        say_country(running, "boston", "US")
        wait_until(lambda: all(_has(running, site, 1, 2) for site in running.sites), "policies at all sites")
        certificate = running.client.site("boston").certificate
        assert certificate is not None
        yield World(
            running,
            keys,
            LyingCoordinator(running.coordinator),
            pins | {"boston": ("US", certificate.key_sha256)},
        )


def _has(running: Federation, site: str, bundle: int, labels: int) -> bool:
    policy = running.client.site(site).policy
    return (policy.version, policy.labels) == (bundle, labels)


def say_country(running: Federation, site: str, country: str) -> None:
    """What the catalogue, which the coordinator keeps, says of a site."""
    fact = Fact(value=country, source="operator", as_of=datetime.now(UTC))
    operators = Fact(value=[country], source="operator", as_of=datetime.now(UTC))
    running.client.change_site(site, SiteRequest(facts={"country": fact, "operator_countries": operators}))


@dataclass
class Wire:
    """A data port behind a counter."""

    proxy: Proxy

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.proxy.ticket.port}"


@pytest.fixture
def wire() -> Iterator[Callable[[SiteAgent], Wire]]:
    made: list[Proxy] = []

    def before(agent: SiteAgent) -> Wire:
        host, _, port = agent.listen.rpartition(":")
        made.append(Proxy(Ticket(host, int(port), b"", bytes(32), bytes(32))))
        return Wire(made[-1])

    yield before
    for proxy in made:
        proxy.close()


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))


def peer(
    world: World, me: SiteIdentity, grant: Grant, address: str, *ways: Way, shows: bytes = b""
) -> RoutedPeer:
    """The other end of a forged grant, as a party that checks nothing sees it."""
    found = RoutedPeer.at(address, world.liar.trust(me), world.liar.key.sign(grant))
    assert isinstance(found, RoutedPeer)
    found.sends = grant.dial == "source"
    found.gate = LyingGate(shows)
    other = grant.target.site if found.sends else grant.source.site
    found.ways = ways or (Way((me.site, other), address),)
    return found


def refused(main: Callable[[], Any]) -> FlowError:
    """The one error that something ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control, "LAST_WORD_S", 40.0)  # however slow this machine is
        with pytest.raises((FlowError, BaseExceptionGroup)) as caught:
            trio.run(main)
    error: BaseException = caught.value
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, FlowError)
    return error


def denials(agent: SiteAgent, task: str) -> list[dict[str, Any]]:
    """What an agent has on record against a task."""
    return [
        line for line in evidence_of(agent) if line.get("task") == task and line.get("decision") == "deny"
    ]


# --- at plan time ---------------------------------------------------------------------------------------------------


def test_labelled_data_is_refused_when_it_is_asked_for(world: World) -> None:
    client = world.federation.client
    with pytest.raises(Denied, match="EU"):
        client.copy("paris:/data/cohort/", "boston:/data/in")
    with pytest.raises(Denied):  # what a requester says adds, and takes nothing away
        client.copy("paris:/data/cohort/", "boston:/data/in", labels=["public"])
    with pytest.raises(Denied):  # nor does asking for the folder above
        client.copy("paris:/data/", "boston:/data/in", labels=["public"])
    assert world.landed() == []


def test_what_is_permitted_moves_under_a_release(world: World) -> None:
    client = world.federation.client
    done = client.copy("paris:/data/cohort/", "berlin:/data/cohort").wait(60)
    assert done.state == "completed", done.message
    try:
        assert (world["berlin"].data / "cohort/genomes").stat().st_size == SIZE
        task = done.tasks[0].id
        points = [line["point"] for line in evidence_of(world["berlin"]) if _of(line, task)]
        assert points[:1] == ["land"]
        assert "publish" in points
        assert {line["point"] for line in evidence_of(world["paris"]) if _of(line, task)} == {"release"}
        # A copy has the labels of what it came from, though nobody has said anything about its place.
        with pytest.raises(Denied, match="EU"):
            client.copy("berlin:/data/cohort/", "boston:/data/in", labels=["public"])
    finally:
        for path in (world["berlin"].data / "cohort").glob("*"):
            path.unlink()


def _of(line: dict[str, Any], task: str) -> bool:
    return line["kind"] == "decision" and line.get("task") == task


# --- a coordinator that lies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", ["plan", "name"])
def test_the_source_refuses_what_a_lying_coordinator_plans(
    world: World, wire: Callable[[SiteAgent], Wire], lie: str, tmp_path: Path
) -> None:
    """A grant for a site that must not have the data; a certificate in the name of one that may, for another key."""
    me = identity_of(world["boston"]) if lie == "plan" else world.liar.minted("berlin")
    grant = world.liar.grant(world.party("paris"), me.party, labels=["public"], policy_digest=b"permitted")
    before = wire(world["paris"])
    other = peer(world, me, grant, before.address)
    looked = refused(lambda: stat_remote(other, b"data/cohort/"))
    assert looked.reason == "policy-denied"
    error = refused(lambda: pull(other, b"data/cohort/", os.fsencode(tmp_path / "loot"), SETTINGS))
    assert error.reason == "policy-denied"
    assert before.proxy.passed < CHATTER
    assert not list(tmp_path.rglob("*genomes*"))
    assert world.landed() == []
    assert denials(world["paris"], grant.task)


def test_the_source_refuses_a_site_whose_country_the_coordinator_invents(world: World) -> None:
    """The coordinator's catalogue says that boston is in France: it plans, gives grants, and nothing leaves."""
    running = world.federation
    say_country(running, "boston", "FR")
    try:
        asked = running.client.copy("paris:/data/cohort/", "boston:/data/in")
        with pytest.raises(FlowError) as caught:
            asked.wait(60)
    finally:
        say_country(running, "boston", "US")
    assert caught.value.reason == "policy-denied"
    task = asked.refresh().tasks[0]
    assert (asked.state, task.reason, task.counters.bytes_sent) == ("terminated", "policy-denied", 0)
    assert "paris" in task.message
    assert task.attempts == 1
    assert world.landed() == []
    assert denials(world["paris"], task.id)


def test_the_source_counts_for_itself_when_the_coordinator_lowers_the_counter(
    world: World, wire: Callable[[SiteAgent], Wire], tmp_path: Path
) -> None:
    """Nothing that the coordinator keeps knows of the first export; the second is refused all the same."""
    berlin = identity_of(world["berlin"])
    reasons = []
    for number in (1, 2):
        grant = world.liar.grant(
            world.party("paris"), berlin.party, source_path="/data/counted/", transfer=f"t-count{number}"
        )
        before = wire(world["paris"])
        other = peer(world, berlin, grant, before.address)
        target = os.fsencode(tmp_path / str(number))
        if number == 1:
            assert trio.run(lambda: pull(other, b"data/counted/", target, SETTINGS)).state == "completed"  # noqa: B023
        else:
            reasons.append(refused(lambda: pull(other, b"data/counted/", target, SETTINGS)).reason)  # noqa: B023
            assert before.proxy.passed < CHATTER
            assert denials(world["paris"], grant.task)
    assert reasons == ["policy-denied"]
    assert not (tmp_path / "2" / "rows").exists()


# --- a source that lies -----------------------------------------------------------------------------------------------


def release(world: World, grant: Grant, signer: SiteIdentity, **changes: Any) -> bytes:
    """What paris would show, changed."""
    now = int(time.time())
    fields: dict[str, Any] = {
        "transfer": grant.transfer, "task": grant.task, "fence": grant.fence, "route": [grant.source, grant.target],
        "source_path": grant.source_path, "target_path": grant.target_path, "issued": now, "expires": now + 300,
        "labels": ["public"], "requester": "admin",
    }  # fmt: skip
    return signer.sign_release(Release(**(fields | changes)))


def lies(world: World, grant: Grant, route: list[Party]) -> dict[str, tuple[bytes, str]]:
    """Releases that a source could show, with the reason why each is refused."""
    paris, minted = identity_of(world["paris"]), world.liar.minted("paris")
    stolen = release(world, grant, paris, route=route).replace(b"public", b"pubLic")
    return {
        "none": (b"", "release-missing"),
        "stripped": (release(world, grant, paris, route=route), "release-stripped"),
        "forged": (release(world, grant, minted, route=route), "release-forged"),
        "altered": (stolen, "release-forged"),
        "another task": (release(world, grant, paris, route=route, task="t-other.1"), "release-other"),
        "another path": (
            release(world, grant, paris, route=route, source_path="/data/maps"),
            "release-other",
        ),
        "another route": (
            release(world, grant, paris, route=[grant.source, world.party("boston"), grant.target]),
            "release-other",
        ),
        "old": (release(world, grant, paris, route=route, issued=1, expires=2), "release-expired"),
    }


LIES = ["none", "stripped", "forged", "altered", "another task", "another path", "another route", "old"]


def selection(world: World) -> Selection:
    return Selection([Root(os.fsencode(world["paris"].data / "cohort"), b"")])


@pytest.mark.parametrize("lie", LIES)
def test_the_target_refuses_what_a_lying_source_sends(
    world: World, wire: Callable[[SiteAgent], Wire], lie: str
) -> None:
    grant = world.liar.grant(world.party("paris"), world.party("berlin"), dial="source", labels=["public"])
    shown, reason = lies(world, grant, [grant.source, grant.target])[lie]
    before = wire(world["berlin"])
    other = peer(world, identity_of(world["paris"]), grant, before.address, shows=shown)
    error = refused(lambda: push(selection(world), other, b"data/in", SETTINGS))
    assert error.reason == reason
    assert before.proxy.passed < CHATTER
    assert world.landed() == []
    assert not (world["berlin"].data / "in").exists(), "what is denied makes no folder"
    assert [line["refused"] for line in denials(world["berlin"], grant.task)] == [reason]


def test_a_look_tells_whether_it_is_a_folder_and_no_more(
    world: World, wire: Callable[[SiteAgent], Wire]
) -> None:
    """Size and times of labelled data are data too: nobody has decided on them when a peer asks where to land."""
    for path, kind in (("/data/maps", stat.S_IFREG), ("/data/cohort", stat.S_IFDIR)):
        grant = world.liar.grant(
            world.party("paris"), world.party("berlin"), source_path=path, labels=["public"]
        )
        other = peer(world, identity_of(world["berlin"]), grant, wire(world["paris"]).address)
        found = trio.run(stat_remote, other, path[1:].encode())
        assert found is not None
        assert found[1:] == (kind, 0, 0)


@pytest.mark.parametrize("lie", LIES)
def test_a_relay_refuses_what_a_lying_source_sends(
    world: World, wire: Callable[[SiteAgent], Wire], lie: str
) -> None:
    grant = world.liar.grant(world.party("paris"), world.party("berlin"), dial="source", labels=["public"])
    route = [world.party("paris"), world.party("utrecht"), world.party("berlin")]
    shown, reason = lies(world, grant, route)[lie]
    to_relay, to_target = wire(world["utrecht"]), wire(world["berlin"])
    addresses = ["", to_relay.address, to_target.address]
    relays = RelayGrant(
        **{
            name: getattr(grant, name)
            for name in (
                "id",
                "transfer",
                "task",
                "fence",
                "epoch",
                "issued",
                "expires",
                "dial",
                "source_path",
            )
        },
        target_path=grant.target_path,
        stops=[Stop(at.site, at.key_sha256, address) for at, address in zip(route, addresses, strict=True)],
        labels=["public"],
        requester="admin",
    )
    way = Way(("paris", "utrecht", "berlin"), to_relay.address, sign_relay_grant(world.liar.key, relays))
    other = peer(world, identity_of(world["paris"]), grant, to_relay.address, way, shows=shown)
    error = refused(lambda: push(selection(world), other, b"data/in", SETTINGS))
    assert error.reason == reason
    assert to_relay.proxy.passed < CHATTER
    assert to_target.proxy.passed < CHATTER
    assert world.landed() == []
    assert [line["refused"] for line in denials(world["utrecht"], grant.task)] == [reason]


# --- policies and labels never go back --------------------------------------------------------------------------------


def test_what_nobody_may_say_is_not_taken(world: World) -> None:
    """The coordinator takes neither an old bundle nor one of other keys, nor a statement that is not its owner's."""
    client, keys = world.federation.client, world.keys
    with pytest.raises(FlowError, match="not newer"):
        client.activate_bundle(keys.bundle(files(keys, world.pins), 1))
    with pytest.raises(FlowError, match="no key trusted"):
        client.activate_bundle(PolicyKeys().bundle(files(keys, world.pins), 2))
    with pytest.raises(FlowError) as caught:
        client.set_label(PolicyKeys().statement("paris:/data/cohort", "public", number=2))
    assert caught.value.reason == "label-forged"
    with pytest.raises(FlowError, match="not later"):
        client.set_label(keys.statement("paris:/data/cohort", "public", number=1))
    assert msgspec.to_builtins(client.bundles())[0]["version"] == 1


def flow_of(world: World, tmp_path: Path) -> Flow:
    """The `flow` command of the first admin."""
    secrets = world.federation.coordinator.folder / "secrets"
    login = Login.parse((secrets / "admin-login").read_text())
    return Flow(
        tmp_path,
        env={
            "FLOW_CONFIG_DIR": str(tmp_path / "config"),
            "FLOW_COORDINATOR": world.federation.coordinator.url,
            "FLOW_TOKEN": login.token.format_secret(),
            "FLOW_CA_FILE": str(secrets / "ca.pem"),
        },
    )


def test_bundles_and_labels_from_the_command_line(world: World, tmp_path: Path) -> None:
    """A newer bundle and statement reach all agents, also one that was away, and stay over a restart."""
    flow, keys = flow_of(world, tmp_path), world.keys
    assert flow("policy", "bundle", "status", "--json").data["behind"] == []
    key = tmp_path / "owner.pem"
    key.touch(0o600)
    key.write_bytes(keys.owner.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    sign = [
        "label",
        "sign",
        "paris:/data/cohort",
        "--owner",
        "hospital",
        "--key",
        key,
        "-o",
        tmp_path / "said",
    ]
    made = flow(*sign, "--number", 5, "--label", "public", "--fact", "persons=12", "--json").data
    assert (made["owner"], made["number"], made["labels"]) == ("hospital", 5, ["public"])
    world["boston"].kill()
    flow("label", "set", tmp_path / "said")
    assert "statement 5" in flow("label", "set", tmp_path / "said", code=1).stderr  # not later than itself
    shown = {row["path"]: row for row in flow("label", "ls", "--json").data["labels"]}
    assert (shown["/data/cohort"]["labels"], shown["/data/cohort"]["facts"]) == (
        ["public"],
        {"data.persons": 12},
    )
    (tmp_path / "bundle").write_bytes(keys.bundle(files(keys, world.pins), 2))
    pushed = flow("policy", "bundle", "push", tmp_path / "bundle", "--json").data
    assert (pushed["version"], pushed["in_force"]) == (2, True)
    assert "not newer" in str(flow("policy", "bundle", "push", tmp_path / "bundle", code=1))
    assert flow("policy", "bundle", "status", "--json", code=1).data["behind"] == ["boston"]
    world["boston"].start()
    wait_until(lambda: flow("policy", "bundle", "status", code=None).code == 0, "the bundle at boston")
    assert "version 2" in flow("site", "show", "boston").stdout
    wait_until(lambda: not flow("label", "ls", "--json").data["behind"], "the statement at boston")
    world["paris"].stop()
    world["paris"].start()
    assert world.federation.client.site("paris").policy.version == 2
    world.federation.client.copy("paris:/data/cohort/", "berlin:/data/free").wait(
        60
    )  # public by its owner's word
    kinds = [line["kind"] for line in evidence_of(world["paris"])]
    assert kinds.count("policy.activate") == 2


def test_a_site_that_cuts_its_chain_is_told_of_when_its_next_head_arrives(
    world: World, tmp_path: Path
) -> None:
    """Berlin drops what it recorded last and goes on: whoever holds its heads notices, not only an auditor later."""
    flow, client = flow_of(world, tmp_path), world.federation.client
    client.copy("paris:/data/maps", "berlin:/data/maps", labels=["public"]).wait(60)

    def held() -> int:
        return max(one.seq for one in client.checkpoints("berlin"))

    (segment,) = sorted((world["berlin"].state / "evidence" / "chain").glob("*.jsonl"))
    own = [line for line in evidence_of(world["berlin"]) if line["kind"] == "checkpoint"]
    own = [line for line in own if line["of"]["agent"] == "site:berlin"]
    wait_until(lambda: held() >= own[-1]["of"]["seq"], "the heads at the coordinator")
    assert flow("evidence", "verify", "berlin", "--json").data["findings"] == []
    world["berlin"].kill()
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(lines[: own[-2]["seq"]]))
    world["berlin"].start()
    for number in range(3):  # until the new history is as long as the old one was
        client.copy("paris:/data/maps", f"berlin:/data/maps-{number}", labels=["public"]).wait(60)
    said = wait_until(
        lambda: [one for one in client.checkpoints("berlin") if one.seq > own[-1]["of"]["seq"]],
        "a later head",
    )
    assert said
    found = flow("evidence", "verify", "berlin", "--json", code=6).data
    assert "forked" in {finding["what"] for finding in found["findings"]}
    for event in client.events(after=0, types=["evidence.contradicted"]):
        assert (event.site, event.data["chain"]) == ("berlin", own[-1]["of"]["chain"])
        break
    assert flow("evidence", "verify", "nowhere", code=3)
