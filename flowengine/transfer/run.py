"""A transfer from its first session to its last: local, pull or push, with retries.

Goal
    One command ends with everything in place or with a named reason, whatever breaks in between.
Plan
    Passes: each opens a session and runs it to its end. A broken session is followed by another after a backoff;
    what landed or is journalled is not sent again, what was scanned is not read again. Objects that failed for a
    passing reason get another pass too.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.errors import FlowError, ProtocolError, TemporaryError, UsageError
from flowengine.store.landed import LandedManifest
from flowengine.store.scan_cache import ScanCache
from flowengine.store.selection import Root, Selection
from flowengine.transfer.connect import (
    Channel,
    Listener,
    dial,
    first_flow_error,
    join_streams,
    session_errors,
    stream_count,
)
from flowengine.transfer.control import STALL_S
from flowengine.transfer.serve import SelectionServer
from flowengine.transfer.session import Counters, Observer, Session
from flowengine.transfer.source import run_source
from flowengine.transfer.target import NOWHERE, TargetRoot, run_target
from flowengine.wire.messages import Listed, Open, Opened, Options
from flowengine.wire.ticket import Ticket

__all__ = [
    "Report",
    "TransferSettings",
    "copy_local",
    "list_remote",
    "pull",
    "push",
    "remote_manifest",
    "renamed",
    "stat_remote",
]

PASSING_REASONS: Final = frozenset({"stale", "changed", "vanished"})
"""Reasons for which an object that failed is tried once more."""
MAX_PASSES: Final = 3
_FIRST_BACKOFF_S: Final = 0.2
_LAST_BACKOFF_S: Final = 10.0


@dataclass(frozen=True)
class TransferSettings:
    """How a transfer is run, apart from what it moves.

    Attributes:
        profile: chunking profile's name.
        options: what is kept, left out and removed.
        streams: data streams; 0 chooses.
        threads: threads that read one large object; 0 chooses.
        compression: zstd level, 0 none, None adapts.
        use_cache: whether the scan cache is read and written.
        retry_for_s: how long to go on after the connection broke without any progress.
        stall_s: how long the peer may say nothing before the connection is taken for broken.
    """

    profile: str = DEFAULT_PROFILE.name
    options: Options = field(default_factory=Options)
    streams: int = 0
    threads: int = 0
    compression: int | None = None
    use_cache: bool = True
    retry_for_s: float = 60.0
    stall_s: float = STALL_S

    @property
    def reader_threads(self) -> int:
        """Threads that read one large object."""
        return self.threads or max(1, (os.cpu_count() or 1) // 2)


@dataclass
class Report:
    """How a transfer ended: the numbers of its last pass, bytes over the wire of all passes."""

    state: str
    version_id: bytes
    counters: Counters
    failures: list[tuple[bytes, str, str]]
    extras: list[bytes]
    bottleneck: str
    seconds: float
    bytes_sent: int
    passes: int


PassResult = tuple[str, bytes, list[tuple[bytes, str, str]], list[bytes], str]
OnePass = Callable[[Counters], Awaitable[PassResult]]


async def _passes(
    one_pass: OnePass,
    settings: TransferSettings,
    note: Callable[[str], None],
    alive: Callable[[], bool] = lambda: True,
) -> Report:
    """Run passes until one ends by itself with nothing left that another could mend."""
    started = time.monotonic()
    sent = 0
    backoff = _FIRST_BACKOFF_S
    progress_at = started
    passes = 0
    good_passes = 0
    noted = ""
    while True:
        counters = Counters()
        passes += 1
        try:
            state, version_id, failures, extras, bottleneck = await one_pass(counters)
        except (FlowError, BaseExceptionGroup) as raised:
            error = raised if isinstance(raised, FlowError) else first_flow_error(raised)
            if error is None:
                raise
            sent += counters.bytes_sent
            now = time.monotonic()
            if counters.objects_done - counters.objects_unchanged > 0 or counters.bytes_sent > 1 << 20:
                progress_at, backoff = now, _FIRST_BACKOFF_S
            if error.reason not in ("disconnected", "stalled", "busy") or not alive():
                raise error from raised
            if now - progress_at > settings.retry_for_s and error.reason != "busy":
                raise error from raised
            if error.message != noted:  # what it waits for is said once, not at every try
                note(
                    f"{error.message}; trying again until it works"
                    if error.reason == "busy"
                    else f"{error.message}; trying again in {backoff:.1f} s"
                )
                noted = error.message
            await trio.sleep(backoff)
            backoff = min(backoff * 2, _LAST_BACKOFF_S)
            continue
        sent += counters.bytes_sent
        good_passes += 1
        passing = bool(failures) and all(reason in PASSING_REASONS for _, reason, _ in failures)
        if passing and good_passes < MAX_PASSES:
            note(f"{len(failures)} objects changed meanwhile; going over them again")
            continue
        return Report(
            state,
            version_id,
            counters,
            failures,
            extras,
            bottleneck,
            time.monotonic() - started,
            sent,
            passes,
        )


def _caches(settings: TransferSettings) -> tuple[ScanCache | None, ScanCache | None]:
    if not settings.use_cache:
        return None, None
    return ScanCache(settings.profile), ScanCache(settings.profile)


async def _open(
    channel: Channel, ticket: Ticket, role: str, path: bytes, settings: TransferSettings
) -> Session:
    streams = stream_count(channel.rtt_s, settings.streams)
    await channel.send(Open(role, path, os.urandom(16), streams, settings.profile, settings.options))
    answer = await channel.receive(settings.stall_s)
    if not isinstance(answer, Opened):
        raise ProtocolError("the other side did not answer the request", reason="disconnected")
    session = await join_streams(
        channel, ticket, answer, settings.profile, settings.options, settings.compression
    )
    session.stall_s = settings.stall_s
    return session


async def pull(
    ticket: Ticket,
    path: bytes,
    target: bytes,
    settings: TransferSettings,
    *,
    observe: Observer | None = None,
    note: Callable[[str], None] = lambda line: None,
    alive: Callable[[], bool] = lambda: True,
) -> Report:
    """Bring what a ticket offers to a local directory.

    Args:
        path: below the served root; a trailing slash means the contents.
        target: local directory, made where missing.
        observe: called twice a second with the counters.
        note: told what a person should know, one line at a time.
        alive: asked before another session is tried.

    Raises:
        FlowError: the transfer cannot go on; what landed stays, and the same call continues.
    """
    caches = _caches(settings)

    async def one_pass(counters: Counters) -> PassResult:
        channel = await dial(ticket)
        try:
            async with session_errors(channel):
                session = await _open(channel, ticket, "target", path, settings)
                record = LandedManifest(target) if not settings.options.dry_run else None
                done = await run_target(
                    session, TargetRoot(target, record), caches=caches, counters=counters, observe=observe
                )
            return done.state, done.version_id, done.failures, done.extras, done.bottleneck
        finally:
            await channel.aclose()

    return await _passes(one_pass, settings, note, alive)


async def push(
    selection: Selection,
    ticket: Ticket,
    path: bytes,
    settings: TransferSettings,
    *,
    observe: Observer | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Report:
    """Send a local selection to a directory below a served root; arguments and errors as for `pull`."""
    cache, _ = _caches(settings)

    async def one_pass(counters: Counters) -> PassResult:
        channel = await dial(ticket)
        try:
            async with session_errors(channel):
                session = await _open(channel, ticket, "source", path, settings)
                done = await run_source(
                    session,
                    selection,
                    cache=cache,
                    counters=counters,
                    threads=settings.reader_threads,
                    observe=observe,
                )
            for name, value in done.receipt.counters.items():
                own = {"bytes_sent", "objects_read", "bytes_read"}
                if not settings.options.dry_run:
                    own.add("bytes_payload")  # in a dry run only the target knows what would be sent
                if name not in own and hasattr(counters, name):
                    setattr(counters, name, value)
            return done.receipt.state, done.version_id, done.failures, [], done.receipt.bottleneck
        finally:
            await channel.aclose()

    return await _passes(one_pass, settings, note)


def copy_local(
    selection: Selection,
    target: bytes,
    settings: TransferSettings,
    *,
    observe: Observer | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Report:
    """Copy between two paths of this machine: the source in a child process, the target in this one.

    The two speak the real protocol over loopback. Must be called where no event loop and no other thread runs,
    because it forks.
    """
    listener = Listener("127.0.0.1", 0)
    listener.bind()
    ticket = listener.ticket()
    alive_read, alive_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(alive_write)
        _run_child(listener, selection, settings, alive_read)
    listener.close_bound()
    os.close(alive_read)
    status: list[int] = []

    def alive() -> bool:
        if not status:
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status.append(code)
        return not status

    async def main() -> Report:
        return await pull(ticket, b"", target, settings, observe=observe, note=note, alive=alive)

    try:
        return trio.run(main)
    except TemporaryError as error:
        if error.reason == "disconnected" and not alive():
            raise TemporaryError(
                "the source process ended before it was done",
                hint="run the same command again: it continues where it stopped",
                reason="disconnected",
            ) from error
        raise
    finally:
        os.close(alive_write)
        if not status:
            os.waitpid(child, 0)


def _run_child(listener: Listener, selection: Selection, settings: TransferSettings, alive_read: int) -> None:
    """The source process; never returns. It ends when the other end of the pipe does."""
    code = 1
    try:
        # Ctrl-C reaches the whole group; the target's process decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        server = SelectionServer(
            selection,
            use_cache=settings.use_cache,
            threads=settings.reader_threads,
            compression=settings.compression,
        )

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listener.serve, server.handle)
                await trio.lowlevel.wait_readable(alive_read)
                nursery.cancel_scope.cancel()

        trio.run(main)
        code = 0
    finally:
        os._exit(code)


def remote_manifest(
    ticket: Ticket,
    path: bytes,
    sink: Callable[[bytes], object],
    profile: str,
    *,
    reread: bool,
    observe: Observer | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[tuple[bytes, str, str]]:
    """Have the other side scan a path and build its manifest here; gives what it could not read.

    It is a pull that keeps nothing: every chunk id travels, no chunk does.
    """

    async def main() -> list[tuple[bytes, str, str]]:
        options = Options(dry_run=True, reread=reread)
        settings = TransferSettings(profile=profile, options=options, use_cache=False)
        channel = await dial(ticket)
        try:
            async with session_errors(channel):
                session = await _open(
                    channel, ticket, "target", path.rstrip(b"/") + b"/" if path else path, settings
                )
                done = await run_target(
                    session,
                    TargetRoot(NOWHERE, None, sink),
                    caches=(None, None),
                    counters=Counters(),
                    observe=observe,
                )
            return done.failures
        finally:
            await channel.aclose()

    return trio.run(main)


async def stat_remote(ticket: Ticket, path: bytes) -> tuple[bytes, int, int, int] | None:
    """(path, mode, size, mtime_ns) of a path below a served root; None where nothing is."""
    rows = await _look(ticket, "stat", path)
    return rows[0] if rows else None


async def list_remote(ticket: Ticket, path: bytes) -> list[tuple[bytes, int, int, int]]:
    """(name, mode, size, mtime_ns) of a directory's entries, or of the one file.

    Raises:
        NotFound: there is no such path.
    """
    return await _look(ticket, "list", path)


async def _look(ticket: Ticket, role: str, path: bytes) -> list[tuple[bytes, int, int, int]]:
    channel = await dial(ticket)
    rows: list[tuple[bytes, int, int, int]] = []
    try:
        await channel.send(Open(role, path, bytes(16), 0, DEFAULT_PROFILE.name, Options()))
        while True:
            answer = await channel.receive()
            if not isinstance(answer, Listed):
                raise ProtocolError("the other side did not answer the request", reason="disconnected")
            rows += answer.rows
            if answer.last:
                return rows
    finally:
        await channel.aclose()


def renamed(selection: Selection, name: bytes) -> Selection:
    """The selection with its one file under another name."""
    if not selection.single_file:
        raise UsageError("only a single file can get another name at the target")
    return Selection([Root(selection.roots[0].path, name)], selection.files_from)
