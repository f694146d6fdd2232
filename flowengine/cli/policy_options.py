"""Options that several `flow policy` commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

__all__ = ["at_option", "directory_option", "json_option", "print_json"]

Command = Callable[..., Any]


def directory_option(command: Command) -> Command:
    """Where the policies are."""
    return click.option(
        "-p",
        "--policies",
        "directory",
        type=click.Path(path_type=Path),
        default=Path("policies"),
        show_default=True,
        help="Directory of policy files, or a bundle.",
    )(command)


def json_option(command: Command) -> Command:
    """Data instead of text."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def at_option(command: Command) -> Command:
    """Another date."""
    return click.option("--at", metavar="DATE", help="As if it were this date (2027-01-01).")(command)


def print_json(value: object) -> None:
    """A value as JSON on stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))
