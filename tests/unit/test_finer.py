"""The finer cut: its chunks, which chunks are asked for, and what the source holds of them."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from flowengine.chunking import DEFAULT_PROFILE, PROFILES, Cutter, chunk_id, pack_chunks
from flowengine.chunking.fine import FINE_BYTES, FineCutter, fine_id, fine_lengths, fine_profile
from flowengine.store.reading import Piece
from flowengine.transfer.holds import FineHold, PieceHold
from flowengine.transfer.refining import regions_beside
from flowengine.transfer.unit import ChunkGone

DATA = random.Random(1).randbytes(300_000)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_fine_chunks_are_the_bytes_in_order(profile) -> None:  # type: ignore[no-untyped-def]
    packed = FineCutter(profile).packed(DATA)
    lengths = fine_lengths(packed)
    assert sum(lengths) == len(DATA)
    assert max(lengths) <= fine_profile(profile).maximum
    at = 0
    for index, length in enumerate(lengths):
        row = packed[index * FINE_BYTES : (index + 1) * FINE_BYTES]
        assert row[4:] == fine_id(DATA[at : at + length])
        at += length


def test_an_edit_changes_few_fine_chunks() -> None:
    cutter = FineCutter(DEFAULT_PROFILE)
    places = cutter.places(DATA)
    changed = DATA[:150_000] + b"!" + DATA[150_000:]
    packed = cutter.packed(changed)
    rows = [packed[at : at + FINE_BYTES] for at in range(0, len(packed), FINE_BYTES)]
    assert sum(row not in places for row in rows) <= 3


def _hold(path: Path, data: bytes) -> PieceHold:
    lengths = Cutter(DEFAULT_PROFILE).lengths(data)
    ids, at = [], 0
    for length in lengths:
        ids.append(chunk_id(data[at : at + length]))
        at += length
    packed = pack_chunks(zip(lengths, ids, strict=True))
    return PieceHold(Piece(0, lengths, packed, None, 0), os.fsencode(path))


def test_a_hold_of_fine_chunks_gives_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    hold = _hold(path, DATA)
    first = hold.lengths[0]
    fine = FineHold(hold, [1, 2], FineCutter(DEFAULT_PROFILE))
    assert sum(fine.lengths) == hold.lengths[1] + hold.lengths[2]
    path.unlink()  # it has the bytes itself
    got = b"".join(
        bytes(view)
        for at in range(len(fine.lengths))
        for _, part in fine.parts(at, 1)
        for view in part.views()
    )
    assert got == DATA[first : first + len(got)]


def test_a_chunk_that_is_gone_stands_for_itself_and_is_lost_when_sent(tmp_path: Path) -> None:
    hold = _hold(tmp_path / "nothing", DATA)
    fine = FineHold(hold, [0, 1], FineCutter(DEFAULT_PROFILE))
    assert fine.lengths == hold.lengths[:2]
    parts = fine.parts(0, 2)
    assert [count for count, _ in parts] == [1, 1]
    for _, part in parts:
        with pytest.raises(ChunkGone):
            part.views()


@pytest.mark.parametrize(
    ("places", "wanted", "left", "expected"),
    [
        # between two that were found: where it stood
        ([0, -1, 150], [0, 1, 0], -1, {1: (100, 150)}),
        # nothing stood between them
        ([0, -1, 100], [0, 1, 0], -1, {}),
        # at the end of a run: what follows what was found, as far as the old file goes
        ([0, 100, -1], [0, 0, 1], -1, {2: (200, 400)}),
        # at the beginning of a run, after what the run before ended with
        ([-1, 500], [1, 0], 450, {0: (450, 500)}),
        # at the beginning, with nothing known before it
        ([-1, 500], [1, 0], -1, {0: (300, 500)}),
        # nothing near was found
        ([-1, -1], [1, 1], -1, {}),
        # what follows stood before what precedes: each end by itself
        ([700, -1, 100], [0, 1, 0], -1, {1: (0, 100)}),
    ],
)
def test_where_a_chunk_may_have_stood(
    places: list[int], wanted: list[int], left: int, expected: dict[int, tuple[int, int]]
) -> None:
    lengths = [100] * len(places)
    assert regions_beside(lengths, places, bytearray(wanted), left, 1000) == expected


def test_of_a_long_run_its_ends_are_asked_for() -> None:
    places = [0, *[-1] * 30, 5000]
    found = regions_beside([100] * 32, places, bytearray([0, *[1] * 30, 0]), -1, 10_000)
    assert sorted(found) == [1, 27, 28, 29, 30]
