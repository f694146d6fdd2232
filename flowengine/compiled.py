"""Libraries of plain C that the build made where it could, each beside the module that calls it by ctypes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from typing import Any

__all__ = ["load_library"]


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
