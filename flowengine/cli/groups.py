"""A group of commands whose help tells of each command one whole sentence."""

from __future__ import annotations

from typing import Final

import click

__all__ = ["Group"]

_SENTENCE: Final = 300
"""Characters of a command's first sentence; click would cut it at the end of the line."""


class Group(click.Group):
    """Commands that share their first word."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        rows = [
            (name, command.get_short_help_str(_SENTENCE))
            for name in self.list_commands(ctx)
            if (command := self.get_command(ctx, name)) is not None and not command.hidden
        ]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
