"""The harness believes nobody: wrong copies, failures and hidden daemons show in the record."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from perf import data
from perf.contenders import Contender
from perf.contenders.parts import Parts
from perf.contenders.plain import Copy
from perf.network import Network
from perf.report import Record
from perf.run import OneRun, Plan
from perf.scenarios import Built, Scenario
from perf.session import Session

pytestmark = pytest.mark.slow

NETWORK = Network(
    "host", {"a": "127.0.0.1", "b": "127.0.0.1"}, {"a": [], "b": []}, {Path("/proc/net/dev"): "lo"}, {}
)
BURN = "import os, time\nwhile time.process_time() < 0.3: pass\nprint('burnt', flush=True)\ntime.sleep(60)"


class Liar(Contender):
    """Says that it is done, and one byte is wrong."""

    name = "liar"
    local_only = True

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        session.run("a", ["cp", "-a", f"{source}/.", str(target)])
        with (target / "file").open("r+b") as file:
            file.seek(1000)
            file.write(bytes(1))
        return {}


class Failing(Contender):
    name = "failing"

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        session.run("a", ["sh", "-c", "echo out of luck >&2; exit 3"])
        return {}


class WithDaemon(Copy):
    """Burns CPU time in an orphan that is still there at the end."""

    name = "with-daemon"

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        session.run("a", ["sh", "-c", f'"{sys.executable}" -c "{BURN}" > burnt & exit 0'])
        daemon = session.start("a", ["sleep", "60"])
        burnt = session.scratch / "burnt"
        session.wait_until(lambda: bool(burnt.read_text()), daemon, "daemon", "burn")
        return super().transfer(session, source, target)


class Slow(Copy):
    """Writes half, waits for ever; after a crash it finds what it wrote and finishes."""

    name = "slow"

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        marker = target / "half"
        if not marker.exists():
            session.run("a", ["sh", "-c", f"head -c 20000000 /dev/zero > {marker}; sleep 60"])
        return super().transfer(session, source, target)


def measure(kind: type[Contender], tmp_path: Path, kill_at_half: bool = False) -> Record:
    source = tmp_path / "source"
    data.write_random(source / "file", 2_000_000, 1)
    scratch = tmp_path / "run"
    scratch.mkdir()
    scenario = Scenario("test", "", lambda *_: Built([source]), kill_at_half)
    return OneRun(kind, scenario, Built([source]), Plan([], [], [], limit_s=30)).measure(NETWORK, scratch)


def with_parts(tmp_path: Path, at_target: Path | None = None) -> Record:
    """A tree of small files and a large one, moved by the parts alone; or only described, where something is there."""
    source, scratch = tmp_path / "source", tmp_path / "run"
    data.small_files(source, 60, 1)
    if at_target is None:
        data.write_random(source / "deep" / "large", 11_000_000, 1)
    scratch.mkdir()
    built = Built([source], at_target=at_target)
    scenario = Scenario("test", "", lambda *_: built)
    return OneRun(Parts, scenario, built, Plan([], [], [], limit_s=30)).measure(NETWORK, scratch)


def test_the_parts_alone_move_a_tree(tmp_path: Path) -> None:
    record = with_parts(tmp_path)
    assert (record["ok"], record["error"]) == (True, "")


def test_the_parts_alone_read_what_is_there(tmp_path: Path) -> None:
    at_target = tmp_path / "before"
    data.small_files(at_target, 60, 1)
    assert with_parts(tmp_path, at_target)["ok"]


def test_the_parts_alone_see_a_difference(tmp_path: Path) -> None:
    at_target = tmp_path / "before"
    data.small_files(at_target, 60, 2)
    record = with_parts(tmp_path, at_target)
    assert not record["ok"]
    assert "client: exit code 1" in str(record["error"])


def test_a_true_copy_is_measured(tmp_path: Path) -> None:
    record = measure(Copy, tmp_path)
    assert (record["ok"], record["error"]) == (True, "")
    assert float(str(record["wall_s"])) > 0


def test_a_wrong_copy_is_no_success(tmp_path: Path) -> None:
    record = measure(Liar, tmp_path)
    assert (record["ok"], record["error"]) == (False, "file differs before byte 1048576")


def test_a_failure_is_told_in_the_contender_s_words(tmp_path: Path) -> None:
    record = measure(Failing, tmp_path)
    assert (record["ok"], record["error"]) == (False, "client: exit code 3; out of luck")


def test_the_cpu_time_of_orphans_counts(tmp_path: Path) -> None:
    record = measure(WithDaemon, tmp_path)
    assert record["ok"]
    assert float(str(record["cpu_s"])) > 0.25
    assert float(str(record["peak_rss_bytes"])) > 1_000_000


def test_a_transfer_is_killed_at_half_and_goes_on(tmp_path: Path) -> None:
    record = measure(Slow, tmp_path, kill_at_half=True)
    assert record["ok"], record["error"]
    assert isinstance(record["before_kill"], dict)
