"""Libraries of plain C that the build made where it could, each beside the module that calls it by ctypes."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from typing import Any

__all__ = ["Scratch", "load_library"]


class Scratch:
    """Memory that a library writes results to, kept from call to call: making some costs as much as a short call."""

    __slots__ = ("_address", "_memory", "_size_bytes")

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None
        self._address = self._size_bytes = 0

    def room(self, size_bytes: int) -> int:
        """The address of so much memory, which holds anything; until the next call, and for one thread at a time."""
        if size_bytes > self._size_bytes:
            self._size_bytes = 1 << max(16, (size_bytes - 1).bit_length())
            self._memory = mmap.mmap(-1, self._size_bytes)
            self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        return self._address


def load_library(
    beside: str, name: str, interface: int, calls: Iterable[tuple[str, Any, list[Any]]]
) -> ctypes.CDLL | None:
    """A compiled library, if there is one that fits the module; like an extension module it is loaded by an import.

    Args:
        beside: the module's file.
        name: of the library: `_NAME.so`, whose function `flow_NAME_interface` gives its number.
        interface: the number that the module was written for; a library of another one is from before an update.
        calls: name, result type, argument types of each function.
    """
    try:
        library = ctypes.CDLL(os.path.join(os.path.dirname(beside), f"_{name}.so"))
        told = library[f"flow_{name}_interface"]
    except (OSError, AttributeError):
        return None
    told.restype = ctypes.c_int64
    if told() != interface:
        return None
    for call, result, arguments in calls:
        function = getattr(library, call)
        function.restype, function.argtypes = result, arguments
    return library
