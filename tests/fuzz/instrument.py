"""Coverage for modules that are loaded already; for the fuzz targets, which are run as scripts beside this file."""

from __future__ import annotations

import sys

__all__ = ["instrument_package"]


def instrument_package(atheris: object, prefix: str) -> None:
    """Have atheris see the plain functions and methods of all loaded modules whose names begin so."""
    for module in [name for name in sys.modules if name.startswith(prefix)]:
        for value in list(vars(sys.modules[module]).values()):
            members = vars(value).values() if isinstance(value, type) else [value]
            for member in members:
                own = getattr(member, "__module__", None) == module
                if callable(member) and own and hasattr(member, "__code__"):
                    atheris.instrument_func(member)  # type: ignore[attr-defined]
