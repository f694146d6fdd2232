"""What reading and writing large files leaves in the system's page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.manifest import FILE, Entry
from flowengine.store import page_cache
from flowengine.store.buffers import BufferPool
from flowengine.store.page_cache import ReadTrail, WriteTrail, share_of_memory
from flowengine.store.reading import SEGMENT_BYTES, ObjectChanged, ObjectReader
from flowengine.store.selection import Root, Selection
from flowengine.store.staging import StagedObject
from flowengine.transfer import landing
from flowengine.transfer.local import copy_local
from flowengine.transfer.passes import TransferSettings
from flowengine.transfer.sinks import LargeObject, TargetDirectory
from flowengine.units import MIB

pytestmark = pytest.mark.slow
WINDOW_BYTES = 4 * MIB  # what the system keeps as one piece is smaller
LAG = 4
"""Windows."""
AHEAD_BYTES = 2 * SEGMENT_BYTES
SIZE = 12 * WINDOW_BYTES + 12_345


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the real ones, so that files of 48 MiB tell."""
    monkeypatch.setattr(page_cache, "WINDOW_BYTES", WINDOW_BYTES)
    monkeypatch.setattr(page_cache, "LAG_BYTES", LAG * WINDOW_BYTES)


def in_memory(folder: Path) -> bool:
    place = max((len(line.split()[4]), line) for line in Path("/proc/self/mountinfo").read_text().splitlines()
                if folder.is_relative_to(line.split()[4]))  # fmt: skip
    return place[1].partition(" - ")[2].split()[0] in ("tmpfs", "ramfs")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system whose files are not in memory anyway."""
    for folder in (tmp_path, Path("/var/tmp"), Path(__file__).parent):
        if not in_memory(folder.resolve()):
            with tempfile.TemporaryDirectory(dir=folder) as made:
                yield Path(made)
            return
    pytest.fail("no folder on a disk: set TMPDIR to one")


def resident(path: Path) -> list[bool]:
    """Of each window of a file, whether more than half of it is in memory."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        byte = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        assert not ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(byte)), ctypes.c_size_t(size), pages
        )
        del byte
    each = WINDOW_BYTES // mmap.PAGESIZE
    windows = [pages[at : at + each] for at in range(0, len(pages), each)]
    return [2 * sum(one) > len(one) for one in windows]


def cold(path: Path, size: int = SIZE) -> Path:
    """A file of which nothing is in memory."""
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert not any(resident(path))
    return path


def read(path: Path, threads: int, pieces: int = 1000, between: Callable[[], None] = lambda: None) -> None:
    """Read a file, or its first pieces, and stop."""
    reader = ObjectReader(DEFAULT_PROFILE, BufferPool(4, SEGMENT_BYTES + DEFAULT_PROFILE.maximum), threads)
    fd = os.open(path, os.O_RDONLY)
    try:
        going = reader.pieces(fd, path.stat().st_size)
        for piece, _ in zip(going, range(pieces), strict=False):
            assert piece.buffer is not None
            piece.buffer.release()
            between()
        going.close()
    finally:
        os.close(fd)
        reader.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_what_was_not_there_before_it_was_read_is_not_there_behind_it(disk: Path, threads: int) -> None:
    path = cold(disk / "file")
    read(path, threads)
    assert not any(resident(path))


@pytest.mark.parametrize("threads", [1, 3])
def test_what_was_there_stays(disk: Path, threads: int) -> None:
    path = cold(disk / "file")
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        for window in (0, 1, 5, 11):
            os.pread(file.fileno(), WINDOW_BYTES, window * WINDOW_BYTES)
    before = resident(path)
    assert [window for window, there in enumerate(before) if there] == [0, 1, 5, 11]
    read(path, threads)
    assert resident(path) == before


def test_a_reading_that_ends_early_leaves_nothing_either(disk: Path) -> None:
    path = cold(disk / "file")
    read(path, 1, pieces=3)
    read_windows = 3 * SEGMENT_BYTES // WINDOW_BYTES
    assert not any(
        resident(path)[:read_windows]
    )  # what the system is reading ahead just then may come behind that


def test_who_reads_a_little_later_finds_it(disk: Path) -> None:
    path = cold(disk / "file", 16 * WINDOW_BYTES)
    fd = os.open(path, os.O_RDONLY)
    trail = ReadTrail(fd, path.stat().st_size, ahead_bytes=AHEAD_BYTES)
    try:
        for at in range(0, 16 * WINDOW_BYTES, WINDOW_BYTES):
            trail.reached(at)
            os.pread(fd, WINDOW_BYTES, at)
        there = [window for window, one in enumerate(resident(path)) if one]
        assert there == list(range(16 - 1 - LAG, 16))
    finally:
        trail.end()
        os.close(fd)
    assert not any(resident(path))


