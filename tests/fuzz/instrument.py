"""Runs one fuzz target with coverage of modules that are loaded already; for the files beside this one, run as scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

__all__ = ["fuzz"]


def fuzz(arguments: list[str], targets: Mapping[str, Callable[[bytes], None]], package: str) -> None:
    """Run one target under atheris until it stops by itself; `--list` names them.

    Args:
        arguments: of the command: its name, the target, and options of libFuzzer.
        package: prefix of the modules that are covered.
    """
    if arguments[1:] == ["--list"]:
        sys.stdout.write("".join(f"{name}\n" for name in targets))
        return
    if len(arguments) < 2 or arguments[1] not in targets:
        raise SystemExit(f"usage: {arguments[0]} {{{','.join(targets)}}} [libFuzzer options]")
    import atheris

    _instrument(atheris, package)
    atheris.Setup([arguments[0], *arguments[2:]], targets[arguments[1]])
    atheris.Fuzz()


def _instrument(atheris: object, prefix: str) -> None:
    """Have atheris see the plain functions and methods of all loaded modules whose names begin so."""
    for module in [name for name in sys.modules if name.startswith(prefix)]:
        for value in list(vars(sys.modules[module]).values()):
            members = vars(value).values() if isinstance(value, type) else [value]
            for member in members:
                own = getattr(member, "__module__", None) == module
                if callable(member) and own and hasattr(member, "__code__"):
                    atheris.instrument_func(member)  # type: ignore[attr-defined]
