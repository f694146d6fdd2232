"""`flow plan show`: what a transfer between sites would be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from flowengine.cli.federation import (
    complete_place,
    json_option,
    note,
    open_client,
    parse_deadline,
    plain,
    show_time,
)
from flowengine.errors import Exit, UsageError
from flowengine.units import format_bytes, format_count, format_rate

if TYPE_CHECKING:
    from flowengine.api.plans import Plan
    from flowengine.api.transfers import Priority
    from flowengine.client import Client

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
@click.option(
    "--contract",
    "contracts",
    multiple=True,
    metavar="ID",
    help="A contract that the data is under; may be repeated.",
)
@click.option("--purpose", default="", metavar="TEXT", help="What it is for, for policies.")
@click.option(
    "--priority",
    type=click.Choice(["low", "normal", "high", "urgent"]),
    default="normal",
    show_default=True,
    help="Who goes first.",
)
@click.option("--deadline", metavar="WHEN", help="When it must be there (2h, 2026-12-01T18:00).")
@click.option(
    "--cost-limit", type=click.FloatRange(min=0), metavar="USD", help="Most that moving it may cost."
)
@click.option(
    "--size", default=None, metavar="SIZE", help="How much it is; without it the source's agent counts."
)
@click.option(
    "--objects", type=click.IntRange(min=1), default=None, metavar="N", help="How many objects --size is in."
)
@click.option(
    "--exact",
    is_flag=True,
    help="Count only what the targets lack, by a dry run between the agents; it reads what they have not read yet.",
)
@json_option
def show(
    source: str,
    targets: tuple[str, ...],
    labels: tuple[str, ...],
    contracts: tuple[str, ...],
    purpose: str,
    priority: Priority,
    deadline: str | None,
    cost_limit: float | None,
    size: str | None,
    objects: int | None,
    exact: bool,
    as_json: bool,
) -> int:
    """Show what a transfer from SRC to each DST would be: policy's verdict, ways, time, money, and what binds.

    Nothing moves. `flow cp --plan ID` then goes exactly these ways. Both are places at sites, SITE:/PATH. Exit code 5
    where policy does not permit it, 1 where a deadline cannot be kept.
    """
    from flowengine.cli.locations import all_at_sites
    from flowengine.cli.output import print_json
    from flowengine.units import parse_bytes

    if not all_at_sites([source, *targets]):
        raise UsageError(f"{source!r} is not at a site", hint="write SITE:/PATH; flow site ls lists sites")
    if exact and size is not None:
        raise UsageError("--exact finds out how much it is, --size says so", hint="leave one of them out")
    size_bytes = None if size is None else parse_bytes(size)
    with open_client() as client:
        if exact:
            size_bytes, objects = _dry_run(client, source, targets, labels, contracts, purpose)
        plan = client.plan(
            source,
            list(targets),
            labels=labels,
            contracts=contracts,
            purpose=purpose,
            priority=priority,
            deadline=parse_deadline(deadline),
            cost_limit_usd=cost_limit,
            size_bytes=size_bytes,
            objects=objects,
        )
    if as_json:
        print_json(plain(plan))
    else:
        _print(plan, len(targets))
    if not plan.permitted:
        return Exit.DENIED
    return Exit.FAILED if plan.promise == "refused" else Exit.DONE


def _dry_run(
    client: Client,
    source: str,
    targets: tuple[str, ...],
    labels: tuple[str, ...],
    contracts: tuple[str, ...],
    purpose: str,
) -> tuple[int, int]:
    """Bytes and objects that a target lacks; of several targets the one that lacks most."""
    from flowengine.api.transfers import TransferOptions

    note("the agents compare what is there; nothing is written")
    transfer = client.copy(
        source,
        list(targets),
        labels=labels,
        contracts=contracts,
        purpose=purpose,
        options=TransferOptions(dry_run=True),
    )
    record = transfer.wait()
    lacks = [_lacking(task.counters) for task in record.tasks]
    return max(lacks, key=lambda lack: lack[0])


def _lacking(counters: Any) -> tuple[int, int]:
    size = counters.size_bytes - counters.bytes_unchanged - counters.bytes_reused
    return max(0, size), max(1, counters.objects - counters.objects_unchanged)


def _print(plan: Plan, targets: int) -> None:
    print(plan.text)
    if plan.id:
        print(f"  plan      {plan.id}, kept until {show_time(plan.expires)}")
    if plan.size_bytes is not None:
        each = ", to each target" if targets > 1 else ""
        print(
            f"  moves     {format_bytes(plan.size_bytes)} in {format_count(plan.objects or 1, 'object')}{each}"
        )
    for way in plan.ways:
        price = f", {way.usd_per_gb:g} USD/GB" if way.usd_per_gb else ""
        print(f"  way       {' > '.join(way.sites)}, {format_rate(way.rate_bits_per_s / 8)}{price}")
    if not plan.ways:
        for route in plan.routes:
            print(f"  way       {' > '.join(route)}")
    if plan.expected is not None:
        expected, earliest = show_time(plan.expected), show_time(plan.earliest)
        latest = show_time(plan.latest) if plan.latest else "nobody can say how late"
        span = f", between {earliest} and {latest}" if not earliest == expected == latest else ""
        print(f"  there     {expected}{span}")
    if plan.usd:
        print(f"  costs     {plan.usd:.2f} USD")
    for line in plan.binds:
        print(f"  binds     {line}")
    for decision in plan.decisions:
        if decision.verdict != "none":
            duties = f", with {', '.join(decision.duties)}" if decision.duties else ""
            print(
                f"  policy    {decision.use} at {decision.site}: {decision.verdict} by {decision.rule}{duties}"
            )
