"""What is read again when it is wanted is hashed again: what changed since it was offered is not sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flowengine.chunking import DEFAULT_PROFILE, chunk_id, pack_chunks
from flowengine.chunking.fine import FineCutter
from flowengine.manifest import FILE, Entry
from flowengine.store.reading import Piece
from flowengine.store.scan_events import Batch
from flowengine.transfer.holds import BatchHold, FineHold, PieceHold, UnitPacker
from flowengine.transfer.unit import ChunkGone
from flowengine.transfer.unit_size import UnitSize

PARTS = [bytes([number]) * 5000 for number in range(4)]


def hold(path: Path) -> PieceHold:
    """Four chunks that were offered from what the scan cache knows; nobody has read them."""
    path.write_bytes(b"".join(PARTS))
    packed = pack_chunks([(len(part), chunk_id(part)) for part in PARTS])
    return PieceHold(Piece(0, [len(part) for part in PARTS], packed, None, 0), os.fsencode(path))


def sent(held: PieceHold, index: int, count: int) -> bytes:
    return b"".join(bytes(view) for _, part in held.parts(index, count) for view in part.views())


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


def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "file"
    held = hold(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ChunkGone):
        sent(held, 0, 1)


def batch_of_known(folder: Path, count: int) -> BatchHold:
    """Small files that the scan cache knows, so that each is read again when it is wanted."""
    entries = []
    for number in range(count):
        data = bytes([number]) * 900
        (folder / f"f{number}").write_bytes(data)
        packed = pack_chunks([(len(data), chunk_id(data))])
        entries.append(Entry(b"f%d" % number, FILE, 0o644, 0, size=len(data), chunks=packed))
    held = BatchHold(Batch(entries, None, [-1] * count, os.fsencode(folder)))
    held.number = 7
    return held


def test_a_small_file_that_is_gone_costs_no_other(tmp_path: Path) -> None:
    held = batch_of_known(tmp_path, 5)
    (tmp_path / "f2").unlink()
    packer = UnitPacker(UnitSize())
    assert list(packer.add(held, 0, 5)) == []
    unit = packer.flush()
    assert unit is not None
    assert unit.raw_bytes == 5 * 900
    lost = []
    for run, part in zip(unit.runs, unit.parts, strict=True):
        try:
            (view,) = part.views()
            assert view == bytes([run[1]]) * 900
        except ChunkGone:
            lost.append(run)
    assert lost == [(7, 2, 1)]


def test_of_what_is_cut_finer_only_what_is_gone_is_lost(tmp_path: Path) -> None:
    held = batch_of_known(tmp_path, 3)
    (tmp_path / "f1").unlink()
    fine = FineHold(held, [0, 1, 2], FineCutter(DEFAULT_PROFILE))
    parts = fine.parts(0, len(fine.lengths))
    assert sum(count for count, _ in parts) == len(fine.lengths)
    readable = b""
    for _, part in parts:
        try:
            readable += b"".join(bytes(view) for view in part.views())
        except ChunkGone:
            readable += b"|"
    assert readable == bytes(900) + b"|" + bytes([2]) * 900
