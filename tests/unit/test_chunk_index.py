"""The chunk index finds what was added, survives a restart, and never claims what is not there."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowengine.chunking import CHUNK_BYTES, pack_chunks
from flowengine.store.chunk_index import ChunkIndex
from flowengine.store.index_log import IndexLog, read_log


def _chunks(rng: random.Random, count: int) -> bytes:
    return pack_chunks([(rng.randrange(1, 1 << 18), rng.randbytes(32)) for _ in range(count)])


def _size(packed: bytes) -> int:
    return sum(int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), CHUNK_BYTES))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[tuple[Path, int, str]]:
    folder = tmp_path / "root"
    folder.mkdir()
    fd = os.open(folder, os.O_RDONLY)
    yield folder, fd, str(tmp_path / "state")
    os.close(fd)


def _object(folder: Path, name: str, packed: bytes) -> tuple[int, int]:
    """Size and time of an object made as its chunk list says; what is in it does not matter to the index."""
    with open(folder / name, "wb") as file:
        file.truncate(_size(packed))
    st = os.stat(folder / name)
    return st.st_size, st.st_mtime_ns


def _index(root: tuple[Path, int, str]) -> ChunkIndex:
    return ChunkIndex(os.fsencode(root[0]), "64KiB", root[2])


def test_what_was_added_is_found_after_a_restart(root: tuple[Path, int, str]) -> None:
    folder, fd, _ = root
    rng = random.Random(1)
    first, second = _chunks(rng, 300), _chunks(rng, 1)
    index = _index(root)
    assert not index
    assert index.find(fd, first) == {}
    index.add(b"a", *_object(folder, "a", first), 0, first)
    index.add(b"b", *_object(folder, "b", second), 0, second)
    index.commit()
    again = _index(root)
    assert again
    found = again.find(fd, second + _chunks(rng, 2) + first[:72])
    length = int.from_bytes(first[:4], "little")
    assert found == {0: (b"b", 0), 3: (b"a", 0), 4: (b"a", length)}


def test_an_object_that_changed_or_went_is_not_claimed(root: tuple[Path, int, str]) -> None:
    folder, fd, _ = root
    rng = random.Random(2)
    packed = {name: _chunks(rng, 3) for name in ("changed", "gone", "linked", "same")}
    index = _index(root)
    for name, chunks in packed.items():
        index.add(name.encode(), *_object(folder, name, chunks), 0, chunks)
    index.commit()
    os.utime(folder / "changed", ns=(1, 1))
    (folder / "gone").unlink()
    (folder / "linked").rename(folder / "elsewhere")
    (folder / "linked").symlink_to("elsewhere")
    found = index.find(fd, b"".join(packed.values()))
    assert {path for path, _ in found.values()} == {b"same"}


def test_many_runs_are_merged_and_all_is_still_found(root: tuple[Path, int, str]) -> None:
    folder, fd, state = root
    rng = random.Random(3)
    kept: list[tuple[bytes, bytes]] = []
    index = _index(root)
    for number in range(30):
        packed = _chunks(rng, 20)
        name = f"o{number}"
        index.add(name.encode(), *_object(folder, name, packed), 0, packed)
        index.commit()
        kept.append((name.encode(), packed))
    files = [name for _, _, names in os.walk(state) for name in names]
    assert len(files) <= 8
    for reader in (index, _index(root)):
        for name, packed in kept:
            found = reader.find(fd, packed)
            assert [found[position][0] for position in range(20)] == [name] * 20


def test_a_log_is_taken_over_as_far_as_it_is_whole(root: tuple[Path, int, str]) -> None:
    folder, fd, state = root
    rng = random.Random(5)
    packed = [_chunks(rng, 1 + number % 3) for number in range(5)]
    log = IndexLog(os.fsencode(folder), "64KiB", state)
    for number, chunks in enumerate(packed):
        _object(folder, f"o{number}", chunks)
        log.add(b"o%d" % number, os.stat(folder / f"o{number}"), 0, chunks)
    log.flush()
    log.flush()  # nothing waits: nothing is written
    (path,) = [os.path.join(at, name) for at, _, names in os.walk(state) for name in names]
    assert [(name, chunks) for name, _, _, _, chunks in read_log(path)] == [
        (b"o%d" % number, chunks) for number, chunks in enumerate(packed)
    ]
    os.truncate(path, os.path.getsize(path) - 1)
    index = _index(root)
    found = index.find(fd, b"".join(packed))
    assert {path for path, _ in found.values()} == {b"o0", b"o1", b"o2", b"o3"}
    lengths = [int.from_bytes(packed[2][at : at + 4], "little") for at in range(0, 108, CHUNK_BYTES)]
    assert [found[3 + number][1] for number in range(3)] == [0, lengths[0], lengths[0] + lengths[1]]
    assert not os.path.exists(path)
    log.add(b"o4", os.stat(folder / "o4"), 0, packed[4])
    log.flush()
    assert index.find(fd, packed[4]) == {}
    index.stale = True
    assert index.find(fd, packed[4])[0] == (b"o4", 0)


@pytest.mark.parametrize("damage", [b"", b"flowidx1", os.urandom(100)], ids=["empty", "cut", "noise"])
def test_a_broken_index_is_dropped(root: tuple[Path, int, str], damage: bytes) -> None:
    folder, fd, state = root
    packed = _chunks(random.Random(4), 20)
    index = _index(root)
    index.add(b"a", *_object(folder, "a", packed), 0, packed)
    index.commit()
    (run,) = [os.path.join(at, name) for at, _, names in os.walk(state) for name in names]
    with open(run, "wb") as file:
        file.write(damage)
    again = _index(root)
    assert not again
    assert again.find(fd, packed) == {}
    assert not os.path.exists(run)
