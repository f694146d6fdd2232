"""Planner, agents, relays and policies on links with rates of their own: sites in network namespaces, links by HTB."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from liars import PolicyKeys
from planned import decided, enact, say_links, start
from sites import Federation, federation
from support import MIB, AwakeClock, assert_rate, free_port, roomy_folder, wait_until

from flowengine.api.links import ProbeRequest
from tests.overlay import HUB, overlay

pytestmark = [pytest.mark.root, pytest.mark.alone, pytest.mark.slow]

MBIT = 1_000_000
SITES = {"s": "FR", "t": "DE", "r": "NL", "q": "NL", "p": "US", "u": "DE"}
RELAYS = "rqp"
LINKS = {
    ("s", "t"): 50 * MBIT,
    **{pair: 150 * MBIT for name in RELAYS for pair in (("s", name), (name, "t"))},
}
"""Half of what test_overlay has, where there is no coordinator: what six sites land on one machine is new memory, which
some machines give slowly."""
ALL_WAYS = 350
SHAPED = LINKS | {("s", "u"): 30 * MBIT, ("r", "u"): 100 * MBIT, ("q", "u"): 60 * MBIT}
"""Nobody declares what the links to u carry."""
SHARD = 8 * MIB
CHATTER = 2 * MIB
"""More than a site that carries nothing exchanges with its coordinator."""


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    keys = PolicyKeys()
    with (
        roomy_folder(tmp_path_factory.mktemp("federation")) as base,
        overlay(list(SITES), SHAPED) as net,
        federation(base, options=keys.options(base), host=HUB) as made,
    ):
        for name in SITES:
            relays = ["[relay]", "enabled = true"] if name in RELAYS else []
            listen = f"{net.addresses[name]}:{free_port()}"
            made.make(name, lines=[*relays, *keys.site_lines], listen=listen, prefix=net.prefix(name))
        start(made)
        enact(made, keys, SITES, ["s:/data"])
        say_links(made, LINKS, held=False)
        yield made


def fill(sites: Federation, folder: str, shards: int) -> None:
    """So many files of 8 MiB, as datasets of shards are."""
    source = sites["s"].data / folder
    source.mkdir()
    bytes_of = (
        Cipher(algorithms.AES(os.urandom(16)), modes.CTR(bytes(16))).encryptor().update
    )  # quick to make
    for number in range(shards):
        (source / f"shard-{number:03d}").write_bytes(bytes_of(bytes(SHARD)))


@contextlib.contextmanager
def moving(sites: Federation, folder: str, shards: int, target: str = "t") -> Iterator[Any]:
    """A transfer of so many shards; what landed is right, and is gone afterwards."""
    fill(sites, folder, shards)
    transfer = sites.client.copy(f"s:/data/{folder}/", f"{target}:/data/{folder}")
    try:
        yield transfer
        landed = [path for path in (sites[target].data / folder).iterdir() if path.name.startswith("shard-")]
        assert landed
        for path in sorted(landed)[::8]:
            assert path.read_bytes() == (sites["s"].data / folder / path.name).read_bytes()
    finally:
        if transfer.refresh().ended is None:
            transfer.cancel()
            wait_until(lambda: transfer.refresh().ended, "the end of the rest", 60)
        for site in ("s", target):
            shutil.rmtree(sites[site].data / folder)


def done_bytes(transfer: Any) -> Callable[[], int]:
    """What the coordinator was last told of a transfer."""
    return lambda: int(transfer.refresh().counters.bytes_done)


def sent_bytes(site: str) -> int:
    """What a site has put on the network."""
    return int(Path(f"/sys/class/net/flow-{site}/statistics/rx_bytes").read_text())


def received_bytes(site: str) -> int:
    """What a site has had from the network."""
    return int(Path(f"/sys/class/net/flow-{site}/statistics/tx_bytes").read_text())


def rate_mbit(count: Callable[[], int], seconds: float) -> float:
    """How fast a counter grows for so long, from one change of it to another."""

    def change(before: int) -> tuple[int, float]:
        # To ask the coordinator at every chance would take half a processor from those whose rate is measured.
        return wait_until(  # type: ignore[no-any-return]
            lambda: (now, time.monotonic()) if (now := count()) != before else None, "bytes", 20, every_s=0.1
        )

    first, begun = change(count())
    before = {site: sent_bytes(site) for site in "srq"}
    last, ended = first, begun
    while ended < begun + seconds:
        last, ended = change(last)
    sent = {
        site: f"{(sent_bytes(site) - bytes_then) * 8 / (ended - begun) / MBIT:.0f}"
        for site, bytes_then in before.items()
    }
    print(f"{ended - begun:.1f} s, Mbit/s that sites sent meanwhile: {sent}")  # shown where a rate is missed
    return (last - first) * 8 / (ended - begun) / MBIT


def used(transfer: Any) -> set[tuple[str, ...]]:
    """The ways that the plan gives to a transfer."""
    return {tuple(way.sites) for way in transfer.refresh().tasks[0].ways}


THREE = {("s", "t"), ("s", "r", "t"), ("s", "q", "t")}


def test_a_plan_follows_what_probes_measured(sites: Federation) -> None:
    ends = [("s", "u"), ("r", "u"), ("q", "u")]
    for pair in [*ends, ("s", "r"), ("s", "q")]:
        for _ in range(4):  # somebody else may have the processors during one of them
            found = sites.client.probe_link(*pair, ProbeRequest(size_bytes=32 * MIB, seconds=1.5))
            assert found.rate_bits_per_s is not None
            spread = max(0.1, 2 * (found.spread or 0.0))
            assert found.rate_bits_per_s <= (1 + spread) * SHAPED[pair]
            if found.rate_bits_per_s >= (1 - spread) * SHAPED[pair]:
                break
        else:
            pytest.fail(f"{pair}: {found} after four probes")
    assert all(sites.client.link(*pair).capacity_bits_per_s is None for pair in ends)
    plan = sites.client.plan("s:/data/", "u:/data/probed", size_bytes=10**10)
    planned = {tuple(way.sites): way.rate_bits_per_s for way in plan.ways}
    believed = {pair: sites.client.link(*pair).rate_bits_per_s or 0.0 for pair in SHAPED if "u" in pair}
    assert planned == {
        ("s", "u"): pytest.approx(believed["s", "u"], rel=0.02),
        ("s", "r", "u"): pytest.approx(believed["r", "u"], rel=0.02),
        ("s", "q", "u"): pytest.approx(believed["q", "u"], rel=0.02),
    }
    with moving(sites, "probed", 32, "u") as transfer:
        wait_until(lambda: used(transfer) == planned.keys(), "the ways of the plan", 60)
        wait_until(
            lambda: sent_bytes("q") > 4 * MIB and sent_bytes("r") > 4 * MIB, "bytes over both relays", 60
        )
        # What the sender sends is more at first: it fills the relays.
        assert_rate(lambda: rate_mbit(lambda: received_bytes("u"), 2.5), 0.8 * 190, 1.1 * 190)


def test_a_limit_that_changes_is_held_and_what_policy_forbids_carries_nothing(sites: Federation) -> None:
    with moving(sites, "capped", 60) as transfer:
        wait_until(lambda: used(transfer) == THREE, "three ways", 60)
        wait_until(lambda: sent_bytes("q") > 8 * MIB, "bytes over q", 60)
        sites.client.set_limit("link:q>t", 40 * MBIT)
        at = time.monotonic() + 2.0
        wait_until(lambda: time.monotonic() > at, "what was on its way")
        before = sent_bytes("p")  # nothing is probed while something moves, and what was begun before is over
        assert_rate(lambda: rate_mbit(lambda: sent_bytes("q"), 5.0), 0.95 * 40, 1.05 * 40)
        sites.client.remove_limit("link:q>t")
        assert sent_bytes("p") < before + CHATTER
        assert "relay begins" not in sites["p"].log
        assert decided(sites["p"], transfer.record, "relay") == []
        assert {line["decision"] for line in decided(sites["q"], transfer.record, "relay")} == {"permit"}


def test_what_is_urgent_and_due_gets_its_rate(sites: Federation) -> None:
    with moving(sites, "bulk", 64) as bulk:
        wait_until(lambda: used(bulk) == THREE, "three ways", 60)
        fill(sites, "due", 48)
        begun = time.monotonic()
        due = sites.client.copy(
            "s:/data/due/", "t:/data/due", priority="urgent", deadline=timedelta(seconds=60)
        )
        assert due.record.promised
        wait_until(lambda: time.monotonic() > begun + 5.0, "five seconds")
        # More than half of what the ways carry, which is what it would get as an equal.
        assert_rate(lambda: rate_mbit(done_bytes(due), 1.5), 0.6 * ALL_WAYS)
        assert due.wait(60).state == "completed"
        assert time.monotonic() - begun < 60


def test_all_ways_are_used_and_one_relay_dies(sites: Federation) -> None:
    with moving(sites, "large", 144) as transfer:
        wait_until(lambda: done_bytes(transfer)() > MIB, "first bytes", 60)
        at = time.monotonic() + 5.0
        wait_until(lambda: time.monotonic() > at, "the first five seconds")
        assert used(transfer) == THREE
        # Both ends, three links and their sites share the processors: what they can they show in one look of some.
        assert_rate(lambda: rate_mbit(done_bytes(transfer), 3.5), 0.9 * ALL_WAYS, looks=7)
        sites["r"].kill()
        pause = threading.Event()
        with AwakeClock() as clock:
            grown, longest, before = 0.0, 0.0, sent_bytes("s")
            while (now := clock.now_s()) < 5.0:
                if (count := sent_bytes("s")) > before + 256 * 1024:
                    longest, grown, before = max(longest, now - grown), now, count
                pause.wait(0.01)
            assert max(longest, clock.now_s() - grown) < 3.0
        assert_rate(lambda: rate_mbit(lambda: sent_bytes("s"), 2.0), 0.8 * 200)
