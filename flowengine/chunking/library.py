"""The compiled library of this package, if the build made it: `_cut.c`, `_hash.c` and `_read.c`, called by ctypes.

Each call lets the interpreter go once, for as long as it works. What calls it does the same in Python where it is missing.
"""

from __future__ import annotations

import ctypes
from typing import Final

from flowengine.compiled import load_library

__all__ = ["CUT_WAYS", "HASH_WAYS", "LIBRARY", "Data", "Rule", "State", "place_of"]

Data = bytes | bytearray | memoryview

_INTERFACE: Final = 3
_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Rule(ctypes.Structure):
    """How bytes are cut and named: sizes, and for each the way to do it."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("minimum", "average", "maximum", "cut_way", "hash_way")
    )


class State(ctypes.Structure):
    """How far a buffer is filled, how far it is cut, and from where the next cut is looked for."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("filled", "cut", "looked"))


class _Buffer(ctypes.Structure):
    """Python's own description of a buffer, of which only address and size are looked at."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("owner", ctypes.c_void_p),
        ("size", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


LIBRARY: Final = load_library(
    __file__,
    "chunks",
    _INTERFACE,
    [
        ("flow_cut_ways", _NUMBER, []),
        ("flow_cut", _NUMBER, [_POINTER, *[_NUMBER] * 5, _POINTER, _NUMBER]),
        ("flow_hash_ways", _NUMBER, []),
        ("flow_hash", _NUMBER, [_NUMBER, _POINTER, _POINTER, _NUMBER, _POINTER]),
        (
            "flow_hash_under",
            _NUMBER,
            [_NUMBER, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_char_p, _POINTER, _NUMBER, _POINTER],
        ),
        ("flow_check", _NUMBER, [_NUMBER, _POINTER, _NUMBER, _POINTER, _NUMBER]),
        ("flow_pack", _NUMBER, [_POINTER, _POINTER, _NUMBER, _NUMBER, _POINTER, _NUMBER]),
        ("flow_pack_many", _NUMBER, [*[_POINTER] * 3, _NUMBER, _NUMBER, _POINTER, _POINTER, _NUMBER]),
        (
            "flow_read_chunks",
            _NUMBER,
            [_NUMBER, _NUMBER, _POINTER, _POINTER, _POINTER, _NUMBER, _NUMBER, _POINTER, _NUMBER],
        ),
    ],
)
CUT_WAYS: Final = 0 if LIBRARY is None else int(LIBRARY.flow_cut_ways())
HASH_WAYS: Final = 0 if LIBRARY is None else int(LIBRARY.flow_hash_ways())
"""How many ways this processor has to do the same, the last being the quickest; none without the library."""

_python = ctypes.PyDLL(None)
_get_buffer, _release_buffer = _python.PyObject_GetBuffer, _python.PyBuffer_Release
_get_buffer.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int]
_release_buffer.argtypes, _release_buffer.restype = [ctypes.c_void_p], None


class place_of:  # noqa: N801  (used like a function; a generator's context costs as much as a short call)
    """Address and size of contiguous bytes, which stay where they are meanwhile."""

    __slots__ = ("_at", "_data", "_described")

    def __init__(self, data: Data) -> None:
        self._data = data

    def __enter__(self) -> tuple[int, int]:
        self._described = described = _Buffer()
        self._at = ctypes.addressof(described)
        _get_buffer(self._data, self._at, 0)
        return described.address or 0, described.size

    def __exit__(self, *_: object) -> None:
        _release_buffer(self._at)
