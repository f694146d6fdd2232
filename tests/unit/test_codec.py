"""A compressed block gives what was announced or nothing, and takes no more memory than that."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
import zstandard

from flowengine.codec import Compressor, decompress
from flowengine.errors import IntegrityError

TEXT = b"many words, again and again, " * 2000
HUGE = 8 << 20


def packed(data: bytes, *, claim: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=claim).compress(data)


def lying(announced: int) -> bytes:
    """A frame of `HUGE` zeros whose header says something smaller."""
    frame = bytearray(packed(bytes(HUGE)))
    assert frame[4] >> 6 == 2, "the content size takes four bytes"
    at = 5 if frame[4] >> 5 & 1 else 6
    assert struct.unpack_from("<I", frame, at)[0] == HUGE
    struct.pack_into("<I", frame, at, announced)
    return bytes(frame)


def test_blocks_come_back() -> None:
    block = Compressor().compress(TEXT, 1)
    assert block is not None
    assert len(block) < len(TEXT) // 10
    assert decompress(zstandard.ZstdDecompressor(), block, len(TEXT)) == TEXT


def test_what_compression_does_not_shrink_is_stored() -> None:
    assert Compressor().compress(random.Random(1).randbytes(65536), 1) is None


@pytest.mark.parametrize(
    ("block", "announced"),
    [
        (packed(bytes(HUGE)), 1000),
        (packed(bytes(HUGE), claim=False), 1000),
        (lying(1000), 1000),
        (packed(TEXT), len(TEXT) + 1),
        (packed(TEXT), len(TEXT) - 1),
        (packed(TEXT)[:-5], len(TEXT)),
        (b"", 1000),
        (b"no zstd at all", 1000),
    ],
    ids=["claims more", "claims nothing", "lies", "too short", "too long", "cut", "empty", "garbage"],
)
def test_any_other_size_is_refused_within_what_was_announced(block: bytes, announced: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            decompress(zstandard.ZstdDecompressor(), block, announced)
        assert tracemalloc.get_traced_memory()[1] < announced + (1 << 20)
    finally:
        tracemalloc.stop()
