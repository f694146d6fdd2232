"""Files that change, vanish or cannot be read; disks that are full or may not be written: clear words, nothing lost."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from support import MIB, Flow, assert_same, mounted, random_file, small_tree, wait_until

pytestmark = pytest.mark.slow

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
needs_root = pytest.mark.root


def open_to_all(tmp_path: Path) -> None:
    """Let other accounts reach a test's folder: what pytest makes is for its own account alone."""
    above = 3 if "PYTEST_XDIST_WORKER" in os.environ else 2
    for folder in (tmp_path, *tmp_path.parents[:above]):
        folder.chmod(0o755)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    small_tree(tmp_path / "source", 60, size=20_000, per_folder=20)
    random_file(tmp_path / "source" / "large", 12 * MIB)
    return tmp_path / "source"


def test_a_file_that_is_appended_to_lands_whole_or_fails_by_name(
    flow: Flow, source: Path, tmp_path: Path
) -> None:
    """A line is 4096 equal bytes and an append is one line: a torn file would show a hash that never was."""
    path = source / "log"
    path.write_bytes(b"")
    states: set[str] = set()
    hasher = hashlib.sha256()
    stop = threading.Event()
    started = threading.Event()

    def write() -> None:
        number = 0
        with open(path, "ab", buffering=0) as file:
            while not stop.is_set() and number < 60_000:
                line = bytes([number % 251]) * 4096
                hasher.update(line)
                states.add(hasher.hexdigest())
                file.write(line)
                number += 1
                if number == 2000:
                    started.set()
                if number > 2000:
                    stop.wait(0.0005)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        started.wait(30)
        done = flow("cp", f"{source}/", tmp_path / "target", "--json", code=None)
    finally:
        stop.set()
        writer.join()
    landed = tmp_path / "target" / "log"
    if done.code == 7:
        assert [row["path"] for row in done.data["failures"]] == ["log"]
        assert done.data["failures"][0]["reason"] == "changed"
        assert not landed.exists()
    else:
        assert done.code == 0, str(done)
    if landed.exists():
        assert hashlib.sha256(landed.read_bytes()).hexdigest() in states
    flow("cp", f"{source}/", tmp_path / "target")
    assert_same(source, tmp_path / "target")


def test_files_that_vanish_meanwhile_are_no_harm(flow: Flow, tmp_path: Path) -> None:
    source = small_tree(tmp_path / "source", 6000, size=2000, per_folder=100)
    with flow.started("cp", f"{source}/", tmp_path / "target", "--json") as running:
        wait_until((tmp_path / "target").exists, "the target")
        for number in range(5999, 3000, -7):
            (source / f"d{number // 100:04}" / f"f{number}").unlink(missing_ok=True)
        shutil.rmtree(source / "d0059")
        done = running.finish()
    assert done.code in (0, 7), str(done)
    if done.code == 7:
        assert {row["reason"] for row in done.data["failures"]} <= {"vanished", "changed", "stale"}
    flow("sync", f"{source}/", tmp_path / "target", "--delete")
    assert_same(source, tmp_path / "target")


@needs_root
def test_what_may_not_be_read_is_named_and_the_rest_lands(source: Path, tmp_path: Path) -> None:
    (source / "d0000" / "f3").chmod(0)
    (source / "d0001").chmod(0)
    (source / "large").chmod(0)
    state, target = tmp_path / "state", tmp_path / "target"
    for folder in (state, target):
        folder.mkdir()
        os.chown(folder, 65534, 65534)
    open_to_all(tmp_path)
    os.chown(source, 65534, 65534)
    done = Flow(state, NOBODY)("cp", f"{source}/", target, "--json", code=7)
    assert {(row["path"], row["reason"]) for row in done.data["failures"]} == {
        ("d0000/f3", "permission"),
        ("d0001", "permission"),
        ("large", "permission"),
    }
    assert done.data["objects_landed"] == 39
    assert "f3" in done.stderr


