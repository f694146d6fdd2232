"""A target against sources that lie: nothing leaves its folder, nothing unverified gets its final name.

The sources are built of the library's own parts; the target is the real `pull`.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import zstandard
from support import MIB, snapshot

from flowengine.chunking import chunk_id, pack_chunks, profile_named
from flowengine.chunking.fine import FINE_BYTES, FINE_ID_BYTES, FineCutter, fine_id
from flowengine.errors import Exit, FlowError, exit_code
from flowengine.manifest import FILE, HARDLINK, SYMLINK, Entry, Header, ManifestBuilder
from flowengine.transfer.listen import Incoming, Listener
from flowengine.transfer.passes import Report, TransferSettings
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.transfer.run import pull
from flowengine.transfer.session import Session
from flowengine.wire.frames import MAX_FRAME_BYTES
from flowengine.wire.messages import (
    WANT_NONE,
    DirectoryBegin,
    DirectoryEnd,
    Failed,
    Finer,
    Finish,
    Lost,
    Message,
    ObjectBegin,
    ObjectEnd,
    ObjectRun,
    Offer,
    Options,
    Receipt,
    Want,
)
from flowengine.wire.records import STORED, ZSTD, pack_record_header


class FakeSource:
    """A source that says and sends what a test wants."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.sealer = session.sealer(0)
        self.wants: list[Want] = []
        self.failed: list[Failed] = []
        self.receipt: Receipt | None = None
        self.heard = trio.lowlevel.ParkingLot()

    def say(self, *messages: Message) -> None:
        for message in messages:
            self.session.control.post(message)

    def say_raw(self, data: bytes) -> None:
        self.session.control._outgoing.append(data)
        self.session.control._wake.set()

    async def listen(self) -> None:
        async for batch in self.session.control.receive():
            for message in batch:
                if isinstance(message, Want):
                    self.wants.append(message)
                    self.heard.unpark_all()
                elif isinstance(message, Failed):
                    self.failed.append(message)
                    self.heard.unpark_all()
                elif isinstance(message, Receipt):
                    self.receipt = message
                    self.heard.unpark_all()

    async def wanted(self, count: int = 1) -> None:
        """Wait for so many answers to offers."""
        while len(self.wants) < count:
            await self.heard.park()

    def send(self, plain: bytes) -> None:
        """Seal bytes into one frame of the first stream and send it."""
        out = bytearray(MAX_FRAME_BYTES)
        size = self.sealer.seal_into([plain], out)
        self.session.streams.sockets[0].sendall(out[:size])

    def send_record(self, runs: list[tuple[int, int, int]], payload: bytes) -> None:
        self.send(pack_record_header(STORED, len(payload), len(payload), runs) + payload)

    def send_end(self) -> None:
        out = bytearray(MAX_FRAME_BYTES)
        for number, sock in self.session.streams.sockets.items():
            sealer = self.sealer if number == 0 else self.session.sealer(number)
            sock.sendall(out[: sealer.seal_end(out)])

    async def whole(self, entries: list[Entry]) -> None:
        """Offer a root of these entries honestly, and wait for the receipt."""
        recorder = ManifestRecorder(ManifestBuilder(None, Header(self.session.profile)))
        recorder.enter(b"")
        recorder.entries(entries)
        recorder.leave(0o755, 0, b"")
        summary = recorder.finish()
        self.say(DirectoryBegin(b""), Offer(entries), DirectoryEnd(0o755, 0))
        self.say(Finish(summary.version_id, summary.objects, summary.size_bytes, True))
        while self.receipt is None:
            await self.heard.park()
        self.send_end()


Act = Callable[[FakeSource], Awaitable[None]]


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLOW_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    return tmp_path / "target"


