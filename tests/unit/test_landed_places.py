"""Where a chunk that landed in this session can be read again."""

from __future__ import annotations

import pytest

from flowengine.chunking import chunk_id, pack_chunks
from flowengine.manifest import FILE, Entry
from flowengine.store.encoded import parse_block
from flowengine.store.proofs import encode_entries
from flowengine.transfer.places import LandedPart, LandedRun

PARTS = [bytes([number]) * (100 + number) for number in range(5)]
IDS = [chunk_id(part) for part in PARTS]


def packed(*numbers: int) -> bytes:
    return pack_chunks([(len(PARTS[number]), IDS[number]) for number in numbers])


def test_chunks_of_one_object() -> None:
    part = LandedPart((b"folder/file", "s.7", 5000), packed(3, 1, 2, 1))
    assert part.place_of(IDS[3]) == (b"folder/file", "s.7", 5000)
    assert part.place_of(IDS[1]) == (b"folder/file", "s.7", 5103)
    assert part.place_of(IDS[2]) == (b"folder/file", "s.7", 5204)
    with pytest.raises(KeyError):
        part.place_of(IDS[0])


@pytest.mark.parametrize("folder", [b"", b"some/folder"])
def test_chunks_of_files_that_came_together(folder: bytes) -> None:
    entries = [
        Entry(b"a", FILE, 0o644, 0, len(PARTS[0]), packed(0)),
        Entry(b"b", FILE, 0o644, 0, sum(len(PARTS[number]) for number in (1, 2, 3)), packed(1, 2, 3)),
        Entry(b"c", FILE, 0o644, 0, len(PARTS[4]), packed(4)),
    ]
    block = parse_block(encode_entries(entries))
    assert block is not None
    run = LandedRun(folder, block, 30)
    before = folder + b"/" if folder else b""
    assert run.place_of(IDS[0]) == (before + b"a", 30, 0)
    assert run.place_of(IDS[2]) == (before + b"b", 31, 101)
    assert run.place_of(IDS[4]) == (before + b"c", 32, 0)
