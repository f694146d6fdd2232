"""`flow maintain`: times in which a site or a link is not to be used."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import click

from flowengine.cli.federation import (
    json_option,
    note,
    open_client,
    parse_deadline,
    plain,
    print_table,
    show_time,
)
from flowengine.cli.groups import Group
from flowengine.errors import Exit, UsageError

__all__ = ["maintain"]


@click.group(cls=Group)
def maintain() -> None:
    """Maintenance: times in which a site or a link is not to be used.

    Before it starts no new way leads over it any more; in it none does; after it they come back.
    """


@maintain.command("ls")
@json_option
def ls(as_json: bool) -> int:
    """List all times."""
    from flowengine.cli.output import print_json

    with open_client() as client:
        found = client.maintenance()
    if as_json:
        print_json({"maintenance": plain(found)})
        return Exit.DONE
    rows = [
        (one.id, one.scope, show_time(one.starts), show_time(one.ends), one.created_by, one.comment or "-")
        for one in found
    ]
    print_table(("ID", "SCOPE", "STARTS", "ENDS", "BY", "WHY"), rows)
    return Exit.DONE


@maintain.command("add")
@click.argument("scope")
@click.option(
    "--from", "starts", metavar="WHEN", help="When it starts (2h, 2026-12-01T18:00); now when left out."
)
@click.option("--until", "ends", metavar="WHEN", required=True, help="When it ends.")
@click.option(
    "--drain",
    default="10min",
    show_default=True,
    metavar="TIME",
    help="So long before, no new way leads there.",
)
@click.option("--comment", default="", metavar="TEXT", help="Why.")
@json_option
def add(scope: str, starts: str | None, ends: str, drain: str, comment: str, as_json: bool) -> int:
    """Keep transfers off SCOPE, which is site:A or link:A>B, for a time."""
    from flowengine.api.links import MaintenanceRequest
    from flowengine.cli.output import print_json
    from flowengine.units import parse_duration_s

    if not scope.startswith(("site:", "link:")):
        raise UsageError(f"{scope!r} is no scope", hint="write site:A or 'link:A>B' (quoted)")
    now = datetime.now(UTC)

    def instant(text: str | None) -> datetime:
        when = parse_deadline(text)
        return now if when is None else now + when if isinstance(when, timedelta) else when

    request = MaintenanceRequest(
        scope=scope,
        starts=instant(starts),
        ends=instant(ends),
        drain_s=parse_duration_s(drain),
        comment=comment,
    )
    with open_client() as client:
        made = client.add_maintenance(request)
    if as_json:
        print_json(plain(made))
    else:
        note(f"{made.id}: {made.scope} is not used from {show_time(made.starts)} to {show_time(made.ends)}")
    return Exit.DONE


@maintain.command("rm")
@click.argument("maintenance_id", metavar="ID")
def rm(maintenance_id: str) -> int:
    """Let it be used again."""
    with open_client() as client:
        client.remove_maintenance(maintenance_id)
    note(f"{maintenance_id}: removed")
    return Exit.DONE
