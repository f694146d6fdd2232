"""`flow events`: what happens in the federation, as it happens."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from flowengine.cli.federation import complete_site, json_option, open_client, plain, show_time
from flowengine.errors import Exit

if TYPE_CHECKING:
    from flowengine.api.events import Event

__all__ = ["events"]


@click.command()
@click.option(
    "--after",
    type=click.IntRange(0),
    default=None,
    metavar="SEQ",
    help="Begin behind this event; 0 for all that are kept. [default: only new ones]",
)
@click.option("--transfer", default="", metavar="ID", help="Only this transfer's.")
@click.option("--site", default="", metavar="SITE", shell_complete=complete_site, help="Only this site's.")
@click.option(
    "--type", "types", multiple=True, metavar="TYPE", help="Only types that begin so; may be repeated."
)
@click.option("--count", type=click.IntRange(1), default=None, metavar="N", help="End after N events.")
@json_option
def events(
    after: int | None, transfer: str, site: str, types: tuple[str, ...], count: int | None, as_json: bool
) -> int:
    """Print events until Ctrl-C, one a line; comes back by itself when the coordinator was away."""
    shown = 0
    with (
        open_client() as client,
        client.events(after=after, transfer=transfer, site=site, types=types) as stream,
    ):
        for event in stream:
            print(json.dumps(plain(event)) if as_json else _line(event), flush=True)
            shown += 1
            if shown == count:
                break
    return Exit.DONE


def _line(event: Event) -> str:
    about = [word for word in (event.transfer, event.site, event.user) if word]
    data = " ".join(f"{key}={value}" for key, value in event.data.items() if value not in ("", None, [], {}))
    return f"{event.seq:>7} {show_time(event.at)} {event.type:<22} {' '.join([*about, data])}".rstrip()
