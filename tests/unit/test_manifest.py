"""Manifests: what a builder refuses, what a reader finds, and what a liar cannot do."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from blake3 import blake3

from flowengine.chunking import PROFILES, Profile, pack_chunks
from flowengine.errors import IntegrityError, NotFound, ProtocolError, UsageError
from flowengine.manifest import (
    DIRECTORY,
    FILE,
    FLAG_SPARSE,
    HARDLINK,
    MAX_DEPTH,
    MAX_PAGE_BYTES,
    SYMLINK,
    Entry,
    Extra,
    Header,
    ManifestBuilder,
    ManifestReader,
    Summary,
    chunk_count,
    cut_pages,
    decode_extra,
    diff,
    encode_extra,
)
from flowengine.manifest.entries import Kind, Node, Root, Subdirectory, digest, encode
from flowengine.manifest.records import END_MAGIC, FILE_CONTEXT, FOOTER, MAGIC, RECORD

SPEC = Path(__file__).resolve().parents[2] / "docs" / "spec" / "manifest.md"
CHUNK = pack_chunks([(5, b"c" * 32)])


def file(name: bytes, mtime_ns: int = 0) -> Entry:
    return Entry(name, FILE, 0o644, mtime_ns, 5, pack_chunks([(5, blake3(name).digest())]))


def build(fill: Callable[[ManifestBuilder], object], header: Header | None = None) -> tuple[Summary, bytes]:
    out = bytearray()
    builder = ManifestBuilder(out.extend, header)
    builder.begin_directory(b"")
    fill(builder)
    builder.end_directory(0o750, 9)
    return builder.finish(), bytes(out)


def reader(data: bytes, version_id: bytes | None = None) -> ManifestReader:
    return ManifestReader(lambda offset, length: data[offset : offset + length], len(data), version_id)


def started(header: Header | None = None) -> ManifestBuilder:
    builder = ManifestBuilder(None, header)
    builder.begin_directory(b"")
    return builder


def sample(builder: ManifestBuilder) -> None:
    builder.add_entries([file(b"a"), Entry(b"link", SYMLINK, 0o777, 3, link=b"../a")])
    builder.begin_directory(b"d")
    builder.add_entries([file(b"b"), Entry(b"again", HARDLINK, 0o644, 0, link=b"a")][::-1])
    builder.begin_directory(b"deep")
    builder.end_directory(0o700, 5)
    builder.end_directory(0o755, 4)
    builder.begin_directory(b"e")
    builder.end_directory(0o755, 6)


# ---- what is written -------------------------------------------------------------------------------------


def test_the_example_of_the_specification() -> None:
    def fill(builder: ManifestBuilder) -> None:
        hello = pack_chunks([(6, blake3(b"hello\n").digest())])
        builder.add_entries(
            [
                Entry(b"a.txt", FILE, 0o644, 1_700_000_000_000_000_000, 6, hello),
                Entry(b"link", SYMLINK, 0o777, 0, link=b"a.txt"),
            ]
        )
        builder.begin_directory(b"empty")
        builder.end_directory(0o755, 0)

    _, data = build(fill)
    block = SPEC.read_text(encoding="utf-8").rpartition("```text\n")[2].partition("```")[0]
    shown = "".join(line[4:] for line in block.splitlines() if not line.startswith("#"))
    assert bytes.fromhex(shown) == data


def test_a_walk_gives_directories_before_what_is_in_them() -> None:
    summary, data = build(sample)
    opened = reader(data, summary.version_id)
    assert summary == opened.summary == opened.verify()
    assert summary[1:] == (4, 3, 10, 2)
    assert [(path, e.name, e.kind, e.mtime_ns) for path, e in opened.walk()] == [
        (b"", b"a", FILE, 0),
        (b"", b"link", SYMLINK, 3),
        (b"", b"d", DIRECTORY, 4),
        (b"d", b"again", HARDLINK, 0),
        (b"d", b"b", FILE, 0),
        (b"d", b"deep", DIRECTORY, 5),
        (b"", b"e", DIRECTORY, 6),
    ]
    assert [(path, e.name) for path, e in opened.walk(b"d")] == [
        (b"d", b"again"),
        (b"d", b"b"),
        (b"d", b"deep"),
    ]


def test_an_empty_version() -> None:
    summary, data = build(lambda builder: None)
    assert summary[1:] == (0, 0, 0, 0)
    assert [*reader(data).walk()] == []
    assert reader(data).root == Entry(b"", DIRECTORY, 0, 0)


def test_lookup_finds_every_kind_and_says_what_is_missing() -> None:
    opened = reader(build(sample)[1])
    assert opened.lookup(b"") is opened.root
    assert opened.lookup(b"d/again").link == b"a"
    assert (opened.lookup(b"d").kind, opened.lookup(b"d").size) == (DIRECTORY, 5)
    for path in (b"nothing", b"d/deep/x", b"a/x", b"/a", b"d//b", b"d/"):
        with pytest.raises(NotFound):
            opened.lookup(path)
    with pytest.raises(NotFound, match="'d/b' is not a directory"):
        next(opened.walk(b"d/b"))


def test_ids_do_not_need_a_file() -> None:
    builder = started()
    sample(builder)
    builder.end_directory(0o750, 9)
    assert builder.finish() == build(sample)[0]


def test_the_root_counts_only_where_asked() -> None:
    def version(header: Header, mode: int, mtime_ns: int) -> tuple[Summary, Entry]:
        out = bytearray()
        builder = ManifestBuilder(out.extend, header)
        builder.begin_directory(b"")
        builder.end_directory(mode, mtime_ns)
        summary = builder.finish()
        return summary, reader(bytes(out)).root

    assert version(Header(), 0o755, 1) == version(Header(), 0o700, 2)
    kept = Header(root_attributes=True)
    assert version(kept, 0o755, 1)[0] != version(kept, 0o755, 2)[0]
    assert version(kept, 0o755, 1)[1] == Entry(b"", DIRECTORY, 0o755, 1)


def test_the_profile_and_the_options_are_part_of_the_version() -> None:
    headers = [Header(profile) for profile in PROFILES.values()]
    headers += [Header(xattrs=True), Header(owner=True), Header(root_attributes=True)]
    versions = {build(lambda builder: None, header)[0].version_id for header in headers}
    assert len(versions) == len(headers)
    for header in headers:
        assert Header.decode(header.encode()) == header
        assert reader(build(sample, header)[1]).header == header


def test_pages_have_both_bounds() -> None:
    plain = [Entry(b"%06d" % i, FILE, 0o644, 0) for i in range(20_000)]
    pages = [*cut_pages(plain)]
    assert [e for page in pages for e in page] == plain
    assert 60 < len(pages) < 110
    unlucky = [e for page in pages for e in page[:-1]]  # no name of these ends a page by itself
    assert {len(page) for page in [*cut_pages(unlucky)][:-1]} == {1024}
    heavy = [Entry(b"%06d" % i, SYMLINK, 0o777, 0, link=b"x" * 4096) for i in range(1000)]
    sizes = [len(encode(page)) for page in cut_pages(heavy)]
    assert len(sizes) > 30
    assert max(sizes) < MAX_PAGE_BYTES


@pytest.mark.slow
def test_the_heaviest_page_fits() -> None:
    extra = encode_extra(Extra(xattrs=((b"user.x", b"x" * 65_500),)))
    runs = struct.pack("<32sQQ", b"r" * 32, 2000, 2000) * 1024
    entries = [
        Entry(b"%05d" % i + b"n" * 250, FILE, 0o644, 0, 2000 * 1024, extra=extra, runs=runs, depth=1)
        for i in range(50)
    ]
    builder = started(Header(xattrs=True))
    for page in cut_pages(entries):
        assert len(builder.add_page(page).data) <= MAX_PAGE_BYTES


@pytest.mark.parametrize("removed", [0, 500, 9_999])
def test_a_change_of_one_entry_changes_few_pages(removed: int) -> None:
    entries = [file(b"%06d" % i) for i in range(10_000)]
    before = {encode(page) for page in cut_pages(entries)}
    after = {encode(page) for page in cut_pages(entries[:removed] + entries[removed + 1 :])}
    assert len(before ^ after) <= 3


@pytest.mark.slow
def test_a_change_in_a_large_object_changes_few_runs() -> None:
    chunks = [(65_536, blake3(b"%d" % i).digest()) for i in range(60_000)]

    def runs(chunks: list[tuple[int, bytes]]) -> set[bytes]:
        collect = started().new_object()
        collect.feed(pack_chunks(chunks))
        found = collect.finish()
        assert (found.depth, found.chunk_count) == (1, len(chunks))
        return {found.runs[at : at + 48] for at in range(0, len(found.runs), 48)}

    before = runs(chunks)
    assert len(before) > 80
    assert len(before ^ runs([*chunks[:30_000], (1, b"n" * 32), *chunks[30_000:]])) <= 4


# ---- large objects ---------------------------------------------------------------------------------------


def large(builder: ManifestBuilder, name: bytes, packed: bytes) -> Entry:
    collect = builder.new_object()
    collect.feed(packed)
    return Entry(name, FILE, 0o644, 0, **collect.finish().fields())


@pytest.mark.slow
def test_two_levels_of_runs() -> None:
    packed = pack_chunks([(100, bytes(2) + struct.pack("<Q", i * i) + bytes(22)) for i in range(66_000)])
    summary, data = build(lambda b: b.add_entries([large(b, b"o", packed)]))
    opened = reader(data)
    entry = opened.lookup(b"o")
    assert (entry.depth, chunk_count(entry), entry.size) == (2, 66_000, 6_600_000)
    pieces = [*opened.chunks(b"", entry)]
    assert b"".join(pieces) == packed
    assert max(map(len, pieces)) == 64 * 36
    assert opened.verify() == summary


def test_objects_with_equal_runs_may_come_mixed() -> None:
    packed = pack_chunks([(i + 1, blake3(b"%d" % i).digest()) for i in range(1500)])

    def fill(builder: ManifestBuilder) -> None:
        first, second = builder.new_object(), builder.new_object()
        for at in range(0, len(packed), 3600):
            first.feed(packed[at : at + 3600])
            second.feed(packed[at : at + 3600])
        a, b = (c.finish().fields() for c in (first, second))
        builder.add_entries([Entry(b"a", FILE, 0, 0, **a)])
        builder.begin_directory(b"d")
        builder.add_entries([Entry(b"b", FILE, 0, 0, **b)])
        builder.end_directory(0, 0)

    summary, data = build(fill)
    opened = reader(data)
    assert opened.verify() == summary
    for directory, name in ((b"", b"a"), (b"d", b"b")):
        entry = next(e for path, e in opened.walk(directory) if e.name == name)
        assert b"".join(opened.chunks(directory, entry)) == packed
    with pytest.raises(UsageError, match="not an entry"):
        next(opened.chunks(b"d", opened.lookup(b"a")))


def test_a_run_must_be_added_before_its_page() -> None:
    entry = Entry(b"o", FILE, 0, 0, 2000, runs=struct.pack("<32sQQ", b"r" * 32, 2000, 2000), depth=1)
    with pytest.raises(UsageError, match="'' names a run of chunks that was not added"):
        build(lambda b: b.add_page([entry]))


@pytest.mark.parametrize(
    "packed", [b"x", pack_chunks([(0, b"c" * 32)]), pack_chunks([((4 << 20) + 1, b"c" * 32)])]
)
def test_packed_chunks_are_checked(packed: bytes) -> None:
    with pytest.raises(ProtocolError):
        started().new_object().feed(packed)


# ---- lies of entries -------------------------------------------------------------------------------------


def run(size: int, chunks: int) -> bytes:
    return struct.pack("<32sQQ", b"r" * 32, size, chunks)


RUN = run(2000, 2000)

LIES = {
    "size 6 but its chunks hold 5": Entry(b"x", FILE, 0, 0, 6, CHUNK),
    "size is 6 but its chunks hold 10": Entry(b"x", FILE, 0, 0, 6, CHUNK * 2),
    "chunk list is cut off": Entry(b"x", FILE, 0, 0, 5, CHUNK + b"y"),
    "empty or larger": Entry(b"x", FILE, 0, 0, 0, pack_chunks([(0, b"c" * 32)])),
    "or larger than": Entry(b"x", FILE, 0, 0, 5 << 20, pack_chunks([(5 << 20, b"c" * 32)])),
    "has runs and depth 0": Entry(b"x", FILE, 0, 0, 5, CHUNK, runs=RUN),
    "missing, cut off": Entry(b"x", FILE, 0, 0, 2000, depth=1),
    "beside a chunk list": Entry(b"x", FILE, 0, 0, 5, CHUNK, runs=RUN, depth=1),
    "cut off, or stands": Entry(b"x", FILE, 0, 0, 2000, runs=RUN + b"y", depth=1),
    "its runs hold 2000": Entry(b"x", FILE, 0, 0, 2001, runs=RUN, depth=1),
    "claims 1 bytes in 2000 chunks": Entry(b"x", FILE, 0, 0, 1, runs=run(1, 2000), depth=1),
    "though an entry holds 1024": Entry(b"x", FILE, 0, 0, 9, runs=run(9, 9), depth=1),
    "a file and has a link target": Entry(b"x", FILE, 0, 0, 5, CHUNK, b"l"),
    "a link and has a size": Entry(b"x", SYMLINK, 0, 0, 5, CHUNK, b"l"),
    "or flags": Entry(b"x", SYMLINK, 0, 0, link=b"l", flags=FLAG_SPARSE),
    "target is empty": Entry(b"x", SYMLINK, 0, 0),
    "has a NUL": Entry(b"x", SYMLINK, 0, 0, link=b"a\0b"),
    "not a path below the root": Entry(b"x", HARDLINK, 0, 0, link=b"../a"),
    "'/a' is not a path": Entry(b"x", HARDLINK, 0, 0, link=b"/a"),
    "'dir/y' comes later": Entry(b"x", HARDLINK, 0, 0, link=b"dir/y"),
    "'dir/x' comes later": Entry(b"x", HARDLINK, 0, 0, link=b"dir/x"),
    "'dir/a/b' comes later": Entry(b"x", HARDLINK, 0, 0, link=b"dir/a/b"),
    "keeps none": Entry(b"x", FILE, 0, 0, extra=encode_extra(Extra(uid=0))),
    "has extended attributes in": Entry(b"x", FILE, 0, 0, extra=encode_extra(Extra(((b"user.a", b""),)))),
    "does not decode": Entry(b"x", FILE, 0, 0, extra=b"\xff"),
}


@pytest.mark.parametrize("why", LIES)
def test_an_entry_that_contradicts_itself_is_named(why: str) -> None:
    builder = started()
    builder.begin_directory(b"dir")
    message = why.replace("size 6", "size is 6")
    with pytest.raises(ProtocolError, match=f"'dir/x'.*{re.escape(message)}"):
        builder.add_page([LIES[why]])
    other = started()
    other.begin_directory(b"dir")
    with pytest.raises(ProtocolError, match=f"'dir/x'.*{re.escape(message)}"):
        other.add_encoded_page(encode([LIES[why]]))


@pytest.mark.parametrize(
    "entry",
    [
        Entry(b"x", DIRECTORY, 0, 0),
        Entry(b"x", -1, 0, 0),
        Entry(b"x", FILE, 0o10000, 0),
        Entry(b"x", FILE, 0, 2**63),
        Entry(b"x", FILE, 0, 0, -1),
        Entry(b"x", FILE, 0, 0, 2**64),
        Entry(b"x", FILE, 0, 0, flags=2),
        Entry(b"x", SYMLINK, 0, 0, link=b"x" * 4097),
        Entry(b"", FILE, 0, 0),
        Entry(b"x" * 256, FILE, 0, 0),
        Entry(b"x", FILE, 0, 0, depth=5, runs=RUN),
        Entry(b"x", FILE, 0, 0, 5125, CHUNK * 1025),
        Entry(b"x", FILE, 0.5, 0),  # type: ignore[arg-type]
    ],
)
def test_fields_have_ranges(entry: Entry) -> None:
    with pytest.raises(ProtocolError):
        started().add_page([entry])


@pytest.mark.parametrize("names", [b".", b"..", b"a/b", b"a\0", b"b a", b"a a", b"a b/", b"a .", b"- .."])
def test_names_are_components_and_rise(names: bytes) -> None:
    with pytest.raises(ProtocolError, match="cannot be right"):
        started().add_page([Entry(name, FILE, 0, 0) for name in names.split()])


def test_every_other_spelling_of_a_page_is_refused() -> None:
    page = encode([Entry(b"x", FILE, 0, 0)])
    assert started().add_encoded_page(page).objects == 1
    others = {
        "trailing byte": page + b"\0",
        "long array": b"\xdc\0\1" + page[1:],
        "long integer": page.replace(b"\xc4\1x\0", b"\xc4\1x\xcc\0"),
        "float": page.replace(b"\xc4\1x\0", b"\xc4\1x\xcb" + bytes(8)),
        "bool": page.replace(b"\xc4\1x\0", b"\xc4\1x\xc2"),
        "text": page.replace(b"\xc4\1x", b"\xa1x"),
        "missing field": b"\x91\x9a" + page[2:-1],
        "additional field": b"\x91\x9c" + page[2:] + b"\0",
        "no entry": b"\x90",
        "nothing": b"",
        "cut off": page[:-1],
        "too large": bytes(MAX_PAGE_BYTES + 1),
    }
    for what, data in others.items():
        assert data != page, what
        with pytest.raises(ProtocolError):
            started().add_encoded_page(data)


def test_a_page_with_another_hash_is_refused() -> None:
    page = started().add_page([file(b"x")])
    assert started().add_encoded_page(page.data, page.page_id, check=False) == page
    with pytest.raises(IntegrityError, match="does not have the hash"):
        started().add_encoded_page(page.data, bytes(32))


def test_a_trusted_page_still_stands_in_order_and_counts() -> None:
    pages = [*cut_pages([file(b"%06d" % i) for i in range(1000)])]
    data = [encode(page) for page in pages]
    builder = started()
    assert builder.add_encoded_page(data[1], check=False).chunks == len(pages[1])
    with pytest.raises(ProtocolError, match="out of order"):
        builder.add_encoded_page(data[0], check=False)
    large_one = encode([Entry(b"x", FILE, 0, 0, 4000, runs=RUN * 2, depth=1)])
    assert started().add_encoded_page(large_one, check=False).chunks == 4000
    assert chunk_count(Entry(b"x", FILE, 0, 0, 4000, runs=RUN * 2, depth=1)) == 4000


def test_sums_stay_below_2_to_the_63() -> None:
    half = run(2**62, 2**61)
    pages = [Entry(name, FILE, 0, 0, 2**62, runs=half, depth=1) for name in (b"a", b"b")]
    with pytest.raises(ProtocolError, match="'b' cannot be right: the sizes on its page"):
        started().add_page(pages)


def test_a_directory_keeps_its_attributes() -> None:
    extra = encode_extra(Extra(((b"user.a", b"1"),), 1, 2))

    def fill(builder: ManifestBuilder) -> None:
        builder.begin_directory(b"d")
        builder.end_directory(0o755, 1, extra)

    data = build(fill, Header(xattrs=True, owner=True))[1]
    assert reader(data).lookup(b"d") == Entry(b"d", DIRECTORY, 0o755, 1, extra=extra)
    with pytest.raises(ProtocolError, match="'d' cannot be right: it has extended attributes in"):
        build(fill)
    assert encode_extra(decode_extra(b"")) == b""


def test_a_profile_has_its_sizes_in_order() -> None:
    with pytest.raises(ProtocolError, match="out of order"):
        Header.decode(Header(Profile("odd", 10, 20, 30)).encode())


def test_extra_is_sorted_and_bounded() -> None:
    extra = Extra(((b"user.b", b"2"), (b"user.a", b"1")), 0, 5, b"root", b"wheel")
    assert decode_extra(encode_extra(extra)).xattrs == ((b"user.a", b"1"), (b"user.b", b"2"))
    entry = Entry(b"x", FILE, 0, 0, extra=encode_extra(extra))
    summary, data = build(lambda b: b.add_page([entry]), Header(xattrs=True, owner=True))
    assert reader(data).lookup(b"x") == entry
    assert reader(data).verify() == summary
    for bad in (Extra(((b"a", b""), (b"a", b""))), Extra(((b"", b""),)), Extra(((b"a", bytes(65_536)),))):
        with pytest.raises(UsageError):
            encode_extra(bad)


# ---- order of calls --------------------------------------------------------------------------------------


def twice_finished(builder: ManifestBuilder) -> None:
    builder.end_directory(0, 0)
    builder.finish()
    builder.finish()


def second_root(builder: ManifestBuilder) -> None:
    builder.end_directory(0, 0)
    builder.begin_directory(b"")


@pytest.mark.parametrize(
    "calls",
    [
        twice_finished,
        second_root,
        lambda b: b.finish(),
        lambda b: ManifestBuilder().add_entries([file(b"a")]),
        lambda b: ManifestBuilder().end_directory(0, 0),
    ],
)
def test_calls_that_make_no_sense(calls: Callable[[ManifestBuilder], None]) -> None:
    with pytest.raises(UsageError):
        calls(started())


def entries_after_a_directory(builder: ManifestBuilder) -> None:
    builder.begin_directory(b"d")
    builder.end_directory(0, 0)
    builder.add_page([file(b"a")])


def directories_falling(builder: ManifestBuilder) -> None:
    for name in (b"b", b"a"):
        builder.begin_directory(name)
        builder.end_directory(0, 0)


def page_after_the_last(builder: ManifestBuilder) -> None:
    builder.add_page([file(b"a")])
    builder.add_page([file(b"b")])


def entries_after_the_last_page(builder: ManifestBuilder) -> None:
    builder.add_page([file(b"a")])
    builder.add_entries([file(b"b")])


def page_among_entries(builder: ManifestBuilder) -> None:
    builder.add_entries([file(b"a")])
    builder.add_page([file(b"b")])


def too_deep(builder: ManifestBuilder) -> None:
    for _ in range(MAX_DEPTH):
        builder.begin_directory(b"d")


@pytest.mark.parametrize(
    "calls",
    [
        entries_after_a_directory,
        directories_falling,
        page_after_the_last,
        entries_after_the_last_page,
        page_among_entries,
        too_deep,
        lambda b: b.add_page([]),
        lambda b: b.add_page([file(b"%06d" % i) for i in range(1024)]),
        lambda b: b.begin_directory(b".."),
        lambda b: b.begin_directory(b""),
        lambda b: b.end_directory(0o10000, 0),
        lambda b: b.end_directory(0, 2**63),
        lambda b: b.end_directory(0, 0, b"\xff"),
        lambda b: ManifestBuilder().begin_directory(b"d"),
    ],
)
def test_what_a_peer_may_not_send(calls: Callable[[ManifestBuilder], None]) -> None:
    with pytest.raises(ProtocolError):
        calls(started())


# ---- lies of files ---------------------------------------------------------------------------------------


Piece = tuple[bytes, int]  # id and offset


class Forger:
    """Writes any records, each with its true hash, as a hostile maker of manifests can."""

    def __init__(self) -> None:
        self.data = bytearray(MAGIC)
        self.add(Kind.HEADER, Header().encode())

    def add(self, kind: Kind, body: bytes, *offsets: int) -> Piece:
        offset = len(self.data)
        self.data += (
            RECORD.pack(kind, len(body), 8 * len(offsets)) + body + struct.pack(f"<{len(offsets)}Q", *offsets)
        )
        return digest(kind, body) if kind is not Kind.HEADER else b"", offset

    def page(self, entries: list[Entry], *runs: int) -> Piece:
        return self.add(Kind.ENTRIES, encode(entries), *runs)

    def node(self, pages: Sequence[Piece], below: Sequence[Piece] = ()) -> Piece:
        body = encode(Node(b"".join(i for i, _ in pages), b"".join(i for i, _ in below)))
        return self.add(Kind.NODE, body, *(at for _, at in [*pages, *below]))

    def subdirectories(self, *nodes: tuple[bytes, Piece, int, int]) -> Piece:
        entries = [
            Subdirectory(name, 0, 0, node[0], objects, below, 0, 0) for name, node, objects, below in nodes
        ]
        return self.add(Kind.SUBDIRECTORIES, encode(entries), *(node[1] for _, node, _, _ in nodes))

    def finish(self, node: Piece, objects: int, directories: int, size: int, chunks: int) -> bytes:
        root = Root(Header().encode(), 0, 0, node[0], objects, directories, size, chunks)
        version_id, at = self.add(Kind.ROOT, encode(root), node[1])
        footer = FOOTER.pack(at, version_id, bytes(32), END_MAGIC)
        checksum = blake3(bytes(self.data) + footer[:40], derive_key_context=FILE_CONTEXT).digest()
        return bytes(self.data) + FOOTER.pack(at, version_id, checksum, END_MAGIC)


def plain(name: bytes) -> Entry:
    return Entry(name, FILE, 0, 0)


def lies_about_totals(forger: Forger) -> bytes:
    return forger.finish(forger.node([forger.page([plain(b"a")])]), 2, 0, 0, 0)


def lies_about_a_subtree(forger: Forger) -> bytes:
    inner = forger.node([forger.page([plain(b"a")])])
    return forger.finish(forger.node([], [forger.subdirectories((b"d", inner, 2, 0))]), 2, 1, 0, 0)


def names_a_file_as_a_directory(forger: Forger) -> bytes:
    empty = forger.node([])
    page = forger.page([plain(b"a"), plain(b"b")])
    return forger.finish(forger.node([page], [forger.subdirectories((b"b", empty, 0, 0))]), 2, 1, 0, 0)


def names_a_file_of_an_earlier_page_as_a_directory(forger: Forger) -> bytes:
    pages = [forger.page(page) for page in cut_pages([plain(b"%04d" % i) for i in range(1000)])]
    below = forger.subdirectories((b"0003", forger.node([]), 0, 0))
    return forger.finish(forger.node(pages, [below]), 1000, 1, 0, 0)


def cuts_pages_otherwise(forger: Forger) -> bytes:
    pages = [forger.page([plain(b"a")]), forger.page([plain(b"b")])]
    return forger.finish(forger.node(pages), 2, 0, 0, 0)


def orders_pages_otherwise(forger: Forger) -> bytes:
    pages = [forger.page(page) for page in cut_pages([plain(b"%04d" % i) for i in range(1000)])]
    return forger.finish(forger.node(pages[1::-1]), 300, 0, 0, 0)


def claims_more_than_the_file_can_hold(forger: Forger) -> bytes:
    return forger.finish(forger.node([]), 2**40, 0, 0, 0)


def shares_nodes(forger: Forger) -> bytes:
    """A small file in which every directory holds the next one twice; only the root's totals lie."""
    node, objects, directories = forger.node([forger.page([plain(b"a")])]), 1, 0
    for _ in range(40):
        below = forger.subdirectories((b"x", node, objects, directories), (b"y", node, objects, directories))
        node, objects, directories = forger.node([], [below]), 2 * objects, 2 * directories + 2
    return forger.finish(node, 50, 50, 0, 0)


