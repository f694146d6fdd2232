"""Two coordinators on one PostgreSQL, real agents, and the death of everybody in turn during one transfer."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from gate import gated
from sites import Coordinator, Federation
from support import MIB, Flow, assert_same, random_file, wait_until

pytestmark = pytest.mark.slow

SIZE = 96 * MIB
AWAY_S = 3.0
LOST_PER_KILL = 24 * MIB
"""What was on its way when an end died: the credit window and what sockets hold."""


def pause() -> None:
    """For as long as the killed party stays dead; the others work on meanwhile."""
    threading.Event().wait(AWAY_S)


def test_a_transfer_survives_everybody_and_one_of_two_coordinators(
    postgres_server: Callable[[], str], tmp_path: Path
) -> None:
    state = postgres_server()
    first, second = (Coordinator(tmp_path / "coordinators", state=state) for _ in range(2))
    with contextlib.ExitStack() as stack:
        for coordinator in (first, second):
            coordinator.start()
            stack.callback(coordinator.kill)
        client = stack.enter_context(second.client())
        sites = Federation(second, client, folder=tmp_path)
        gate = stack.enter_context(gated())
        both = f'coordinator = ["{first.url}", "{second.url}"]'
        source = sites.make("a", listen=f"127.0.0.1:{gate.behind}")
        source.lines += [f'advertise = ["127.0.0.1:{gate.port}"]', both]
        target = sites.make("b", lines=[both])
        for agent in (source, target):
            agent.start()
            stack.callback(agent.kill)
        random_file(source.data / "large", SIZE)

        flow = Flow(tmp_path / "client-state", env={"FLOW_CONFIG_DIR": str(tmp_path / "client")})
        flow("login", stdin=(tmp_path / "coordinators/secrets/admin-login").read_bytes())
        asking = subprocess.Popen(flow.command("cp", "a:/data/large", "b:/data/in/"), env=flow.environment())
        gate.wait_reached(SIZE // 5)
        (record,) = client.transfers()
        asking.send_signal(signal.SIGKILL)
        asking.wait()
        for share, victim in ((2, source), (3, target)):
            gate.wait_reached(share * SIZE // 5)
            victim.kill()
            pause()
            victim.start()
        gate.wait_reached(4 * SIZE // 5)
        first.kill()
        gate.open()

        done = wait_until(
            lambda: found if (found := client.transfer(record.id).record).ended else None, "the end", 180
        )
        assert (done.state, done.reason) == ("completed", "done"), done.message
        assert_same(source.data, target.data / "in", root_itself=False)
        assert gate.proxy is not None
        assert gate.proxy.passed < 1.03 * SIZE + 2 * LOST_PER_KILL
        states = []
        with client.events(after=0, transfer=record.id, types=["transfer"]) as events:
            for event in events:
                states.append(event.type)
                if event.type == "transfer.completed":
                    break
        assert states == ["transfer.requested", "transfer.started", "transfer.completed"]
