"""What is read again when it is wanted is hashed again: what changed since it was offered is not sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flowengine.chunking import chunk_id, pack_chunks
from flowengine.store.reading import Piece
from flowengine.transfer.holds import PieceHold
from flowengine.transfer.unit import ChunkGone

PARTS = [bytes([number]) * 5000 for number in range(4)]


def hold(path: Path) -> PieceHold:
    """Four chunks that were offered from what the scan cache knows; nobody has read them."""
    path.write_bytes(b"".join(PARTS))
    packed = pack_chunks([(len(part), chunk_id(part)) for part in PARTS])
    return PieceHold(Piece(0, [len(part) for part in PARTS], packed, None, 0), os.fsencode(path))


def sent(held: PieceHold, index: int, count: int) -> bytes:
    return b"".join(bytes(view) for part in held.parts(index, count) for view in part.views())


def test_what_is_unchanged_is_sent(tmp_path: Path) -> None:
    assert sent(hold(tmp_path / "file"), 1, 2) == PARTS[1] + PARTS[2]


def test_a_change_that_left_size_and_time_alone_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    held = hold(path)
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(5000 + 4999)
        file.write(b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ChunkGone) as gone:
        sent(held, 1, 2)
    assert gone.value.reason == "changed"
    assert sent(held, 2, 2) == PARTS[2] + PARTS[3]  # the others are what they were


def test_what_shrank_or_went_or_became_a_link_is_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "file"
    held = hold(path)
    os.truncate(path, 12_000)
    with pytest.raises(ChunkGone) as gone:
        sent(held, 2, 1)
    assert gone.value.reason == "changed"
    (tmp_path / "elsewhere").write_bytes(b"".join(PARTS))
    path.unlink()
    path.symlink_to("elsewhere")
    with pytest.raises(ChunkGone) as gone:
        sent(held, 0, 1)
    assert gone.value.reason == "vanished"
