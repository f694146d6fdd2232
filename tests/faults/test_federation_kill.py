"""A transfer between two agents survives the death of everybody."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from deaths import LOST_PER_KILL, everybody_dies, logged_in
from gate import gated
from sites import Coordinator, SiteAgent, federation
from support import GIB, MIB, bytes_on, loopback_namespace, random_file, roomy_folder, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with roomy_folder(tmp_path) as folder:
        yield folder


@pytest.mark.parametrize("size", [96 * MIB, pytest.param(2 * GIB, marks=pytest.mark.full)])
def test_a_transfer_survives_the_death_of_everybody(place: Path, size: int) -> None:
    with federation(place, "b") as sites, gated() as gate:
        source = sites.make("a", listen=f"127.0.0.1:{gate.behind}")
        source.data.mkdir(parents=True)
        random_file(source.data / "large", size)
        source.lines.append(f'advertise = ["127.0.0.1:{gate.port}"]')
        source.start()

        def coordinator_dies() -> None:
            sites.coordinator.kill()
            gate.open()
            sites.coordinator.start()

        everybody_dies(
            logged_in(sites.coordinator, place),
            source,
            sites["b"],
            place / "journal",
            lambda share: gate.wait_reached(int(share * size)),
            coordinator_dies,
        )
        slack = LOST_PER_KILL * 2 if size < GIB else 0
        assert gate.proxy is not None
        assert gate.proxy.passed < 1.03 * size + slack


@pytest.mark.root
@pytest.mark.full
def test_bytes_on_the_interface_when_everybody_dies(place: Path) -> None:
    """The same, with all that the parties say to each other counted by the kernel."""
    size = 2 * GIB
    with loopback_namespace() as prefix:
        coordinator = Coordinator(place / "coordinator", prefix=prefix)
        a, b = (SiteAgent(site, place / site, prefix=prefix) for site in "ab")
        try:
            coordinator.start()
            flow = logged_in(coordinator, place, prefix)
            for agent in (a, b):
                agent.token = flow("site", "token", agent.site).stdout.strip()
                agent.start()
            random_file(a.data / "large", size)
            before = bytes_on(prefix, "lo")

            def reached(share: float) -> None:
                wait_until(lambda: bytes_on(prefix, "lo") - before > share * size, "bytes on the wire", 240)

            def coordinator_dies() -> None:
                coordinator.kill()
                coordinator.start()

            everybody_dies(flow, a, b, place / "journal", reached, coordinator_dies)
            ratio = (bytes_on(prefix, "lo") - before) / size
            print(f"{ratio:.4f} of the data on the interface")
            assert ratio < 1.03
        finally:
            for running in (coordinator, a, b):
                if running.process is not None:
                    running.process.end(signal.SIGKILL)
