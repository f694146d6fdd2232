"""Two coordinators on one PostgreSQL, real agents, and the death of everybody in turn during one transfer."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deaths import LOST_PER_KILL, everybody_dies, logged_in
from gate import gated
from sites import Coordinator, Federation, SiteAgent
from support import GIB, MIB, bytes_on, loopback_namespace, random_file, roomy_folder, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    with roomy_folder(tmp_path) as folder:
        yield folder


@pytest.mark.parametrize("size", [96 * MIB, pytest.param(2 * GIB, marks=pytest.mark.full)])
def test_a_transfer_survives_everybody_and_one_of_two_coordinators(
    postgres_server: Callable[[], str], place: Path, size: int
) -> None:
    state = postgres_server()
    first, second = (Coordinator(place / "coordinators", state=state) for _ in range(2))
    with contextlib.ExitStack() as stack:
        for coordinator in (first, second):
            coordinator.start()
            stack.callback(coordinator.kill)
        sites = Federation(second, stack.enter_context(second.client()), folder=place)
        gate = stack.enter_context(gated())
        both = f'coordinator = ["{first.url}", "{second.url}"]'
        source = sites.make("a", listen=f"127.0.0.1:{gate.behind}")
        source.lines += [f'advertise = ["127.0.0.1:{gate.port}"]', both]
        target = sites.make("b", lines=[both])
        for agent in (source, target):
            agent.start()
            stack.callback(agent.kill)
        random_file(source.data / "large", size)

        def coordinator_dies() -> None:
            first.kill()
            gate.open()

        everybody_dies(
            logged_in(second, place),
            source,
            target,
            place / "journal",
            lambda share: gate.wait_reached(int(share * size)),
            coordinator_dies,
        )
        assert gate.proxy is not None
        assert gate.proxy.passed < 1.03 * size + (LOST_PER_KILL * 2 if size < GIB else 0)


@pytest.mark.root
@pytest.mark.full
def test_bytes_on_the_interface_with_two_coordinators(
    postgres_server: Callable[[], str], place: Path
) -> None:
    size = 2 * GIB
    with loopback_namespace() as prefix:
        state = postgres_server()
        first, second = (Coordinator(place / "coordinators", state=state, prefix=prefix) for _ in range(2))
        a, b = (SiteAgent(site, place / site, prefix=prefix) for site in "ab")
        try:
            for coordinator in (first, second):
                coordinator.start()
            flow = logged_in(second, place, prefix)
            for agent in (a, b):
                agent.lines.append(f'coordinator = ["{first.url}", "{second.url}"]')
                agent.token = flow("site", "token", agent.site).stdout.strip()
                agent.start()
            random_file(a.data / "large", size)
            before = bytes_on(prefix, "lo")

            def reached(share: float) -> None:
                wait_until(lambda: bytes_on(prefix, "lo") - before > share * size, "bytes on the wire", 240)

            everybody_dies(flow, a, b, place / "journal", reached, first.kill)
            ratio = (bytes_on(prefix, "lo") - before) / size
            print(f"{ratio:.4f} of the data on the interface")
            assert ratio < 1.03
        finally:
            for running in (first, second, a, b):
                if running.process is not None:
                    running.process.end(signal.SIGKILL)
