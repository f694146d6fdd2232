"""What a gatherer tells is what it took, and a manifest is the same whether its folders come one by one or gathered."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from flowengine.chunking import pack_chunks
from flowengine.manifest import FILE, Block, Entry, ManifestBuilder, Summary
from flowengine.store.encoded import parse_block
from flowengine.store.proofs import encode_entries
from flowengine.store.scan_events import (
    Batch,
    DirectoryEntered,
    DirectoryLeft,
    Event,
    LargeBegun,
    LargeEnded,
    ScanFailed,
)
from flowengine.transfer import gathering
from flowengine.transfer.gathering import Gathered, Gatherer
from flowengine.transfer.placing_subtrees import check_folders, each_of, offers_of
from flowengine.transfer.recorder import ManifestRecorder
from flowengine.transfer.sinks import TargetDirectory
from flowengine.units import MIB
from flowengine.wire.messages import (
    MAX_OFFER_CHUNKS,
    MAX_OFFER_ENTRIES,
    MAX_SUBTREES_FOLDERS,
    DirectoryBegin,
    EncodedOffer,
    Folder,
    Subtrees,
)

MOST_BYTES = 8 * MIB
"""What a gatherer keeps back at most."""
Told = tuple[object, ...]


def block(files: int, chunks: int, size_bytes: int) -> Block:
    """So many files, each of so many chunks of this size; no chunk comes twice."""
    entries = []
    for number in range(files):
        packed = pack_chunks([(size_bytes, struct.pack("<QQ16x", number, at)) for at in range(chunks)])
        entries.append(Entry(b"%05d" % number, FILE, 0o644, number, chunks * size_bytes, packed))
    made = parse_block(encode_entries(entries))
    assert made is not None
    return made


SHAPES = [
    block(1, 1, 10),
    block(3, 0, 0),
    block(2, 3, 700),
    block(250, 1, 100),
    block(1024, 1, 1),
    block(60, 90, 50),
    block(9, 14, 64_000),
]
LINK = Entry(b"link", 1, 0o777, 0, 0, b"", b"elsewhere")
OPS = ["enter", "enter", "enter", "leave", "leave", "leave", "block", "block", "other", "odd leave"]


@st.composite
def scans(draw: st.DrawFn, most: int = 120) -> list[Event]:
    """The events of some tree below a root that is entered first and left last."""
    events: list[Event] = [DirectoryEntered(b"", b"/root")]
    depth, names = 0, 0
    for op in draw(st.lists(st.sampled_from(OPS), max_size=most)):
        if op == "enter":
            names += 1
            events.append(DirectoryEntered(b"%06d" % names, b"/root/x"))
            depth += 1
        elif op == "block":
            events.append(Batch(draw(st.sampled_from(SHAPES)), None, [-1], b"/root/x"))
        elif op == "other":
            events += draw(
                st.sampled_from(
                    [
                        [Batch([LINK], None, [-1], b"/root/x")],
                        [LargeBegun(Entry(b"large", FILE, 0o644, 0, MIB), b"/l"), LargeEnded("", "")],
                        [ScanFailed(b"x", "local", "it cannot be read")],
                    ]
                )
            )
        elif depth:
            odd = op == "odd leave"
            extra = draw(st.sampled_from([b"", b"attributes"])) if odd else b""
            complete = not odd or bool(extra) or draw(st.booleans())
            apply = not odd or not complete
            events.append(
                DirectoryLeft(draw(st.integers(0, 0o1777)), draw(st.integers()), extra, complete, apply)
            )
            depth -= 1
    events += [DirectoryLeft(0o755, number, b"", True, True) for number in range(depth)]
    return [*events, DirectoryLeft(0o755, 0, b"", True, True)]


def said(event: Event) -> Told:
    """An event in words that a gathered folder has as well."""
    if isinstance(event, DirectoryEntered):
        return "enter", event.name
    if isinstance(event, Batch) and event.block is not None:
        return "files", event.block.data
    if isinstance(event, DirectoryLeft):
        return "leave", event.mode, event.mtime_ns, event.extra, event.complete, event.apply
    return "other", id(event)


def expanded(told: Event | Gathered) -> list[Told]:
    if not isinstance(told, Gathered):
        return [said(told)]
    found: list[Told] = []
    for message in each_of(told.folders):
        if isinstance(message, DirectoryBegin):
            found.append(("enter", message.name))
        elif isinstance(message, EncodedOffer):
            found.append(("files", message.data))
        else:
            end = message
            found.append(("leave", end.mode, end.mtime_ns, end.extra, end.complete, end.apply))
    return found


def check_gathered(one: Gathered, depth: int) -> None:
    """It is what one message may hold, and its parts agree."""
    root = TargetDirectory(b"", b"", -1, None, created=True)
    check_folders(root, one.folders, depth)
    assert 1 < len(one.folders) <= MAX_SUBTREES_FOLDERS
    blocks = [found for found in one.blocks if found is not None]
    assert [batch.block for batch in one.batches] == blocks
    assert [folder.entries for folder in one.folders] == [
        found.data if found is not None else b"" for found in one.blocks
    ]
    assert offers_of(Subtrees(one.folders)) == len(blocks)
    assert 0 < sum(found.count for found in blocks) <= MAX_OFFER_ENTRIES
    assert sum(found.chunks for found in blocks) <= MAX_OFFER_CHUNKS
    assert sum(found.size_bytes for found in blocks) <= MOST_BYTES


@given(scans(), st.sampled_from([-1, 1 << 62]))
def test_what_is_told_is_what_was_taken_in_the_same_order(events: list[Event], held_ns: int) -> None:
    """Whether what is kept back is soon too old, or never."""
    gatherer = Gatherer()
    told: list[Told] = []
    depth = 0
    with mock.patch.object(gathering, "HELD_NS", held_ns):
        for event in events:
            for one in gatherer.take(event):
                if isinstance(one, Gathered):
                    check_gathered(one, depth)
                elif isinstance(one, DirectoryEntered | DirectoryLeft):
                    depth += 1 if isinstance(one, DirectoryEntered) else -1
                told += expanded(one)
    assert gatherer.drop() == []
    assert told == [said(event) for event in events]


@given(scans())
def test_what_is_kept_back_is_bounded_and_dropped_once(events: list[Event]) -> None:
    for end in range(0, len(events), 7):
        gatherer = Gatherer()
        told: list[Event | Gathered] = []
        with mock.patch.object(gathering, "HELD_NS", 1 << 62):
            for event in events[:end]:
                told += gatherer.take(event)
        dropped = gatherer.drop()
        assert sum(batch.block.count for batch in dropped if batch.block is not None) <= MAX_OFFER_ENTRIES
        assert sum(batch.block.size_bytes for batch in dropped if batch.block is not None) <= MOST_BYTES
        out = [
            batch
            for one in told
            for batch in (one.batches if isinstance(one, Gathered) else [one])
            if isinstance(batch, Batch)
        ]
        taken = [event for event in events[:end] if isinstance(event, Batch)]
        assert list(map(id, [*out, *dropped])) == list(map(id, taken))
        assert gatherer.drop() == []
        assert list(gatherer.let_go()) == []


@given(st.lists(st.sampled_from(SHAPES[:4]), min_size=1, max_size=300))
def test_a_long_row_of_folders_is_told_in_few_that_are_bounded(blocks: Sequence[Block]) -> None:
    events: list[Event] = []
    for number, files in enumerate(blocks):
        events += [
            DirectoryEntered(b"%06d" % number, b"/root/x"),
            Batch(files, None, [-1], b"/root/x"),
            DirectoryLeft(0o755, number, b"", True, True),
        ]
    gatherer = Gatherer()
    told: list[Event | Gathered] = []
    with mock.patch.object(gathering, "HELD_NS", 1 << 62):
        for event in events:
            told += gatherer.take(event)
    told += gatherer.let_go()
    for one in told:
        if isinstance(one, Gathered):
            check_gathered(one, 1)
    assert [words for one in told for words in expanded(one)] == [said(event) for event in events]
    # A folder that closes one fills it: only the last one and those that alone are much hold less.
    assert sum(isinstance(one, Gathered) for one in told) <= 2 + sum(b.count for b in blocks) // 256 + (
        len(blocks) // 100
    )


# --- manifests --------------------------------------------------------------------------------------------------

NAMES = st.binary(min_size=1, max_size=20).filter(
    lambda name: not {0, 47} & {*name} and name not in (b".", b"..")
)


@st.composite
def subtrees(draw: st.DrawFn) -> list[tuple[Folder, Block | None]]:
    """Folders as they are met, names of one folder in order."""
    found: list[tuple[Folder, Block | None]] = []

    def fill(depth: int, most: int) -> None:
        for name in sorted(draw(st.sets(NAMES, max_size=most))):
            files = draw(st.none() | st.sampled_from(SHAPES))
            data = files.data if files is not None else b""
            mtime_ns = draw(st.integers(-(2**63), 2**63 - 1))
            found.append((Folder(depth, name, draw(st.integers(0, 0o1777)), mtime_ns, data), files))
            if depth < 4:
                fill(depth + 1, draw(st.integers(0, 2)))

    fill(0, 4)
    return found


def manifest(what: list[tuple[Folder, Block | None]], way: str, *, sink: bool) -> tuple[Summary, bytes]:
    written: list[bytes] = []
    builder = ManifestBuilder(written.append if sink else None)
    recorder = ManifestRecorder(builder)
    recorder.enter(b"")
    if way == "gathered":
        recorder.subtrees([folder for folder, _ in what], [files for _, files in what])
    else:
        blocks = iter([files for _, files in what if files is not None])
        for message in each_of([folder for folder, _ in what]):
            if isinstance(message, DirectoryBegin):
                recorder.enter(message.name)
            elif isinstance(message, EncodedOffer):
                recorder.block(next(blocks))
            else:
                recorder.leave(message.mode, message.mtime_ns, message.extra)
    recorder.leave(0o755, 0, b"")
    return recorder.finish(), b"".join(written)


@given(subtrees(), st.booleans())
def test_a_manifest_is_the_same_however_its_folders_come(
    what: list[tuple[Folder, Block | None]], sink: bool
) -> None:
    assert manifest(what, "gathered", sink=sink) == manifest(what, "one by one", sink=sink)


def test_a_manifest_of_many_folders_is_the_same_where_pages_of_folders_and_of_files_end() -> None:
    long = block(3000, 1, 7)
    assert not long.is_one_page
    what: list[tuple[Folder, Block | None]] = [
        (Folder(0, b"%05d" % number, 0o755, number, one.data if one is not None else b""), one)
        for number in range(2500)
        for one in [None if number % 5 == 0 else long if number == 1234 else SHAPES[number % 3]]
    ]
    for sink in (False, True):
        assert manifest(what, "gathered", sink=sink) == manifest(what, "one by one", sink=sink)
