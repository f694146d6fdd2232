"""Transfers between this host and a peer: pull, push, and looking without moving."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable

import msgspec
import trio

from flowengine.chunking import DEFAULT_PROFILE
from flowengine.errors import ProtocolError
from flowengine.store.landed import LandedManifest
from flowengine.store.selection import Selection
from flowengine.transfer.bwlimit import following
from flowengine.transfer.connect import Peer, dial, open_session
from flowengine.transfer.passes import PassResult, Report, TransferSettings, run_passes
from flowengine.transfer.session import Counters, Observer, Session
from flowengine.transfer.streams import stream_count
from flowengine.wire.messages import Listed, Open, Options

__all__ = ["list_remote", "peer_session", "pull", "push", "remote_manifest", "stat_remote"]


@contextlib.asynccontextmanager
async def peer_session(
    peer: Peer,
    role: str,
    path: bytes,
    settings: TransferSettings,
    note: Callable[[str], None] = lambda line: None,
) -> AsyncIterator[Session]:
    """A session for one pass, for the length of the block; as `connect.open_session`, held to the settings' limit.

    Args:
        role: what this side will be, "source" or "target".
        path: what the peer is asked for.
        note: told of changes of the limit.
    """

    def request(rtt_s: float, congestion: str) -> Open:
        streams = stream_count(rtt_s, settings.streams, congestion=congestion)
        return Open(role, path, os.urandom(16), streams, settings.profile, settings.options, subtrees=True)

    async with (
        open_session(
            peer,
            request,
            compression=settings.compression,
            stall_s=settings.stall_s,
            fixed_streams=bool(settings.streams),
        ) as session,
        following(session, settings.limit, note),
    ):
        yield session


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
    from flowengine.transfer.target import TargetRoot, run_target  # a push starts sooner without

    caches = settings.caches()

    async def one_pass(counters: Counters) -> PassResult:
        async with peer_session(peer, "target", path, settings, note) as session:
            record = LandedManifest(target) if not settings.options.dry_run else None
            done = await run_target(
                session, TargetRoot(target, record), caches=caches, counters=counters, observe=observe
            )
        return PassResult(done.state, done.version_id, done.failures, done.extras, done.bottleneck, session)

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
    from flowengine.transfer.source import run_source  # and a pull without this

    cache, _ = settings.caches()

    async def one_pass(counters: Counters) -> PassResult:
        async with peer_session(peer, "source", path, settings, note) as session:
            done = await run_source(
                session,
                selection,
                cache=cache,
                counters=counters,
                threads=settings.reader_threads,
                observe=observe,
            )
        receipt = done.receipt
        for name, value in receipt.counters.items():
            own = {"bytes_sent"}  # what was read is told of the target, whichever side that is
            if not settings.options.dry_run:
                own.add("bytes_payload")  # in a dry run only the target knows what would be sent
            if name not in own and hasattr(counters, name):
                setattr(counters, name, value)
        return PassResult(receipt.state, done.version_id, done.failures, [], receipt.bottleneck, session)

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
    from flowengine.transfer.target import NOWHERE, TargetRoot, run_target

    async def main() -> list[tuple[bytes, str, str]]:
        asked = msgspec.structs.replace(options, dry_run=True)
        settings = TransferSettings(profile=profile, options=asked, use_cache=False)
        contents = path.rstrip(b"/") + b"/" if path else path
        async with peer_session(peer, "target", contents, settings, note) as session:
            done = await run_target(
                session,
                TargetRoot(NOWHERE, None, sink),
                caches=(None, None),
                counters=Counters(),
                observe=observe,
            )
        return done.failures

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
    request = Open(role, path, bytes(16), 0, DEFAULT_PROFILE.name, Options())
    channel = await dial(peer, lambda *_: request)
    rows: list[tuple[bytes, int, int, int]] = []
    try:
        while True:
            answer = await channel.receive()
            if not isinstance(answer, Listed):
                raise ProtocolError("the other side did not answer the request", reason="disconnected")
            rows += answer.rows
            if answer.last:
                return rows
    finally:
        await channel.aclose()
