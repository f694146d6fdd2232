"""What the commands that talk to a coordinator share: the client, tables, times, site names for the shell."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import click

from flowengine.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from flowengine.api.sites import Site
    from flowengine.client import Client

__all__ = [
    "ago", "complete_place", "complete_site", "json_option", "note", "open_client", "parse_deadline", "plain",
    "print_table", "remember_sites", "show_time",
]  # fmt: skip

_NAMES_FILE: Final = "site-names.json"
_STALE_S: Final = 60.0


def note(line: str) -> None:
    """Tell a person something, on stderr."""
    print(f"flow: {line}", file=sys.stderr, flush=True)


@contextmanager
def open_client() -> Iterator[Client]:
    """A client of the coordinator that is logged in to, or that the environment names."""
    from flowengine.client import connect

    with connect(note=note) as client:
        yield client


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Data instead of text."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def plain(value: object) -> Any:
    """A resource, or a list of them, as JSON-able data."""
    import msgspec

    return msgspec.to_builtins(value)


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns; the last one may be as long as it likes."""
    table = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_time(when: datetime | None) -> str:
    """A time in this machine's zone, to the second."""
    return "-" if when is None else when.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def ago(when: datetime | None, now: datetime | None = None) -> str:
    """How long ago something was.

    >>> ago(datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, 0, 1, 5, tzinfo=UTC))
    '1min 5s ago'
    """
    from flowengine.units import format_duration

    if when is None:
        return "never"
    seconds = ((now or datetime.now(UTC)) - when).total_seconds()
    if abs(seconds) < 1:
        return "now"
    return f"{seconds:.0f}s ago" if seconds < 60 else f"{format_duration(seconds)} ago"


def parse_deadline(text: str | None) -> datetime | timedelta | None:
    """A deadline from "2h", "2026-12-01" or "2026-12-01T18:00" (local time unless it names a zone)."""
    if text is None:
        return None
    from flowengine.units import parse_duration_s

    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        try:
            return timedelta(seconds=parse_duration_s(text))
        except UsageError:
            raise UsageError(
                f"--deadline {text!r} is neither a time nor a duration",
                hint="write 2h, 2026-12-01 or 2026-12-01T18:00+01:00",
            ) from None
    return when.astimezone() if when.tzinfo is None else when


# --- site names for the shell: from a file, which is filled in the background, so that a TAB never waits ---


def _names_path() -> Path:
    from flowengine.client.access import config_dir

    return config_dir() / _NAMES_FILE


def remember_sites(sites: Iterable[Site]) -> None:
    """Keep the names and roots for completion; failing to is no reason to disturb."""
    import json

    rows = {site.name: [root.name for root in site.roots] for site in sites}
    try:
        path = _names_path()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = path.with_name(f"{_NAMES_FILE}.{os.getpid()}.part")
        part.write_text(json.dumps(rows), encoding="utf-8")
        part.replace(path)
    except OSError:
        pass


def _known_sites() -> dict[str, list[str]]:
    """What is remembered; a refresh is started when it is old, at most one a minute."""
    import json
    import subprocess
    import time

    try:
        path = _names_path()
        rows: dict[str, list[str]] = {}
        age = float("inf")
        if path.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))
            age = time.time() - path.stat().st_mtime
        if age > _STALE_S:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not rows:
                path.write_text("{}", encoding="utf-8")
            os.utime(path)  # before asking: when the coordinator is away, the next TAB does not ask again
            subprocess.Popen(
                [sys.executable, "-m", "flowengine.cli.federation"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        return rows
    except (OSError, ValueError):
        return {}


def complete_site(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of sites."""
    return [name for name in sorted(_known_sites()) if name.startswith(incomplete)]


def complete_place(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """`site:/root` for what begins like a site, and files."""
    from click.shell_completion import CompletionItem

    known = _known_sites()
    site, colon, _ = incomplete.partition(":")
    if colon and site in known:
        places = [f"{site}:{root}" for root in known[site] or ["/"]]
        return [CompletionItem(place) for place in places if place.startswith(incomplete)]
    items = [CompletionItem(f"{name}:/") for name in sorted(known) if name.startswith(incomplete)]
    return [*items, CompletionItem(incomplete, type="file")]


def _refresh() -> None:
    from flowengine.client import connect
    from flowengine.errors import FlowError

    try:
        with connect(retry_for_s=0) as client:
            remember_sites(client.sites())
    except FlowError:
        pass


if __name__ == "__main__":
    _refresh()
