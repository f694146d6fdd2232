"""Two sites of which neither can be dialled meet at a relay: what passes, and who is let in to wait."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from support import until

from flowengine.errors import AuthenticationError, FlowError
from flowengine.store.selection import Root, Selection
from flowengine.transfer import meeting
from flowengine.transfer.passes import TransferSettings
from flowengine.transfer.reaching import Way
from flowengine.transfer.run import pull, push
from flowengine.trust.relay_grant import sign_relay_grant
from tests.routes import Hosts, fill

pytestmark = pytest.mark.slow
SIZE = 16 << 20
SETTINGS = TransferSettings(retry_for_s=60.0, streams=6)


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))


def outbound_only(hosts: Hosts) -> None:
    for name in "st":
        hosts.add(name, listens=False)


@pytest.mark.parametrize("relays", [("r",), ("q", "r")])
def test_a_pull_from_a_site_that_waits(tmp_path: Path, relays: tuple[str, ...]) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, *relays, relays=relays) as hosts:
            outbound_only(hosts)
            data = fill(hosts["s"].folder / "data", SIZE)
            way = hosts.way("t", *relays, "s")
            hosts.meet(way)
            report = await pull(hosts.peer(way), b"data/", os.fsencode(hosts["t"].folder / "in"), SETTINGS)
            assert report.state == "completed"
            assert (hosts["t"].folder / "in/big").read_bytes() == data
            route = ("s", *reversed(relays), "t")
            ticket = b"ticket of " + ">".join(route).encode()
            assert hosts["s"].gate.asked == [("release", route, b"")]
            for name in relays:
                assert hosts[name].gate.asked == [("relay", route, ticket)]
                assert hosts[name].passed_bytes() >= SIZE

    trio.run(main)


def test_a_push_to_a_site_that_waits(tmp_path: Path) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, "r", relays=["r"]) as hosts:
            outbound_only(hosts)
            data = fill(hosts["s"].folder / "data", SIZE)
            way = hosts.way("s", "r", "t", dial="source")
            hosts.meet(way)
            selection = Selection([Root(os.fsencode(hosts["s"].folder / "data"), b"")])
            report = await push(selection, hosts.peer(way, push=True), b"in", SETTINGS)
            assert report.state == "completed"
            assert (hosts["t"].folder / "in/big").read_bytes() == data
            assert [use for use, _, _ in hosts["t"].gate.asked] == ["land"]

    trio.run(main)


def test_both_sites_dial_again_when_what_stood_between_them_broke(tmp_path: Path) -> None:
    async def main() -> None:
        async with Hosts.running(tmp_path, "r", relays=["r"]) as hosts:
            outbound_only(hosts)
            data = fill(hosts["s"].folder / "data", SIZE)
            hosts["r"].limits.set_rate("link:r>t", 200e6)
            way = hosts.way("t", "r", "s")
            hosts.meet(way)
            relay = hosts["r"].relay
            assert relay is not None

            async def cut() -> None:
                await until(lambda: hosts["r"].passed_bytes() >= SIZE // 4, "bytes on the relay")
                for passage in relay._passages.values():
                    passage.end("for this test")
                hosts["r"].limits.set_rate("link:r>t", None)

            hosts.nursery.start_soon(cut)
            report = await pull(hosts.peer(way), b"data/", os.fsencode(hosts["t"].folder / "in"), SETTINGS)
            assert report.state == "completed"
            assert report.passes == 2
            assert (hosts["t"].folder / "in/big").read_bytes() == data

    trio.run(main)


def test_who_may_wait_and_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another site's grant lets nobody in; a relay asks its policy; and who waits is not given to another claim."""

    monkeypatch.setattr(meeting, "MEET_S", 0.5)

    async def main() -> None:
        async with Hosts.running(tmp_path, "r", "x", relays=["r"]) as hosts:
            outbound_only(hosts)
            fill(hosts["s"].folder / "data", 1 << 20)
            way = hosts.way("t", "r", "s")
            listener = hosts["x"].listener
            assert listener is not None
            with pytest.raises(AuthenticationError) as raised:
                await listener.meet(way.document, lambda incoming: trio.sleep(0), lambda: None)
            assert raised.value.reason == "grant-other-party"

            loot = os.fsencode(hosts["t"].folder / "in")
            at_once = TransferSettings(retry_for_s=0.0)
            hosts["r"].gate.denies = frozenset({"relay"})
            hosts.meet(way)
            with pytest.raises(FlowError) as denied:
                await pull(hosts.peer(way), b"data/", loot, at_once)
            assert denied.value.reason == "policy-denied"
            hosts["r"].gate.denies = frozenset()

            later = hosts.relay_grant("t", "r", "s", fence=1_001)
            other = Way(way.sites, way.address, sign_relay_grant(hosts.federation.grant_key, later))
            with pytest.raises(FlowError, match="has not come to this relay"):
                await pull(hosts.peer(other, fence=1_001), b"data/", loot, at_once)
            assert not list(hosts["t"].folder.rglob("big"))

    trio.run(main)