def attack(
    target: Path, act: Act, *, options: Options | None = None, stall_s: float = 20.0
) -> FlowError | Report:
    """Let a fake source act on a pull; how the pull ended."""

    async def main() -> FlowError | Report:
        listener = Listener("127.0.0.1", 0)
        listener.bind()

        async def handle(incoming: Incoming) -> None:
            async with incoming.accept(incoming.request.options) as session:
                fake = FakeSource(session)
                try:
                    await session.streams.next()
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(session.control.run_writer)
                        nursery.start_soon(fake.listen)
                        await act(fake)
                finally:
                    session.streams.close()

        settings = TransferSettings(
            use_cache=False,
            streams=1,
            options=options or Options(links="inside"),
            retry_for_s=0.0,
            stall_s=stall_s,
        )
        outcome: list[FlowError | Report] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, handle)
            with trio.fail_after(50):
                try:
                    outcome.append(await pull(listener.ticket(), b"", os.fsencode(target), settings))
                except FlowError as error:
                    outcome.append(error)
            nursery.cancel_scope.cancel()
        return outcome[0]

    before = snapshot(target.parent / "outside")
    ended = trio.run(main)
    assert snapshot(target.parent / "outside") == before
    assert set(os.listdir(target.parent)) <= {"outside", "state", "target"}
    return ended


def assert_refused(ended: FlowError | Report, target: Path, code: Exit = Exit.INTEGRITY) -> None:
    """It ended with this code, and nothing landed but what was verified."""
    assert isinstance(ended, FlowError), ended
    assert exit_code(ended) == code, repr(ended)
    assert ended.message
    for name in set(os.listdir(target)) - {".flow-staging"}:
        assert (name, (target / name).read_bytes()) == ("file", b"hello")


def chunk(data: bytes) -> bytes:
    return pack_chunks([(len(data), chunk_id(data))])


def small(name: bytes = b"file", data: bytes = b"hello", **changes: object) -> Entry:
    fields: dict[str, object] = {"chunks": chunk(data), "size": len(data)} | changes
    return Entry(name, FILE, 0o644, 1, fields["size"], fields["chunks"])  # type: ignore[arg-type]


# --- names and paths --------------------------------------------------------------------------------------------

BAD_NAMES = [
    b"/etc/owned",
    b"..",
    b".",
    b"",
    b"a/b",
    b"../outside/owned",
    b"nul\0",
    b".flow-staging",
    b"x" * 256,
]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("kind", ["file", "folder", "large", "link", "hard"])
def test_a_bad_name_is_refused(target: Path, name: bytes, kind: str) -> None:
    messages: dict[str, list[Message]] = {
        "file": [Offer([small(name)])],
        "folder": [DirectoryBegin(name)],
        "large": [ObjectBegin(Entry(name, FILE, 0o644, 1, 2 * MIB))],
        "link": [Offer([Entry(name, SYMLINK, 0o777, 1, 0, b"", b"there")])],
        "hard": [Offer([Entry(name, HARDLINK, 0o644, 1, 0, b"", b"there")])],
    }

    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), *messages[kind])

    assert_refused(attack(target, act), target)


@pytest.mark.parametrize(
    "link",
    [b"/etc/passwd", b"../outside/secret", b"a/../../outside/secret", b".flow-staging/lock", b"", b"a//b"],
)
def test_a_hard_link_to_elsewhere_is_refused(target: Path, link: bytes) -> None:
    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), Offer([Entry(b"zz", HARDLINK, 0o644, 1, 0, b"", link)]))

    assert_refused(attack(target, act), target)


def test_a_hard_link_through_a_symbolic_link_is_not_made(target: Path) -> None:
    target.mkdir()
    (target / "way-out").symlink_to("../outside")

    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), Offer([Entry(b"zz", HARDLINK, 0o600, 1, 0, b"", b"way-out/secret")]))
        fake.say(Offer([small(b"zzz")]))
        await fake.wanted(2)
        fake.send_record([(1, 0, 1)], b"hello")
        while not fake.failed:
            await fake.heard.park()
        fake.say(DirectoryEnd(0o755, 0))

    ended = attack(target, act)
    assert isinstance(ended, FlowError)
    assert not (target / "zz").exists()
    assert (target.parent / "outside" / "secret").stat().st_nlink == 1


