"""`flow transfer` and `flow why`: what was asked for, how it stands, and steering it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from flowengine.cli.federation import (
    ago,
    complete_site,
    json_option,
    note,
    open_client,
    plain,
    print_table,
    show_time,
)
from flowengine.cli.groups import Group
from flowengine.cli.third_party import describe, follow, summary
from flowengine.errors import Exit
from flowengine.units import format_bytes, format_rate

if TYPE_CHECKING:
    from flowengine.api.transfers import Counters, Task, Transfer, TransferState

__all__ = ["transfer", "why"]

_STATES = ("requested", "started", "suspended", "completed", "terminated", "quarantined", "purged")


@click.group(cls=Group)
def transfer() -> None:
    """Transfers between sites: list, watch, steer."""


@transfer.command("ls")
@click.option("--state", type=click.Choice(_STATES), default=None, help="Only those in this state.")
@click.option(
    "--site", default=None, metavar="SITE", shell_complete=complete_site, help="Only from or to this site."
)
@click.option("--user", default=None, metavar="USER", help="Only this user's.")
@click.option("--tenant", default=None, metavar="TENANT", help="Only this tenant's.")
@click.option(
    "--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="How many at most."
)
@json_option
def ls(
    state: TransferState | None,
    site: str | None,
    user: str | None,
    tenant: str | None,
    limit: int,
    as_json: bool,
) -> int:
    """List transfers, the newest first."""
    from itertools import islice

    from flowengine.cli.output import print_json

    with open_client() as client:
        found = list(islice(client.transfers(state=state, site=site, user=user, tenant=tenant), limit + 1))
    more, found = len(found) > limit, found[:limit]
    if as_json:
        print_json({"transfers": plain(found), "more": more})
        return Exit.DONE
    rows = [
        (
            record.id,
            record.state,
            _share(record.counters),
            record.user,
            ago(record.created),
            describe(record)
            + (
                f"  ({record.message})"
                if record.state in ("suspended", "terminated", "quarantined", "purged")
                else ""
            ),
        )
        for record in found
    ]
    print_table(("TRANSFER", "STATE", "DONE", "USER", "ASKED", "WHAT"), rows)
    if more:
        note("there are more; --limit shows them")
    return Exit.DONE


def _share(counters: Counters) -> str:
    if not counters.size_bytes:
        return f"{counters.objects_done} obj" if counters.objects_done else "-"
    return f"{100 * counters.bytes_done // counters.size_bytes} %{'' if counters.scan_done else '+'}"


@transfer.command("show")
@click.argument("transfer_id", metavar="ID")
@json_option
def show(transfer_id: str, as_json: bool) -> int:
    """Show a transfer: state and reason, each target's task, what policy said."""
    from flowengine.cli.output import print_json

    with open_client() as client:
        record = client.transfer(transfer_id).record
    if as_json:
        print_json(plain(record))
        return Exit.DONE
    request = record.request
    print(f"{record.id}: {record.state} since {show_time(record.since)}")
    if record.message:
        print(f"  because   {record.message}" + (f" ({record.reason})" if record.reason else ""))
    print(f"  {request.mode:<8}  {describe(record)}")
    print(
        f"  asked     {show_time(record.created)} by {record.user}, tenant {record.tenant}, {request.priority} priority"
    )
    if request.labels or request.purpose:
        print(
            f"  data      {', '.join(request.labels) or 'no label'}"
            + (f", for {request.purpose}" * bool(request.purpose))
        )
    if request.deadline is not None:
        print(
            f"  deadline  {show_time(request.deadline)}{', promised' if record.promised else ', not promised'}"
        )
    if record.eta is not None and record.ended is None:
        span = ""
        if record.eta_earliest is not None:
            latest = show_time(record.eta_latest) if record.eta_latest else "nobody can say how late"
            span = f" (between {show_time(record.eta_earliest)} and {latest})"
        print(f"  expected  {show_time(record.eta)}{span}")
    print(f"  so far    {summary(record)}")
    for task in record.tasks:
        _show_task(task)
    for decision in record.decisions:
        if decision.verdict != "none":
            duties = f"; duties: {', '.join(decision.duties)}" if decision.duties else ""
            print(
                f"  policy    {decision.use} at {decision.site}: {decision.verdict}, {decision.rule or decision.text}{duties}"
            )
    return Exit.DONE


