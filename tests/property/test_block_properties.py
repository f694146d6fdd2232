"""Blocks of encoded entries: both parsers say the same of any bytes, and a manifest the same of any grouping."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flowengine.chunking import pack_chunks
from flowengine.manifest import Block, Entry, ManifestBuilder, Summary
from flowengine.manifest.block import PYTHON
from flowengine.manifest.entries import encode
from flowengine.store import many
from flowengine.store.encoded import parse_block

NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: not {0, 47} & {*name} and name not in (b".", b"..")
)
CHUNKS = st.lists(
    st.tuples(st.sampled_from([1, 300, 70_000, 4 << 20]), st.binary(min_size=32, max_size=32)), max_size=9
)
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.sampled_from(
    [0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32, -1, -32, -33, -128, -129, -32769, -(2**31) - 1]
)


@st.composite
def files(draw: st.DrawFn, most: int = 40) -> list[Entry]:
    names = sorted(draw(st.sets(NAMES, min_size=1, max_size=most)))
    made = []
    for name in names:
        chunks = draw(CHUNKS)
        size = sum(length for length, _ in chunks)
        made.append(Entry(name, 0, draw(st.integers(0, 0o7777)), draw(NUMBERS), size, pack_chunks(chunks)))
    return made


def compiled(data: bytes) -> Block | None:
    assert many.is_compiled()
    return parse_block(data)


@given(files(), st.integers(0, 1023), st.integers(0, 130_000))
def test_both_parsers_agree(entries: list[Entry], count: int, weight: int) -> None:
    data = encode(entries)
    one, other = compiled(data), Block.parse(data, PYTHON)
    assert one is not None
    assert other is not None
    assert one.segments == other.segments
    assert one.segments_after(count, weight) == other.segments_after(count, weight)
    assert one.columns == other.columns
    assert one.entries == entries
    assert one.names == [entry.name for entry in entries]
    assert (one.first_name, one.last_name) == (entries[0].name, entries[-1].name)
    assert (one.count, one.size_bytes) == (len(entries), sum(entry.size for entry in entries))


@given(files(4), st.data())
def test_both_parsers_refuse_the_same(entries: list[Entry], draw: st.DataObject) -> None:
    data = bytearray(encode(entries))
    at = draw.draw(st.integers(0, len(data) - 1))
    data[at] = draw.draw(st.integers(0, 255))
    end = draw.draw(st.integers(0, len(data)) | st.just(len(data)))
    one, other = compiled(bytes(data[:end])), Block.parse(bytes(data[:end]), PYTHON)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.segments == other.segments


@given(st.binary(max_size=300))
def test_garbage_is_no_block(data: bytes) -> None:
    assert (compiled(data) is None) == (Block.parse(data, PYTHON) is None)


def summary(groups: list[tuple[str, list[Entry]]]) -> tuple[Summary, bytes]:
    written: list[bytes] = []
    builder = ManifestBuilder(written.append)
    builder.begin_directory(b"")
    for way, entries in groups:
        if way == "entries":
            builder.add_entries(entries)
        else:
            block = Block.parse(encode(entries), PYTHON) if way == "python" else compiled(encode(entries))
            assert block is not None
            for part in block.parts(7, 20):
                builder.add_block(part)
    builder.end_directory(0o755, 0)
    return builder.finish(), b"".join(written)


@given(
    files(),
    st.lists(st.tuples(st.sampled_from(["entries", "compiled", "python"]), st.integers(1, 20)), max_size=9),
)
def test_a_manifest_is_the_same_however_its_entries_come(
    entries: list[Entry], cuts: list[tuple[str, int]]
) -> None:
    groups, rest = [], entries
    for way, count in cuts:
        if rest[:count]:
            groups.append((way, rest[:count]))
        rest = rest[count:]
    if rest:
        groups.append(("compiled", rest))
    assert summary(groups) == summary([("entries", entries)])


def test_pages_are_cut_alike_at_every_bound() -> None:
    light = [Entry(b"%05d" % n, 0, 0o644, n) for n in range(3000)]
    heavy = [Entry(b"%05d" % n, 0, 0o644, n, 300, pack_chunks([(1, bytes(32))] * 300)) for n in range(40)]
    for entries in (light, heavy):
        assert (
            summary([("compiled", entries)])
            == summary([("python", entries)])
            == summary([("entries", entries)])
        )