def test_a_folder_that_is_a_symbolic_link_is_not_entered(target: Path) -> None:
    target.mkdir()
    (target / "way-out").symlink_to("../outside")

    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), DirectoryBegin(b"way-out"), Offer([small(b"owned")]))
        await fake.wanted()
        fake.send_record([(0, 0, 1)], b"hello")
        fake.say(DirectoryEnd(0o755, 0))
        fake.say_raw(b"\0\0\0\1\xc1")

    ended = attack(target, act)
    assert isinstance(ended, FlowError)


@pytest.mark.parametrize("link", [b"/etc/passwd", b"../../x", b"..", b"a/../../../x"])
def test_a_symbolic_link_out_of_the_root_fails_by_name(target: Path, link: bytes) -> None:
    async def act(fake: FakeSource) -> None:
        await fake.whole(
            [Entry(b"bad", SYMLINK, 0o777, 1, 0, b"", link), Entry(b"good", SYMLINK, 0o777, 1, 0, b"", b"x")]
        )

    ended = attack(target, act)
    assert not isinstance(ended, FlowError), ended
    assert ended.state == "incomplete"
    assert [(path, reason) for path, reason, _ in ended.failures] == [(b"bad", "link")]
    assert not os.path.lexists(target / "bad")
    assert os.readlink(target / "good") == "x"


@pytest.mark.parametrize("mode", [0o4755, 0o2755])
def test_set_id_bits_without_their_owner_are_refused(target: Path, mode: int) -> None:
    async def act(source: FakeSource) -> None:
        await source.whole([Entry(b"file", FILE, mode, 1, 5, chunk(b"hello"))])

    assert_refused(attack(target, act), target)
    assert not (target / "file").exists()


@pytest.mark.parametrize(("name", "count"), [(b"d", 300), (b"n" * 250, 20)])
def test_folders_too_deep_or_too_long_are_refused(target: Path, name: bytes, count: int) -> None:
    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), *[DirectoryBegin(name) for _ in range(count)])

    ended = attack(target, act)
    assert isinstance(ended, FlowError)
    assert exit_code(ended) == Exit.INTEGRITY, ended


@pytest.mark.parametrize("names", [[b"b", b"a"], [b"a", b"a"]])
def test_names_out_of_order_or_twice_are_refused(target: Path, names: list[bytes]) -> None:
    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), Offer([small(name) for name in names]))

    assert_refused(attack(target, act), target)


