"""Compression over buffers, bounded on the way back.

zstandard contexts are reused per thread; both calls release the GIL.
"""

from __future__ import annotations

from typing import Final

import zstandard

from flowengine.errors import IntegrityError

__all__ = ["Compressor", "decompress"]

_PAYS: Final = 0.95
"""A block that compression does not bring below this share is stored instead."""


class Compressor:
    """Compresses blocks at a level that may change from block to block. One thread each."""

    def __init__(self) -> None:
        self._by_level: dict[int, zstandard.ZstdCompressor] = {}

    def compress(self, data: bytes | bytearray | memoryview, level: int) -> bytes | None:
        """The compressed block, or None where storing is as good."""
        compressor = self._by_level.get(level)
        if compressor is None:
            compressor = self._by_level[level] = zstandard.ZstdCompressor(
                level=level, write_checksum=False, write_content_size=True
            )
        packed = compressor.compress(data)
        return packed if len(packed) < len(data) * _PAYS else None


def decompress(
    decompressor: zstandard.ZstdDecompressor, data: bytes | bytearray | memoryview, size_bytes: int
) -> bytes:
    """The plaintext of a block, which must be `size_bytes` long.

    Raises:
        IntegrityError: the block is broken, or would give another number of bytes; at most `size_bytes` were allocated.
    """
    try:
        # The frame's own claim is read before anything is allocated by it.
        claimed = zstandard.frame_content_size(data)
        if claimed != size_bytes:
            raise IntegrityError(
                f"a compressed block claims {claimed} bytes where {size_bytes} were announced",
                hint="the sender is broken or lies; the transfer stops",
            )
        plain = decompressor.decompress(data, max_output_size=size_bytes)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"a compressed block does not decompress: {error}") from None
    if len(plain) != size_bytes:
        raise IntegrityError(f"a compressed block gave {len(plain)} bytes where {size_bytes} were announced")
    return plain
