"""kill -9 of client, source, target and coordinator, one after the other, during one transfer between two agents."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from gate import Gate, gated
from sites import Coordinator, Federation, SiteAgent, federation
from support import (  # fmt: skip
    GIB,
    MIB,
    Flow,
    assert_same,
    bytes_on,
    loopback_namespace,
    random_file,
    wait_until,
)

pytestmark = pytest.mark.slow

AWAY_S = 3.0
"""How long each stays dead."""
LOST_PER_KILL = 24 * MIB
"""What a killed end may lose of what was on its way: the credit window and what sockets hold. A small transfer needs
this beside its 3 %; a large one does not."""
_RECORD = struct.Struct("<QI32s4s")
_MARK = 0xFFFF_FFFF


def journalled(journal: Path) -> Counter[int]:
    """How often each offset stands in a staging journal."""
    data = journal.read_bytes()
    at = 4 + struct.unpack_from("<I", data)[0]
    offsets: Counter[int] = Counter()
    while at + _RECORD.size <= len(data):
        offset, length, _, _ = _RECORD.unpack_from(data, at)
        if length != _MARK:
            offsets[offset] += 1
        at += _RECORD.size
    return offsets


def pause() -> None:
    """For as long as the killed party stays dead; the others work on meanwhile."""
    threading.Event().wait(AWAY_S)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    room = os.statvfs("/dev/shm")
    roomy = room.f_bavail * room.f_frsize > 8 * GIB
    with tempfile.TemporaryDirectory(prefix="flow-kill-", dir="/dev/shm" if roomy else tmp_path) as folder:
        yield Path(folder)


def client_process(sites: Federation, place: Path, *words: str) -> subprocess.Popen[bytes]:
    """A `flow` command of the first admin."""
    flow = Flow(place / "client-state", env={"FLOW_CONFIG_DIR": str(place / "client")})
    login = (sites.coordinator.folder / "secrets/admin-login").read_bytes()
    flow("login", stdin=login)
    return subprocess.Popen(flow.command(*words), env=flow.environment(), stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("size", [96 * MIB, pytest.param(2 * GIB, marks=pytest.mark.full)])
def test_a_transfer_survives_the_death_of_everybody(place: Path, size: int) -> None:
    with federation(place, "b") as sites, gated() as gate:
        source = sites.make("a", listen=f"127.0.0.1:{gate.behind}")
        source.data.mkdir(parents=True)
        random_file(source.data / "large", size)
        source.lines.append(f'advertise = ["127.0.0.1:{gate.port}"]')
        source.start()
        _run(sites, gate, place, size)
        slack = LOST_PER_KILL * 2 if size < GIB else 0
        assert gate.proxy is not None
        assert gate.proxy.passed < 1.03 * size + slack


def _run(sites: Federation, gate: Gate, place: Path, size: int) -> None:
    client = client_process(sites, place, "cp", "a:/data/large", "b:/data/in/")
    steps = [size * n // 10 for n in (2, 4, 6, 8)]
    gate.wait_reached(steps[0])
    (record,) = sites.client.transfers()
    client.send_signal(signal.SIGKILL)
    client.wait()
    staging = sites["b"].data / "in/.flow-staging"
    kept = place / "journal"
    os.link(wait_until(lambda: next(iter(staging.glob("l.*.j")), None), "a staging journal"), kept)

    gate.wait_reached(steps[1])
    sites["a"].kill()
    pause()
    sites["a"].start()

    gate.wait_reached(steps[2])
    sites["b"].kill()
    before = journalled(kept)
    pause()
    sites["b"].start()

    gate.wait_reached(steps[3])
    sites.coordinator.kill()
    gate.open()
    pause()
    sites.coordinator.start()

    done = wait_until(
        lambda: found if (found := sites.client.transfer(record.id).record).ended else None, "the end", 180
    )
    assert (done.state, done.reason) == ("completed", "done"), done.message
    (task,) = done.tasks
    assert (task.state, task.counters.objects_done) == ("done", 1)
    assert_same(sites["a"].data, sites["b"].data / "in", root_itself=False)
    offsets = journalled(kept)
    assert len(before) > 0
    assert [offset for offset, times in offsets.items() if times > 1] == []
    states = []
    with sites.client.events(after=0, transfer=record.id, types=["transfer"]) as events:
        for event in events:
            states.append(event.type)
            if event.type == "transfer.completed":
                break
    assert states == ["transfer.requested", "transfer.started", "transfer.completed"]


@pytest.mark.root
@pytest.mark.full
def test_bytes_on_the_interface_when_everybody_dies(place: Path) -> None:
    size = 2 * GIB
    with loopback_namespace() as prefix:
        coordinator = Coordinator(place / "coordinator", prefix=prefix)
        agents = {site: SiteAgent(site, place / site, prefix=prefix) for site in "ab"}
        processes = [coordinator, *agents.values()]
        flow = Flow(place / "client-state", prefix, {"FLOW_CONFIG_DIR": str(place / "client")})
        try:
            coordinator.start()
            flow("login", stdin=(coordinator.folder / "secrets/admin-login").read_bytes())
            for site, agent in agents.items():
                agent.token = flow("site", "token", site).stdout.strip()
                agent.start()
            random_file(agents["a"].data / "large", size)
            before = bytes_on(prefix, "lo")

            def wait_passed(share: float) -> None:
                wait_until(lambda: bytes_on(prefix, "lo") - before > share * size, "bytes on the wire", 240)

            with flow.started("cp", "a:/data/large", "b:/data/in/") as client:
                wait_passed(0.2)
                client.process.kill()
            for share, victim in ((0.4, agents["a"]), (0.6, agents["b"]), (0.8, coordinator)):
                wait_passed(share)
                victim.kill()
                pause()
                victim.start()
            wait_until(lambda: "completed" in flow("transfer", "ls", "--json").stdout, "the end", 240)
            assert bytes_on(prefix, "lo") - before < 1.03 * size
            assert_same(agents["a"].data, agents["b"].data / "in", root_itself=False)
        finally:
            for running in processes:
                if running.process is not None:
                    running.process.end(signal.SIGKILL)
