"""What must not slip past policy: copies without a byte, transfers that go on, old plans, clocks that jump.

A real coordinator and real agents.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from liars import PolicyKeys, evidence_of
from sites import Federation, federation
from studies import STUDY
from support import MIB, files_below, random_file, wait_until, written_below

from flowengine.client.synchronous import Transfer
from flowengine.errors import Denied
from flowengine.policy.duties import Clock
from flowengine.trust.deletion import verify_deletion
from flowengine_agent.holdings import Holdings

pytestmark = pytest.mark.slow

POLICY = (
    STUDY
    + """
[[rule]]
id     = "members"
effect = "permit"
on     = ["release", "relay"]
when   = []
why    = "Members of the study give"
[[rule]]
id     = "receive"
effect = "permit"
on     = [{use}]
when   = []
then   = [{then}]
why    = "Members of the study receive"
"""
)
COUNT = '{count = {ledger = "transfers", window = "calendar_year"}}'
SEALED = '{encrypt = {at = ["flight", "rest"]}}'
ENOUGH = """
[[rule]]
id     = "enough"
effect = "forbid"
on     = ["land", "hold"]
when   = ["ledger.transfers_after('{label}', 'recipient', 'calendar_year') > {most}"]
why    = "The agreement covers so many"
"""
ENDED = """
[[rule]]
id     = "ended"
effect = "forbid"
on     = ["land"]
when   = []
why    = "The agreement has ended"
"""
RATE = 24_000_000
DUE_S = 8


@dataclass
class World:
    """Two sites, and the bundles that come into force there."""

    federation: Federation
    keys: PolicyKeys
    version: int = 0

    def activate(self, *rules: str, then: str = "", use: str = "land") -> None:
        """Put policies in force and wait until both agents have them."""
        self.version += 1
        text = POLICY.replace("{then}", then).replace("{use}", f'"{use}"') + "".join(rules)
        self.client.activate_bundle(self.keys.bundle({"study.toml": text}, self.version))
        wait_until(
            lambda: all(self.client.site(name).policy.version == self.version for name in "ab"),
            f"version {self.version} everywhere",
            20,
        )

    @property
    def client(self) -> Any:
        return self.federation.client

    def ask(self, source: str, to: str, *labels: str, **options: Any) -> Transfer:
        places = f"a:/data/{source}", f"b:/data/{to}/"
        found: Transfer = self.client.copy(*places, labels=["study", *labels], **options)
        return found

    def copy(self, source: str, to: str, *labels: str) -> Transfer:
        transfer = self.ask(source, to, *labels)
        wait_until(lambda: transfer.refresh().ended, "the end", 40)
        assert transfer.record.state == "completed", transfer.record.message
        return transfer

    def records(self, site: str, transfer: Transfer, kind: str) -> list[dict[str, Any]]:
        return [
            record
            for record in evidence_of(self.federation[site])
            if record["kind"] == kind and record.get("transfer") == transfer.id
        ]

    def visible(self, to: str) -> list[str]:
        folder = self.federation["b"].data / to
        return sorted(path.name for path in files_below(folder) if ".flow-staging" not in path.parts)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("federation")
    keys = PolicyKeys()
    lines = [*keys.site_lines, 'purge_after = "1 s"']
    with federation(folder, options=keys.options(folder)) as running:
        for site in "ab":
            running.add(site, lines=lines)
        make_data(running["a"].data)
        yield World(running, keys)


def make_data(data: Path) -> None:
    for number in range(5):
        random_file(data / f"small/{number}", 20_000, seed=number + 1)
        random_file(data / f"more/{number}", 20_000, seed=number + 1)
        random_file(data / f"third/{number}", 20_000, seed=number + 11)
    random_file(data / "large/one", 24 * MIB)


@pytest.mark.parametrize(("use", "then"), [("land", COUNT), ("hold", f"{COUNT}, {SEALED}")])
def test_a_copy_of_which_no_byte_has_to_move_is_decided_counted_and_on_the_record(
    world: World, use: str, then: str
) -> None:
    source = "small" if use == "land" else "third"
    world.activate(ENOUGH.replace("{label}", use).replace("{most}", "3"), then=then, use=use)
    first = world.copy(source, f"{use}-1", use)
    # The same once more: nothing moves. Then under other names, where what lies there is taken if it can be read.
    same = world.copy(source, f"{use}-1", use)
    assert same.record.counters.bytes_unchanged > 0
    other = world.copy("more" if use == "land" else source, f"{use}-1", use)
    if use == "land":
        assert other.record.counters.bytes_reused == 100_000
    for transfer in (first, same, other):
        landed = world.records("b", transfer, "chunk-root")
        assert [(one["objects"] >= 5, one["size_bytes"] >= 100_000) for one in landed] == [(True, True)]
        for site, point in (("a", "release"), ("b", use)):
            decided = world.records(site, transfer, "decision")
            assert point in {one["ask"]["use"] for one in decided}
        states = [
            one["state"]
            for one in world.records("a", transfer, "obligation")
            if one["duty"]["type"] == "count"
        ]
        assert states == ["accepted", "fulfilled"]
    with pytest.raises(Denied, match="covers so many"):
        world.ask(source, f"{use}-3", use)


def test_a_cancelled_transfer_leaves_room_only_where_nothing_had_moved(world: World) -> None:
    world.activate(ENOUGH.replace("{label}", "rare").replace("{most}", "1"), then=COUNT)
    agent = world.federation["b"]
    agent.kill()
    waits = world.ask("small", "cancelled", "rare")
    with pytest.raises(Denied, match="covers so many"):  # what waits has its place
        world.ask("small", "other", "rare")
    waits.cancel()
    agent.start()
    world.client.set_limit("link:a>b", RATE)
    moves = world.ask("large", "cancelled", "rare")
    wait_until(lambda: staged_bytes(world, "cancelled") > MIB, "some bytes", 30)
    moves.cancel()
    wait_until(lambda: moves.refresh().ended, "the end", 30)
    world.client.remove_limit("link:a>b")
    with pytest.raises(Denied, match="covers so many"):
        world.ask("small", "other", "rare")


def staged_bytes(world: World, to: str) -> int:
    return written_below(world.federation["b"].data / to, staged=True)


def test_what_was_paused_goes_on_only_as_the_newest_policies_let_it(world: World) -> None:
    world.activate()
    world.client.set_limit("link:a>b", RATE)
    transfer = world.ask("large", "paused")
    wait_until(lambda: staged_bytes(world, "paused") > MIB, "some bytes", 30)
    transfer.pause()
    wait_until(lambda: transfer.refresh().state == "suspended", "the pause", 30)
    world.activate(ENDED)
    transfer.resume()
    world.client.remove_limit("link:a>b")
    wait_until(lambda: transfer.refresh().state == "purged", "the purge", 40)
    assert world.visible("paused") == []
    assert "agreement has ended" in transfer.why().line or "study/ended" in transfer.why().line
    with pytest.raises(Denied, match="agreement has ended"):
        transfer.retry()
    world.activate()
    transfer.retry()
    wait_until(lambda: transfer.refresh().ended, "the end", 40)
    assert transfer.record.state == "completed", transfer.record.message
    assert world.visible("paused") == ["one"]


def test_a_plan_that_was_made_under_older_policies_is_decided_anew(world: World) -> None:
    world.activate()
    plan = world.client.plan("a:/data/small", "b:/data/planned/", labels=["study"])
    assert plan.permitted
    world.activate(ENDED)
    with pytest.raises(Denied, match="agreement has ended"):
        world.ask("small", "planned", plan=plan.id)
    assert world.visible("planned") == []


def test_a_deletion_is_neither_forgotten_nor_early_where_a_clock_jumps_back_over_a_restart(
    world: World,
) -> None:
    world.activate(then=f'{{delete_after = "{DUE_S} seconds", proof = "certificate"}}')
    begun = time.time()
    transfer = world.copy("small", "due")
    agent = world.federation["b"]
    agent.kill()
    holdings = Holdings(str(agent.state / "holdings.sqlite"))
    known = holdings.clock()
    assert known is not None
    # As if the clock had been an hour ahead of where it is now.
    holdings.set_clock(Clock(known.wall + 3600, known.steady, known.boot))
    holdings.close()
    agent.start()
    record = wait_until(lambda: transfer.refresh().state == "purged" and transfer.record, "the purge", 60)
    found = record.tasks[0].disposal
    assert found is not None
    anchors = (world.federation.coordinator.folder / "secrets/ca.pem").read_text()
    said, _ = verify_deletion(base64.b64decode(found.certificate), anchors)
    assert (said.cause, said.objects) == ("delete-after", 5)
    assert said.landed >= int(begun)
    assert said.deleted >= said.landed + DUE_S, "out of sight it may be before, destroyed it is not"
    assert world.visible("due") == []


EMERGENCY = """
[[rule]]
id     = "emergency"
effect = "permit"
on     = ["land"]
when   = [{when}]
then   = [{notify = ["privacy@example.org"], within = "15 min"}, {review_by = "24 hours"}]
why    = "Vital interest: one person may release, reviewed within 24 hours"
"""


def test_emergencies_have_no_door(world: World) -> None:
    """Nobody can say that it is one; and were it one, no agent carries out what is then to be done."""
    world.activate(EMERGENCY.replace("{when}", "'request.break_glass is true'"), use="process")
    with pytest.raises(Denied) as denied:
        world.ask("small", "emergency", purpose="request.break_glass is true")
    assert "Not known: an emergency is declared" in denied.value.message
    world.activate(EMERGENCY.replace("{when}", ""), use="process")
    with pytest.raises(Denied, match="unsupported obligation: notify"):
        world.ask("small", "emergency", purpose="care")
    world.activate(EMERGENCY.replace("{when}", ""), ENDED)
    with pytest.raises(Denied, match="agreement has ended"):
        world.ask("small", "emergency")
    assert world.visible("emergency") == []