def test_names_that_the_file_system_takes_for_one_are_reported(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowengine.transfer.target.folds_names", lambda fd: True)
    names = [b"Name", "caf\u00e9".encode(), b"name", "cafe\u0301".encode(), b"other"]

    async def act(fake: FakeSource) -> None:
        await fake.whole([Entry(name, FILE, 0o644, 1, 0) for name in sorted(names)])

    ended = attack(target, act)
    assert isinstance(ended, Report), ended
    assert {(path, reason) for path, reason, _ in ended.failures} == {
        (b"name", "collision"),
        ("caf\u00e9".encode(), "collision"),
    }
    assert sorted(os.listdir(target)) >= ["Name", "cafe\u0301", "other"]


# --- offers that contradict themselves --------------------------------------------------------------------------

LARGE = Entry(b"large", FILE, 0o644, 1, 2 * MIB)
SOME = pack_chunks([(65536, chunk_id(bytes(65536)))])


@pytest.mark.parametrize(
    "messages",
    [
        [Offer([small()])],
        [DirectoryBegin(b"not-the-root")],
        [DirectoryBegin(b""), Offer([])],
        [DirectoryBegin(b""), Offer([small(b"%04d" % n) for n in range(1025)])],
        [DirectoryBegin(b""), Offer([small(size=4)])],
        [DirectoryBegin(b""), Offer([small(size=1 << 62)])],
        [DirectoryBegin(b""), Offer([small(chunks=b"x" * 35)])],
        [DirectoryBegin(b""), Offer([small(chunks=pack_chunks([(0, bytes(32))]), size=0)])],
        [DirectoryBegin(b""), Offer([small(chunks=pack_chunks([(1 << 31, bytes(32))]), size=1 << 31)])],
        [DirectoryBegin(b""), Offer([small(chunks=SOME * 9000, size=65536 * 9000)])],
        [DirectoryBegin(b""), Offer([small(chunks=SOME * 16, size=MIB)])],
        [DirectoryBegin(b""), ObjectRun(SOME)],
        [DirectoryBegin(b""), ObjectEnd()],
        [DirectoryBegin(b""), ObjectBegin(LARGE), ObjectBegin(LARGE)],
        [DirectoryBegin(b""), ObjectBegin(LARGE), ObjectRun(b"")],
        [DirectoryBegin(b""), ObjectBegin(LARGE), ObjectRun(SOME[:-1])],
        [DirectoryBegin(b""), ObjectBegin(LARGE), ObjectRun(SOME * 33)],
        [DirectoryBegin(b""), ObjectBegin(LARGE), ObjectRun(SOME * 9000)],
        [DirectoryBegin(b""), ObjectBegin(LARGE), ObjectRun(SOME), ObjectEnd()],
        [DirectoryBegin(b""), ObjectBegin(LARGE), DirectoryEnd(0o755, 0)],
        [DirectoryBegin(b""), ObjectBegin(Entry(b"large", FILE, 0o644, 1, 0))],
        [DirectoryBegin(b""), DirectoryEnd(0o755, 0), DirectoryEnd(0o755, 0)],
        [DirectoryBegin(b""), DirectoryEnd(0o755, 0), Finish(bytes(32), 0, 0, True)],
        [DirectoryBegin(b""), Finish(bytes(32), 0, 0, True)],
        [DirectoryBegin(b""), Lost(0, 0, 1, "gone", "gone")],
        [DirectoryBegin(b""), Want(1)],
        [DirectoryBegin(b""), Receipt(bytes(32), "completed", {})],
    ],
    ids=lambda messages: "+".join(type(message).__name__ for message in messages),
)  # fmt: skip
def test_an_offer_that_contradicts_itself_is_refused(target: Path, messages: list[Message]) -> None:
    async def act(fake: FakeSource) -> None:
        fake.say(*messages)

    assert_refused(attack(target, act), target)


def test_a_file_too_large_for_any_disk_is_refused(target: Path) -> None:
    async def act(fake: FakeSource) -> None:
        fake.say(
            DirectoryBegin(b""), ObjectBegin(Entry(b"large", FILE, 0o644, 1, (1 << 63) - 1)), ObjectRun(SOME)
        )

    ended = attack(target, act)
    assert isinstance(ended, FlowError)
    assert not (target / "large").exists()


# --- data -------------------------------------------------------------------------------------------------------


def data_attack(
    target: Path, send: Callable[[FakeSource], None], *, data: bytes = b"hello"
) -> FlowError | Report:
    """Offer one small file honestly, and once it is wanted send something."""

    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), Offer([small(data=data)]))
        await fake.wanted()
        assert fake.wants[0].kind == 1
        send(fake)

    return attack(target, act)


@pytest.mark.parametrize(
    "plain",
    [
        pytest.param(pack_record_header(STORED, 5, 5, [(0, 0, 1)]) + b"hellO", id="wrong content"),
        pytest.param(pack_record_header(STORED, 4, 4, [(0, 0, 1)]) + b"hell", id="too short"),
        pytest.param(pack_record_header(STORED, 9, 9, [(0, 0, 1)]) + b"hello too", id="more than announced"),
        pytest.param(pack_record_header(STORED, 10, 10, [(0, 0, 1), (0, 0, 1)]) + b"hellohello", id="twice in one"),
        pytest.param(pack_record_header(STORED, 10, 10, [(0, 0, 2)]) + b"hellohello", id="a chunk that is not there"),
        pytest.param(pack_record_header(STORED, 5, 5, [(7, 0, 1)]) + b"hello", id="an offer that is not there"),
        pytest.param(pack_record_header(STORED, 5, 5, [(0, 0, 0)]) + b"hello", id="an empty run"),
        pytest.param(pack_record_header(STORED, 5, 5, [(0, 1 << 31, 1 << 31)]) + b"hello", id="huge indices"),
        pytest.param(pack_record_header(STORED, 1 << 31, 1 << 31, [(0, 0, 1)]), id="a huge record"),
        pytest.param(pack_record_header(STORED, 5, 5, []) + b"hello", id="no runs"),
        pytest.param(pack_record_header(7, 5, 5, [(0, 0, 1)]) + b"hello", id="unknown codec"),
        pytest.param(pack_record_header(ZSTD, 5, 5, [(0, 0, 1)]) + b"hello", id="no zstd"),
        pytest.param(struct.pack("<I", 0xFFFF_FFFF) * 40, id="garbage"),
    ],
)  # fmt: skip
def test_data_that_is_not_what_was_wanted_is_refused(target: Path, plain: bytes) -> None:
    assert_refused(data_attack(target, lambda fake: fake.send(plain)), target)


