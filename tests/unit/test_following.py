"""Following an old file: what is taken is right, and the way is found again after edits."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest

from flowengine.chunking import DEFAULT_PROFILE, Cutter, chunk_id, pack_chunks
from flowengine.store.buffers import Buffer, BufferPool
from flowengine.transfer.following import Follower
from flowengine.units import MIB

RUN_CHUNKS = 100


@cache
def original() -> bytes:
    return random.Random(1).randbytes(30 * MIB)


def follow(
    path: Path, new: bytes, between: Callable[[int], None] = lambda run: None, *, honest: bool = True
) -> int:
    """Follow `path` as `new` is offered run by run; how many bytes were taken, after comparing them."""
    pool = BufferPool(2, 2 * MIB + DEFAULT_PROFILE.maximum)
    follower = Follower(os.open(path, os.O_RDONLY), DEFAULT_PROFILE, pool, elsewhere=False)
    lengths = Cutter(DEFAULT_PROFILE).lengths(new)
    offsets = list(accumulate(lengths[:-1], initial=0))
    old = path.read_bytes()
    taken = 0
    calls: list[tuple[int, int, bytes]] = []

    def write(first: int, end: int, buffer: Buffer, view: memoryview) -> None:
        calls.append((first, end, bytes(view)))

    try:
        for at in range(0, len(lengths), RUN_CHUNKS):
            between(at // RUN_CHUNKS)
            mine, starts = lengths[at : at + RUN_CHUNKS], offsets[at : at + RUN_CHUNKS]
            packed = pack_chunks(
                (length, chunk_id(new[offset : offset + length]))
                for offset, length in zip(starts, mine, strict=True)
            )
            calls.clear()
            places = follower.take(starts, mine, packed, set(), write)
            assert {index for first, end, _ in calls for index in range(first, end)} == {
                index for index, place in enumerate(places) if place >= 0
            }
            for first, end, data in calls:
                assert data == new[starts[first] : starts[first] + len(data)]
                assert len(data) == sum(mine[first:end])
                assert data == old[places[first] : places[first] + len(data)] or not honest
                taken += len(data)
    finally:
        follower.close()
    return taken


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("following") / "old"
    path.write_bytes(original())
    return path


EDITS: dict[str, tuple[Callable[[bytes], bytes], float]] = {
    "nothing": (lambda old: old, 0),
    "a byte": (lambda old: old[: 9 * MIB] + b"!" + old[9 * MIB + 1 :], 1),
    "a byte more": (lambda old: old[: 9 * MIB] + b"!" + old[9 * MIB :], 1),
    "at the head": (lambda old: b"!" + old, 1),
    "at the end": (lambda old: old + b"!", 1),
    "cut short": (lambda old: old[: 9 * MIB + 77], 1),
    "a megabyte overwritten": (lambda old: old[: 9 * MIB] + bytes(MIB) + old[10 * MIB :], 1),
    "a byte more, and one less behind it": (
        lambda old: old[: 9 * MIB] + b"!" + old[9 * MIB : 10 * MIB] + old[10 * MIB + 1 :],
        2 / 6,  # the two chunks that were edited, and no other
    ),
    "five taken out": (lambda old: old[: 9 * MIB] + old[14 * MIB :], 1),
    "ten more": (lambda old: old[: 9 * MIB] + random.Random(2).randbytes(10 * MIB) + old[9 * MIB :], 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_what_is_the_same_is_found_again(old: Path, name: str) -> None:
    edit, edits = EDITS[name]
    new = edit(original())
    same = min(len(new), len(original()))
    if name == "a megabyte overwritten":
        same -= MIB
    assert follow(old, new) >= same - edits * 6 * DEFAULT_PROFILE.maximum


@pytest.mark.slow
def test_another_file_gives_nothing_and_is_lost(old: Path) -> None:
    assert follow(old, random.Random(3).randbytes(20 * MIB)) == 0


@pytest.mark.slow
def test_a_file_that_is_written_to_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(original()[: 16 * MIB])
    new = b"!" + original()[: 16 * MIB]

    def spoil(run: int) -> None:
        if run == 1:
            path.write_bytes(bytes(16 * MIB))

    assert follow(path, new, spoil, honest=False) < 16 * MIB


def test_no_window_is_trusted_twice(tmp_path: Path) -> None:
    """The file changes between the cut of a window and the reading of what was found in it."""
    path = tmp_path / "old"
    path.write_bytes(original()[:MIB])
    new = b"!" + original()[:MIB]
    lengths = Cutter(DEFAULT_PROFILE).lengths(new)
    offsets = list(accumulate(lengths[:-1], initial=0))
    packed = pack_chunks(
        (length, chunk_id(new[offset : offset + length]))
        for offset, length in zip(offsets, lengths, strict=True)
    )

    class Spoiled(Follower):
        def _cut(self, window: int) -> None:
            super()._cut(window)
            path.write_bytes(bytes(MIB))

    pool = BufferPool(2, 2 * MIB)
    follower = Spoiled(os.open(path, os.O_RDONLY), DEFAULT_PROFILE, pool, elsewhere=False)
    try:
        places = follower.take(offsets, lengths, packed, set(), lambda *written: pytest.fail("took it"))
    finally:
        follower.close()
    assert set(places) == {-1}


def test_what_is_there_already_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(original()[:MIB])
    lengths = Cutter(DEFAULT_PROFILE).lengths(original()[:MIB])
    offsets = list(accumulate(lengths[:-1], initial=0))
    packed = pack_chunks(
        (length, chunk_id(original()[offset : offset + length]))
        for offset, length in zip(offsets, lengths, strict=True)
    )
    written: list[tuple[int, int]] = []
    follower = Follower(os.open(path, os.O_RDONLY), DEFAULT_PROFILE, BufferPool(1, 2 * MIB), elsewhere=False)
    try:
        places = follower.take(
            offsets, lengths, packed, {0, 3}, lambda first, end, buffer, view: written.append((first, end))
        )
    finally:
        follower.close()
    assert written == [(1, 3), (4, len(lengths))]
    assert [index for index, place in enumerate(places) if place < 0] == [0, 3]


def cuts_counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How large windows are cut from now on."""
    windows: list[int] = []
    cut = Follower._cut

    def counted(self: Follower, window: int) -> None:
        windows.append(window)
        cut(self, window)

    monkeypatch.setattr(Follower, "_cut", counted)
    return windows


