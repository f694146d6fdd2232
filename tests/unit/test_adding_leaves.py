"""A manifest in which folders of files come many at once: it is, byte for byte, the one in which they come step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from zlib import crc32

import pytest
from transfers import block_of, entry

from flowengine.chunking import hashing
from flowengine.errors import ProtocolError, UsageError
from flowengine.manifest import Block, ManifestBuilder, ManifestReader, Summary
from flowengine.manifest.build import MAX_DEPTH, Leaf
from flowengine.manifest.cut import PageCutter
from flowengine.manifest.entries import MAX_PAGE_ENTRIES, Subdirectory

SMALL = block_of(entry(b"x", b"some bytes"), entry(b"y", b"others", b"of two chunks"), entry(b"z"))
ONE = block_of(entry(b"one", b"1", mode=0o600))
PAGES = block_of(*(entry(b"%05d" % number, b"%d" % number) for number in range(3000)))
Way = Callable[[ManifestBuilder, Sequence[Leaf]], None]


def at_once(builder: ManifestBuilder, leaves: Sequence[Leaf]) -> None:
    builder.add_leaves(leaves)


def one_by_one(builder: ManifestBuilder, leaves: Sequence[Leaf]) -> None:
    for leaf in leaves:
        builder.add_leaves([leaf])


def step_by_step(builder: ManifestBuilder, leaves: Sequence[Leaf]) -> None:
    for leaf in leaves:
        builder.begin_directory(leaf.name)
        if leaf.block is not None:
            builder.add_block(leaf.block)
        builder.end_directory(leaf.mode, leaf.mtime_ns)


@pytest.fixture(params=hashing.hash_ways(), autouse=True)
def hashed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way the ids are made."""
    monkeypatch.setattr(hashing, "_way", request.param)


def of(number: int, block: Block | None, *, mode: int = 0o755) -> Leaf:
    return Leaf(b"%05d" % number, mode, number * 1_000_000_007 - 5, block)


def built(way: Way, leaves: Sequence[Leaf], *, sink: bool) -> tuple[Summary, bytes]:
    """A version with leaves below its root and below a folder that stands among them in another."""
    written: list[bytes] = []
    builder = ManifestBuilder(written.append if sink else None)
    half = len(leaves) // 2
    builder.begin_directory(b"")
    builder.add_block(SMALL)
    builder.begin_directory(b"a")
    way(builder, leaves)
    builder.end_directory(0o755, 3)
    builder.begin_directory(b"b")
    builder.add_block(ONE)
    way(builder, leaves[:half])
    for leaf in leaves[half : half + 1]:
        builder.begin_directory(leaf.name)
        way(builder, leaves)
        builder.end_directory(0o711, 4)
    way(builder, leaves[half + 1 :])
    builder.end_directory(0o700, 5)
    builder.end_directory(0o750, 6)
    return builder.finish(), b"".join(written)


@pytest.mark.parametrize(
    "leaves",
    [
        [],
        [of(1, SMALL)],
        [of(1, None)],
        [of(1, None), of(2, None), of(3, ONE)],
        [of(number, (SMALL, None, ONE)[number % 3]) for number in range(40)],
        [of(1, SMALL), of(2, PAGES), of(3, ONE)],
        [of(1, PAGES), of(2, PAGES)],
        [Leaf(name, 0o7777, -(2**63), ONE) for name in (b"\x01", b"a" * 255, b"\xff\xfe", b"\xff\xff")],
        [Leaf(b"m", 0, 2**63 - 1, SMALL)],
    ],
)
def test_leaves_at_once_make_the_same_file_and_version(leaves: list[Leaf]) -> None:
    assert SMALL.is_one_page
    assert not PAGES.is_one_page
    expected, data = built(step_by_step, leaves, sink=True)
    assert data
    for way in (at_once, one_by_one):
        assert built(way, leaves, sink=True) == (expected, data)
        assert built(way, leaves, sink=False) == (expected, b"")


def test_a_block_that_ends_with_a_cut_is_one_page() -> None:
    """A page that is full to its bound, with nothing behind it."""
    full = block_of(*(entry(b"%04d" % number, b"%d" % number) for number in range(3000)))
    end = full.segments[0].files
    cut = full.part(0, end)
    assert len(cut.segments) == 2
    assert cut.is_one_page
    for block in (cut, full.part(0, end + 1), full.part(0, end - 1)):
        leaves = [of(1, block), of(2, SMALL)]
        assert built(at_once, leaves, sink=True) == built(step_by_step, leaves, sink=True)


def test_so_many_leaves_that_their_parent_has_pages_of_them() -> None:
    leaves = [of(number, (SMALL, None, ONE)[number % 3]) for number in range(2500)]
    assert built(at_once, leaves, sink=True) == built(step_by_step, leaves, sink=True)


