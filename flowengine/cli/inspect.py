"""`flow ls`, `flow verify`, `flow manifest` and `flow diff`: they look and change nothing."""

from __future__ import annotations

import os
import stat
import sys
import time
from contextlib import ExitStack
from typing import Any

import click

from flowengine.cli.federation import complete_place
from flowengine.cli.locations import Local, Remote, all_at_sites, parse_location
from flowengine.cli.third_party import order, order_options, refuse_order_options
from flowengine.errors import Exit, NotFound
from flowengine.machine import usable_processors
from flowengine.units import format_count, show_path

__all__ = ["diff", "ls", "manifest", "verify"]

_TICKET = click.option(
    "--ticket-file",
    type=click.Path(),
    metavar="FILE",
    help="Take the ticket from FILE (or $FLOW_TICKET_FILE, $FLOW_TICKET).",
)
_PROGRESS = click.option(
    "--progress",
    type=click.Choice(["auto", "bar", "lines", "json", "none"]),
    default="auto",
    show_default=True,
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_PROFILE = click.option(
    "--chunk-size",
    "profile",
    type=click.Choice(["64KiB", "256KiB", "1MiB"]),
    default="64KiB",
    show_default=True,
)


@click.command()
@click.argument("location", shell_complete=complete_place)
@_TICKET
@_JSON
def ls(location: str, ticket_file: str | None, as_json: bool) -> int:
    """List a folder: mode, size, time, name.

    LOCATION is a local path, a ticket or a folder at a site, SITE:/PATH, as its agent sees it now.
    """
    if all_at_sites([location]):
        return _list_site(location, as_json)
    place = parse_location(location, ticket_file)
    if isinstance(place, Local):
        rows = _list_local(place.path)
    else:
        import trio

        from flowengine.transfer.run import list_remote

        rows = trio.run(list_remote, place.ticket, place.path.rstrip(b"/"))
    if as_json:
        from flowengine.cli.output import print_json

        print_json(
            {
                "entries": [
                    {
                        "name": show_path(name),
                        "mode": f"{mode & 0o7777:04o}",
                        "kind": _kind(mode),
                        "size": size,
                        "mtime_ns": mtime_ns,
                    }
                    for name, mode, size, mtime_ns in rows
                ]
            }
        )
        return Exit.DONE
    for name, mode, size, mtime_ns in rows:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(mtime_ns / 1e9))
        print(f"{stat.filemode(mode)} {size:>14} {when} {show_path(name)}{'/' if stat.S_ISDIR(mode) else ''}")
    return Exit.DONE


def _list_site(location: str, as_json: bool) -> int:
    from flowengine.cli.federation import note, open_client, plain
    from flowengine.cli.output import print_json

    with open_client() as client:
        listing = client.ls(location)
    if as_json:
        print_json(plain(listing))
        return Exit.DONE
    letters = {"directory": "d", "file": "-", "link": "l"}
    for entry in listing.entries:
        # What a site offers is listed without a time.
        when = entry.mtime.astimezone().strftime("%Y-%m-%d %H:%M") if entry.mtime.timestamp() else ""
        slash = "/" if entry.kind == "directory" else ""
        print(f"{letters.get(entry.kind, '?')} {entry.size_bytes:>14} {when:16} {entry.name}{slash}")
    if not listing.complete:
        note(f"{location} holds more than these {len(listing.entries)} entries")
    return Exit.DONE


def _kind(mode: int) -> str:
    return {stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFREG: "file"}.get(
        stat.S_IFMT(mode), "special"
    )


def _list_local(path: bytes) -> list[tuple[bytes, int, int, int]]:
    try:
        if not os.path.isdir(path):
            st = os.lstat(path)
            return [(path, st.st_mode, st.st_size, st.st_mtime_ns)]
        rows = []
        for name in sorted(os.listdir(path)):
            st = os.lstat(os.path.join(path, name))
            rows.append((name, st.st_mode, st.st_size, st.st_mtime_ns))
        return rows
    except FileNotFoundError:
        from flowengine.store.selection import spelling_of

        raise NotFound(f"{show_path(path)} does not exist", hint=spelling_of(path)) from None