def links_to_nothing(forger: Forger) -> bytes:
    page = forger.page([Entry(b"x", HARDLINK, 0, 0, link=b"w")])
    return forger.finish(forger.node([page]), 1, 0, 0, 0)


def run_is_shorter(forger: Forger) -> bytes:
    run_id, at = forger.add(Kind.RUN, CHUNK * 1500)
    runs = struct.pack("<32sQQ", run_id, 5 * 1500, 1499)
    page = forger.page([Entry(b"x", FILE, 0, 0, 5 * 1500, runs=runs, depth=1)], at)
    return forger.finish(forger.node([page]), 1, 0, 5 * 1500, 1499)


def run_is_cut_otherwise(forger: Forger) -> bytes:
    run_id, at = forger.add(Kind.RUN, CHUNK * 1000)
    runs = struct.pack("<32sQQ", run_id, 5000, 1000) * 2
    page = forger.page([Entry(b"x", FILE, 0, 0, 10_000, runs=runs, depth=1)], at, at)
    return forger.finish(forger.node([page]), 1, 0, 10_000, 2000)


def run_has_an_empty_chunk(forger: Forger) -> bytes:
    run_id, at = forger.add(Kind.RUN, CHUNK * 1500 + pack_chunks([(0, b"c" * 32)]))
    runs = struct.pack("<32sQQ", run_id, 5 * 1500, 1501)
    page = forger.page([Entry(b"x", FILE, 0, 0, 5 * 1500, runs=runs, depth=1)], at)
    return forger.finish(forger.node([page]), 1, 0, 5 * 1500, 1501)