@transfer.command("receipt")
@click.argument("transfer_id", metavar="ID")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    help="The file to write; FILE.SITE for each target where there are several.",
)
@json_option
def receipt(transfer_id: str, output: str, as_json: bool) -> int:
    """Fetch what the targets signed for: proofs of delivery that `flow evidence verify` checks offline."""
    import base64

    from flowengine.cli.output import print_json
    from flowengine.errors import NotFound

    with open_client() as client:
        found = client.transfer(transfer_id).receipts()
    if not found:
        raise NotFound(
            f"no target of {transfer_id} has signed for it yet",
            hint="a target signs when everything has landed; flow transfer show tells how it stands",
        )
    files = {}
    for one in found:
        files[one.site] = output if len(found) == 1 else f"{output}.{one.site}"
        with open(files[one.site], "wb") as file:
            file.write(base64.b64decode(one.receipt))
    if as_json:
        print_json({"transfer": transfer_id, "receipts": files})
    else:
        for site, name in files.items():
            print(f"{name}: of {site}")
    return Exit.DONE


def _show_task(task: Task) -> None:
    counters = task.counters
    facts = [f"{counters.objects_done} of {counters.objects} objects", f"{format_bytes(counters.bytes_done)}"]
    if task.state == "running":
        facts.append(format_rate(task.rate_bits_per_s / 8))
        if task.bottleneck:
            facts.append(task.bottleneck)
    if task.attempts > 1:
        facts.append(f"attempt {task.attempts}")
    print(f"  task      {task.target.site}:{task.target.path}  {task.state}  {', '.join(facts)}")
    if task.fed_by:
        print(f"  from      {task.source.site}:{task.source.path}, once it is complete there")
    for way in task.ways:
        print(f"  way       {' > '.join(way.sites)}, planned at {format_rate(way.rate_bits_per_s / 8)}")
    if task.binds:
        print(f"  binds     {task.binds}")
    if task.wait is not None:
        print(
            f"            waits {ago(task.wait.since).removesuffix(' ago')}: {task.wait.text}; ends when {task.wait.ends_when}"
        )
    if task.message and task.state != "done":
        print(f"            {task.message} ({task.reason})" + (f"; next: {task.hint}" if task.hint else ""))
    if task.disposal is not None and task.disposal.state != "none":
        found = task.disposal
        print(
            f"            {found.state} ({found.cause}): {found.objects} objects, {format_bytes(found.size_bytes)} that had "
            f"landed, {found.missing} missing"
            + (f"; named {found.name}" if found.state == "quarantined" else "; certificate with --json")
        )
    if task.version_id:
        print(f"            version {task.version_id}")


@transfer.command("watch")
@click.argument("transfer_id", metavar="ID")
@click.option(
    "--progress",
    type=click.Choice(["auto", "bar", "lines", "json", "none"]),
    default="auto",
    show_default=True,
)
@json_option
def watch(transfer_id: str, progress: str, as_json: bool) -> int:
    """Follow a transfer to its end, whoever started it. Exit codes as for `flow cp`."""
    with open_client() as client:
        return follow(client.transfer(transfer_id), progress, as_json=as_json)


@transfer.command("pause")
@click.argument("transfer_id", metavar="ID")
def pause(transfer_id: str) -> int:
    """Stop moving until `flow transfer resume`; nothing that was done is lost."""
    with open_client() as client:
        return _told(client.transfer(transfer_id).pause())


@transfer.command("resume")
@click.argument("transfer_id", metavar="ID")
def resume(transfer_id: str) -> int:
    """Go on after `flow transfer pause`."""
    with open_client() as client:
        return _told(client.transfer(transfer_id).resume())


@transfer.command("cancel")
@click.argument("transfer_id", metavar="ID")
def cancel(transfer_id: str) -> int:
    """End a transfer. What has landed stays."""
    with open_client() as client:
        return _told(client.transfer(transfer_id).cancel())


@transfer.command("retry")
@click.argument("transfer_id", metavar="ID")
def retry(transfer_id: str) -> int:
    """Try again what ended incomplete: only what is missing moves."""
    with open_client() as client:
        return _told(client.transfer(transfer_id).retry())


def _told(record: Transfer) -> int:
    note(f"transfer {record.id} is {record.state}" + (f": {record.message}" if record.message else ""))
    return Exit.DONE


@click.command()
@click.argument("transfer_id", metavar="ID")
@json_option
def why(transfer_id: str, as_json: bool) -> int:
    """Say in one line what a transfer waits for, since when and what ends it; or what makes it no faster."""
    from flowengine.cli.output import print_json

    with open_client() as client:
        answer = client.transfer(transfer_id).why()
    if as_json:
        print_json(plain(answer))
    else:
        print(answer.line)
        for target, lines in sorted(answer.plan.items()):
            for line in lines:
                print(f"  to {target}: {line}" if len(answer.plan) > 1 else f"  {line}")
    return Exit.DONE
