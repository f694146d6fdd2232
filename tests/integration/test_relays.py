"""Sessions over relays: what passes, what does not, and what each site is asked before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from support import until

from flowengine.chunking.filling import Filling
from flowengine.errors import AuthenticationError, FlowError, TemporaryError
from flowengine.store.selection import Root, Selection
from flowengine.transfer.passes import Report, TransferSettings
from flowengine.transfer.routes import RoutedPeer
from flowengine.transfer.run import pull, push, stat_remote
from tests.routes import Hosts, fill

pytestmark = pytest.mark.slow
SIZE = 24 << 20
SETTINGS = TransferSettings(retry_for_s=60.0, streams=4)


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))


async def pulled(hosts: Hosts, peer: RoutedPeer, settings: TransferSettings = SETTINGS) -> Report:
    return await pull(peer, b"data/", os.fsencode(hosts["t"].folder / "in"), settings)


@pytest.mark.parametrize("relays", [("r",), ("r", "q"), ("r", "q", "p")])
def test_a_pull_over_relays(tmp_path: Path, relays: tuple[str, ...]) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, "s", "t", *relays, relays=relays) as hosts:
            data = fill(hosts["s"].folder / "data", SIZE)
            report = await pulled(hosts, hosts.peer(hosts.way("t", *relays, "s")))
            assert report.state == "completed"
            assert (hosts["t"].folder / "in/big").read_bytes() == data
            route = ("s", *reversed(relays), "t")
            ticket = b"ticket of " + ">".join(route).encode()
            assert hosts["s"].gate.asked == [("release", route, b"")]
            for name in relays:
                assert hosts[name].gate.asked == [("relay", route, ticket)]
                assert hosts[name].passed_bytes() >= SIZE
                assert list((hosts[name].folder / "data").iterdir()) == []

    trio.run(main)


def test_a_push_over_a_relay(tmp_path: Path) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, "s", "t", "r", relays=["r"]) as hosts:
            data = fill(hosts["s"].folder / "data", SIZE)
            way = hosts.way("s", "r", "t", dial="source")
            selection = Selection([Root(os.fsencode(hosts["s"].folder / "data"), b"")])
            report = await push(selection, hosts.peer(way, push=True), b"in", SETTINGS)
            assert report.state == "completed"
            assert (hosts["t"].folder / "in/big").read_bytes() == data
            assert [use for use, _, _ in hosts["s"].gate.asked] == ["release"]
            assert hosts["r"].gate.asked == [("relay", ("s", "r", "t"), b"ticket of s>r>t")]
            assert hosts["t"].gate.asked == [("land", ("s", "r", "t"), b"ticket of s>r>t")]

    trio.run(main)


def test_several_routes_carry_one_transfer_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, "s", "t", "r", "q", relays=["r", "q"]) as hosts:
            fill(hosts["s"].folder / "data", 3 * SIZE)
            for name, near in (("s", "serve"), ("r", "link:r>t"), ("q", "link:q>t")):
                hosts[name].limits.set_rate(near, 400e6 if name == "s" else 80e6)
            ways = [hosts.way("t", "s"), hosts.way("t", "r", "s"), hosts.way("t", "q", "s")]
            report = await pulled(hosts, hosts.peer(*ways))
            assert report.state == "completed"
            carried = [hosts[name].passed_bytes() for name in ("r", "q")]
            assert min(carried) > 2 << 20
            assert sum(carried) < report.bytes_sent  # the direct route had its part

    trio.run(main)


def test_a_relay_that_dies_costs_a_pass_and_no_landed_chunk(tmp_path: Path) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, "s", "t", "r", "q", relays=["r", "q"]) as hosts:
            data = fill(hosts["s"].folder / "data", 3 * SIZE)
            for name in "rq":
                hosts[name].limits.set_rate(f"link:{name}>t", 80e6)
            peer = hosts.peer(hosts.way("t", "r", "s"), hosts.way("t", "q", "s"))

            async def kill() -> None:
                await until(lambda: hosts["r"].passed_bytes() >= 4 << 20, "bytes on the relay")
                hosts["r"].scope.cancel()
                hosts["q"].limits.set_rate("link:q>t", None)

            hosts.nursery.start_soon(kill)
            report = await pulled(hosts, peer)
            assert (report.state, report.passes) == ("completed", 2)
            assert (hosts["t"].folder / "in/big").read_bytes() == data
            # What landed in the first pass was not sent again: more than a window's worth would be.
            assert report.bytes_sent < len(data) + (24 << 20)

    trio.run(main)


@pytest.mark.parametrize("changes", [False, True])
def test_a_big_file_goes_on_where_its_relay_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: bool
) -> None:
    """What was read of it is not read again, unless it has changed meanwhile."""
    size, read_from = 4 * SIZE, [0]
    fill_in = Filling.fill

    def counted(filling: Filling, fd: int, offset: int, until: int, *, ends: bool) -> bytes:
        read_from.append(offset)
        return fill_in(filling, fd, offset, until, ends=ends)

    monkeypatch.setattr(Filling, "fill", counted)

    async def main() -> None:
        async with Hosts.running(tmp_path, "s", "t", "r", "q", relays=["r", "q"]) as hosts:
            fill(hosts["s"].folder / "data", size)
            big = hosts["s"].folder / "data/big"
            for name in "rq":
                hosts[name].limits.set_rate(f"link:{name}>t", 400e6)
            peer = hosts.peer(hosts.way("t", "r", "s"), hosts.way("t", "q", "s"))

            async def kill() -> None:
                await until(
                    lambda: hosts["r"].passed_bytes() >= size // 4, "a quarter over r", pause_at_most_s=0.01
                )
                if changes:
                    with open(big, "r+b") as file:
                        file.write(b"another beginning")
                hosts["r"].scope.cancel()
                hosts["q"].limits.set_rate("link:q>t", None)

            def again(line: str) -> None:
                read_from.clear()

            hosts.nursery.start_soon(kill)
            into = os.fsencode(hosts["t"].folder / "in")
            report = await pull(peer, b"data/", into, SETTINGS, note=again)
            assert (report.state, report.passes) == ("completed", 2)
            assert (hosts["t"].folder / "in/big").read_bytes() == big.read_bytes()
            assert (min(read_from, default=size) == 0) is changes
            if not changes:
                assert min(read_from, default=size) >= size // 4

    trio.run(main)


def test_routes_come_and_go_while_a_session_runs(tmp_path: Path) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, "s", "t", "r", "q", relays=["r", "q"]) as hosts:
            data = fill(hosts["s"].folder / "data", 2 * SIZE)
            hosts["s"].limits.set_rate("serve", 160e6)
            direct, one, two = hosts.way("t", "s"), hosts.way("t", "r", "s"), hosts.way("t", "q", "s")
            peer = hosts.peer(direct, one)
            left_at: list[int] = []

            async def change() -> None:
                await until(lambda: hosts["r"].passed_bytes() >= 1 << 20, "bytes on the relay")
                peer.use([direct, two])
                relay = hosts["r"].relay
                assert relay is not None
                await until(lambda: not relay.streams, "the relay's streams to end")
                left_at.append(hosts["r"].passed_bytes())

            hosts.nursery.start_soon(change)
            report = await pulled(hosts, peer)
            assert (report.state, report.passes) == ("completed", 1)
            assert (hosts["t"].folder / "in/big").read_bytes() == data
            assert left_at == [hosts["r"].passed_bytes()]
            assert hosts["q"].passed_bytes() > 1 << 20

    trio.run(main)


@pytest.mark.parametrize(("site", "use"), [("s", "release"), ("r", "relay")])
def test_not_a_byte_passes_what_policy_forbids(tmp_path: Path, site: str, use: str) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, "s", "t", "r", relays=["r"]) as hosts:
            fill(hosts["s"].folder / "data", 1 << 20)
            hosts[site].gate.denies = frozenset({use})
            with pytest.raises(FlowError) as raised:
                await pulled(hosts, hosts.peer(hosts.way("t", "r", "s")))
            assert raised.value.reason == "policy-denied"
            assert hosts["r"].passed_bytes() == 0
            # With another route the transfer goes on without it.
            report = await pulled(hosts, hosts.peer(hosts.way("t", "r", "s"), hosts.way("t", "s")))
            assert report.state == "completed"
            assert hosts["r"].passed_bytes() == 0

    trio.run(main)


def test_who_has_no_place_on_a_route_is_not_let_in(tmp_path: Path) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, "s", "t", "r", "x", relays=["r"]) as hosts:
            fill(hosts["s"].folder / "data", 1 << 20)
            stolen = hosts.way("t", "r", "s")
            peer = hosts.peer(stolen)
            peer.trust = hosts["x"].trust
            with pytest.raises(AuthenticationError) as raised:
                await pulled(hosts, peer)
            assert raised.value.reason == "grant-other-party"

            for changes, reason in (
                ({"expires": 1_000, "issued": 500}, "grant-expired"),
                ({"task": "task-2"}, "grant-other-party"),
                ({"fence": 999}, "grant-superseded"),
            ):
                way = hosts.way("t", "r", "s", **changes)
                with pytest.raises(FlowError) as refused:
                    await pulled(hosts, hosts.peer(way), TransferSettings(retry_for_s=0.0))
                told = "\n".join(hosts["s"].log + hosts["r"].log)
                assert refused.value.reason == reason or reason in told

    trio.run(main)


def test_a_site_that_does_not_relay_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, "s", "t", "r") as hosts:
            fill(hosts["s"].folder / "data", 1 << 20)
            with pytest.raises(FlowError, match="does not relay"):
                await pulled(hosts, hosts.peer(hosts.way("t", "r", "s")))

    trio.run(main)


def test_a_revoked_neighbour_ends_what_passes(tmp_path: Path) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, "s", "t", "r", relays=["r"]) as hosts:
            fill(hosts["s"].folder / "data", SIZE)
            hosts["r"].limits.set_rate("link:r>t", 40e6)
            relay = hosts["r"].relay
            assert relay is not None

            async def revoke() -> None:
                await until(lambda: hosts["r"].passed_bytes() >= 1 << 20, "bytes on the relay")
                hosts["r"].trust.revoked = frozenset({hosts["t"].trust.identity.facts.serial})
                relay.drop_revoked()

            hosts.nursery.start_soon(revoke)
            with pytest.raises(FlowError):
                await pulled(hosts, hosts.peer(hosts.way("t", "r", "s")), TransferSettings(retry_for_s=0.0))
            assert relay.passages() == []
            assert any("certificate-revoked" in line for line in hosts["r"].log)

    trio.run(main)


def test_a_relay_takes_no_more_streams_than_it_may(tmp_path: Path) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, "s", "t") as hosts:
            relay = hosts.add("r", relays=True, max_streams=3).relay
            assert relay is not None
            data = fill(hosts["s"].folder / "data", SIZE)
            report = await pulled(hosts, hosts.peer(hosts.way("t", "r", "s")))  # four are asked for
            assert report.state == "completed"
            assert report.streams <= 3
            assert (hosts["t"].folder / "in/big").read_bytes() == data
            await relay.drain(0.1)
            with pytest.raises(TemporaryError, match="stopping") as refused:
                await stat_remote(hosts.peer(hosts.way("t", "r", "s")), b"data/")
            assert refused.value.reason == "busy"

    trio.run(main)
