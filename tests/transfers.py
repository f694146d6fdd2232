"""Small files as tests offer them, and whole transfers in one process: both ends of a session, and what they said."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

import trio

from flowengine.chunking import DEFAULT_PROFILE, chunk_id, pack_chunks
from flowengine.manifest import FILE, Block, Entry
from flowengine.store.encoded import parse_block
from flowengine.store.landed import LandedManifest
from flowengine.store.proofs import encode_entries
from flowengine.store.scan_cache import ScanCache
from flowengine.store.selection import select
from flowengine.transfer.channel import Channel, session_errors
from flowengine.transfer.placing_subtrees import offers_of
from flowengine.transfer.session import Counters, Session
from flowengine.transfer.source import run_source
from flowengine.transfer.streams import Streams, prepare_socket
from flowengine.transfer.target import TargetOutcome, TargetRoot, run_target
from flowengine.units import MIB
from flowengine.wire.keys import NO_FINGERPRINT, SessionSecrets
from flowengine.wire.messages import WANT_ALL, Folder, Options, Subtrees, Want

__all__ = ["Done", "block_of", "data", "entry", "transfer", "tree"]


def entry(name: bytes, *parts: bytes, mode: int = 0o640) -> Entry:
    packed = pack_chunks([(len(part), chunk_id(part)) for part in parts])
    return Entry(name, FILE, mode, len(name) - 5, sum(map(len, parts)), packed)


def block_of(*entries: Entry) -> Block:
    made = parse_block(encode_entries(list(entries)))
    assert made is not None
    return made


class Done:
    """How a transfer ended, and what was said in it.

    Attributes:
        messages: of the source, in order.
        offered: the folders of those that are subtrees.
        wants: of the target, in order.
    """

    def __init__(self) -> None:
        self.messages: list[object] = []
        self.offered: list[list[Folder]] = []
        self.wants: list[Want] = []
        self.source, self.target = Counters(), Counters()
        self.outcome: TargetOutcome | None = None
        self.version = b""

    @property
    def told(self) -> int:
        """How many offers came as subtrees."""
        return sum(offers_of(Subtrees(folders)) for folders in self.offered)

    @property
    def whole(self) -> int:
        """How many of them were wanted together with others."""
        return sum(want.whole for want in self.wants if want.kind == WANT_ALL)

    @property
    def failures(self) -> list[tuple[bytes, str, str]]:
        assert self.outcome is not None
        return self.outcome.failures

    @property
    def extras(self) -> list[bytes]:
        assert self.outcome is not None
        return self.outcome.extras


def ends(options: Options) -> list[tuple[Channel, Session]]:
    """The two ends of a session: the source's and the target's."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
    identity = os.urandom(16)
    found = []
    for side in (0, 1):
        secrets = SessionSecrets(
            bytes(32), bytes([1]) * 32, client_fingerprint=NO_FINGERPRINT, server_fingerprint=NO_FINGERPRINT
        )
        control, *data = [pair[side] for pair in pairs]
        streams = Streams()
        for number, sock in enumerate(data):
            prepare_socket(sock, long=False)
            streams.arrived(number, sock)
        channel = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(control)), secrets, 0.0)
        session = Session(
            control=channel.control(),
            streams=streams,
            secrets=secrets,
            session_id=identity,
            profile=DEFAULT_PROFILE,
            options=options,
            sends=side == 0,
        )
        found.append((channel, session))
    return found


def heard(session: Session, said: Callable[[object], None]) -> None:
    """Let somebody listen to what one end says; it is said all the same."""
    post = session.control.post

    def say(message: object) -> None:
        said(message)
        post(message)  # type: ignore[arg-type]

    session.control.post = say  # type: ignore[method-assign]


def transfer(
    source: Path,
    target: Path,
    options: Options | None = None,
    *,
    subtrees: bool = True,
    cached: bool = False,
    before: Callable[[object], None] = lambda message: None,
) -> Done:
    """One session of a source and a target in this process, with all that such a session is.

    Args:
        subtrees: whether the target understands them, as the source has been told.
        before: shown each message of the source before it is sent.
    """
    done = Done()

    def offered(message: object) -> None:
        before(message)
        done.messages.append(message)
        if isinstance(message, Subtrees):
            done.offered.append(message.folders)

    def answered(message: object) -> None:
        if isinstance(message, Want):
            done.wants.append(message)

    async def main() -> None:
        (near, giving), (far, taking) = ends(options or Options())
        giving.subtrees = subtrees
        heard(giving, offered)
        heard(taking, answered)
        caches = [ScanCache(DEFAULT_PROFILE.name) if cached else None for _ in range(3)]

        async def give() -> None:
            async with session_errors(near):
                outcome = await run_source(
                    giving, select([os.fsencode(source) + b"/"]), cache=caches[0], counters=done.source
                )
            done.version = outcome.version_id

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(give)
                path = os.fsencode(target)
                async with session_errors(far):
                    done.outcome = await run_target(
                        taking,
                        TargetRoot(path, None if taking.options.dry_run else LandedManifest(path)),
                        caches=(caches[1], caches[2]),
                        counters=done.target,
                    )
        for channel in (near, far):
            await channel.aclose()
        for cache in caches:
            if cache is not None:
                cache.close()

    trio.run(main)
    assert done.outcome is not None
    if not done.failures:
        assert done.outcome.version_id == done.version
    return done


def data(seed: int, size_bytes: int) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def tree(root: Path, folders: int = 60) -> Path:
    """Many small folders: nested, empty, with empty files, with files of several chunks, with modes and times."""
    for number in range(folders):
        folder = root / f"d{number:03}"
        folder.mkdir(parents=True)
        for name in range(number % 4):
            (folder / f"f{name}").write_bytes(data(number << 8 | name, 50 * number + name))
        if number % 3 == 0:
            (folder / "empty").touch()
        if number % 5 == 0:
            deep = folder / "in" / "deeper"
            deep.mkdir(parents=True)
            (deep / "bottom").write_bytes(data(number + 7_000_000, 300))
            (folder / "nothing" / "at all").mkdir(parents=True)
        if number % 20 == 7:
            (folder / "chunks").write_bytes(data(number + 9_000_000, 200_000 + number))
        if number == 33:
            (folder / "most").write_bytes(data(1, MIB - 1))
    for number, path in enumerate(sorted(root.rglob("*"))):
        if path.is_file():
            path.chmod((0o644, 0o600, 0o755, 0o444)[number % 4])
            os.utime(path, ns=(1, 1_000_000_007 * (number + 1)))
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        if path.is_dir():
            path.chmod((0o755, 0o700, 0o1777, 0o511)[number % 4])
            os.utime(path, ns=(1, 1_500_000_003 * (number + 1)))
    root.chmod(0o750)
    os.utime(root, ns=(1, 123_456_789_000_000_001))
    return root
