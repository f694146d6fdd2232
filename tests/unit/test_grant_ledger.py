"""A site's memory of grants: fences never fall, what is spent stays spent, whatever happens to the process."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flowengine.errors import AuthenticationError, LocalError
from flowengine.store.grants import GrantLedger
from flowengine.trust.grant import Grant, Party

NOW = 1_800_000_000


def grant(fence: int, task: str = "t", expires: int = NOW + 300) -> Grant:
    return Grant(
        id=b"i" * 16, transfer="t", task=task, fence=fence, epoch=1, issued=expires - 300, expires=expires,
        source=Party("a", "a"), target=Party("b", "b"), dial="target", route=["a", "b"], source_path="/a",
        target_path="/b", mode="copy", secret=b"s" * 32,
    )  # fmt: skip


def reason(ledger: GrantLedger, fence: int, task: str = "t") -> str:
    try:
        ledger.admit(grant(fence, task))
    except AuthenticationError as error:
        return error.reason
    return ""


def test_lower_fences_and_spent_ones_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "grants.sqlite")
    with GrantLedger(path) as ledger:
        assert ledger.standing("t") == (0, False)
        assert [reason(ledger, fence) for fence in (5, 5, 4, 6, 5)] == [
            "", "", "grant-superseded", "", "grant-superseded",
        ]  # fmt: skip
        assert reason(ledger, 1, "another task") == ""
        ledger.spend(grant(5))  # superseded already: says nothing of fence 6
        assert ledger.standing("t") == (6, False)
        ledger.spend(grant(6))
        assert reason(ledger, 6) == "grant-replayed"
    with GrantLedger(path) as ledger:
        assert ledger.standing("t") == (6, True)
        assert [reason(ledger, fence) for fence in (5, 6, 7, 7)] == [
            "grant-superseded", "grant-replayed", "", "",
        ]  # fmt: skip
        assert ledger.highest_fence() == 7


def test_a_task_may_be_spent_without_having_been_admitted(tmp_path: Path) -> None:
    with GrantLedger(":memory:") as ledger:
        ledger.spend(grant(9))
        assert (reason(ledger, 9), reason(ledger, 8)) == ("grant-replayed", "grant-superseded")


def test_old_tasks_are_forgotten_and_the_highest_fence_is_not() -> None:
    with GrantLedger(":memory:") as ledger:
        ledger.admit(grant(5))
        ledger.admit(grant(6, "later", expires=NOW + 200_000))
        assert ledger.prune(NOW + 300 + 2 * 86_400) == 0
        assert ledger.prune(NOW + 300 + 2 * 86_400 + 1) == 1
        assert ledger.standing("t") == (0, False)
        assert ledger.standing("later") == (6, False)
        assert ledger.highest_fence() == 6


def test_of_many_threads_that_admit_each_sees_the_highest(tmp_path: Path) -> None:
    with GrantLedger(str(tmp_path / "grants.sqlite")) as ledger, ThreadPoolExecutor(8) as threads:
        fences = [*range(1, 60), *range(60, 0, -1)]
        reasons = list(threads.map(lambda fence: reason(ledger, fence), fences))
        assert ledger.standing("t") == (60, False)
        assert set(reasons) == {"", "grant-superseded"}


@pytest.mark.slow
def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "grants.sqlite"
    code = f"""
import os, sys
sys.path.insert(0, {os.fspath(Path(__file__).parent)!r})
from test_grant_ledger import GrantLedger, grant
ledger = GrantLedger({os.fspath(path)!r})
for fence in range(1, 10_000):
    ledger.spend(grant(fence))
    print(fence, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        last = int(process.stdout.readline())
    process.kill()
    last = max([last, *map(int, process.communicate()[0].split())])
    with GrantLedger(os.fspath(path)) as ledger:
        fence, spent = ledger.standing("t")
        assert last <= fence <= last + 1
        assert spent
        assert reason(ledger, last) in ("grant-replayed", "grant-superseded")


def test_a_damaged_ledger_is_not_replaced_by_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "grants.sqlite"
    path.write_bytes(b"not a database, but long enough to be looked at as one" * 100)
    with pytest.raises(LocalError, match="ledger"):
        GrantLedger(os.fspath(path))
    assert path.read_bytes().startswith(b"not a database")
    with pytest.raises(sqlite3.DatabaseError):
        sqlite3.connect(path).execute("SELECT * FROM task")