def test_files_that_are_empty_or_shrink_are_read_as_ever(disk: Path) -> None:
    empty = disk / "empty"
    empty.touch()
    fd = os.open(empty, os.O_RDONLY)
    trail = ReadTrail(fd, 0, ahead_bytes=AHEAD_BYTES)
    trail.reached(0)
    trail.end()
    trail = ReadTrail(fd, 10 * MIB, ahead_bytes=AHEAD_BYTES)  # so long it was when somebody looked
    trail.reached(0)
    trail.end()
    os.close(fd)
    path = cold(disk / "file")
    with pytest.raises(ObjectChanged):
        read(path, 1, between=lambda: os.truncate(path, 2 * WINDOW_BYTES))


def test_of_what_is_written_the_last_stays_until_the_end(disk: Path) -> None:
    path = disk / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    trail = WriteTrail(fd)
    for at in range(0, 16 * WINDOW_BYTES, WINDOW_BYTES):
        os.pwrite(fd, os.urandom(WINDOW_BYTES), at)
        os.fdatasync(fd)
        trail.wrote(at + WINDOW_BYTES)
    there = [window for window, one in enumerate(resident(path)) if one]
    assert there == list(range(16 - LAG, 16))
    trail.end()
    os.close(fd)
    assert not any(resident(path))


@pytest.mark.parametrize(("share", "stay"), [(share_of_memory(), ["a", "b"]), (SIZE, ["a"]), (0, [])])
def test_a_session_leaves_its_share_of_what_it_lands(
    disk: Path, monkeypatch: pytest.MonkeyPatch, share: int, stay: list[str]
) -> None:
    (disk / "source").mkdir()
    for name in ("a", "b"):
        cold(disk / "source" / name)
    (disk / "target").mkdir()
    monkeypatch.setattr(landing, "share_of_memory", lambda: share)
    report = copy_local(
        Selection([Root(os.fsencode(disk / "source"), b"")]), os.fsencode(disk / "target"), TransferSettings()
    )
    assert report.state == "completed"
    for name in ("a", "b"):
        assert not any(resident(disk / "source" / name))
        assert (
            any(resident(disk / "target" / name)) == all(resident(disk / "target" / name)) == (name in stay)
        )
        assert (disk / "target" / name).read_bytes() == (disk / "source" / name).read_bytes()


