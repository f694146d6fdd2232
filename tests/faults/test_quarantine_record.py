"""What goes to quarantine is on the record, whatever fails or dies between hiding it and writing that down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowengine.policy.model import Duty
from flowengine_agent.holdings import Holding, Holdings

pytestmark = pytest.mark.slow

KEEPER = """
import os, signal, sys, structlog, trio
from pathlib import Path
from types import SimpleNamespace
from support import until
from flowengine.errors import Denied, LocalError, TemporaryError
from flowengine.trust.grant import Grant, Party
from flowengine_agent.acting import Acting
from flowengine_agent.config import OfferedFolder
from flowengine_agent.evidence import EvidenceLog
from flowengine_agent.holdings import Holdings
from flowengine_agent.keeping import Keeper
from flowengine_agent.recording import Owed, Recorder
from flowengine_agent.roots import Roots
from flowengine_agent.writers import Writers

place, fault = Path(sys.argv[1]), sys.argv[2]
holdings = Holdings(str(place / "holdings.sqlite"))
evidence = EvidenceLog(str(place / "evidence"), "beta", lambda: (b"", b""))


class Faulty(Recorder):
    refusals = 2 if fault == "refused" else 0

    async def keep(self, *entries):
        if self.refusals:
            self.refusals -= 1
            raise Denied("it cannot be made durable: no space left on device", reason="no-evidence")
        if fault == "dies-before":
            os.kill(os.getpid(), signal.SIGKILL)
        await super().keep(*entries)
        if fault == "dies-behind":
            os.kill(os.getpid(), signal.SIGKILL)


if fault == "no account":
    tries, hidden = [], holdings.hidden

    def fails(*args):
        tries.append(args)
        if len(tries) < 3:
            raise LocalError("the account cannot be written: no space left on device")
        hidden(*args)

    holdings.hidden = fails


async def nobody(*_):
    raise TemporaryError("the coordinator is away")


async def main():
    log = structlog.get_logger()
    roots = Roots([OfferedFolder(str(place / "data"), "/data", "read-write")])
    site = SimpleNamespace(
        name="beta", log=log, roots=roots, writers=Writers(), acting=Acting(roots, None, None, log),
        gate=SimpleNamespace(recorder=Faulty("beta", log, evidence, lambda: "")), link=SimpleNamespace(post=nobody),
    )
    owed = lambda holding, *kinds: [
        Owed("d-1", "decision", duty, holding.transfer, holding.task) for duty in holding.duties if duty.type in kinds
    ]
    keeper = Keeper(site, holdings, purge_after_s=3600, is_coming=lambda task: False, owed=owed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        await until(lambda: holdings.in_state("hidden"), "it is hidden")
        nursery.cancel_scope.cancel()

trio.run(main)
"""
OBJECTS = {b"a": b"1", b"sub/b": b"22"}


def run_keeper(place: Path, fault: str = "") -> int:
    """Run a keeper until nothing is to be hidden any more, or it dies."""
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", KEEPER, place, fault], env=os.environ | {"PYTHONPATH": str(tests)}, check=False
    )
    return done.returncode


def recorded(place: Path) -> list[dict[str, Any]]:
    """What was recorded of quarantines and of the duty to have them, in its order."""
    lines = [
        line
        for path in sorted((place / "evidence/chain").iterdir())
        for line in path.read_bytes().splitlines()
    ]
    return [one for one in map(json.loads, lines) if one["kind"] in ("quarantine", "obligation")]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A site's folders, with a task on account whose two objects have to go."""
    holdings = Holdings(str(tmp_path / "holdings.sqlite"))
    duty = Duty("quarantine", (("value", True),), ("p/r",))
    holdings.begin(
        Holding("t-1.1", "t-1", "alpha", "/data/set", "/data", b"set", ("l",), (duty,), b"d", begun=100)
    )
    holdings.add_objects("t-1.1", [(path, len(data)) for path, data in OBJECTS.items()])
    assert holdings.mark("t-1.1", "policy-stopped", "not permitted any more", all_of_it=True)
    holdings.close()
    for path, data in OBJECTS.items():
        file = tmp_path / "data/set" / os.fsdecode(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return tmp_path


def assert_hidden_and_recorded(place: Path, times: int) -> None:
    left = [
        path
        for path in (place / "data/set").rglob("*")
        if path.is_file() and ".flow-staging" not in path.parts
    ]
    assert left == []
    holdings = Holdings(str(place / "holdings.sqlite"))
    (found,) = holdings.in_state("hidden")
    holdings.close()
    assert (found.objects, found.size_bytes, found.missing) == (2, 3, 0)
    said = recorded(place)
    assert [one["kind"] for one in said] == ["obligation", "quarantine"] * times
    for duty, one in zip(said[::2], said[1::2], strict=True):
        assert (duty["state"], duty["proof"]) == ("fulfilled", {"objects": 2, "size_bytes": 3})
        assert (one["objects"], one["size_bytes"], one["missing"]) == (2, 3, 0)


def test_it_is_recorded_once(place: Path) -> None:
    assert run_keeper(place) == 0
    assert_hidden_and_recorded(place, 1)


@pytest.mark.parametrize(("fault", "times"), [("dies-before", 1), ("dies-behind", 2)])
def test_a_death_beside_the_record_loses_none(place: Path, fault: str, times: int) -> None:
    assert run_keeper(place, fault) == -signal.SIGKILL
    assert len(recorded(place)) == 2 * (times - 1)
    assert run_keeper(place) == 0
    assert_hidden_and_recorded(place, times)


def test_it_is_recorded_once_though_the_account_cannot_be_written(place: Path) -> None:
    assert run_keeper(place, "no account") == 0
    said = recorded(place)
    # That it could not be done at first is on the record as well.
    assert [one["kind"] for one in said].count("quarantine") == 1
    assert [one["state"] for one in said if one["kind"] == "obligation"] == ["fulfilled", "failed"]


def test_what_cannot_be_recorded_is_tried_again_and_ends_nothing(place: Path) -> None:
    assert run_keeper(place, "refused") == 0
    assert_hidden_and_recorded(place, 1)
