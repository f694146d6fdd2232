"""The chunk index finds what was added, survives a restart, and never claims what is not there."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowengine.chunking import CHUNK_BYTES, pack_chunks
from flowengine.store.chunk_index import ChunkIndex


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


def _object(folder: Path, name: str, packed: bytes) -> os.stat_result:
    """An object of the size that its chunk list says; what is in it does not matter to the index."""
    with open(folder / name, "wb") as file:
        file.truncate(_size(packed))
    return os.stat(folder / name)


def _index(root: tuple[Path, int, str]) -> ChunkIndex:
    return ChunkIndex(os.fsencode(root[0]), "64KiB", root[2])


def test_what_was_added_is_found_after_a_restart(root: tuple[Path, int, str]) -> None:
    folder, fd, _ = root
    rng = random.Random(1)
    first, second = _chunks(rng, 300), _chunks(rng, 1)
    index = _index(root)
    assert not index
    assert index.find(fd, first) == {}
    index.add(b"a", _object(folder, "a", first), 0, first)
    index.add(b"b", _object(folder, "b", second), 0, second)
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
        index.add(name.encode(), _object(folder, name, chunks), 0, chunks)
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
        index.add(name.encode(), _object(folder, name, packed), 0, packed)
        index.commit()
        kept.append((name.encode(), packed))
    files = [name for _, _, names in os.walk(state) for name in names]
    assert len(files) <= 8
    for reader in (index, _index(root)):
        for name, packed in kept:
            found = reader.find(fd, packed)
            assert [found[position][0] for position in range(20)] == [name] * 20


@pytest.mark.parametrize("damage", [b"", b"flowidx1", os.urandom(100)], ids=["empty", "cut", "noise"])
def test_a_broken_index_is_dropped(root: tuple[Path, int, str], damage: bytes) -> None:
    folder, fd, state = root
    packed = _chunks(random.Random(4), 20)
    index = _index(root)
    index.add(b"a", _object(folder, "a", packed), 0, packed)
    index.commit()
    (run,) = [os.path.join(at, name) for at, _, names in os.walk(state) for name in names]
    with open(run, "wb") as file:
        file.write(damage)
    again = _index(root)
    assert not again
    assert again.find(fd, packed) == {}
    assert not os.path.exists(run)