@pytest.mark.parametrize("byte", [3 * WINDOW_BYTES + 5, 12 * WINDOW_BYTES - 1, SIZE - 1])
def test_where_one_page_was_there_its_window_stays(disk: Path, byte: int) -> None:
    path = cold(disk / "file")
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        os.pread(file.fileno(), 1, byte)
    read(path, 1)
    assert [window for window, there in enumerate(resident(path)) if there] == [byte // WINDOW_BYTES]


def test_who_begins_further_on_lets_nothing_go_before_that(disk: Path) -> None:
    path = cold(disk / "file")
    fd = os.open(path, os.O_RDONLY)
    trail = ReadTrail(fd, SIZE, 8 * WINDOW_BYTES, ahead_bytes=AHEAD_BYTES)
    try:
        trail.reached(8 * WINDOW_BYTES)
        os.pread(fd, 2 * WINDOW_BYTES, 5 * WINDOW_BYTES)  # somebody else
        trail.end()
    finally:
        os.close(fd)
    assert resident(path)[5:7] == [True, True]


def test_of_a_file_that_cannot_be_mapped_all_stays(disk: Path) -> None:
    path = cold(disk / "file", 2 * WINDOW_BYTES)
    fd = os.open(path, os.O_RDONLY)
    trail = ReadTrail(fd, 3 * WINDOW_BYTES, ahead_bytes=AHEAD_BYTES)  # longer than it is
    try:
        trail.reached(2 * WINDOW_BYTES)
        os.truncate(path, WINDOW_BYTES)
        trail.end()
        os.pread(fd, WINDOW_BYTES, 0)
        trail = ReadTrail(fd, 2 * WINDOW_BYTES, WINDOW_BYTES, ahead_bytes=AHEAD_BYTES)
        trail.reached(WINDOW_BYTES)
        trail.end()
    finally:
        os.close(fd)
    assert resident(path) == [True]


def test_behind_a_hole_nothing_stays_either(disk: Path) -> None:
    path = disk / "file"
    with path.open("wb") as file:
        file.truncate(600 * MIB)  # several pieces, and more than is asked about ahead
        file.seek(600 * MIB)
        file.write(os.urandom(SIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reader = ObjectReader(DEFAULT_PROFILE, BufferPool(4, SEGMENT_BYTES + DEFAULT_PROFILE.maximum))
    with path.open("rb") as file:
        for piece in reader.pieces(file.fileno(), path.stat().st_size, sparse=True):
            if piece.buffer is not None:
                piece.buffer.release()
    assert not any(resident(path))


def test_what_takes_no_hints_fails_nothing() -> None:
    reading, writing = os.pipe()
    try:
        for fd in (reading, writing):
            trail = WriteTrail(fd)
            trail.wrote(page_cache.LAG_BYTES + WINDOW_BYTES)
            trail.end()
    finally:
        os.close(reading)
        os.close(writing)


def test_a_large_object_that_passes_lets_go_while_it_is_written(disk: Path) -> None:
    folder = os.open(disk, os.O_RDONLY)
    size = 16 * WINDOW_BYTES
    large = LargeObject(cast(TargetDirectory, None), Entry(b"a", FILE, 0o600, 0, size, b"", b"", 0, b""))
    large.staged = staged = StagedObject(folder, "l.a", b"a", size)
    staged.trail = WriteTrail(staged.fd)
    try:
        for at in range(0, size, WINDOW_BYTES):
            large.put(at, memoryview(os.urandom(WINDOW_BYTES)), b"")
            os.fdatasync(staged.fd)
        assert resident(disk / "l.a") == [False] * (16 - LAG) + [True] * LAG
    finally:
        staged.close()
        os.close(folder)
    assert not any(resident(disk / "l.a"))


def test_the_share_is_a_small_part_of_the_memory() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < share_of_memory() <= total // 16


def test_the_share_is_of_what_a_group_is_held_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "memory_limits", lambda: [1 << 60, 512 * MIB])
    assert share_of_memory.__wrapped__() == 32 * MIB


def test_the_units_filter_permits_the_question() -> None:
    """No group of systemd has mincore, and what the filter does not permit ends the process."""
    unit = Path(__file__).resolve().parents[2] / "agents/deploy/flowengine-agent.service"
    filters = [line for line in unit.read_text().splitlines() if line.startswith("SystemCallFilter=")]
    assert "mincore" in {word for line in filters for word in line.partition("=")[2].split()}


_MINCORE = {"x86_64": 27, "aarch64": 232}
_FILTERED = """
import ctypes, struct, sys
kept = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in [
    (0x20, 0, 0, 0),                            # the number of the system call
    (0x15, 0, 1, int(sys.argv.pop(1))),         # this one ends the process
    (0x06, 0, 0, 0x80000000),
    (0x06, 0, 0, 0x7FFF0000),                   # any other is let through
]))
program = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(kept)))
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(22, 2, program), ctypes.get_errno()
"""


def filtered(number: int, code: str, *arguments: str) -> int:
    """The exit code of Python code behind a filter (seccomp) that ends who makes one system call."""
    code = _FILTERED + code
    return subprocess.run([sys.executable, "-c", code, str(number), *arguments], timeout=120).returncode


@pytest.mark.skipif(platform.machine() not in _MINCORE, reason="the number of mincore is not known here")
def test_a_filter_that_ends_who_asks_ends_no_transfer(disk: Path) -> None:
    number = _MINCORE[platform.machine()]
    assert filtered(number, "libc.mincore(None, 0, None)") == -signal.SIGSYS
    path, copy = cold(disk / "file"), disk / "copy"
    run = "from flowengine.cli.main import main; sys.exit(main())"
    assert filtered(number, run, "cp", "--progress", "none", str(path), str(copy)) == 0
    assert copy.read_bytes() == path.read_bytes()
    ask = "from flowengine.store.page_cache import learn, may_ask\n{}\nsys.exit(may_ask())"
    assert (filtered(number, ask.format("")), filtered(0xFFFF, ask.format(""))) == (0, 1)
    # What is confined to some folders, as a mover is, cannot start another process, and knows it from before.
    confined = (
        "from flowengine_agent.landlock import confine\nassert confine(['/usr', '/proc/self'], ['/dev/null'])"
    )
    assert filtered(0xFFFF, ask.format(f"learn()\n{confined}")) == 1


def test_no_mapping_is_kept(disk: Path) -> None:
    path = disk / "file"
    path.touch()
    os.truncate(path, 1 << 40)
    fd = os.open(path, os.O_RDONLY)
    trail = ReadTrail(fd, 1 << 40, ahead_bytes=AHEAD_BYTES)
    try:
        trail.reached(0)
        assert str(path) not in Path("/proc/self/maps").read_text()
    finally:
        trail.end()
        os.close(fd)