@pytest.mark.parametrize("told", [True, False], ids=["its size told", "its size not told"])
def test_a_zip_bomb_is_refused(target: Path, told: bool) -> None:
    bomb = zstandard.ZstdCompressor(level=1, write_content_size=told).compress(bytes(512 * MIB))
    header = pack_record_header(ZSTD, len(bomb) + 5, len(bomb), [(0, 0, 1)])
    assert_refused(data_attack(target, lambda fake: fake.send(header + bomb)), target)


def test_a_chunk_that_came_already_is_refused(target: Path) -> None:
    def send(fake: FakeSource) -> None:
        fake.send_record([(0, 0, 1)], b"hello")
        fake.send_record([(0, 0, 1)], b"hello")

    ended = data_attack(target, send)
    assert isinstance(ended, FlowError)
    assert exit_code(ended) == Exit.INTEGRITY


def test_a_chunk_that_is_not_wanted_is_refused(target: Path) -> None:
    target.mkdir()
    (target / "file").write_bytes(b"hello")

    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), Offer([small()]))
        await fake.wanted()
        assert fake.wants[0].kind == 0
        fake.send_record([(0, 0, 1)], b"hello")

    ended = attack(target, act)
    assert isinstance(ended, FlowError)
    assert exit_code(ended) == Exit.INTEGRITY
    assert (target / "file").read_bytes() == b"hello"


def test_a_large_object_with_one_wrong_chunk_does_not_land(target: Path) -> None:
    parts = [bytes([n]) * 65536 for n in range(32)]

    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), ObjectBegin(LARGE), ObjectRun(b"".join(map(chunk, parts))), ObjectEnd())
        await fake.wanted()

        def send() -> None:
            with contextlib.suppress(OSError):  # the target hangs up at the wrong one
                for number, part in enumerate(parts):
                    fake.send_record([(0, number, 1)], part if number != 17 else b"!" * 65536)

        await trio.to_thread.run_sync(send)

    assert_refused(attack(target, act), target)


@pytest.mark.parametrize("garbage", [b"\xff" * 5000, b"\xf5" + bytes(4999), b"GET / HTTP/1.1\r\n\r\n" * 300])
def test_garbage_on_a_data_connection_is_refused(target: Path, garbage: bytes) -> None:
    assert_refused(data_attack(target, lambda fake: fake.session.streams.sockets[0].sendall(garbage)), target)


@pytest.mark.parametrize("position", [0, 5, 15, 16, 100, 1023])
def test_a_changed_bit_in_a_frame_is_refused(target: Path, position: int) -> None:
    def send(fake: FakeSource) -> None:
        out = bytearray(MAX_FRAME_BYTES)
        plain = pack_record_header(STORED, 5, 5, [(0, 0, 1)]) + b"hello"
        size = fake.sealer.seal_into([plain], out)
        out[position] ^= 1
        fake.session.streams.sockets[0].sendall(out[:size])

    assert_refused(data_attack(target, send), target)


def test_a_data_connection_that_ends_unsealed_is_no_end(target: Path) -> None:
    ended = data_attack(target, lambda fake: fake.session.streams.sockets[0].shutdown(socket.SHUT_WR))
    assert_refused(ended, target, Exit.TEMPORARY)


