"""Folders that are made and filled at once: compiled and in Python, which must not differ."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowengine.store.many import Stat
from flowengine.store.runs import FolderPlace, PlacedFolders, place_folders, staging_name

NOTHING = Stat(*[0] * len(Stat._fields))


pytestmark = pytest.mark.usefixtures("way")


def stat_of(path: Path) -> Stat:
    return Stat.of(path.lstat())


class Bench:
    """A target and a staging folder with files `<number>`, the first of which is number `FIRST`."""

    FIRST = 254

    def __init__(self, folder: Path) -> None:
        self.target, self.staging = folder / "target", folder / "staging"
        self.target.mkdir()
        self.staging.mkdir()
        self._fds = [os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (self.target, self.staging)]

    def stage(self, *contents: bytes | None) -> None:
        for number, content in enumerate(contents, self.FIRST):
            if content is not None:
                path = self.staging / staging_name(number)
                path.write_bytes(content)
                path.chmod(0o640)
                os.utime(path, ns=(5, number))

    def place(
        self,
        folders: list[FolderPlace],
        names: list[bytes],
        left_out: bytes = b"",
        *,
        sync: bool = False,
    ) -> PlacedFolders:
        packed = b"".join(name + b"\0" for name in names)
        base, staging = self._fds
        open_before = sorted(os.listdir("/proc/self/fd"))
        placed = place_folders(
            base, folders, staging, self.FIRST, packed, left_out or bytes(len(names)), sync=sync
        )
        assert sorted(os.listdir("/proc/self/fd")) == open_before
        assert placed.files.names == names
        assert len(placed.errors) == len(names)
        assert len(placed.folders) == len(placed.folder_errors) == len(folders)
        return placed

    def left(self) -> set[str]:
        return {path.name for path in self.staging.iterdir()}

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("sync", [False, True])
def test_folders_are_made_filled_and_dressed_and_each_stat_is_true(bench: Bench, sync: bool) -> None:
    bench.stage(b"one", b"", b"three", b"four")
    folders = [
        FolderPlace(0, b"a", 0o750, 1_000_000_001, 2),
        FolderPlace(1, b"empty", 0o700, -1, 0),
        FolderPlace(1, b"\xff\n", 0o500, 2, 1),
        FolderPlace(2, b"deep", 0o1777, 3, 0),
        FolderPlace(3, b"deeper", 0o755, -1_500_000_000, 1),
        FolderPlace(0, b"b", 0o755, 4, 0),
    ]
    before = os.umask(0o077)
    try:
        placed = bench.place(folders, [b"x", b"y", b"z", b"\xfe"], sync=sync)
    finally:
        os.umask(before)
    assert placed.errors == [0, 0, 0, 0]
    assert placed.folder_errors == [0] * 6
    a = bench.target / "a"
    odd = a / os.fsdecode(b"\xff\n")
    files = [a / "x", a / "y", odd / "z", odd / "deep" / "deeper" / os.fsdecode(b"\xfe")]
    assert [path.read_bytes() for path in files] == [b"one", b"", b"three", b"four"]
    assert [st for _, st in placed.files.pairs()] == [stat_of(path) for path in files]
    made = [a, a / "empty", odd, odd / "deep", odd / "deep" / "deeper", bench.target / "b"]
    # What lies in a folder was made in it, so that its own time is what it was to have.
    assert [(path.stat().st_mode & 0o7777, path.stat().st_mtime_ns) for path in made] == [
        (one.mode, one.mtime_ns) for one in folders
    ]
    # A folder whose stat is told has all it is to have.
    assert placed.folders == [stat_of(path) for path in made]
    assert bench.left() == set()
    assert sorted(os.listdir(bench.target)) == ["a", "b"]


def test_a_folder_that_is_there_is_used_as_it_is_and_gets_mode_and_time(bench: Bench) -> None:
    there = bench.target / "a"
    there.mkdir(0o700)
    (there / "kept").write_bytes(b"kept")
    (there / "replaced").write_bytes(b"old")
    bench.stage(b"new")
    placed = bench.place([FolderPlace(0, b"a", 0o711, 77, 1)], [b"replaced"])
    assert (placed.errors, placed.folder_errors) == ([0], [0])
    assert (there / "replaced").read_bytes() == b"new"
    assert (there / "kept").read_bytes() == b"kept"
    assert (there.stat().st_mode & 0o7777, there.stat().st_mtime_ns) == (0o711, 77)


def test_what_is_left_out_has_no_staging_file_and_is_no_failure(bench: Bench) -> None:
    bench.stage(None, b"two", None, b"four")
    folders = [FolderPlace(0, b"a", 0o755, 1, 3), FolderPlace(1, b"b", 0o755, 2, 1)]
    placed = bench.place(folders, [b"1", b"2", b"3", b"4"], bytes([1, 0, 1, 0]))
    assert (placed.errors, placed.folder_errors) == ([0] * 4, [0, 0])
    stats = [st for _, st in placed.files.pairs()]
    assert (stats[0], stats[2]) == (NOTHING, NOTHING)
    assert stats[1] == stat_of(bench.target / "a" / "2")
    assert stats[3] == stat_of(bench.target / "a" / "b" / "4")
    assert sorted(os.listdir(bench.target / "a")) == ["2", "b"]


def test_a_staging_file_that_is_missing_costs_itself_alone(bench: Bench) -> None:
    bench.stage(b"one", None, b"three")
    placed = bench.place(
        [FolderPlace(0, b"a", 0o755, 1, 2), FolderPlace(0, b"b", 0o755, 2, 1)], [b"1", b"2", b"3"]
    )
    assert placed.errors == [0, errno.ENOENT, 0]
    assert placed.folder_errors == [0, 0]
    assert placed.files.pairs()[1] == (b"2", NOTHING)
    assert sorted(os.listdir(bench.target / "a")) == ["1"]
    assert (bench.target / "b" / "3").read_bytes() == b"three"
    assert placed.folders == [stat_of(bench.target / name) for name in ("a", "b")]


def test_a_folder_where_a_file_is_to_come_costs_that_file_alone(bench: Bench) -> None:
    (bench.target / "a" / "1").mkdir(parents=True)
    bench.stage(b"one", b"two")
    placed = bench.place([FolderPlace(0, b"a", 0o755, 1, 2)], [b"1", b"2"])
    assert placed.errors == [errno.EISDIR, 0]
    assert placed.folder_errors == [0]
    assert (bench.target / "a" / "2").read_bytes() == b"two"
    assert bench.left() == {staging_name(Bench.FIRST)}


@pytest.mark.parametrize("what", ["file", "pipe", "link to a folder", "dangling link", "link to a file"])
def test_what_stands_in_a_folders_place_fails_all_in_it_and_nothing_else(
    bench: Bench, tmp_path: Path, what: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(0o700)
    os.utime(outside, ns=(9, 9))
    before = stat_of(outside)
    there = bench.target / "a"
    if what == "file":
        there.write_bytes(b"as it was")
    elif what == "pipe":
        os.mkfifo(there)
    elif what == "link to a folder":
        there.symlink_to(outside)
    elif what == "link to a file":
        (tmp_path / "file").write_bytes(b"as it was")
        there.symlink_to(tmp_path / "file")
    else:
        there.symlink_to(tmp_path / "nowhere")
    stood = stat_of(there)
    bench.stage(b"1", b"2", b"3", b"4", None)
    placed = bench.place(
        [
            FolderPlace(0, b"a", 0o755, 1, 2),
            FolderPlace(1, b"below", 0o755, 1, 1),
            FolderPlace(2, b"deeper", 0o755, 1, 0),
            FolderPlace(0, b"b", 0o700, 2, 2),
        ],
        [b"1", b"2", b"3", b"4", b"5"],
        bytes([0, 0, 0, 0, 1]),
        sync=True,
    )
    code = placed.folder_errors[0]
    assert code in (errno.ENOTDIR, errno.ELOOP)
    assert placed.folder_errors == [code, code, code, 0]
    assert placed.errors == [code, code, code, 0, 0]
    assert placed.folders[:3] == [NOTHING] * 3
    assert stat_of(there) == stood
    assert os.listdir(outside) == []
    assert stat_of(outside) == before
    assert not (tmp_path / "nowhere").exists()
    assert (bench.target / "b" / "4").read_bytes() == b"4"
    assert placed.folders[3] == stat_of(bench.target / "b")
    assert bench.left() == {staging_name(Bench.FIRST + number) for number in range(3)}


def test_nothing_lands_below_what_is_not_made_though_it_is_left_out(bench: Bench) -> None:
    """A file that is left out has not failed, wherever it was to come."""
    (bench.target / "a").write_bytes(b"")
    bench.stage(None, b"2")
    placed = bench.place([FolderPlace(0, b"a", 0o755, 1, 2)], [b"1", b"2"], bytes([1, 0]))
    assert placed.errors == [0, errno.ENOTDIR]


def test_a_name_that_is_too_long_fails_as_any_other(bench: Bench) -> None:
    bench.stage(b"1", b"2")
    placed = bench.place(
        [FolderPlace(0, b"x" * 256, 0o755, 1, 1), FolderPlace(0, b"ok", 0o755, 1, 1)], [b"1", b"y" * 256]
    )
    assert placed.folder_errors == [errno.ENAMETOOLONG, 0]
    assert placed.errors == [errno.ENAMETOOLONG, errno.ENAMETOOLONG]


def test_folders_without_any_file_and_files_of_one_name_in_many_folders(bench: Bench) -> None:
    placed = bench.place([FolderPlace(0, b"a", 0o755, 1, 0), FolderPlace(1, b"b", 0o750, 2, 0)], [])
    assert (placed.errors, placed.folder_errors) == ([], [0, 0])
    assert len(placed.files) == 0
    count = 300
    bench.stage(*[b"%d" % number for number in range(count)])
    placed = bench.place([FolderPlace(0, b"d%03d" % n, 0o755, n, 1) for n in range(count)], [b"same"] * count)
    assert not any(placed.errors)
    assert not any(placed.folder_errors)
    for number in range(count):
        assert (bench.target / f"d{number:03d}" / "same").read_bytes() == b"%d" % number


def test_a_deep_chain_of_folders_is_made_and_left(bench: Bench) -> None:
    bench.stage(b"bottom")
    depth = 200
    placed = bench.place(
        [FolderPlace(n, b"d", 0o755 if n % 2 else 0o711, n, int(n == depth - 1)) for n in range(depth)],
        [b"f"],
    )
    assert placed.errors == [0]
    assert placed.folder_errors == [0] * depth
    path = bench.target
    for number in range(depth):
        path = path / "d"
        assert placed.folders[number] == stat_of(path)
        assert path.stat().st_mtime_ns == number
    assert (path / "f").read_bytes() == b"bottom"