@needs_root
def test_a_target_that_may_not_be_written(source: Path, tmp_path: Path) -> None:
    state, target = tmp_path / "state", tmp_path / "target"
    state.mkdir()
    target.mkdir(mode=0o755)
    os.chown(state, 65534, 65534)
    open_to_all(tmp_path)
    for place in (target, target / "below"):
        done = Flow(state, NOBODY)("cp", f"{source}/", place, code=1)
        assert "ermission denied" in done.stderr
        assert "next:" in done.stderr
    assert os.listdir(target) == []


@needs_root
def test_a_read_only_target(flow: Flow, source: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "target", "size=1m,ro") as target:
        done = flow("cp", f"{source}/", target, code=1)
        assert "read-only" in done.stderr
        assert "next:" in done.stderr


@needs_root
@pytest.mark.parametrize("way", ["local", "push"])
def test_a_full_target_suspends_and_goes_on_when_there_is_room(
    flow: Flow, source: Path, tmp_path: Path, way: str
) -> None:
    with mounted(tmp_path / "target", "size=8m") as target, flow.serving(target) as ticket:
        to = target if way == "local" else ticket.format_secret_url()
        done = flow("cp", f"{source}/", to, "--retry-for", "1", code=75)
        assert "No space left" in done.stderr
        assert "make room" in done.stderr
        assert not (target / "large").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", target], check=True)
        again = flow("cp", f"{source}/", to, "--json").data
        assert again["bytes_sent"] < 13 * MIB
        assert_same(source, target, root_itself=False)


@needs_root
def test_a_target_without_room_for_names_suspends(flow: Flow, source: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "target", "size=64m,nr_inodes=40") as target:
        done = flow("cp", f"{source}/", target, "--retry-for", "1", code=75)
        assert "No space left" in done.stderr
        subprocess.run(["mount", "-o", "remount,nr_inodes=1000", target], check=True)
        flow("cp", f"{source}/", target)
        assert_same(source, target, root_itself=False)


@needs_root
def test_a_full_state_folder_costs_only_memory_of_what_was_read(
    flow: Flow, source: Path, tmp_path: Path
) -> None:
    with mounted(tmp_path / "state", "size=64k") as state:
        done = Flow(state)("cp", f"{source}/", tmp_path / "target", code=None)
        assert done.code in (0, 75), str(done)
        if done.code:
            assert "No space left" in done.stderr


def test_a_state_folder_that_cannot_be_made_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    done = Flow(tmp_path / "file" / "state")("cp", f"{source}/", tmp_path / "target", code=1)
    assert "file/state" in done.stderr


def test_a_broken_cache_is_made_anew(flow: Flow, source: Path, tmp_path: Path) -> None:
    flow("cp", f"{source}/", tmp_path / "target")
    for path in flow.state.rglob("*.sqlite*"):
        path.write_bytes(b"garbage" * 1000)
    flow("cp", f"{source}/", tmp_path / "target")
    assert_same(source, tmp_path / "target")


def test_a_broken_journal_is_not_believed(flow: Flow, source: Path, tmp_path: Path) -> None:
    staging = tmp_path / "target" / ".flow-staging"
    staging.mkdir(parents=True)
    from blake3 import blake3

    name = "l." + blake3(b"large").hexdigest(16)
    (staging / name).write_bytes(os.urandom(12 * MIB))
    (staging / f"{name}.j").write_bytes(os.urandom(5000))
    (staging / "s.1").write_bytes(b"left over")
    (staging / "r.2").mkdir()
    (staging / "r.2" / "5").write_bytes(b"left over")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "1").write_bytes(b"of somebody")
    for part in ("r.0", "r.3"):
        (staging / part).symlink_to(elsewhere)
    flow("cp", f"{source}/", tmp_path / "target")
    assert_same(source, tmp_path / "target")
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == {"1": b"of somebody"}
    assert not staging.exists()
