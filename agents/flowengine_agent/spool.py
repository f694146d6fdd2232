"""Rows of objects that are needed once more, in order, later: few in memory, the rest on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Final

import msgspec

from flowengine.store.filesystem import local_error
from flowengine.store.scan_cache import state_directory

__all__ = ["RowSpool"]

_IN_MEMORY_BYTES: Final = 4 << 20
_LENGTH_BYTES: Final = 4
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(list[tuple[bytes, int]]).decode


class RowSpool:
    """Keeps rows (path, size) as they come. Not for two threads at once; goes with its `close`.

    Raises:
        LocalError: the disk of the state folder refused.
    """

    def __init__(self) -> None:
        self._folder = state_directory()
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES, dir=self._folder)  # noqa: SIM115 - see `close`

    def add(self, rows: list[tuple[bytes, int]]) -> None:
        """Some more."""
        data = _encode(rows)
        try:
            self._file.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
        except OSError as error:
            raise local_error(error, "cannot keep what was opened in", self._folder.encode()) from error

    def parts(self) -> Iterator[list[tuple[bytes, int]]]:
        """All of them, as they were added; nothing is added from here on."""
        self._file.seek(0)
        while length := self._file.read(_LENGTH_BYTES):
            yield _decode(self._file.read(int.from_bytes(length, "big")))

    def close(self) -> None:
        """Let them go."""
        self._file.close()