def packed_of(data: bytes, lengths: list[int]) -> bytes:
    """The packed chunks of some bytes."""
    starts = accumulate(lengths[:-1], initial=0)
    return pack_chunks(
        (length, chunk_id(data[at : at + length])) for at, length in zip(starts, lengths, strict=True)
    )


def test_behind_what_was_overwritten_the_way_is_found_by_cutting_no_more_than_that(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = original()[: 5 * MIB] + random.Random(2).randbytes(MIB) + original()[6 * MIB :]
    windows = cuts_counted(monkeypatch)
    assert follow(old, new) > len(original()) - MIB - 3 * DEFAULT_PROFILE.maximum
    assert MIB < sum(windows) < MIB + 2 * DEFAULT_PROFILE.maximum


def test_two_chunks_that_changed_places_cost_one_of_them(old: Path) -> None:
    data = original()
    lengths = Cutter(DEFAULT_PROFILE).lengths(data)
    offsets = list(accumulate(lengths[:-1], initial=0))
    for index in range(10, 90):
        at, middle, end = offsets[index : index + 3]
        new = data[:at] + data[middle:end] + data[at:middle] + data[end:]
        cuts = Cutter(DEFAULT_PROFILE).lengths(new)
        if middle - at < end - middle and cuts[index : index + 2] == [end - middle, middle - at]:
            break
    assert follow(old, new) == len(data) - (middle - at)


def test_for_one_chunk_that_was_overwritten_nothing_is_cut(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = original()
    offset = sum(Cutter(DEFAULT_PROFILE).lengths(data)[:50])
    new = data[: offset + 10] + bytes(10) + data[offset + 20 :]  # long before where a cut is looked for
    windows = cuts_counted(monkeypatch)
    assert follow(old, new) >= len(data) - DEFAULT_PROFILE.maximum
    assert windows == []


def test_one_that_begins_in_the_middle_cuts_nothing_of_what_is_before(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a file that was recalled, until a run of the object is not what it has."""
    lengths = Cutter(DEFAULT_PROFILE).lengths(original())
    first = len(lengths) // 2
    begin, mine = sum(lengths[:first]), lengths[first : first + RUN_CHUNKS]
    data = bytearray(original()[begin : begin + sum(mine)])
    spoiled = mine[0] + mine[1]
    data[:spoiled] = random.Random(4).randbytes(spoiled)
    windows = cuts_counted(monkeypatch)
    pool = BufferPool(2, 2 * MIB + DEFAULT_PROFILE.maximum)
    follower = Follower(os.open(old, os.O_RDONLY), DEFAULT_PROFILE, pool, elsewhere=True)
    try:
        offsets = list(accumulate(mine[:-1], initial=begin))
        places = follower.take(offsets, mine, packed_of(bytes(data), mine), set(), lambda *written: None)
    finally:
        follower.close()
    assert places == [-1, -1, *offsets[2:]]
    assert sum(windows) <= spoiled
