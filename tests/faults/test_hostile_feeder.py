"""A target that takes a version from another target, against feeders that lie: only what the version has is placed.

The feeders are the sources of `test_hostile_source.py`, which say what a test wants; the target is the real `run_target`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from support import MIB, Item, snapshot

from flowengine.chunking import DEFAULT_PROFILE, chunk_id, pack_chunks
from flowengine.errors import FlowError, IntegrityError, ProtocolError
from flowengine.manifest import FILE, SYMLINK, Entry, Header, ManifestBuilder
from flowengine.transfer.channel import first_flow_error
from flowengine.transfer.listen import Incoming, Listener
from flowengine.transfer.passes import TransferSettings
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.transfer.run import peer_session
from flowengine.transfer.session import Counters, Session
from flowengine.transfer.target import TargetOutcome, TargetRoot, run_target
from flowengine.wire.frames import MAX_FRAME_BYTES
from flowengine.wire.messages import (
    DirectoryBegin,
    DirectoryEnd,
    Finish,
    ManifestPart,
    Message,
    ObjectBegin,
    ObjectEnd,
    ObjectRun,
    Offer,
    Receipt,
)

DATA = b"of the version"
LARGE = [bytes([number]) * DEFAULT_PROFILE.maximum for number in range(1, 12)]


def entry(name: bytes, data: bytes = DATA, mode: int = 0o644) -> Entry:
    return Entry(name, FILE, mode, 1, len(data), pack_chunks([(len(data), chunk_id(data))]))


def packed(chunks: list[bytes]) -> bytes:
    return pack_chunks([(len(one), chunk_id(one)) for one in chunks])


ROOT = [entry(b"a"), Entry(b"link", SYMLINK, 0o777, 1, 0, link=b"a")]
BIG = Entry(b"big", FILE, 0o644, 1, sum(map(len, LARGE)))
END = DirectoryEnd(0o755, 0)


def version() -> tuple[bytes, bytes]:
    """Id and manifest of the version: `a` and a link, then a folder with a large object."""
    data = bytearray()
    recorder = ManifestRecorder(ManifestBuilder(data.extend, Header(DEFAULT_PROFILE)))
    recorder.enter(b"")
    recorder.entries(ROOT)
    recorder.enter(b"sub")
    recorder.large_begin(BIG)
    recorder.large_chunks(packed(LARGE))
    recorder.large_end(keep=True)
    for _ in range(2):
        recorder.leave(0o755, 0, b"")
    return recorder.finish().version_id, bytes(data)


VERSION, MANIFEST = version()
SHOWN = [ManifestPart(MANIFEST[:100], False), ManifestPart(MANIFEST[100:], True)]
Said = list[Message]


def take(target: Path, said: Said, version_id: bytes = VERSION) -> FlowError | TargetOutcome:
    """Have a target take a version from a feeder that says these; how it ended."""

    async def main() -> FlowError | TargetOutcome:
        listener = Listener("127.0.0.1", 0)
        listener.bind()

        async def speak(session: Session) -> None:
            for message in said:
                session.control.post(message)
            await session.control.run_writer()

        async def handle(incoming: Incoming) -> None:
            async with incoming.accept(incoming.request.options) as session:
                try:
                    await session.streams.next()
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(speak, session)
                        async for batch in session.control.receive():
                            if any(isinstance(message, Receipt) for message in batch):
                                out = bytearray(MAX_FRAME_BYTES)
                                end = session.sealer(0).seal_end(out)
                                session.streams.sockets[0].sendall(out[:end])
                        nursery.cancel_scope.cancel()
                finally:
                    session.streams.close()

        settings = TransferSettings(use_cache=False, streams=1, retry_for_s=0.0, stall_s=20.0)
        found: list[FlowError | TargetOutcome] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, handle)
            with trio.fail_after(50):
                try:
                    async with peer_session(listener.ticket(), "target", b"", settings) as session:
                        found.append(await _land(session, target, version_id))
                except (FlowError, BaseExceptionGroup) as raised:
                    error = raised if isinstance(raised, FlowError) else first_flow_error(raised)
                    if error is None:
                        raise
                    found.append(error)
            nursery.cancel_scope.cancel()
        return found[0]

    return trio.run(main)


async def _land(session: Session, target: Path, version_id: bytes) -> TargetOutcome:
    root = TargetRoot(os.fsencode(target), version=version_id)
    return await run_target(session, root, caches=(None, None), counters=Counters())


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target where something stands already, under names that the version has and that it has not."""
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))
    made = tmp_path / "target"
    (made / "sub").mkdir(parents=True)
    for name in ("a", "mine"):
        (made / name).write_bytes(b"stood here before")
    return made