@pytest.mark.parametrize("weight", [0, 300, 3000, 60_000])
def test_pages_that_are_cut_folder_by_folder_are_those_of_all_at_once(weight: int) -> None:
    """By names, by number and by weight."""
    names = [b"%06d" % number for number in range(4000)]
    plain = [name for name in names if crc32(name) * 0x9E3779B1 & 0xFFFFFFFF >= 1 << 24]
    for some in (names, plain):
        made = [
            Subdirectory(name, 0o755, 0, bytes(32), 0, 0, 0, 0, bytes(weight))
            for name in some[: 4000 if weight < 1000 else 300]
        ]
        cutter: PageCutter[Subdirectory] = PageCutter()
        pages = [page for one in made if (page := cutter.add(one))]
        last = cutter.finish()
        at_once: PageCutter[Subdirectory] = PageCutter()
        assert pages == at_once.feed(made)
        assert last == at_once.finish()
        assert max(map(len, pages)) == MAX_PAGE_ENTRIES or weight or some is names
        assert len(pages) > 2


def test_what_was_written_is_found_again() -> None:
    written: list[bytes] = []
    builder = ManifestBuilder(written.append)
    builder.begin_directory(b"")
    builder.add_leaves([of(1, SMALL), of(2, None), of(3, PAGES), of(4, ONE)])
    builder.end_directory(0o755, 0)
    summary = builder.finish()
    assert (summary.objects, summary.directories) == (3 + 3000 + 1, 4)
    data = b"".join(written)
    reader = ManifestReader(lambda at, size: data[at : at + size], len(data), summary.version_id)
    found = [(path, one.name) for path, one in reader.walk()]
    assert [name for path, name in found if not path] == [b"00001", b"00002", b"00003", b"00004"]
    assert [name for path, name in found if path == b"00001"] == [b"x", b"y", b"z"]
    assert [name for path, name in found if path == b"00003"] == PAGES.names
    assert [name for path, name in found if path == b"00004"] == [b"one"]


@pytest.mark.parametrize(
    "leaves",
    [
        [of(2, SMALL), of(1, SMALL)],
        [of(1, None), of(1, None)],
        [of(1, SMALL), of(2, PAGES), of(1, SMALL)],
        *([Leaf(name, 0o755, 0, ONE)] for name in (b"", b".", b"..", b"a/b", b"a\0b", b"x" * 256)),
        [of(1, SMALL), Leaf(b"", 0o755, 0, None)],
        [of(1, SMALL, mode=0o10000)],
        [of(1, SMALL, mode=-1)],
        [of(1, PAGES, mode=0o10000)],
        [Leaf(b"a", 0o755, 2**63, ONE)],
        [Leaf(b"a", 0o755, -(2**63) - 1, None)],
    ],
)
@pytest.mark.parametrize("way", [at_once, one_by_one, step_by_step])
def test_names_order_modes_and_times_are_checked(leaves: list[Leaf], way: Way) -> None:
    builder = ManifestBuilder()
    builder.begin_directory(b"")
    with pytest.raises(ProtocolError):
        way(builder, leaves)


@pytest.mark.parametrize("way", [at_once, step_by_step])
def test_leaves_stand_behind_the_folder_before_them_and_end_its_entries(way: Way) -> None:
    builder = ManifestBuilder()
    builder.begin_directory(b"")
    builder.begin_directory(b"m")
    builder.end_directory(0o755, 0)
    with pytest.raises(ProtocolError, match="names must rise"):
        way(builder, [Leaf(b"a", 0o755, 0, ONE)])
    builder = ManifestBuilder()
    builder.begin_directory(b"")
    way(builder, [Leaf(b"a", 0o755, 0, ONE)])
    with pytest.raises(ProtocolError, match="not before"):
        builder.add_block(SMALL)
    with pytest.raises(ProtocolError, match="names must rise"):
        builder.begin_directory(b"a")


@pytest.mark.parametrize("way", [at_once, step_by_step])
def test_leaves_are_as_deep_as_folders_may_be(way: Way) -> None:
    builder = ManifestBuilder()
    builder.begin_directory(b"")
    for _ in range(MAX_DEPTH - 2):
        builder.begin_directory(b"d")
    way(builder, [of(1, ONE), of(2, None)])
    builder.begin_directory(b"x")
    with pytest.raises(ProtocolError, match="directories deep"):
        way(builder, [of(1, ONE)])


@pytest.mark.parametrize("way", [at_once, step_by_step])
def test_without_a_root_or_behind_its_end_there_are_no_leaves(way: Way) -> None:
    builder = ManifestBuilder()
    with pytest.raises(ProtocolError, match="root"):
        way(builder, [of(1, ONE)])
    builder = ManifestBuilder()
    builder.begin_directory(b"")
    builder.end_directory(0o755, 0)
    with pytest.raises(UsageError, match="closed"):
        way(builder, [of(1, ONE)])
