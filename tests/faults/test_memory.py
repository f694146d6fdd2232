"""Memory of both ends is bounded, whatever is moved: a large file, many files, a tree that is only looked at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support import GIB, MIB, Flow, children, peak_memory, random_file, roomy_folder, wait_until

pytestmark = pytest.mark.slow

LIMIT = 300 * MIB


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that is removed at once: what these tests write is large, in the long forms too large for memory."""
    long_form = request.node.get_closest_marker("full") is not None
    with TemporaryDirectory(dir=tmp_path) if long_form else roomy_folder(tmp_path) as folder:
        yield Path(folder)


def peaks(flow: Flow, *command: object) -> dict[str, int]:
    """Run a local command to its end: the most memory that each of its two processes has had."""
    found = {"target": 0, "source": 0}
    flow.executed = True
    with flow.started(*command) as running:

        def ended() -> bool:
            found["target"] = max(found["target"], peak_memory(running.pid))
            for child in children(running.pid):
                found["source"] = max(found["source"], peak_memory(child))
            return running.process.poll() is not None

        wait_until(ended, "the end", 900)
        done = running.finish()
    assert done.code == 0, str(done)
    assert min(found.values()) > 10 * MIB, "nothing was measured"
    print({side: f"{size / MIB:.0f} MiB" for side, size in found.items()})
    return found


def many_files(root: Path, count: int, per_folder: int = 1000) -> None:
    for number in range(count):
        folder = root / f"{number // per_folder:05}"
        if number % per_folder == 0:
            folder.mkdir(parents=True)
        with open(folder / f"file-{number}", "wb") as file:
            file.write(b"%d of many" % number)


def links_of_one(root: Path, count: int) -> None:
    """Many entries at the price of names: symbolic links, which need no data and are quickly made."""
    for number in range(count):
        folder = root / f"{number // 2000:05}"
        if number % 2000 == 0:
            folder.mkdir(parents=True)
        os.symlink(f"to-{number}", folder / f"link-{number}")


def one_large_file(flow: Flow, place: Path, size: int) -> None:
    random_file(place / "large", size)
    found = peaks(flow, "cp", place / "large", f"{place}/target/")
    assert max(found.values()) < LIMIT, found


def many_small_files(flow: Flow, place: Path, count: int) -> None:
    many_files(place / "source", count)
    found = peaks(flow, "cp", f"{place}/source/", place / "target")
    assert max(found.values()) < LIMIT, found


def a_tree_looked_at(flow: Flow, place: Path, count: int) -> None:
    links_of_one(place / "source", count)
    found = peaks(flow, "sync", f"{place}/source/", place / "target", "--dry-run")
    assert max(found.values()) < LIMIT, found


def many_folders(flow: Flow, place: Path, count: int) -> None:
    for number in range(count):
        (place / "source" / f"{number // 500:04}" / f"folder-{number}").mkdir(parents=True)
    found = peaks(flow, "cp", f"{place}/source/", place / "target")
    assert max(found.values()) < LIMIT, found


def test_one_large_file(flow: Flow, place: Path) -> None:
    one_large_file(flow, place, GIB // 2)


def test_many_small_files(flow: Flow, place: Path) -> None:
    many_small_files(flow, place, 20_000)


def test_a_tree_looked_at(flow: Flow, place: Path) -> None:
    a_tree_looked_at(flow, place, 100_000)


def test_many_folders(flow: Flow, place: Path) -> None:
    many_folders(flow, place, 10_000)


@pytest.mark.full
def test_one_huge_file(flow: Flow, place: Path) -> None:
    one_large_file(flow, place, 4 * GIB)


@pytest.mark.full
def test_very_many_small_files(flow: Flow, place: Path) -> None:
    many_small_files(flow, place, 200_000)


@pytest.mark.full
def test_two_million_entries_looked_at(flow: Flow, place: Path) -> None:
    a_tree_looked_at(flow, place, 2_000_000)


@pytest.mark.full
def test_very_many_folders(flow: Flow, place: Path) -> None:
    many_folders(flow, place, 200_000)
