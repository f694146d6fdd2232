"""Records: what the byte stream inside sealed frames consists of.

A record is a header, a list of chunk runs, and the bytes of those chunks one behind the other, compressed or not.
A run addresses chunks by offer: (offer number, first index, count). docs/spec/wire.md has the byte table.
"""

from __future__ import annotations

import struct
from typing import Final

from flowengine.errors import ProtocolError
from flowengine.units import MIB

__all__ = [
    "MAX_RUNS",
    "MAX_UNIT_BYTES",
    "RECORD_HEADER_BYTES",
    "RUN_BYTES",
    "STORED",
    "ZSTD",
    "RecordHeader",
    "pack_record_header",
    "parse_record_header",
    "record_limit",
]

STORED: Final = 0
ZSTD: Final = 1

MAX_UNIT_BYTES: Final = 4 * MIB
"""A sender closes a record at the latest when it holds this much plaintext; one chunk may take it over."""
MAX_RUNS: Final = 4096

_HEADER: Final = struct.Struct("<BBHII")
_RUN: Final = struct.Struct("<III")
RECORD_HEADER_BYTES: Final = _HEADER.size
RUN_BYTES: Final = _RUN.size

Run = tuple[int, int, int]
RecordHeader = tuple[int, int, int, list[Run], int]
"""(codec, plaintext bytes, stored bytes, runs, bytes of header and runs)"""


def record_limit(max_chunk_bytes: int) -> int:
    """Most plaintext bytes that a record may hold under a profile."""
    return MAX_UNIT_BYTES + max_chunk_bytes


def pack_record_header(codec: int, raw_bytes: int, stored_bytes: int, runs: list[Run]) -> bytes:
    """The bytes before a record's payload.

    >>> parse_record_header(memoryview(pack_record_header(STORED, 9, 9, [(1, 2, 3)])), 100)
    (0, 9, 9, [(1, 2, 3)], 24)
    """
    return _HEADER.pack(codec, 0, len(runs), raw_bytes, stored_bytes) + b"".join(
        [_RUN.pack(*run) for run in runs]
    )


def parse_record_header(data: memoryview, max_raw_bytes: int) -> RecordHeader | None:
    """The header at the start of `data`; None while it is not complete.

    Raises:
        ProtocolError: a field is out of its bounds.
    """
    if len(data) < RECORD_HEADER_BYTES:
        return None
    codec, reserved, count, raw, stored = _HEADER.unpack_from(data)
    if codec not in (STORED, ZSTD) or reserved or not 0 < count <= MAX_RUNS:
        raise ProtocolError(
            f"a data record has codec {codec}, reserved {reserved}, {count} runs: not of this protocol"
        )
    if not 0 < raw <= max_raw_bytes or not 0 < stored <= raw or (codec == STORED and stored != raw):
        raise ProtocolError(
            f"a data record claims {raw} bytes stored as {stored}; at most {max_raw_bytes} are allowed"
        )
    end = RECORD_HEADER_BYTES + count * RUN_BYTES
    if len(data) < end:
        return None
    return codec, raw, stored, list(_RUN.iter_unpack(data[RECORD_HEADER_BYTES:end])), end
