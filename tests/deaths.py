"""kill -9 of client, source, target and coordinator, one after the other, during one transfer; what must hold then."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from sites import Coordinator, SiteAgent
from support import MIB, Flow, assert_journals_are_true, assert_same, journal_rows, wait_until

from flowengine.trust.tokens import Login

__all__ = ["LOST_PER_KILL", "everybody_dies", "logged_in"]

LOST_PER_KILL = 24 * MIB
"""What a killed end may lose of what was on its way: the credit window and what sockets hold. A small transfer needs
this beside its 3 %; a large one does not."""


def logged_in(coordinator: Coordinator, place: Path, prefix: list[str] | None = None) -> Flow:
    """The `flow` command of the first admin, who asks just this coordinator."""
    flow = Flow(place / "client-state", prefix or [], {"FLOW_CONFIG_DIR": str(place / "client")})
    secrets = coordinator.folder / "secrets"
    token = Login.parse((secrets / "admin-login").read_text(encoding="ascii")).token.format_secret()
    words = ("login", coordinator.url, "--token", "-", "--ca-file", secrets / "ca.pem")
    flow(*words, stdin=token.encode())
    return flow


def journalled(journal: Path) -> Counter[int]:
    """How often each offset stands in a staging journal."""
    return Counter(offset for offset, _, _ in journal_rows(journal))


def everybody_dies(
    flow: Flow,
    source: SiteAgent,
    target: SiteAgent,
    kept: Path,
    reached: Callable[[float], None],
    coordinator_dies: Callable[[], None],
) -> None:
    """Copy /data/large from one site to another, killing all on the way, and check what is left.

    Each is dead for as long as it takes to start again, a second or so, and the others work on meanwhile.

    Args:
        flow: of who asks.
        kept: where the target's journal is kept, on the same file system.
        reached: waits until so much of the data, from 0 to 1, has passed.
        coordinator_dies: kills the coordinator, or one of two, and lets it come back where it shall.
    """
    asking = subprocess.Popen(
        flow.command("cp", f"{source.site}:/data/large", f"{target.site}:/data/in/"),
        env=flow.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    reached(0.2)
    asking.kill()
    asking.wait()
    (record,) = flow("transfer", "ls", "--json").data["transfers"]
    staging = target.data / "in/.flow-staging"
    os.link(wait_until(lambda: next(iter(staging.glob("l.*.j")), None), "a staging journal"), kept)

    reached(0.4)
    source.kill()
    source.start()
    with flow.started("transfer", "watch", record["id"], "--progress", "lines") as watching:
        reached(0.6)
        target.kill()
        before = journalled(kept)
        assert_journals_are_true(target.data)
        target.start()

        reached(0.8)
        coordinator_dies()
        seen = watching.finish(240)
    assert seen.code == 0, str(seen)

    record = flow("transfer", "show", record["id"], "--json").data
    assert (record["state"], record["reason"]) == ("completed", "done"), record
    (task,) = record["tasks"]
    assert (task["state"], task["counters"]["objects_done"]) == ("done", 1)
    assert_same(source.data, target.data / "in", root_itself=False)
    assert len(before) > 0
    assert [offset for offset, times in journalled(kept).items() if times > 1] == []
    told = flow(
        "events", "--after", "0", "--transfer", record["id"], "--type", "transfer", "--count", "3", "--json"
    )
    types = [json.loads(line)["type"] for line in told.stdout.splitlines()]
    assert types == ["transfer.requested", "transfer.started", "transfer.completed"]
