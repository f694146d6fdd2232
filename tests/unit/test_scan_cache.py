"""The scan cache: what is written is found again, by whom it may be, whatever order it came in."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flowengine.store import scan_cache
from flowengine.store.scan_cache import DirectoryPart, ScanCache

PROFILE = "64KiB"
ONE, TWO, THREE = (DirectoryPart(name, name * 2) for name in (b"one", b"two", b"three"))


class Clock:
    """A monotonic clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(scan_cache, "time", clock)
    return clock


def opened(folder: Path) -> ScanCache:
    return ScanCache(PROFILE, str(folder))


def test_a_new_cache_knows_nothing_but_what_is_written_to_it(tmp_path: Path, clock: Clock) -> None:
    cache = opened(tmp_path)
    assert cache.directory(1, 2) == []
    cache.save_directory(1, 2, [ONE, TWO])
    assert cache.directory(1, 2) == [ONE, TWO]  # also where it waits to be written
    assert cache.directory(1, 3) == []
    cache.flush()
    assert cache.directory(1, 2) == [ONE, TWO]
    cache.save_directory(1, 2, [THREE])
    cache.close()
    again = opened(tmp_path)
    assert again.directory(1, 2) == [THREE]
    assert again.directory(1, 3) == []
    again.close()


def test_parts_stand_until_the_whole_is_kept(tmp_path: Path, clock: Clock) -> None:
    cache = opened(tmp_path)
    cache.add_directory_part(1, 2, 1, ONE)
    cache.add_directory_part(1, 2, 2, TWO)
    assert cache.directory(1, 2) == [ONE, TWO]
    cache.save_directory(1, 2, [THREE])
    assert cache.directory(1, 2) == [THREE]


def test_a_part_that_comes_behind_the_whole_stays(tmp_path: Path, clock: Clock) -> None:
    cache = opened(tmp_path)
    cache.add_directory_part(1, 2, 1, ONE)
    cache.save_directory(1, 2, [TWO])
    cache.add_directory_part(1, 2, 1, THREE)
    cache.flush()
    assert cache.directory(1, 2) == [TWO, THREE]


def test_what_another_connection_writes_is_found_in_a_moment(tmp_path: Path, clock: Clock) -> None:
    cache, other = opened(tmp_path), opened(tmp_path)
    assert cache.directory(1, 2) == []
    other.save_directory(1, 2, [ONE])
    other.flush()
    clock.now += 1
    assert cache.directory(1, 2) == [ONE]
    assert cache.directory(1, 3) == []


def test_opening_is_no_writing(tmp_path: Path, clock: Clock) -> None:
    cache = opened(tmp_path)
    opened(tmp_path).close()
    clock.now += 1
    asked: list[str] = []
    cache._db.set_trace_callback(asked.append)
    assert cache.directory(1, 2) == []
    assert asked == ["PRAGMA data_version"]


def test_two_connections_that_write_the_same_folder_do_not_meet(tmp_path: Path, clock: Clock) -> None:
    cache, other = opened(tmp_path), opened(tmp_path)
    assert cache.directory(1, 2) == other.directory(1, 2) == []
    other.save_directory(1, 2, [ONE, TWO])
    other.flush()
    cache.save_directory(1, 2, [THREE])
    cache.flush()
    assert cache.directory(1, 2) == [THREE]
    clock.now += 1
    assert other.directory(1, 2) == [THREE]


def test_more_folders_than_are_remembered_are_asked_for(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_cache, "_MOST_OURS", 2)
    cache = opened(tmp_path)
    for ino in range(4):
        cache.save_directory(1, ino, [ONE])
    clock.now += 1
    assert [cache.directory(1, ino) for ino in range(5)] == [[ONE]] * 4 + [[]]


def test_a_broken_file_is_an_empty_cache(tmp_path: Path) -> None:
    (tmp_path / f"scan-{PROFILE}.sqlite").write_bytes(b"no database" * 1000)
    cache = opened(tmp_path)
    assert cache.directory(1, 2) == []
    cache.save_directory(1, 2, [ONE])
    assert cache.directory(1, 2) == [ONE]


def test_it_is_written_by_itself(tmp_path: Path) -> None:
    cache = opened(tmp_path)
    begun = time.monotonic()
    while not (found := opened(tmp_path).directory(1, 2)):
        assert time.monotonic() - begun < 30
        cache.save_directory(1, 2, [ONE])
    assert found == [ONE]