def has_more_levels_than_needed(forger: Forger) -> bytes:
    run_id, at = forger.add(Kind.RUN, CHUNK * 1500)
    inner = struct.pack("<32sQQ", run_id, 7500, 1500)
    list_id, list_at = forger.add(Kind.RUN_LIST, inner, at)
    outer = struct.pack("<32sQQ", list_id, 7500, 1500)
    page = forger.page([Entry(b"x", FILE, 0, 0, 7500, runs=outer, depth=2)], list_at)
    return forger.finish(forger.node([page]), 1, 0, 7500, 1500)


def node_is_cut_off(forger: Forger) -> bytes:
    return forger.finish(forger.add(Kind.NODE, encode(Node(bytes(33)))), 0, 0, 0, 0)


def gives_the_root_attributes(forger: Forger) -> bytes:
    node = forger.node([])
    root = encode(Root(Header().encode(), 0o755, 0, node[0], 0, 0, 0, 0))
    version_id, at = forger.add(Kind.ROOT, root, node[1])
    return bytes(forger.data) + FOOTER.pack(at, version_id, bytes(32), END_MAGIC)


def is_too_deep(forger: Forger) -> bytes:
    node = forger.node([])
    for below in range(MAX_DEPTH):
        node = forger.node([], [forger.subdirectories((b"d", node, 0, below))])
    return forger.finish(node, 0, MAX_DEPTH, 0, 0)


