"""`flow plan show`: what a transfer between sites would be."""

from __future__ import annotations

import click

from flowengine.cli.federation import complete_place, json_option, open_client, parse_deadline, plain
from flowengine.errors import Exit, UsageError

__all__ = ["show"]


@click.command()
@click.argument("source", metavar="SRC", shell_complete=complete_place)
@click.argument("targets", nargs=-1, required=True, metavar="DST…", shell_complete=complete_place)
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="LABEL",
    help="What the data is, for policies; may be repeated.",
)
@click.option("--purpose", default="", metavar="TEXT", help="What it is for, for policies.")
@click.option("--deadline", metavar="WHEN", help="When it must be there (2h, 2026-12-01T18:00).")
@click.option(
    "--size", default=None, metavar="SIZE", help="How much it is; without it no duration can be told."
)
@json_option
def show(
    source: str,
    targets: tuple[str, ...],
    labels: tuple[str, ...],
    purpose: str,
    deadline: str | None,
    size: str | None,
    as_json: bool,
) -> int:
    """Show what a transfer from SRC to each DST would be: policy's verdict, routes, an estimate. Nothing moves.

    Both are places at sites, SITE:/PATH. Exit code 5 where policy does not permit it.
    """
    from flowengine.cli.locations import all_at_sites
    from flowengine.cli.output import print_json
    from flowengine.units import parse_bytes

    if not all_at_sites([source, *targets]):
        raise UsageError(f"{source!r} is not at a site", hint="write SITE:/PATH; flow site ls lists sites")
    with open_client() as client:
        plan = client.plan(
            source,
            list(targets),
            labels=labels,
            purpose=purpose,
            deadline=parse_deadline(deadline),
            size_bytes=None if size is None else parse_bytes(size),
        )
    if as_json:
        print_json(plain(plan))
    else:
        print(plan.text)
        for route in plan.routes:
            print(f"  route   {' > '.join(route)}")
        for decision in plan.decisions:
            if decision.verdict != "none":
                duties = f", with {', '.join(decision.duties)}" if decision.duties else ""
                print(
                    f"  policy  {decision.use} at {decision.site}: {decision.verdict} by {decision.rule}{duties}"
                )
    return Exit.DONE if plan.permitted else Exit.DENIED