def _reader(
    stack: ExitStack,
    text: str,
    ticket_file: str | None,
    profile: str,
    progress: Any,
    *,
    reread: bool,
    threads: int = 0,
    like: Any = None,
) -> tuple[Any, list[Any]]:
    """A manifest reader for a manifest file, a local path or a ticket; with what could not be read.

    Args:
        like: header of the manifest to compare with, whose attributes and owners are read too.
    """
    from flowengine.store.selection import select
    from flowengine.transfer.manifests import make_manifest, open_manifest, scratch_file
    from flowengine.transfer.session import Counters
    from flowengine.wire.messages import Options

    place = parse_location(text, ticket_file)
    if isinstance(place, Local) and os.path.isfile(place.path) and _is_manifest(place.path):
        return open_manifest(place.path), []
    file = stack.enter_context(scratch_file())
    options = Options(
        reread=reread, xattrs=like is not None and like.xattrs, owner=like is not None and like.owner
    )
    if isinstance(place, Remote):
        from flowengine.transfer.run import remote_manifest

        failures = remote_manifest(
            place.ticket,
            place.path,
            file.write,
            profile,
            options=options,
            observe=progress.update,
            note=progress.note,
        )
        return open_manifest(file), failures
    path = place.path.rstrip(b"/") + b"/" if os.path.isdir(place.path) else place.path
    counters = Counters()
    last = 0.0

    def tick() -> None:
        nonlocal last
        if time.monotonic() - last > 0.5:
            last = time.monotonic()
            progress.update(counters)

    from flowengine.store.scan_cache import ScanCache

    _, failures = make_manifest(
        select([path]),
        file.write,
        profile=profile,
        options=options,
        cache=None if reread else ScanCache(profile),
        threads=threads or max(1, usable_processors() // 2),
        counters=counters,
        tick=tick,
    )
    return open_manifest(file), failures


def _is_manifest(path: bytes) -> bool:
    from flowengine.manifest.records import MAGIC

    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


@click.command()
@click.argument("path")
@click.option(
    "--output", "-o", metavar="FILE", help="Where to write it; - for stdout. [default: NAME.flowmanifest]"
)
@click.option("--no-cache", is_flag=True, help="Read every byte anew.")
@click.option(
    "--threads", type=click.IntRange(0, 256), default=0, help="Threads that read one large file; 0 chooses."
)
@_PROFILE
@_TICKET
@_PROGRESS
@_JSON
def manifest(
    path: str,
    output: str | None,
    no_cache: bool,
    threads: int,
    profile: str,
    ticket_file: str | None,
    progress: str,
    as_json: bool,
) -> int:
    """Write the manifest of PATH (for a folder: of what is in it) and print its version id."""
    from flowengine.cli.output import Progress, print_failures, print_json
    from flowengine.transfer.manifests import copy_manifest

    with ExitStack() as stack:
        with Progress(progress, "reading") as shown:
            reader, failures = _reader(
                stack, path, ticket_file, profile, shown, reread=no_cache, threads=threads
            )
        name = os.path.basename(os.path.normpath(path.partition("#")[0])) or "root"
        where = output or f"{name}.flowmanifest"
        copy_manifest(reader, where)
        print_failures(failures)
        summary = reader.summary
        data = {
            "version": summary.version_id.hex(),
            "objects": summary.objects,
            "directories": summary.directories,
            "bytes": summary.size_bytes,
            "chunks": summary.chunks,
            "output": where,
            "objects_failed": len(failures),
        }
        if where != "-":
            if as_json:
                print_json(data)
            else:
                print(f"{summary.version_id.hex()}  {where}")
    return Exit.SOME_OBJECTS_FAILED if failures else Exit.DONE


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--no-cache", is_flag=True, help="Read every byte anew.")
@_PROFILE
@_TICKET
@_PROGRESS
@_JSON
def diff(
    a: str, b: str, no_cache: bool, profile: str, ticket_file: str | None, progress: str, as_json: bool
) -> int:
    """Show what differs from A to B, each a folder, a manifest file or a ticket.

    One line each: + added, - removed, M changed content, m changed mode or time. Exit code 1 when they differ.
    """
    from flowengine.cli.output import Progress, print_failures, print_json
    from flowengine.transfer.manifests import differences

    with ExitStack() as stack:
        with Progress(progress, "reading") as shown:
            before, failed_a = _reader(stack, a, ticket_file, profile, shown, reread=no_cache)
            after, failed_b = _reader(stack, b, ticket_file, profile, shown, reread=no_cache)
        changes = differences(before, after)
        sign = {"added": "+", "removed": "-", "changed": "M", "metadata": "m"}
        count = 0
        rows: list[dict[str, str]] = []
        for change in changes:
            count += 1
            if as_json:
                rows.append({"change": change.kind, "path": show_path(change.path)})
            else:
                print(f"{sign[change.kind]} {show_path(change.path)}")
        if as_json:
            print_json(
                {
                    "changes": rows,
                    "before": before.summary.version_id.hex(),
                    "after": after.summary.version_id.hex(),
                }
            )
        print_failures(failed_a + failed_b)
    if failed_a or failed_b:
        return Exit.SOME_OBJECTS_FAILED
    return Exit.FAILED if count else Exit.DONE


@click.command()
@click.argument("path", metavar="DST", shell_complete=complete_place)
@click.option(
    "--against",
    metavar="MANIFEST|SRC",
    help="What DST must equal: a manifest file, a folder or a ticket. [default: what last landed there]",
    shell_complete=complete_place,
)
@_PROFILE
@_TICKET
@_PROGRESS
@_JSON
@order_options
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    path: str,
    against: str | None,
    profile: str,
    ticket_file: str | None,
    progress: str,
    as_json: bool,
    **asked: Any,
) -> int:
    """Read every byte of DST and name each object that is wrong, missing or extra.

    Exit code 0 when all is right, 6 when not, 3 when there is nothing to verify against. Between sites,
    `flow verify B:/path --against A:/path` has both sites read and compare.
    """
    if all_at_sites([path] if against is None else [path, against]):
        if against is None:
            raise NotFound("nothing says what it must equal", hint="say it with --against SITE:/PATH")
        shown = {"profile": profile, "progress": progress, "as_json": as_json}
        return order(ctx, "verify", against, [path], asked | shown)
    refuse_order_options(ctx)
    return _verify(path, against, profile, ticket_file, progress, as_json)


