"""Real agents over relays that the plan gives: the routes are used, policy holds at each, and it is all on record."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from liars import LyingCoordinator, LyingGate, PolicyKeys, evidence_of, identity_of
from planned import decided, enact, passed_bytes, say_links, start
from sites import Federation, federation
from support import MIB, random_file, wait_until

from flowengine.errors import FlowError
from flowengine.transfer.passes import TransferSettings
from flowengine.transfer.reaching import Way
from flowengine.transfer.routes import RoutedPeer
from flowengine.transfer.run import pull
from flowengine.trust.relay_grant import RelayGrant, Stop, sign_relay_grant

pytestmark = pytest.mark.slow

MBIT = 1_000_000
LINKS = {("s", "t"): 40 * MBIT} | {
    pair: 80 * MBIT for relay in ("r1", "r2") for pair in (("s", relay), (relay, "t"))
}
SIZE = 64 * MIB
PERSONAL = ["s:/data/cohort", "i:/data/cohort"]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    base, keys = tmp_path_factory.mktemp("federation"), PolicyKeys()
    with federation(base, options=keys.options(base)) as made:
        for site in ("s", "t"):
            made.make(site, lines=keys.site_lines)
        for site in ("i", "j"):  # these only dial out
            made.make(site, lines=keys.site_lines, listen="")
        for site in ("r1", "r2"):
            made.make(site, lines=["[relay]", "enabled = true", *keys.site_lines])
        start(made)
        enact(made, keys, {"s": "FR", "t": "DE", "i": "FR", "j": "DE", "r1": "NL", "r2": "US"}, PERSONAL)
        say_links(made, LINKS, held=True)
        (made["s"].data / "cohort").mkdir()
        random_file(made["s"].data / "cohort/large", SIZE)
        yield made


def test_a_transfer_goes_straight_and_over_the_relay_that_policy_permits(sites: Federation) -> None:
    transfer = sites.client.copy("s:/data/cohort/", "t:/data/in")
    seen: set[tuple[str, ...]] = set()

    def ended() -> bool:
        record = transfer.refresh()
        seen.update(tuple(way.sites) for way in record.tasks[0].ways)
        return record.ended is not None

    wait_until(ended, "the end", 90)
    assert transfer.record.state == "completed", transfer.record
    assert (sites["t"].data / "in/large").read_bytes() == (sites["s"].data / "cohort/large").read_bytes()
    assert seen == {("s", "t"), ("s", "r1", "t")}
    wait_until(lambda: passed_bytes(sites["r1"], transfer.record) > SIZE // 4, "bytes that passed r1")
    assert passed_bytes(sites["r1"], transfer.record) < SIZE
    assert {line["decision"] for line in decided(sites["r1"], transfer.record, "relay")} == {"permit"}
    for relay in ("r1", "r2"):
        assert list(sites[relay].data.iterdir()) == []
    assert "relay begins" not in sites["r2"].log
    assert decided(sites["r2"], transfer.record, "relay") == []


def test_a_forged_plan_leads_nothing_over_the_relay_that_policy_forbids(
    sites: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grants by the coordinator's own key, for a target that asks nobody: the source does not let go of a byte."""
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))
    liar = LyingCoordinator(sites.coordinator)
    source, relay, target = (identity_of(sites[name]) for name in ("s", "r2", "t"))
    route = [source.party.site, relay.party.site, target.party.site]
    grant = liar.grant(source.party, target.party, route=route)
    kept = ("id", "transfer", "task", "fence", "epoch", "issued", "expires", "dial", "requester")
    stops = [(target, ""), (relay, sites["r2"].listen), (source, sites["s"].listen)]
    carried = RelayGrant(
        **{name: getattr(grant, name) for name in kept},
        source_path=grant.source_path,
        target_path=grant.target_path,
        stops=[Stop(one.party.site, one.party.key_sha256, address) for one, address in stops],
    )
    way = Way(("t", "r2", "s"), sites["r2"].listen, sign_relay_grant(liar.key, carried))
    peer = RoutedPeer.at(way.address, liar.trust(target), liar.key.sign(grant))
    assert isinstance(peer, RoutedPeer)
    peer.gate, peer.ways = LyingGate(), (way,)
    settings = TransferSettings(retry_for_s=0.0, streams=2)
    with pytest.raises(FlowError) as refused:
        trio.run(lambda: pull(peer, b"data/cohort/", os.fsencode(tmp_path / "loot"), settings))
    assert refused.value.reason == "policy-denied"
    assert not list(tmp_path.rglob("large"))
    assert "relay begins" not in sites["r2"].log
    on_record = [line for line in evidence_of(sites["s"]) if line.get("task") == grant.task]
    assert ("relay", "r2", "deny") in {
        (line["ask"]["use"], line["ask"]["site"], line["decision"]) for line in on_record
    }


def test_two_sites_that_only_dial_out_meet_at_the_relay_that_policy_permits(sites: Federation) -> None:
    (sites["i"].data / "cohort").mkdir()
    random_file(sites["i"].data / "cohort/part", 16 * MIB)
    plan = sites.client.plan("i:/data/cohort/", "j:/data/in")
    assert plan.routes == [["i", "r1", "j"]]
    transfer = sites.client.copy("i:/data/cohort/", "j:/data/in")
    assert transfer.wait(60).state == "completed", transfer.record
    assert (sites["j"].data / "in/part").read_bytes() == (sites["i"].data / "cohort/part").read_bytes()
    wait_until(lambda: passed_bytes(sites["r1"], transfer.record) > 16 * MIB, "all bytes at r1")
    assert {line["decision"] for line in decided(sites["r1"], transfer.record, "relay")} == {"permit"}
    assert {line["decision"] for line in decided(sites["i"], transfer.record, "release")} == {"permit"}
    assert "relay begins" not in sites["r2"].log


def test_without_a_permitted_relay_the_refusal_says_so(sites: Federation) -> None:
    sites["r1"].stop()
    wait_until(lambda: sites.client.site("r1").state != "online", "r1 to be gone")
    with pytest.raises(FlowError) as refused:
        sites.client.copy("i:/data/cohort/", "j:/data/again")
    assert refused.value.reason == "no-route"
    assert "policy permits none of the relays r2" in refused.value.message
    plan = sites.client.plan("i:/data/cohort/", "j:/data/again")
    assert plan.routes == []
    assert "neither i nor j can be reached from outside" in plan.text