@pytest.mark.parametrize(
    ("forge", "why"),
    [
        (node_is_cut_off, "list of pages is cut off"),
        (gives_the_root_attributes, "said not to be"),
        (is_too_deep, "more than 1024 directories deep"),
        (lies_about_totals, r"entry '\.' cannot be right: its totals are Totals\(objects=2"),
        (lies_about_a_subtree, "entry 'd' cannot be right: its totals"),
        (names_a_file_as_a_directory, "entry 'b' .* twice"),
        (names_a_file_of_an_earlier_page_as_a_directory, "entry '0003' .* twice"),
        (cuts_pages_otherwise, "not cut by the rule"),
        (orders_pages_otherwise, "names must rise"),
        (claims_more_than_the_file_can_hold, "do not fit into"),
        (shares_nodes, "more lies below it than the totals say"),
        (links_to_nothing, "entry 'x' .* first name 'w' is not a file"),
        (run_is_shorter, "entry 'x' .* does not hold 7500 bytes in 1499 chunks"),
        (run_is_cut_otherwise, "entry 'x' .* cut at the wrong place"),
        (run_has_an_empty_chunk, "entry 'x' .* a chunk of it is empty"),
        (has_more_levels_than_needed, "entry 'x' .* more levels of runs than it needs"),
    ],
)
def test_a_forged_file_is_found_out(forge: Callable[[Forger], bytes], why: str) -> None:
    data = forge(Forger())
    with pytest.raises(ProtocolError, match=why):
        reader(data).verify()


