"""A copy between two paths of this machine: a forked source, and a target that shares sockets with it.

Goal
    The engine that moves data between hosts, without what only hosts need: port, certificate, handshake.
Plan
    Before the fork a pair of sockets is made, the *line*. For each session the target makes one pair for control and
    one for each stream, and sends the source its ends over the line, together with fresh randoms for the keys.
    Each process sees the end of the other by the end of the line.
Invariants
    - Nothing here has a name: only the two processes can hold the sockets and the randoms.
    - Frames are sealed, opened and verified as between hosts; only the control connection has no TLS.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from typing import Final

import trio

from flowengine.chunking import profile_named
from flowengine.errors import FlowError, TemporaryError
from flowengine.machine import usable_processors
from flowengine.store.landed import LandedManifest
from flowengine.store.scan_cache import ScanCache
from flowengine.store.selection import Selection
from flowengine.transfer.bwlimit import following
from flowengine.transfer.channel import Channel, session_errors
from flowengine.transfer.passes import PassResult, Report, TransferSettings, run_passes
from flowengine.transfer.session import Counters, Observer, Session
from flowengine.transfer.source import run_source
from flowengine.transfer.streams import Streams, prepare_socket
from flowengine.transfer.target import TargetRoot, run_target
from flowengine.wire.keys import ID_BYTES, NO_FINGERPRINT, RANDOM_BYTES, SessionSecrets

__all__ = ["copy_local"]

_CALL_BYTES: Final = ID_BYTES + 2 * RANDOM_BYTES
_MAX_STREAMS: Final = 64


def copy_local(
    selection: Selection,
    target: bytes,
    settings: TransferSettings,
    *,
    observe: Observer | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Report:
    """Copy to a directory of this machine: the source in a child process, the target in this one.

    Must be called where no event loop and no other thread runs, because it forks. Arguments and errors as for
    `transfer.run.pull`.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()
        _run_source(theirs, selection, settings)
    theirs.close()
    status: list[int] = []

    def alive() -> bool:
        if not status:
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status.append(code)
        return not status

    async def one_pass(counters: Counters) -> PassResult:
        return await _land(ours, target, settings, caches, counters, observe, note)

    try:
        caches = settings.caches()
        return trio.run(run_passes, one_pass, settings, note, alive)
    except TemporaryError as error:
        if error.reason == "disconnected" and not alive():
            raise TemporaryError(
                "the source process ended before it was done",
                hint="run the same command again: it continues where it stopped",
                reason="disconnected",
            ) from error
        raise
    finally:
        ours.close()
        if not status:
            os.waitpid(child, 0)


async def _land(
    line: socket.socket,
    target: bytes,
    settings: TransferSettings,
    caches: tuple[ScanCache | None, ScanCache | None],
    counters: Counters,
    observe: Observer | None,
    note: Callable[[str], None],
) -> PassResult:
    """One session, at the target."""
    channel, session = _call(line, settings)
    try:
        async with session_errors(channel), following(session, settings.limit, note):
            record = LandedManifest(target) if not settings.options.dry_run else None
            done = await run_target(
                session, TargetRoot(target, record), caches=caches, counters=counters, observe=observe
            )
        return PassResult(done.state, done.version_id, done.failures, done.extras, done.bottleneck, session)
    finally:
        await channel.aclose()


def _call(line: socket.socket, settings: TransferSettings) -> tuple[Channel, Session]:
    """Begin a session: make its sockets and hand the source's ends over."""
    streams = min(settings.streams, _MAX_STREAMS) or min(4, usable_processors())
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(1 + streams)]
    call = os.urandom(_CALL_BYTES)
    try:
        socket.send_fds(line, [call], [theirs.fileno() for _, theirs in pairs])
    except OSError as error:
        for ours, _ in pairs:
            ours.close()
        raise TemporaryError("the source process is gone", reason="disconnected") from error
    finally:
        for _, theirs in pairs:
            theirs.close()
    return _session(call, [ours for ours, _ in pairs], settings)


def _session(call: bytes, socks: list[socket.socket], settings: TransferSettings) -> tuple[Channel, Session]:
    control, *data = socks
    randoms = call[ID_BYTES:]
    secrets = SessionSecrets(
        randoms[:RANDOM_BYTES],
        randoms[RANDOM_BYTES:],
        client_fingerprint=NO_FINGERPRINT,
        server_fingerprint=NO_FINGERPRINT,
    )
    streams = Streams()
    for number, sock in enumerate(data):
        prepare_socket(sock, long=False)
        streams.arrived(number, sock)
    channel = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(control)), secrets, 0.0)
    return channel, Session(
        control=channel.control(),
        streams=streams,
        secrets=secrets,
        session_id=call[:ID_BYTES],
        profile=profile_named(settings.profile),
        options=settings.options,
        compression=settings.compression,
        stall_s=settings.stall_s,
    )


def _run_source(line: socket.socket, selection: Selection, settings: TransferSettings) -> None:
    """The source process; never returns. It ends when the other end of the line does."""
    code = 1
    try:
        # Ctrl-C reaches the whole group; the target's process decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)

        async def answer(call: bytes, socks: list[socket.socket]) -> None:
            channel, session = _session(call, socks, settings)
            session.sends = True
            try:
                async with session_errors(channel):
                    cache = ScanCache(settings.profile) if settings.use_cache else None
                    await run_source(
                        session,
                        selection,
                        cache=cache,
                        counters=Counters(),
                        threads=settings.reader_threads,
                    )
            except FlowError:
                pass  # the target was told, and calls again or gives up
            finally:
                await channel.aclose()

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.lowlevel.wait_readable(line)
                    call, fds, _, _ = socket.recv_fds(line, _CALL_BYTES, 1 + _MAX_STREAMS)
                    if not call:
                        break
                    nursery.start_soon(answer, call, [socket.socket(fileno=fd) for fd in fds])
                nursery.cancel_scope.cancel()

        trio.run(main)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()  # a bug: nothing else would tell of it
    finally:
        os._exit(code)
