"""Sites in network namespaces with links of their own: all routes at once, the loss of one, caps that change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import AwakeClock, assert_rate, random_file, roomy_folder

from perf.route_sites import MBIT, RouteSite, RouteSites, wait_for
from tests.overlay import overlay

pytestmark = [pytest.mark.root, pytest.mark.alone, pytest.mark.slow]

SITES = ["s", "t", "r", "q", "p"]
RELAYS = "rqp"
LINKS = {
    ("s", "t"): 100 * MBIT,
    **{pair: 300 * MBIT for name in RELAYS for pair in (("s", name), (name, "t"))},
}
DIRECT, OVER_R, OVER_Q = ("t", "s"), ("t", "r", "s"), ("t", "q", "s")


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[RouteSites]:
    with overlay(SITES, LINKS) as net, roomy_folder(tmp_path) as folder:
        made = RouteSites(folder)
        try:
            for name in SITES:
                made.add(name, prefix=net.prefix(name), address=net.addresses[name], relays=name in RELAYS)
            yield made
        finally:
            made.end()


def fill(site: RouteSite, files: int) -> None:
    """So many files of 16 MiB, as datasets of shards are."""
    for number in range(files):
        random_file(site.folder / f"data/shard-{number:03d}", 1 << 24, seed=number)


@pytest.mark.full  # every day test_planned_overlay has as many routes, with a planner and agents, and one that dies
def test_three_routes_carry_700_mbit_and_one_dies(sites: RouteSites) -> None:
    source, target = sites["s"], sites["t"]
    fill(source, 80)
    sites.pull("s", "t", DIRECT, OVER_R, OVER_Q)
    wait_for(lambda: target.count("pulled") > 1 << 20, "first bytes", 30)
    target.rate_mbit("pulled", 5.0)  # in which TCP finds its rate
    assert_rate(lambda: target.rate_mbit("pulled", 3.0), 0.9 * 700)
    assert sites["p"].count("passed") == 0

    with AwakeClock() as clock:
        sites["r"].process.kill()
        wait_for(lambda: "trying again" in target.said(), "end of the pass", 30)
        before = target.count("pulled")  # the other streams went on until then
        wait_for(lambda: target.count("pulled") > before + (4 << 20), "bytes over what is left", 30)
        assert clock.now_s() < 3.0
    assert_rate(lambda: target.rate_mbit("pulled", 2.0), 0.8 * 400)

    wait_for(lambda: "pulled completed" in target.said(), "end", 60)
    sent = int(target.said().rpartition("bytes ")[2].split()[0])
    assert sent < (80 << 24) + (64 << 20)  # what had landed or was journalled was not sent again
    for shard in sorted((source.folder / "data").iterdir()):
        assert (target.folder / "in" / shard.name).read_bytes() == shard.read_bytes()


def test_a_cap_that_changes_is_held_and_a_route_that_goes_carries_nothing(sites: RouteSites) -> None:
    relay, target = sites["r"], sites["t"]
    fill(sites["s"], 16)
    sites.pull("s", "t", DIRECT, OVER_R, OVER_Q)
    wait_for(lambda: relay.count("passed") > 1 << 20, "first bytes", 30)
    for name in "rq":
        sites[name].tell(f"limit link:t {40 * MBIT}")
    before = relay.count("passed")
    wait_for(lambda: relay.count("passed") > before + (2 << 20), "more bytes", 30)
    assert_rate(lambda: relay.rate_mbit("passed", 5.0), 0.95 * 40, 1.05 * 40)

    sites.use("t", DIRECT, OVER_Q)
    wait_for(lambda: "relay ended" in relay.said(), "end of the passage", 30)
    passed = int(relay.said().rpartition("'bytes': ")[2].split(",")[0])
    wait_for(lambda: "pulled completed" in target.said(), "end", 90)
    assert relay.count("passed") == passed
    assert "passes 1 " in target.said()