def test_shared_nodes_do_not_multiply_a_comparison() -> None:
    forged, honest = reader(shares_nodes(Forger())), reader(build(sample)[1])
    with pytest.raises(ProtocolError, match="more differs below it"):
        for _ in diff(honest, forged):
            pass


def test_huge_equal_runs_are_checked_once() -> None:
    """An object of 64 PiB whose runs are all one takes a few reads to check, and is right."""
    forger = Forger()
    body = pack_chunks([(4 << 20, b"\1" * 32)]) * 2048
    size, count = 2048 << 22, 2048
    run_id, at = forger.add(Kind.RUN, body)
    for _ in range(2):
        run_list = struct.pack("<32sQQ", run_id, size, count) * 2048
        if run_id[0] == 0 and run_id[1] & 1 == 0:
            pytest.fail("choose other chunk ids: this run would be cut elsewhere")
        run_id, at = forger.add(Kind.RUN_LIST, run_list, *[at] * 2048)
        size, count = size * 2048, count * 2048
    runs = struct.pack("<32sQQ", run_id, size, count) * 2
    page = forger.page([Entry(b"o", FILE, 0, 0, 2 * size, runs=runs, depth=3)], at, at)
    opened = reader(forger.finish(forger.node([page]), 1, 0, 2 * size, 2 * count))
    opened.verify()
    assert opened.records.records_read < 30


