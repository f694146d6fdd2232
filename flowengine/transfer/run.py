"""Transfers between this host and a peer: pull, push, and looking without moving."""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec
import trio

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.errors import ProtocolError
from flowengine.store.landed import LandedManifest
from flowengine.store.selection import Selection
from flowengine.transfer.channel import Channel, session_errors
from flowengine.transfer.connect import Peer, dial, join_streams, stream_count
from flowengine.transfer.passes import PassResult, Report, TransferSettings, run_passes
from flowengine.transfer.session import Counters, Observer, Session
from flowengine.transfer.source import run_source
from flowengine.transfer.target import NOWHERE, TargetRoot, run_target
from flowengine.wire.messages import Listed, Open, Opened, Options

__all__ = ["list_remote", "pull", "push", "remote_manifest", "stat_remote"]


async def _open(channel: Channel, peer: Peer, role: str, path: bytes, settings: TransferSettings) -> Session:
    streams = stream_count(channel.rtt_s, settings.streams)
    await channel.send(Open(role, path, os.urandom(16), streams, settings.profile, settings.options))
    answer = await channel.receive(settings.stall_s)
    if not isinstance(answer, Opened):
        raise ProtocolError("the other side did not answer the request", reason="disconnected")
    session = await join_streams(
        channel, peer, answer, settings.profile, settings.options, settings.compression
    )
    session.stall_s = settings.stall_s
    return session


async def pull(
    peer: Peer,
    path: bytes,
    target: bytes,
    settings: TransferSettings,
    *,
    observe: Observer | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Report:
    """Bring what a peer offers to a local directory.

    Args:
        path: below the served root; a trailing slash means the contents.
        target: local directory, made where missing.
        observe: called twice a second with the counters.
        note: told what a person should know, one line at a time.

    Raises:
        FlowError: the transfer cannot go on; what landed stays, and the same call continues.
    """
    caches = settings.caches()

    async def one_pass(counters: Counters) -> PassResult:
        channel = await dial(peer)
        try:
            async with session_errors(channel):
                session = await _open(channel, peer, "target", path, settings)
                record = LandedManifest(target) if not settings.options.dry_run else None
                done = await run_target(
                    session, TargetRoot(target, record), caches=caches, counters=counters, observe=observe
                )
            return done.state, done.version_id, done.failures, done.extras, done.bottleneck
        finally:
            await channel.aclose()

    return await run_passes(one_pass, settings, note)


async def push(
    selection: Selection,
    peer: Peer,
    path: bytes,
    settings: TransferSettings,
    *,
    observe: Observer | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Report:
    """Send a local selection to a directory below a served root; arguments and errors as for `pull`."""
    cache, _ = settings.caches()

    async def one_pass(counters: Counters) -> PassResult:
        channel = await dial(peer)
        try:
            async with session_errors(channel):
                session = await _open(channel, peer, "source", path, settings)
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

    return await run_passes(one_pass, settings, note)


def remote_manifest(
    peer: Peer,
    path: bytes,
    sink: Callable[[bytes], object],
    profile: str,
    *,
    options: Options,
    observe: Observer | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> list[tuple[bytes, str, str]]:
    """Have the other side scan a path and build its manifest here; gives what it could not read.

    It is a pull that keeps nothing: every chunk id travels, no chunk does.
    """

    async def main() -> list[tuple[bytes, str, str]]:
        asked = msgspec.structs.replace(options, dry_run=True)
        settings = TransferSettings(profile=profile, options=asked, use_cache=False)
        channel = await dial(peer)
        try:
            async with session_errors(channel):
                session = await _open(
                    channel, peer, "target", path.rstrip(b"/") + b"/" if path else path, settings
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


async def stat_remote(peer: Peer, path: bytes) -> tuple[bytes, int, int, int] | None:
    """(path, mode, size, mtime_ns) of a path below a served root; None where nothing is."""
    rows = await _look(peer, "stat", path)
    return rows[0] if rows else None


async def list_remote(peer: Peer, path: bytes) -> list[tuple[bytes, int, int, int]]:
    """(name, mode, size, mtime_ns) of a directory's entries, or of the one file.

    Raises:
        NotFound: there is no such path.
    """
    return await _look(peer, "list", path)


async def _look(peer: Peer, role: str, path: bytes) -> list[tuple[bytes, int, int, int]]:
    channel = await dial(peer)
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