def test_a_sealed_end_before_everything_came_is_refused(target: Path) -> None:
    def send(fake: FakeSource) -> None:
        fake.send_end()
        fake.session.streams.sockets[0].shutdown(socket.SHUT_WR)
        fake.session.control.finish_writing()

    ended = attack_with_close(target, send)
    assert isinstance(ended, FlowError)
    assert exit_code(ended) in (Exit.TEMPORARY, Exit.INTEGRITY)
    assert not (target / "file").exists()


def attack_with_close(target: Path, send: Callable[[FakeSource], None]) -> FlowError | Report:
    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), Offer([small()]))
        await fake.wanted()
        send(fake)
        await fake.session.control.aclose()

    return attack(target, act)


# --- control connection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", b"\0\0\0\3\x92\x63\x00", b"\0\0\0\5hello", b"\0\1\0\0" + b"\x91" * 65536],
    ids=["empty", "huge", "no msgpack", "unknown tag", "text", "nested"],
)  # fmt: skip
def test_garbage_on_the_control_connection_is_refused(target: Path, data: bytes) -> None:
    async def act(fake: FakeSource) -> None:
        fake.say_raw(data)

    assert_refused(attack(target, act), target)


def test_a_flood_of_offers_is_refused(target: Path) -> None:
    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), ObjectBegin(Entry(b"large", FILE, 0o644, 1, 65536 * 100_000)))
        for _ in range(40):
            fake.say(*[ObjectRun(SOME * 16)] * 250)
            await trio.lowlevel.checkpoint()

    assert_refused(attack(target, act), target)


def test_a_silent_source_is_given_up(target: Path) -> None:
    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""))

    ended = attack(target, act, stall_s=0.3)
    assert_refused(ended, target, Exit.TEMPORARY)
    assert isinstance(ended, FlowError)
    assert "said nothing" in ended.message


def test_a_source_that_never_answers_the_request_is_given_up(target: Path) -> None:
    async def main() -> None:
        listener = Listener("127.0.0.1", 0)
        listener.bind()

        async def handle(incoming: Incoming) -> None:
            await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, handle)
            settings = TransferSettings(use_cache=False, retry_for_s=0.0, stall_s=0.3)
            with trio.fail_after(60), pytest.raises(FlowError, match="said nothing"):
                await pull(listener.ticket(), b"", os.fsencode(target), settings)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert not target.exists()


def test_an_honest_fake_is_believed(target: Path) -> None:
    """The attacks fail for what is wrong with them, not for being fake."""

    async def act(fake: FakeSource) -> None:
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                await fake.wanted()
                fake.send_record([(0, 0, 1)], b"hello")

            nursery.start_soon(answer)
            await fake.whole([small()])

    ended = attack(target, act)
    assert isinstance(ended, Report), ended
    assert ended.state == "completed"
    assert (target / "file").read_bytes() == b"hello"
    assert profile_named("64KiB").maximum >= 65536


# --- the end ----------------------------------------------------------------------------------------------------


def test_a_version_that_is_not_what_was_offered_is_refused(target: Path) -> None:
    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), Offer([small()]), DirectoryEnd(0o755, 0), Finish(bytes(32), 1, 5, True))
        await trio.sleep_forever()

    ended = attack(target, act)
    assert_refused(ended, target)
    assert "version ids differ" in str(ended)


def test_nothing_is_deleted_before_everything_landed(target: Path) -> None:
    target.mkdir()
    (target / "extra").write_bytes(b"not at the source")
    seen: list[list[str]] = []

    def acting(deliver: bool) -> Act:
        async def act(fake: FakeSource) -> None:
            async with trio.open_nursery() as nursery:

                async def answer() -> None:
                    await fake.wanted()
                    seen.append(os.listdir(target))
                    if deliver:
                        fake.send_record([(0, 0, 1)], b"hello")
                    else:
                        fake.session.streams.shut()

                nursery.start_soon(answer)
                await fake.whole([small()])

        return act

    options = Options(links="inside", delete=True)
    assert isinstance(attack(target, acting(False), options=options), FlowError)
    assert (target / "extra").exists()
    ended = attack(target, acting(True), options=options)
    assert isinstance(ended, Report), ended
    assert (target / "file").read_bytes() == b"hello"
    assert not (target / "extra").exists()
    assert all("extra" in names for names in seen)