def test_other_files_are_no_manifests() -> None:
    _, data = build(sample)
    for other in (b"", b"x" * 500, data[:-1], data + b"x", b"X" + data[1:], MAGIC + bytes(600)):
        with pytest.raises(IntegrityError):
            reader(other)
    with pytest.raises(IntegrityError, match="is of version"):
        reader(data, bytes(32))
    with pytest.raises(ProtocolError, match="format 2"):
        Header.decode(Header().encode().replace(b"\x96\1", b"\x96\2"))


# ---- differences -----------------------------------------------------------------------------------------


def many(changed: int | None) -> bytes:
    def fill(builder: ManifestBuilder) -> None:
        for d in range(100):
            builder.begin_directory(b"dir%03d" % d)
            numbers = range(d * 1000, d * 1000 + 1000)
            builder.add_entries([file(b"file%06d" % i, mtime_ns=int(i == changed)) for i in numbers])
            builder.end_directory(0o755, 0)

    return build(fill)[1]


@pytest.mark.slow
def test_one_change_in_100_000_entries_costs_few_reads() -> None:
    a, b = reader(many(None)), reader(many(54_321))
    changes = [*diff(a, b)]
    assert [(c.kind, c.path) for c in changes] == [("metadata", b"dir054/file054321")]
    assert a.records.records_read + b.records.records_read < 50
    assert [*diff(a, a)] == []


