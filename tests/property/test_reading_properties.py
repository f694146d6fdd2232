"""However an object is read, its chunks are those of its bytes."""

from __future__ import annotations

import os
import random
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowengine.chunking import DEFAULT_PROFILE, PROFILES, Cutter, Profile, chunk_id, pack_chunks
from flowengine.store.buffers import BufferPool
from flowengine.store.reading import SEGMENT_BYTES, ObjectChanged, ObjectReader


def _expected(data: bytes, profile: Profile) -> bytes:
    chunks = []
    at = 0
    for length in Cutter(profile).lengths(data):
        chunks.append((length, chunk_id(data[at : at + length])))
        at += length
    return pack_chunks(chunks)


def _read(
    fd: int, size: int, profile: Profile, threads: int, *, sparse: bool = False, offset: int = 0
) -> tuple[bytes, int]:
    """(packed chunks, bytes that were really read); checks that every piece holds the right bytes."""
    pool = BufferPool(6, SEGMENT_BYTES + profile.maximum)
    reader = ObjectReader(profile, pool, threads)
    packed = b""
    read = 0
    try:
        for piece in reader.pieces(fd, size, sparse=sparse, offset=offset):
            packed += piece.packed
            if piece.buffer is None:
                assert os.pread(fd, piece.size_bytes, piece.offset).strip(b"\0") == b""
                continue
            read += piece.size_bytes
            view = piece.buffer.view[piece.start : piece.start + piece.size_bytes]
            assert view == os.pread(fd, piece.size_bytes, piece.offset)
            piece.buffer.release()
    finally:
        reader.close()
    # Every buffer came back: acquiring all of them again does not wait.
    taken = [pool.acquire() for _ in range(pool.count)]
    assert pool.exhausted()
    for buffer in taken:
        buffer.release()
    return packed, read


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.sampled_from(
        [0, 1, 16 * 1024, 100_001, SEGMENT_BYTES, SEGMENT_BYTES + 1, 2 * SEGMENT_BYTES + 777_777]
    ),
    seed=st.integers(0, 1 << 30),
    repeat=st.sampled_from([0, 1, 4096, 70_000]),
    profile=st.sampled_from(list(PROFILES.values())),
)
def test_threads_do_not_change_boundaries(size: int, seed: int, repeat: int, profile: Profile) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(size) if not repeat else (rng.randbytes(repeat) * (size // repeat + 1))[:size]
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        expected = _expected(data, profile)
        for threads in (1, 2, 3):
            assert _read(file.fileno(), size, profile, threads)[0] == expected


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    runs=st.lists(st.tuples(st.integers(0, 3_000_000), st.integers(1, 400_000)), min_size=0, max_size=4),
    tail=st.integers(0, 2_000_000),
    profile=st.sampled_from([PROFILES["64KiB"], PROFILES["256KiB"]]),
)
def test_holes_give_the_chunks_that_reading_gives(
    runs: list[tuple[int, int]], tail: int, profile: Profile
) -> None:
    with tempfile.TemporaryFile() as file:
        fd = file.fileno()
        at = 0
        for gap, length in runs:
            at += gap
            os.pwrite(fd, random.Random(length).randbytes(length), at)
            at += length
        os.ftruncate(fd, at + tail)
        data = os.pread(fd, at + tail, 0)
        packed, read = _read(fd, len(data), profile, 1, sparse=True)
        assert packed == _expected(data, profile)
        assert read <= len(data)


@pytest.mark.slow
def test_reading_may_go_on_at_any_cut() -> None:
    data = random.Random(7).randbytes(3_000_000)
    lengths = Cutter(DEFAULT_PROFILE).lengths(data)
    expected = _expected(data, DEFAULT_PROFILE)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        for count in (1, 5, len(lengths) - 1):
            packed, _ = _read(file.fileno(), len(data), DEFAULT_PROFILE, 1, offset=sum(lengths[:count]))
            assert packed == expected[36 * count :]


@pytest.mark.parametrize("threads", [1, 2])
def test_an_object_that_shrank_is_noticed(threads: int) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(bytes(100_000))
        file.flush()
        with pytest.raises(ObjectChanged, match="now ends at 100000"):
            _read(file.fileno(), SEGMENT_BYTES * 2, DEFAULT_PROFILE, threads)