def _verify(
    path: str, against: str | None, profile: str, ticket_file: str | None, progress: str, as_json: bool
) -> int:
    from flowengine.cli.output import Progress, print_failures, print_json
    from flowengine.transfer.manifests import differences

    started = time.monotonic()
    with ExitStack() as stack, Progress(progress, "verifying") as shown:
        partial_root = False
        if against is None:
            expected, partial_root = _last_landed(path, ticket_file)
            profile = expected.header.profile.name
            reference_failures: list[Any] = []
        else:
            expected, reference_failures = _reader(stack, against, ticket_file, profile, shown, reread=True)
            profile = expected.header.profile.name
        actual, failures = _reader(
            stack, path, ticket_file, profile, shown, reread=True, like=expected.header
        )
        names = {"added": "extra", "removed": "missing", "changed": "wrong", "metadata": "metadata"}
        found: dict[str, list[str]] = {name: [] for name in [*names.values(), "touched"]}
        expected_top = None
        unreadable = {failed for failed, _, _ in failures}
        for change in differences(expected, actual):
            kind = "touched" if _only_touched(change) else names[change.kind]
            if kind == "extra" and partial_root:
                if expected_top is None:
                    expected_top = {name.partition(b"/")[0] or name for name in _top_names(expected)}
                if change.path.partition(b"/")[0] not in expected_top:
                    continue
            if kind == "missing" and change.path in unreadable:
                continue
            found[kind].append(show_path(change.path))
    bad = sum(len(rows) for kind, rows in found.items() if kind != "touched")
    if as_json:
        print_json(
            {
                "state": "verified" if not bad and not failures and not reference_failures else "differs",
                "objects": actual.summary.objects,
                "bytes": actual.summary.size_bytes,
                **found,
                "unreadable": [{"path": show_path(p), "reason": r, "message": m} for p, r, m in failures],
                "version": actual.summary.version_id.hex(),
                "expected_version": expected.summary.version_id.hex(),
                "seconds": round(time.monotonic() - started, 3),
            }
        )
    else:
        for kind, rows in found.items():
            for row in rows:
                print(f"{kind} {row}")
        print_failures(failures + reference_failures)
        wrong = bad + len(failures)
        verdict = "all as it should be"
        if wrong:
            verdict = f"{format_count(wrong, 'object')} {'is NOT as it' if wrong == 1 else 'are NOT as they'} should be"
        if found["touched"]:
            verdict += f", {len(found['touched'])} touched"
        if progress != "none":
            print(f"verified {format_count(actual.summary.objects, 'object')}: {verdict}", file=sys.stderr)
    if bad:
        return Exit.INTEGRITY
    return Exit.SOME_OBJECTS_FAILED if failures or reference_failures else Exit.DONE


def _only_touched(change: Any) -> bool:
    """Whether nothing but the time differs."""
    before, after = change.before, change.after
    return change.kind == "metadata" and (before.mode, before.extra) == (after.mode, after.extra)


def _top_names(reader: Any) -> list[bytes]:
    names = []
    for directory, entry in reader.walk():
        names.append(directory.partition(b"/")[0] if directory else entry.name)
    return names


def _last_landed(path: str, ticket_file: str | None) -> tuple[Any, bool]:
    from flowengine.store.landed import LandedManifest
    from flowengine.transfer.manifests import open_manifest

    place = parse_location(path, ticket_file)
    if isinstance(place, Remote):
        raise NotFound(
            "what last landed behind a ticket is not known here", hint="say what it must equal with --against"
        )
    if not os.path.lexists(place.path):
        from flowengine.store.selection import spelling_of

        raise NotFound(f"{show_path(place.path)} does not exist", hint=spelling_of(place.path))
    landed = LandedManifest(os.path.abspath(place.path))
    if not os.path.exists(landed.path):
        raise NotFound(
            f"no version is known to have landed in {show_path(place.path)}",
            hint="say what it must equal with --against MANIFEST or --against SRC",
        )
    return open_manifest(landed.path), landed.is_partial()