# --- the finer cut ----------------------------------------------------------------------------------------------

OLD = random.Random(1).randbytes(20_000)
NEW = OLD[:9_000] + b"edited" + OLD[9_000:]


def _finer_act(change: Callable[[bytes], bytes], payload: bytes = b"") -> Act:
    """Offer a file that replaces another, and answer the wish for a finer cut with what `change` makes of the true one."""

    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), Offer([small(b"file", NEW)]))
        await fake.wanted()
        assert fake.wants[0] == Want(WANT_NONE, b"", b"\x01")
        fake.say(Finer(0, change(FineCutter(fake.session.profile).packed(NEW))))
        await fake.wanted(2)
        if payload:
            fake.send_record([(1, 0, 1)], payload)
        await trio.sleep_forever()

    return act


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: packed[:-FINE_BYTES],
        lambda packed: packed + packed[:FINE_BYTES],
        lambda packed: packed[:-1],
        lambda packed: b"",
        lambda packed: bytes(FINE_BYTES) + packed,
        lambda packed: (2**32 - 1).to_bytes(4, "little") + packed[4:],
    ],
    ids=["short", "long", "torn", "empty", "nothing", "huge"],
)
def test_a_finer_cut_of_another_size_is_refused(target: Path, change: Callable[[bytes], bytes]) -> None:
    target.mkdir()
    (target / "file").write_bytes(OLD)
    ended = attack(target, _finer_act(change))
    assert isinstance(ended, FlowError)
    assert exit_code(ended) == Exit.INTEGRITY
    assert (target / "file").read_bytes() == OLD


def test_a_finer_cut_that_nobody_asked_for_is_refused(target: Path) -> None:
    async def act(fake: FakeSource) -> None:
        fake.say(DirectoryBegin(b""), Offer([small()]))
        await fake.wanted()
        fake.say(Finer(0, bytes(FINE_BYTES)))
        await trio.sleep_forever()

    assert_refused(attack(target, act), target)


@pytest.mark.parametrize("honest_ids", [True, False])
def test_fine_chunks_that_are_not_the_chunk_are_refused(target: Path, honest_ids: bool) -> None:
    """Bytes that are not those of the fine id; and fine ids that fit the bytes, but together not the chunk."""
    target.mkdir()
    (target / "file").write_bytes(OLD)
    wrong = b"x" * len(NEW)

    def change(packed: bytes) -> bytes:
        identity = bytes(FINE_ID_BYTES) if honest_ids else fine_id(wrong)
        return len(NEW).to_bytes(4, "little") + identity

    ended = attack(target, _finer_act(change, wrong))
    assert isinstance(ended, FlowError)
    assert exit_code(ended) == Exit.INTEGRITY
    assert (target / "file").read_bytes() == OLD


def test_a_fine_chunk_that_is_lost_fails_its_object_alone(target: Path) -> None:
    target.mkdir()
    (target / "file").write_bytes(OLD)
    entries = [small(b"file", NEW), small(b"other", b"other")]

    async def act(fake: FakeSource) -> None:
        recorder = ManifestRecorder(ManifestBuilder(None, Header(fake.session.profile)))
        recorder.enter(b"")
        recorder.entries(entries)
        recorder.leave(0o755, 0, b"")
        summary = recorder.finish()
        fake.say(DirectoryBegin(b""), Offer(entries))
        await fake.wanted()
        fake.say(Finer(0, FineCutter(fake.session.profile).packed(NEW)))
        await fake.wanted(2)
        fake.say(Lost(1, 0, len(FineCutter(fake.session.profile).packed(NEW)) // FINE_BYTES, "local", "gone"))
        fake.send_record([(0, 1, 1)], b"other")
        fake.say(DirectoryEnd(0o755, 0))
        fake.say(Finish(summary.version_id, summary.objects, summary.size_bytes, True))
        while fake.receipt is None:
            await fake.heard.park()
        fake.send_end()

    ended = attack(target, act)
    assert isinstance(ended, Report)
    assert ended.state == "incomplete"
    assert (target / "file").read_bytes() == OLD
    assert (target / "other").read_bytes() == b"other"
