"""Control messages: what one side says the other reads, and anything else is a protocol error."""

from __future__ import annotations

import msgspec
import pytest

from flowengine.errors import ProtocolError
from flowengine.manifest import FILE, Entry
from flowengine.wire import messages as m

ENTRY = Entry(b"name", FILE, 0o644, 1_700_000_000_000_000_000, 5, b"\x05\0\0\0" + bytes(32))
SAID = [
    m.Open("source", b"sub/\xff", bytes(16), 4, "64KiB", m.Options(delete=True, filters=[(False, b"*.o")])),
    m.Opened(4, bytes(16)),
    m.Refuse("denied", "no", "ask", False),
    m.DirectoryBegin(b"\xff"),
    m.DirectoryEnd(0o755, -1, b"", False, False),
    m.Offer([ENTRY]),
    m.ObjectBegin(ENTRY),
    m.ObjectRun(bytes(72)),
    m.ObjectEnd("changed", "it moved"),
    m.Failed(b"p", "vanished", "gone"),
    m.Lost(1, 2, 3, "changed", "gone"),
    m.Listed([(b"n", 0o100644, 5, 6)], True),
    m.Totals(1, 2, True),
    m.Finish(bytes(32), 1, 2, True),
    m.Finish(bytes(32), 1, 2, True, b"checkpoint"),
    m.Want(m.WANT_SOME, b"\x05"),
    m.Want(m.WANT_NONE, b"", b"\x01"),
    m.Want(m.WANT_ALL, whole=3),
    m.Subtrees([m.Folder(0, b"a", 0o755, 1), m.Folder(1, b"b", 0o755, -2, b"\x90")]),
    m.Finer(7, bytes(32)),
    m.Received(1 << 40),
    m.Landed(1, 2),
    m.Progress({"a": 1}, "the disk", ["1.00 s: streams 12: try more"]),
    m.WantStreams(12),
    m.LeaveStreams([1, 2]),
    m.ManifestPart(b"FLOWMANIFEST", False),
    m.Rate(200_000_000),
    m.Receipt(bytes(32), "completed", {"a": 1}, "the disk"),
    m.Receipt(bytes(32), "completed", {"a": 1}, "", b"checkpoint"),
]


@pytest.mark.parametrize("message", SAID, ids=lambda message: type(message).__name__)
def test_what_is_said_is_read(message: m.Message) -> None:
    assert m.decode(m.encode(message)) == message


def test_every_message_is_among_them() -> None:
    assert {type(message) for message in SAID} == set(m.Message.__args__)


@pytest.mark.parametrize("message", SAID, ids=lambda message: type(message).__name__)
def test_fields_of_a_newer_peer_are_ignored(message: m.Message) -> None:
    fields = msgspec.msgpack.decode(m.encode(message))
    assert m.decode(msgspec.msgpack.encode([*fields, "something newer"])) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x91\x63",
        b"\x92\x09\xa8" + b"\xa8" * 8,  # a text that is not UTF-8
        b"\xdd\xff\xff\xff\xff",
        m.encode(SAID[0])[:-1],
        m.encode(SAID[0]) + b"\0",
        msgspec.msgpack.encode([6, [[b"a/../b" * 100, 0, 0, 0]]]),
    ],
)
def test_anything_else_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="does not decode"):
        m.decode(data)


def test_more_folders_than_subtrees_have_are_not_even_made() -> None:
    folders = [m.Folder(0, b"", 0, 0)] * m.MAX_SUBTREES_FOLDERS
    assert m.decode(m.encode(m.Subtrees(folders))) == m.Subtrees(folders)
    with pytest.raises(ProtocolError, match="does not decode"):
        m.decode(m.encode(m.Subtrees([*folders, folders[0]])))
