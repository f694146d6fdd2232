"""Transfers between sites: `flow cp A:/x B:/y`, and how a command follows one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

import click
import msgspec

from flowengine.cli.federation import note, open_client, parse_deadline, plain
from flowengine.errors import Exit, FlowError, UsageError, exit_code
from flowengine.units import format_bytes, format_count, format_duration, format_rate

if TYPE_CHECKING:
    from flowengine.api.transfers import Transfer as TransferRecord
    from flowengine.client import Transfer

__all__ = ["follow", "order", "order_options", "refuse_order_options"]

_ORDER: Final = (
    "wait",
    "priority",
    "deadline",
    "best_effort",
    "cost_limit",
    "size",
    "plan",
    "labels",
    "purpose",
)
_LOCAL_ONLY: Final = ("files_from", "compress", "threads", "retry_for", "ticket_file", "policy", "site_facts")
_FOLLOW_S: Final = 0.5


def order_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options that only transfers between sites have."""
    options = [
        click.option("--wait/--no-wait", default=True, help="Between sites: stay until it has ended, or only ask for it and print its id. [default: --wait]"),
        click.option("--priority", type=click.Choice(["low", "normal", "high", "urgent"]), default="normal", show_default=True, help="Between sites: who goes first."),
        click.option("--deadline", metavar="WHEN", help="Between sites: when it must be there (2h, 2026-12-01T18:00)."),
        click.option("--best-effort", is_flag=True, help="Between sites: with --deadline, go on without a promise when it cannot be kept."),
        click.option("--cost-limit", type=click.FloatRange(min=0), metavar="USD", help="Between sites: most that moving it may cost."),
        click.option("--size", metavar="SIZE", help="Between sites: how much it is, where you know; spares the count that a deadline needs."),
        click.option("--plan", "plan", metavar="ID", help="Between sites: go exactly the ways of this plan (flow plan show)."),
        click.option("--label", "labels", multiple=True, metavar="LABEL", help="What the data is, for policies; may be repeated."),
        click.option("--purpose", default="", metavar="TEXT", help="What it is for, for policies."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _given(ctx: click.Context, names: Sequence[str]) -> list[str]:
    """Those of the options that stand on the command line, as they are written."""
    source = click.core.ParameterSource.COMMANDLINE
    return [
        max(param.opts, key=len)
        for param in ctx.command.params
        if param.name in names and ctx.get_parameter_source(param.name or "") is source
    ]


def refuse_order_options(ctx: click.Context, allowed: Sequence[str] = ()) -> None:
    """Between local paths and tickets, options of orders make no sense, but for those that policy here is asked with."""
    if given := _given(ctx, [name for name in _ORDER if name not in allowed]):
        raise UsageError(
            f"{given[0]} is for transfers between sites",
            hint="name places as SITE:/PATH, or leave the option out",
        )


def order(
    ctx: click.Context,
    mode: Literal["copy", "sync", "verify"],
    source: str,
    targets: Sequence[str],
    given: dict[str, Any],
    *,
    delete: bool = False,
) -> int:
    """Ask the coordinator for a transfer; follow it unless told not to."""
    from flowengine.api.transfers import TransferOptions
    from flowengine.cli.output import print_json
    from flowengine.client.requests import transfer_request
    from flowengine.units import parse_bytes

    if local := _given(ctx, _LOCAL_ONLY):
        raise UsageError(f"{local[0]} is not for transfers between sites", hint="leave it out")
    filters = [
        (include, pattern.decode("utf-8", "surrogateescape"))
        for include, pattern in ctx.meta.get("flow.filters", [])
    ]
    options = TransferOptions(
        delete=delete,
        dry_run=given.get("dry_run", False),
        publish=given.get("publish", "object"),
        xattrs=given.get("xattrs", False),
        owner=given.get("owner", False),
        links=given.get("links") or "keep",
        filters=filters,
        profile=given["profile"] if _given(ctx, ["profile"]) else None,
        streams=given.get("streams", 0),
        reread=given.get("no_cache", False),
    )
    request = transfer_request(
        source,
        list(targets),
        mode=mode,
        now=datetime.now(UTC),
        labels=given["labels"],
        contracts=given.get("contracts", ()),
        purpose=given["purpose"],
        priority=given["priority"],
        deadline=parse_deadline(given["deadline"]),
        best_effort=given.get("best_effort", False),
        cost_limit_usd=given.get("cost_limit"),
        size_bytes=parse_bytes(given["size"]) if given.get("size") else None,
        plan=given.get("plan") or "",
        options=options,
    )
    with open_client() as client:
        transfer = client.submit(request)
        if not given["wait"]:
            if given["as_json"]:
                print_json(plain(transfer.record))
            else:
                print(transfer.id)
            return Exit.DONE
        return follow(transfer, given["progress"], as_json=given["as_json"])


def follow(transfer: Transfer, mode: str, *, as_json: bool) -> int:
    """Show a transfer until it has ended. Ctrl-C leaves it running and says how to go on."""
    from flowengine.cli.output import Progress, print_json
    from flowengine.client.transfers import failure_of

    verb = {"copy": "moving", "sync": "syncing", "verify": "verifying"}[transfer.record.request.mode]
    waits = ""
    try:
        with Progress(mode, verb) as progress:
            progress.note(f"transfer {transfer.id}: {describe(transfer.record)}")
            for record in transfer.updates(_FOLLOW_S):
                progress.update(_counters(record))
                waits = _tell_waits(record, waits, progress.note)
    except KeyboardInterrupt:
        note(f"no longer watching; transfer {transfer.id} goes on")
        note(f"  next: flow transfer watch {transfer.id}, or flow transfer cancel {transfer.id}")
        return Exit.INTERRUPTED
    record = transfer.record
    failure = failure_of(record)
    if as_json:
        print_json(plain(record))
    elif mode != "none":
        print(summary(record), file=sys.stderr)
    if failure is None:
        return Exit.DONE
    if not as_json:
        _tell_failures(record, failure)
    return exit_code(failure)


def describe(record: TransferRecord) -> str:
    """From where to where."""
    request = record.request
    targets = ", ".join(f"{target.site}:{target.path}" for target in request.targets)
    return f"{request.source.site}:{request.source.path} to {targets}"


class _Shown(msgspec.Struct):
    """The numbers of a record as progress shows them."""

    objects: int
    size_bytes: int
    scan_done: bool
    objects_done: int
    bytes_done: int
    bytes_sent: int
    bytes_reused: int
    bytes_read: int = 0


def _counters(record: TransferRecord) -> _Shown:
    told = record.counters
    return _Shown(
        told.objects,
        told.size_bytes,
        told.scan_done,
        told.objects_done,
        told.bytes_done,
        told.bytes_sent,
        told.bytes_reused,
    )


def _tell_waits(record: TransferRecord, before: str, tell: Callable[[str], None]) -> str:
    """Say what the transfer waits for when that changed."""
    waits = [f"{task.target.site}: {task.wait.text}" for task in record.tasks if task.wait is not None]
    text = "; ".join(dict.fromkeys(waits)) if record.state in ("requested", "suspended") else ""
    if record.state == "suspended" and not text:
        text = record.message
    if text and text != before:
        tell(f"waits: {text}")
    return text or before


def summary(record: TransferRecord) -> str:
    """One line on what a transfer did."""
    counters = record.counters
    done = record.state == "completed"
    seconds = ((record.ended or record.since) - record.created).total_seconds()
    rate = f" ({format_rate(counters.size_bytes / seconds)})" if seconds > 0 else ""
    took = f"{format_bytes(counters.size_bytes)} in {format_duration(seconds)}{rate}"
    failed = f", {counters.objects_failed} FAILED" if counters.objects_failed else ""
    if record.request.mode == "verify":
        verdict = "all as it should be" if done else "NOT all as it should be"
        return f"verified {format_count(counters.objects, 'object')}: {verdict}{failed}; {took}"
    moved = counters.objects_done - counters.objects_unchanged
    holders = sorted({one.site for one in record.decisions if one.use == "hold"})
    sealed = f"; sealed, for {', '.join(holders)} may hold and not read them" if holders else ""
    deleted = f", {counters.objects_deleted} deleted" if counters.objects_deleted else ""
    return (
        f"{'done' if done else record.state.upper()}: {format_count(moved, 'object')} landed, "
        f"{counters.objects_unchanged} unchanged{deleted}{failed}; {took}, "
        f"{format_bytes(counters.bytes_sent)} sent, {format_bytes(counters.bytes_reused)} reused{sealed}"
    )


def _tell_failures(record: TransferRecord, failure: FlowError) -> None:
    note(f"{failure.message} ({failure.reason})")
    for task in record.tasks:
        if task.message and task.state != "done":
            note(f"  {task.target.site}:{task.target.path}: {task.message}")
    if failure.hint:
        print(f"  next: {failure.hint}", file=sys.stderr)
