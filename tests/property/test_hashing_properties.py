"""Chunks are named as blake3 names them, however many are hashed in one call and whichever way it is done."""

from __future__ import annotations

import os
import random
import tempfile
from itertools import accumulate

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from flowengine.chunking import CHUNK_BYTES, DEFAULT_PROFILE, PROFILES, Cutter, ids_of, right_chunks
from flowengine.chunking.filling import Filling, packed_chunks, rule_for
from flowengine.chunking.fine import FineCutter, fine_id
from flowengine.chunking.hashing import hash_ways, lengths_of, pack_chunks, pack_ids

LENGTHS = st.one_of(
    st.sampled_from([1, 63, 64, 65, 1023, 1024, 1025, 2048, 3072, 16 * 1024, 17 * 1024 + 1]),
    st.integers(1, 3000),
    st.integers(1, 200_000),
)


@settings(deadline=None)
@given(lengths=st.lists(LENGTHS, max_size=40), seed=st.integers(0, 1 << 30), beside=st.integers(0, 65))
def test_all_ways_give_the_names_that_blake3_gives(lengths: list[int], seed: int, beside: int) -> None:
    data = memoryview(random.Random(seed).randbytes(beside + sum(lengths)))[beside:]
    expected = b"".join(
        blake3(data[end - length : end]).digest()
        for length, end in zip(lengths, accumulate(lengths), strict=True)
    )
    assert len(hash_ways()) > 1, "the library is in use"
    for way in hash_ways():
        assert ids_of(data, lengths, way) == expected


@pytest.mark.parametrize("count", [1, 255, 256, 257, 3000])
@pytest.mark.parametrize("length", [1, 700, 1024, 5000])
def test_many_pieces_are_hashed_by_batches(count: int, length: int) -> None:
    data = random.Random(1).randbytes(count * length)
    expected = ids_of(data, [length] * count, -1)
    for way in hash_ways():
        assert ids_of(data, [length] * count, way) == expected


def test_a_piece_may_be_larger_than_a_batch() -> None:
    data = random.Random(2).randbytes(4 * 1024 * 1024 + 5 + 2000)
    lengths = [1500, 4 * 1024 * 1024 + 5, 500]
    for way in hash_ways():
        assert ids_of(data, lengths, way) == ids_of(data, lengths, -1)


def test_pieces_beyond_the_data_are_refused() -> None:
    with pytest.raises(ValueError, match="101 bytes were to be hashed in 100"):
        ids_of(bytes(100), [100, 1])


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    seed=st.integers(0, 1 << 30),
    data=st.data(),
)
def test_the_first_wrong_chunk_is_found(lengths: list[int], seed: int, data: st.DataObject) -> None:
    content = bytearray(random.Random(seed).randbytes(sum(lengths)))
    packed = pack_ids(lengths, ids_of(content, lengths))
    at = data.draw(st.integers(0, len(content) - 1), label="changed byte")
    kept = data.draw(st.integers(0, len(content)), label="bytes that are there")
    ends = list(accumulate(lengths))
    whole = sum(end <= kept for end in ends)
    for way in hash_ways():
        assert right_chunks(content, packed, way) == len(lengths)
        assert right_chunks(content + b"more", packed, way) == len(lengths)
        assert right_chunks(content[:kept], packed, way) == whole
    content[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    for way in hash_ways():
        assert right_chunks(content, packed, way) == sum(end <= at for end in ends)


def test_a_wrong_name_or_length_is_a_wrong_chunk() -> None:
    data = bytes(range(256)) * 40
    lengths = [1000, 2000, 3000]
    packed = pack_ids(lengths, ids_of(data, lengths))
    for way in hash_ways():
        for at in range(0, len(packed), 3):
            wrong = bytearray(packed)
            wrong[at] ^= 0x40
            assert right_chunks(data, bytes(wrong), way) == at // CHUNK_BYTES
        assert right_chunks(data, b"", way) == 0
        assert right_chunks(b"", packed, way) == 0


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(0, 700_000), seed=st.integers(0, 1 << 30), profile=st.sampled_from([*PROFILES.values()])
)
def test_cutting_and_naming_in_one_call_changes_nothing(size: int, seed: int, profile: object) -> None:
    data = random.Random(seed).randbytes(size)
    cutter = Cutter(profile)  # type: ignore[arg-type]
    chunks, at = [], 0
    for length in cutter.lengths(data):
        chunks.append((length, blake3(data[at : at + length]).digest()))
        at += length
    assert cutter.packed(data) == pack_chunks(chunks)
    fine = FineCutter(DEFAULT_PROFILE).packed(data[:20_000])
    ends = [*accumulate(int.from_bytes(fine[at : at + 4], "little") for at in range(0, len(fine), 16))]
    assert [fine[at + 4 : at + 16] for at in range(0, len(fine), 16)] == [
        fine_id(data[start:end]) for start, end in zip([0, *ends], ends, strict=False)
    ]


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(1, 900_000),
    steps=st.lists(st.integers(0, 300_000), max_size=6),
    ahead=st.integers(0, 40_000),
    seed=st.integers(0, 1 << 30),
    zeros=st.booleans(),
)
def test_steps_of_reading_do_not_show_in_the_chunks(
    size: int, steps: list[int], ahead: int, seed: int, *, zeros: bool
) -> None:
    data = bytes(size) if zeros else random.Random(seed).randbytes(size)
    cutter = Cutter(DEFAULT_PROFILE)
    expected = cutter.packed(data)
    ahead = min(ahead, size)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        for filling in (cutter.filling, lambda view, filled: Filling(None, cutter.lengths, view, filled)):
            view = memoryview(bytearray(size + 10))
            view[:ahead] = data[:ahead]
            reading = filling(view, ahead)
            packed = b""
            for until in [*(end for end in accumulate(steps, initial=ahead) if end < size), size]:
                packed += reading.fill(file.fileno(), reading.filled, until, ends=until == size)
                assert reading.filled == until
                assert reading.cut == sum(lengths_of(packed))
            assert packed == expected
            assert view[:size] == data


@pytest.mark.parametrize("compiled", [True, False])
def test_a_file_that_ends_early_or_cannot_be_read_is_told(compiled: bool) -> None:
    cutter = Cutter(DEFAULT_PROFILE)
    view = memoryview(bytearray(1000))
    rule = rule_for((16_384, 65_536, 262_144)) if compiled else None
    with tempfile.TemporaryFile() as file:
        file.write(bytes(500))
        file.flush()
        filling = Filling(rule, cutter.lengths, view, 0)
        with pytest.raises(EOFError):
            filling.fill(file.fileno(), 0, 600, ends=True)
        assert filling.filled == 500
        with pytest.raises(EOFError):
            filling.fill(file.fileno(), filling.filled, 600, ends=True)
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(OSError, match="Illegal seek"):
            Filling(rule, cutter.lengths, view, 0).fill(read_end, 0, 10, ends=True)
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_buffer_is_not_filled_beyond_its_end() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(11))
        file.flush()
        filling = Cutter(DEFAULT_PROFILE).filling(memoryview(bytearray(10)))
        with pytest.raises(ValueError, match="10 bytes was to be filled up to 11"):
            filling.fill(file.fileno(), 0, 11, ends=True)


def test_no_chunk_is_longer_than_there_is_room_for() -> None:
    rule = rule_for((68, 512, 600))
    assert rule is not None
    data = random.Random(3).randbytes(100_000)
    packed = packed_chunks(rule, data, 32)
    assert lengths_of(packed) == Cutter(type(DEFAULT_PROFILE)("odd", 512, 68, 600)).lengths(data)
