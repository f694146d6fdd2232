"""`flow cp` and `flow sync`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Final

import click

from flowengine.cli.federation import complete_place
from flowengine.cli.locations import Local, Location, Remote, all_at_sites, parse_locations
from flowengine.cli.own_policy import Side, policy_options, read_own_policy
from flowengine.cli.third_party import order, order_options, refuse_order_options
from flowengine.errors import Exit, UsageError
from flowengine.units import format_bytes, format_count, format_duration, format_rate, show_path

__all__ = ["cp", "sync"]

_PROFILES: Final = ("64KiB", "256KiB", "1MiB")


class _OrderedCommand(click.Command):
    """Keeps the order in which --include and --exclude were given: the first pattern that matches decides."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rules: list[tuple[bool, bytes]] = []
        at = 0
        while at < len(args) and args[at] != "--":
            name, mark, value = args[at].partition("=")
            if name in ("--include", "--exclude"):
                if not mark and at + 1 < len(args):
                    at += 1
                    value = args[at]
                rules.append((name == "--include", os.fsencode(value)))
            at += 1
        ctx.meta["flow.filters"] = rules
        return super().parse_args(ctx, args)


def _common(function: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--include", multiple=True, metavar="PATTERN", expose_value=False, help="Take what matches (rsync's patterns; the first match decides)."),
        click.option("--exclude", multiple=True, metavar="PATTERN", expose_value=False, help="Leave out what matches."),
        click.option("--files-from", type=click.Path(), metavar="FILE", help="Take only the relative paths listed in FILE (- for stdin), one a line; NUL-separated when it holds a NUL."),
        click.option("--dry-run", "-n", is_flag=True, help="Show what would move; change nothing."),
        click.option("--publish", type=click.Choice(["object", "atomic"]), default="object", show_default=True, help="Make objects visible one by one, or the whole tree at once."),
        click.option("--xattrs", is_flag=True, help="Keep extended attributes and ACLs."),
        click.option("--owner", is_flag=True, help="Keep owner and group (needs the right to)."),
        click.option("--links", type=click.Choice(["keep", "inside"]), default=None, help="Symbolic links: keep all as they are, or refuse those that lead out of the target. [local: keep, from a peer: inside]"),
        click.option("--chunk-size", "profile", type=click.Choice(_PROFILES), default="64KiB", show_default=True, help="Average chunk size."),
        click.option("--compress", type=str, default="auto", show_default=True, metavar="auto|none|1-19", help="zstd level for what is sent."),
        click.option("--streams", type=click.IntRange(0, 64), default=0, help="Data connections; 0 chooses."),
        click.option("--bwlimit", metavar="RATE", help="Send no more than RATE (200Mbit/s, 20MB/s), by time of day (08:00-18:00=200Mbit/s,else=off), or as a file says now (@FILE)."),
        click.option("--threads", type=click.IntRange(0, 256), default=0, help="Threads that read one large file; 0 chooses."),
        click.option("--no-cache", is_flag=True, help="Read everything anew; remember nothing."),
        click.option("--retry-for", type=float, default=60.0, show_default=True, metavar="SECONDS", help="Go on trying so long after a connection broke."),
        click.option("--ticket-file", type=click.Path(), metavar="FILE", help="Take the ticket from FILE (or $FLOW_TICKET_FILE, $FLOW_TICKET)."),
        click.option("--progress", type=click.Choice(["auto", "bar", "lines", "json", "none"]), default="auto", show_default=True),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@click.command(cls=_OrderedCommand)
@click.argument("sources", nargs=-1, metavar="SRC…", shell_complete=complete_place)
@click.argument("target", metavar="DST", shell_complete=complete_place)
@_common
@order_options
@policy_options
@click.pass_context
def cp(ctx: click.Context, /, sources: tuple[str, ...], target: str, **settings: Any) -> int:
    """Copy each SRC to DST, which is made where missing.

    SRC/ means what is in SRC, SRC the folder or file itself. What is already there is not sent again; after an
    interruption the same command continues.

    Between sites, `flow cp A:/path B:/path [C:/path …]` copies the first place to all others; bytes go straight from
    site to site, and the command may be stopped: the transfer goes on.
    """
    if not sources:  # click takes one place alone for the last of them
        raise click.UsageError(f"Missing argument 'DST': where shall {target} go?", ctx)
    if all_at_sites([*sources, target]):
        return order(ctx, "copy", sources[0], [*sources[1:], target], settings)
    return _transfer(ctx, list(sources), target, delete=False, **settings)


@click.command(cls=_OrderedCommand)
@click.argument("source", metavar="SRC", shell_complete=complete_place)
@click.argument("target", metavar="DST", shell_complete=complete_place)
@click.option("--delete", is_flag=True, help="Remove at the target what the source does not have.")
@_common
@order_options
@policy_options
@click.pass_context
def sync(ctx: click.Context, /, source: str, target: str, delete: bool, **settings: Any) -> int:
    """Make DST hold what SRC holds, moving only what changed.

    SRC/ means what is in SRC, SRC the folder itself, as in `flow cp`. Without --delete nothing is removed.
    """
    if all_at_sites([source, target]):
        return order(ctx, "sync", source, [target], settings, delete=delete)
    return _transfer(ctx, [source], target, delete=delete, **settings)


def _transfer(ctx: click.Context, sources: list[str], target: str, *, delete: bool, **given: Any) -> int:
    from flowengine.transfer import early

    refuse_order_options(ctx, ("labels", "purpose") if given["policy"] else ())
    *froms, to = parse_locations([*sources, target], given["ticket_file"])
    _ask_policy(froms, to, given)
    remotes = [place for place in [*froms, to] if isinstance(place, Remote)]
    for place in remotes[:1]:  # while all that moves it is loaded
        early.begin(place.ticket.host, place.ticket.port)
    from flowengine.cli.output import Progress, print_failures

    settings = _settings(ctx, given, delete=delete, remote=bool(remotes))
    with Progress(given["progress"], "checking" if given["dry_run"] else "moving") as progress:
        report = _run(froms, to, settings, progress)
    if not given["as_json"] or report.failures:
        print_failures(report.failures)
    _print_report(report, given, delete=delete)
    return Exit.DONE if report.state == "completed" else Exit.SOME_OBJECTS_FAILED


def _ask_policy(froms: list[Location], to: Location, given: dict[str, Any]) -> None:
    """Refuse what the policies of --policy do not permit, before anything is looked at."""
    policy = read_own_policy(
        given["policy"], given["labels"], given["contracts"], given["purpose"], given["site_facts"]
    )
    if policy is None:
        return
    for place in froms:
        path = os.fsdecode(os.path.abspath(place.path) if isinstance(place, Local) else b"/" + place.path)
        source: Side = "here" if isinstance(place, Local) else "there"
        both = isinstance(place, Local) and isinstance(to, Local)
        target: Side = "there" if source == "here" else "here"
        policy.check(source, target, path, mine=("here", "there") if both else ("here",))


def _stated(given: dict[str, Any]) -> dict[str, Any]:
    """What is stated of the data to a server that has policies, where it is known here."""
    if not given["policy"]:
        return {}
    return {
        "labels": list(given["labels"]), "contracts": list(given["contracts"]), "purpose": given["purpose"],
    }  # fmt: skip


def _settings(ctx: click.Context, given: dict[str, Any], *, delete: bool, remote: bool) -> Any:
    from flowengine.transfer.bwlimit import LimitSetting
    from flowengine.transfer.passes import TransferSettings
    from flowengine.wire.filters import FilterSet
    from flowengine.wire.messages import Options

    compress = given["compress"]
    if compress == "auto":
        level = None
    elif compress == "none":
        level = 0
    elif compress.isdigit() and 1 <= int(compress) <= 19:
        level = int(compress)
    else:
        raise UsageError(f"--compress {compress!r} is none of auto, none, 1 to 19")
    rules = ctx.meta["flow.filters"]
    FilterSet(rules)  # refuses bad patterns before anything is touched
    options = Options(
        delete=delete,
        dry_run=given["dry_run"],
        publish=given["publish"],
        xattrs=given["xattrs"],
        owner=given["owner"],
        links=given["links"] or ("inside" if remote else "keep"),
        filters=rules,
        reread=given["no_cache"],
        files_from=_files_from(given["files_from"]),
        **_stated(given),
    )
    return TransferSettings(
        profile=given["profile"],
        options=options,
        streams=given["streams"],
        threads=given["threads"],
        compression=level,
        use_cache=not given["no_cache"],
        retry_for_s=given["retry_for"],
        limit=LimitSetting(given["bwlimit"]) if given["bwlimit"] else None,
    )


def _files_from(path: str | None) -> list[bytes] | None:
    if path is None:
        return None
    try:
        if path == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                data = file.read()
    except OSError as error:
        raise UsageError(f"--files-from {path}: {error.strerror}") from None
    lines = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [line for line in lines if line and not line.startswith(b"#")]


def _run(froms: list[Location], to: Location, settings: Any, progress: Any) -> Any:
    from flowengine.store.selection import select

    locals_ = [place for place in froms if isinstance(place, Local)]
    if len(locals_) == len(froms):
        selection = select([place.path for place in locals_], settings.options.files_from)
        if isinstance(to, Local):
            return _copy_local(selection, to.path, settings, progress)
        return _push(selection, to, settings, progress)
    if isinstance(to, Remote):
        raise UsageError(
            "both source and target are on other hosts",
            hint="run the command on one of the two, with a local path and the other one's ticket",
        )
    if len(froms) > 1:
        raise UsageError("only one source can be pulled at a time", hint="run one command for each")
    source = froms[0]
    assert isinstance(source, Remote)
    return _pull(source, to.path, settings, progress)


def _copy_local(selection: Any, target: bytes, settings: Any, progress: Any) -> Any:
    from flowengine.transfer.local import copy_local

    if selection.single_file and not target.endswith(b"/") and not os.path.isdir(target):
        selection = selection.renamed(os.path.basename(target))
        target = os.path.dirname(target) or b"."
    target = os.path.abspath(target)
    for root in selection.roots:
        source = os.path.realpath(root.path)
        inside = os.path.join(os.path.realpath(target), root.name) if root.name else os.path.realpath(target)
        if os.path.isdir(source) and (inside + b"/").startswith(source + b"/"):
            raise UsageError(
                f"the target {show_path(inside)} lies in the source {show_path(source)}",
                hint="choose a target outside the source",
            )
    return copy_local(selection, target, settings, observe=progress.update, note=progress.note)


def _push(selection: Any, to: Remote, settings: Any, progress: Any) -> Any:
    import stat

    import trio

    from flowengine.transfer.run import push, stat_remote

    async def main() -> Any:
        chosen, path = selection, to.path
        if chosen.single_file and path and not path.endswith(b"/"):
            found = await stat_remote(to.ticket, path)
            if found is None or not stat.S_ISDIR(found[1]):
                parent, _, name = path.rpartition(b"/")
                chosen, path = chosen.renamed(name), parent
        return await push(
            chosen, to.ticket, path.rstrip(b"/"), settings, observe=progress.update, note=progress.note
        )

    return trio.run(main)


def _pull(source: Remote, target: bytes, settings: Any, progress: Any) -> Any:
    import stat

    import msgspec
    import trio

    from flowengine.transfer.run import pull, stat_remote

    renames = (
        source.path
        and not source.path.endswith(b"/")
        and not target.endswith(b"/")
        and not os.path.isdir(target)
    )
    absolute = os.path.abspath(target)

    async def main() -> Any:
        used, where = settings, absolute
        if renames:
            found = await stat_remote(source.ticket, source.path)
            if found is not None and not stat.S_ISDIR(found[1]):
                options = msgspec.structs.replace(settings.options, rename=os.path.basename(where))
                used = msgspec.structs.replace(settings, options=options)
                where = os.path.dirname(where)
        return await pull(
            source.ticket, source.path, where, used, observe=progress.update, note=progress.note
        )

    return trio.run(main)


def _print_report(report: Any, given: dict[str, Any], *, delete: bool) -> None:
    from flowengine.cli.output import print_json

    counters = report.counters
    if given["as_json"]:
        print_json(
            {
                "state": report.state,
                "objects": counters.objects,
                "bytes": counters.size_bytes,
                "bytes_sent": report.bytes_sent,
                "bytes_reused": counters.bytes_reused,
                "bytes_unchanged": counters.bytes_unchanged,
                "objects_landed": counters.objects_done - counters.objects_unchanged,
                "objects_unchanged": counters.objects_unchanged,
                "objects_failed": len(report.failures),
                "objects_deleted": counters.objects_deleted,
                "objects_read_at_target": counters.objects_read,
                "bytes_to_send": counters.bytes_payload if given["dry_run"] else None,
                "seconds": round(report.seconds, 3),
                "version": report.version_id.hex(),
                "passes": report.passes,
                "dry_run": given["dry_run"],
                "bottleneck": report.bottleneck,
                "streams": report.streams,
                "link_changes": report.link_changes,
                "failures": [
                    {"path": show_path(path), "reason": reason, "message": message}
                    for path, reason, message in report.failures
                ],
                "extra": [show_path(path) for path in report.extras],
            }
        )
        return
    if given["dry_run"]:
        for path in report.extras:
            print(f"would delete {show_path(path)}")
        if given["progress"] == "none":
            return
        print(
            f"would send about {format_bytes(counters.bytes_payload)} of {format_bytes(counters.size_bytes)} in "
            f"{format_count(counters.objects, 'object')}; {counters.objects_unchanged} unchanged",
            file=sys.stderr,
        )
        return
    if given["progress"] == "none":
        return
    moved = counters.objects_done - counters.objects_unchanged
    rate = counters.size_bytes / report.seconds if report.seconds else 0.0
    print(
        f"{'done' if report.state == 'completed' else 'NOT COMPLETE'}: {format_count(moved, 'object')} landed, "
        f"{counters.objects_unchanged} unchanged"
        + (f", {counters.objects_deleted} deleted" if delete else "")
        + (f", {len(report.failures)} FAILED" if report.failures else "")
        + f"; {format_bytes(counters.size_bytes)} in {format_duration(report.seconds)} ({format_rate(rate)}), "
        f"{format_bytes(report.bytes_sent)} sent\n  {report.bottleneck}",
        file=sys.stderr,
    )
