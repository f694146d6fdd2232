"""What the journal of a staged object is believed to say, after a crash, a reboot, a torn write."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowengine.chunking import chunk_id, pack_chunks
from flowengine.store.filesystem import boot_id
from flowengine.store.staging import StagedObject

SIZE = 4096
PARTS = [bytes([number]) * SIZE for number in range(1, 5)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def opened(folder: int) -> StagedObject:
    return StagedObject(folder, "l.object", b"object", SIZE * len(PARTS))


def write(staged: StagedObject, *numbers: int) -> None:
    """Write chunks and journal them."""
    for number in numbers:
        os.pwrite(staged.fd, PARTS[number], number * SIZE)
        staged.journal(number * SIZE, pack_chunks([(SIZE, chunk_id(PARTS[number]))]))


def believed(folder: int) -> list[int]:
    """The chunks that a new session finds in place."""
    staged = opened(folder)
    staged.close()
    for offset, row in staged.have.items():
        assert row == (SIZE, chunk_id(PARTS[offset // SIZE]))
    return sorted(offset // SIZE for offset in staged.have)


def reboot(path: Path) -> None:
    """Make a journal one that another boot of the machine left."""
    journal = path / "l.object.j"
    data = journal.read_bytes()
    assert data.count(boot_id()) == 1
    journal.write_bytes(data.replace(boot_id(), b"another boot id"[: len(boot_id())].ljust(len(boot_id()))))


def lose(path: Path, number: int) -> None:
    """Undo the write of a chunk, as a power cut may."""
    with open(path / "l.object", "r+b") as file:
        file.seek(number * SIZE)
        file.write(bytes(SIZE))


def test_the_same_boot_believes_all_that_was_journalled(folder: int) -> None:
    staged = opened(folder)
    write(staged, 0, 2)
    staged.close()
    assert believed(folder) == [0, 2]


def test_after_a_reboot_what_stands_behind_the_mark_is_hashed_first(folder: int, tmp_path: Path) -> None:
    staged = opened(folder)
    write(staged, 0)
    staged.sync()
    write(staged, 1, 2)
    staged.close()
    reboot(tmp_path)
    lose(tmp_path, 2)
    assert believed(folder) == [0, 1]
    assert believed(folder) == [0, 1]  # what was found is journalled under the new boot


def test_a_mark_vouches_only_for_what_stood_before_its_sync(folder: int, tmp_path: Path) -> None:
    staged = opened(folder)
    write(staged, 0)
    staged.sync()
    # Two marks: the second one's sync began where the first one's ended.
    write(staged, 1)
    staged.sync()
    write(staged, 3)
    staged.close()
    reboot(tmp_path)
    lose(tmp_path, 1)  # cannot happen to a synced chunk: it is believed without being looked at
    lose(tmp_path, 3)
    assert believed(folder) == [0, 1]


@pytest.mark.parametrize("cut", [1, 20, 47, 48])
def test_a_torn_record_ends_the_journal(folder: int, tmp_path: Path, cut: int) -> None:
    staged = opened(folder)
    write(staged, 0, 1)
    staged.close()
    journal = tmp_path / "l.object.j"
    os.truncate(journal, journal.stat().st_size - cut)
    assert believed(folder) == [0]
    staged = opened(folder)
    write(staged, 1, 2)  # and goes on behind what is good
    staged.close()
    assert believed(folder) == [0, 1, 2]


def test_a_record_without_its_check_ends_the_journal_and_nothing_behind_it_is_believed(
    folder: int, tmp_path: Path
) -> None:
    staged = opened(folder)
    write(staged, 0, 1, 2)
    staged.close()
    journal = tmp_path / "l.object.j"
    data = bytearray(journal.read_bytes())
    data[-60] ^= 1  # in the second of three records
    journal.write_bytes(data)
    assert believed(folder) == [0]


def test_a_journal_of_another_size_or_path_is_not_believed(folder: int) -> None:
    staged = opened(folder)
    write(staged, 0)
    staged.close()
    for path, size in ((b"other", SIZE * len(PARTS)), (b"object", SIZE)):
        other = StagedObject(folder, "l.object", path, size)
        assert other.have == {}
        assert os.pread(other.fd, SIZE, 0) == bytes(min(size, SIZE))
        other.close()