def test_a_difference_says_what_and_how() -> None:
    def other(builder: ManifestBuilder) -> None:
        builder.add_entries([Entry(b"a", FILE, 0o600, 0, 5, CHUNK), Entry(b"d", FILE, 0o644, 0)])
        builder.begin_directory(b"e")
        builder.add_entries([file(b"new")])
        builder.end_directory(0o700, 6)

    a, b = reader(build(sample)[1]), reader(build(other)[1])
    assert [(c.kind, c.path, c.before is None, c.after is None) for c in diff(a, b)] == [
        ("changed", b"a", False, False),
        ("added", b"d", True, False),
        ("removed", b"link", False, True),
        ("removed", b"d", False, True),
        ("removed", b"d/again", False, True),
        ("removed", b"d/b", False, True),
        ("removed", b"d/deep", False, True),
        ("metadata", b"e", False, False),
        ("added", b"e/new", True, False),
    ]


def test_a_root_that_differs_is_a_change() -> None:
    header = Header(root_attributes=True)
    a = build(sample, header)[1]
    out = bytearray()
    builder = ManifestBuilder(out.extend, header)
    builder.begin_directory(b"")
    sample(builder)
    builder.end_directory(0o777, 9)
    builder.finish()
    assert [(c.kind, c.path) for c in diff(reader(a), reader(bytes(out)))] == [("metadata", b"")]


