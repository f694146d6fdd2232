"""What `flow label` and `flow agreement` have alike: facts from words, files of signed statements, lists of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from flowengine.cli.federation import plain, print_table
from flowengine.errors import Exit, LocalError, NotFound, UsageError

if TYPE_CHECKING:
    from datetime import datetime

    from flowengine.api.sites import Site
    from flowengine.policy.model import Attribute
    from flowengine.trust.statements import Fact

__all__ = ["facts_of", "print_statements", "read_statement", "typed_fact", "until", "write_statement"]


def facts_of(texts: Iterable[str], read: Callable[[str], tuple[str, Fact]]) -> dict[str, Fact]:
    """Facts of `--fact` options, each said once.

    Raises:
        UsageError: one cannot be read, or is said twice.
    """
    found: dict[str, Fact] = {}
    for text in texts:
        name, value = read(text)
        if name in found:
            raise UsageError(
                f"--fact {text!r}: {name} is said twice", hint="put all of a set into one: FR,DE"
            )
        found[name] = value
    return found


def typed_fact(text: str, raw: str, attribute: Attribute) -> Fact:
    """The value in NAME=VALUE, typed as its attribute is.

    Raises:
        UsageError: it is no value of that type.
    """
    from flowengine.policy.conditions import LineError
    from flowengine.policy.reader import fact_value

    shown: object = raw
    if attribute.type == "set":
        shown = [word for word in raw.split(",") if word]
    elif attribute.type == "flag":
        shown = {"true": True, "false": False}.get(raw, raw)
    try:
        value = fact_value(attribute, shown)
    except LineError as error:
        raise UsageError(f"--fact {text!r}: {error.message}", hint=error.hint) from None
    return sorted(value) if isinstance(value, frozenset) else value


def write_statement(output: Path, document: bytes) -> None:
    """Keep a signed statement in a file."""
    try:
        output.write_bytes(document)
    except OSError as error:
        raise LocalError(f"cannot write {output}: {error.strerror}") from None


def read_statement(file: Path, what: str, made_by: str) -> bytes:
    """A signed statement of a file.

    Args:
        what: what people call it.
        made_by: the command that makes one.
    """
    if not file.is_file():
        raise NotFound(f"there is no {what} {file}", hint=f"{made_by} makes one")
    try:
        return file.read_bytes()
    except OSError as error:
        raise LocalError(f"cannot read {file}: {error.strerror}") from None


class _Listed(Protocol):
    serial: int


T = TypeVar("T", bound=_Listed)


def print_statements(
    name: str,
    found: Sequence[T],
    sites: Iterable[Site],
    columns: tuple[str, ...],
    row: Callable[[T], tuple[str, ...]],
    *,
    as_json: bool,
) -> int:
    """List statements, and which sites have not read them yet."""
    from flowengine.cli.output import print_json

    last = max((one.serial for one in found), default=0)
    behind = [
        one.name for one in sites if one.policy.takes and one.state != "revoked" and one.policy.labels < last
    ]
    if as_json:
        print_json({name: plain(found), "behind": behind})
        return Exit.DONE
    print_table(columns, [row(one) for one in found])
    if behind:
        print(f"not everything has arrived yet at: {', '.join(behind)}", file=sys.stderr)
    return Exit.DONE


def until(expires: datetime | None) -> str:
    """The day until when a statement counts, for a table."""
    return f"{expires:%Y-%m-%d}" if expires else "-"