def standing(target: Path) -> dict[bytes, Item]:
    """All that is in the target, but for staging, which is empty, and the time that this gave the folder."""
    found = snapshot(target)
    staged = {name for name in found if name.startswith(b".flow-staging")}
    assert not {name for name in staged if name.startswith((b".flow-staging/s.", b".flow-staging/r."))}
    return {name: item for name, item in found.items() if name and name not in staged}


LIES: dict[str, Said] = {
    "no manifest": [DirectoryBegin(b""), Offer(ROOT)],
    "half a manifest": [SHOWN[0], DirectoryBegin(b""), Offer(ROOT)],
    "another manifest": [ManifestPart(MANIFEST[:-1] + b"?", True), DirectoryBegin(b""), Offer(ROOT)],
    "garbage for a manifest": [ManifestPart(b"x" * 1000, True), DirectoryBegin(b""), Offer(ROOT)],
    "a changed page": [ManifestPart(MANIFEST.replace(b"link", b"lynk"), True), DirectoryBegin(b""), Offer(ROOT)],
    "another file": [*SHOWN, DirectoryBegin(b""), Offer([entry(b"0"), *ROOT])],
    "in place of what is not of the version": [*SHOWN, DirectoryBegin(b""), Offer([ROOT[0], entry(b"mine")])],
    "other content": [*SHOWN, DirectoryBegin(b""), Offer([entry(b"a", b"of the feeder"), ROOT[1]])],
    "another mode": [*SHOWN, DirectoryBegin(b""), Offer([entry(b"a", mode=0o777), ROOT[1]])],
    "another link": [*SHOWN, DirectoryBegin(b""), Offer([Entry(b"link", SYMLINK, 0o777, 1, 0, link=b"mine")])],
    "another folder": [*SHOWN, DirectoryBegin(b""), DirectoryBegin(b"added")],
    "a folder in place of a file": [*SHOWN, DirectoryBegin(b""), DirectoryBegin(b"mine")],
    "another large object": [*SHOWN, DirectoryBegin(b""), ObjectBegin(Entry(b"0", FILE, 0o644, 1, 2 * MIB))],
    "a second manifest": [*SHOWN, *SHOWN],
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_nothing_lands_that_the_version_does_not_have(target: Path, lie: str) -> None:
    before = standing(target)
    ended = take(target, LIES[lie])
    assert isinstance(ended, IntegrityError | ProtocolError), ended
    if lie != "a second manifest":
        assert ended.reason == "feed-differs", ended
        assert "look at the agent of the other one" in ended.hint
    assert standing(target) == before


def test_a_large_object_ends_where_it_is_not_the_versions(target: Path) -> None:
    enter: Said = [*SHOWN, DirectoryBegin(b""), Offer(ROOT), DirectoryBegin(b"sub"), ObjectBegin(BIG)]
    other = [*LARGE[:3], b"?" * DEFAULT_PROFILE.maximum]
    for more in (
        [ObjectRun(packed(other))],
        [ObjectRun(packed(LARGE[:3])), ObjectEnd("changed", "it moved")],
        [ObjectRun(packed([*LARGE, LARGE[0]]))],
    ):
        ended = take(target, [*enter, *more])
        assert isinstance(ended, FlowError)
        assert ended.reason == "feed-differs", ended
        assert not (target / "sub/big").exists()


def test_what_is_left_out_is_found_at_the_end(target: Path) -> None:
    empty = ManifestRecorder(ManifestBuilder(None, Header(DEFAULT_PROFILE)))
    empty.enter(b"")
    empty.leave(0o755, 0, b"")
    summary = empty.finish()
    ended = take(target, [*SHOWN, DirectoryBegin(b""), END, Finish(summary.version_id, 0, 0, True)])
    # The session ends as one of that other version, which whoever holds the grant refuses.
    assert isinstance(ended, TargetOutcome)
    assert ended.version_id == summary.version_id != VERSION
    assert sorted(path.name for path in target.iterdir()) == ["a", "mine", "sub"]


def test_a_manifest_that_nobody_asked_for_is_refused(target: Path) -> None:
    ended = take(target, [*SHOWN], version_id=b"")
    assert isinstance(ended, ProtocolError)
    assert "not asked for" in ended.message
