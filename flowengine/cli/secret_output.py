"""`--output FILE` of the commands that make a secret: a new file that its owner alone can read, instead of stdout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from flowengine.errors import NotFound, UsageError

__all__ = ["check_new", "give_out", "output_option"]


def output_option(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option, for what is written; its value is None or a path."""
    return click.option(
        "-o",
        "--output",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help=f"Write the {what} to a new file that its owner alone can read (0600), instead of printing it.",
    )


def check_new(output: Path | None) -> None:
    """Refuse a file that is there, or cannot be made where it is wanted: before a secret is made that nobody would get."""
    if output is None:
        return
    if output.is_symlink() or output.exists():
        raise UsageError(
            f"{output} is there already; a secret is not written over it",
            hint="remove it, or name another file",
        )
    if not output.absolute().parent.is_dir():
        raise NotFound(f"there is no folder {output.absolute().parent}", hint="make it, or name another file")


def give_out(secret: str, output: Path | None) -> None:
    """Print it, or write it where it was wanted."""
    if output is None:
        print(secret)
        return
    from flowengine.store.secret_files import write_secret

    write_secret(str(output), f"{secret}\n".encode(), replace=False)