def test_versions_of_different_profiles_do_not_compare() -> None:
    a, b = (reader(build(sample, Header(PROFILES[name]))[1]) for name in ("64KiB", "1MiB"))
    with pytest.raises(UsageError, match="64KiB and by 1MiB"):
        next(diff(a, b))


def test_a_walk_of_a_deep_tree_needs_no_recursion() -> None:
    def fill(builder: ManifestBuilder) -> None:
        for _ in range(MAX_DEPTH - 1):
            builder.begin_directory(b"d")
        for _ in range(MAX_DEPTH - 1):
            builder.end_directory(0, 0)

    summary, data = build(fill)
    assert sum(1 for _ in reader(data).walk()) == summary.directories == MAX_DEPTH - 1
    empty = reader(build(lambda b: None)[1])
    assert sum(1 for _ in diff(empty, reader(data))) == MAX_DEPTH - 1


def test_a_read_that_fails_is_not_hidden() -> None:
    data = build(sample)[1]

    def read_at(offset: int, length: int) -> bytes:
        if offset < len(data) // 2:
            raise OSError("disk")
        return data[offset : offset + length]

    def walk() -> Iterator[object]:
        yield from ManifestReader(read_at, len(data)).walk()

    with pytest.raises(OSError, match="disk"):
        next(walk())


def test_lookup_finds_every_entry_of_many_pages_and_no_other() -> None:
    def fill(builder: ManifestBuilder) -> None:
        builder.add_entries([file(b"f%05d" % (2 * i)) for i in range(2000)])
        for i in range(600):
            builder.begin_directory(b"d%05d" % (2 * i))
            builder.end_directory(0, i)

    opened = reader(build(fill)[1])
    for i in range(0, 2000, 37):
        assert opened.lookup(b"f%05d" % (2 * i)) == file(b"f%05d" % (2 * i))
    for i in range(0, 600, 37):
        assert opened.lookup(b"d%05d" % (2 * i)).mtime_ns == i
    before = opened.records.records_read
    assert opened.lookup(b"f03998").name == b"f03998"
    assert opened.records.records_read - before < 8
    for name in (b"f00001", b"d00001", b"a", b"z", b"f99999", b"d99999", b"e"):
        with pytest.raises(NotFound):
            opened.lookup(name)
