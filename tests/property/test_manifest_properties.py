"""Manifests against a second, naive implementation of docs/spec/manifest.md, and under damage and lies.

The oracle below shares no code with the package: its own MessagePack, cuts, hashes, whole trees in memory.
tests/vectors/manifest.json was made by it (running this file as a script writes it).
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flowengine.chunking import PROFILES
from flowengine.errors import IntegrityError, ProtocolError
from flowengine.manifest import (
    DIRECTORY,
    Change,
    ChunkRunCutter,
    Entry,
    Header,
    ManifestBuilder,
    ManifestReader,
    Summary,
    cut_pages,
    diff,
)

VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "manifest.json"

# {name: entry | (mode, mtime, tree)}; an entry is a dict of what is not default; chunks are (length, id).
Tree = dict[bytes, Any]

# ---- the oracle ------------------------------------------------------------------------------------------


def pack(value: object) -> bytes:
    """MessagePack, always in the shortest form."""
    if isinstance(value, bytes):
        n = len(value)
        return (
            (b"\xc4" + bytes([n]))
            if n < 256
            else b"\xc5" + struct.pack(">H", n)
            if n < 65536
            else b"\xc6" + struct.pack(">I", n)
        ) + value
    if isinstance(value, str):
        assert len(value) < 32
        return bytes([0xA0 | len(value)]) + value.encode()
    if isinstance(value, list):
        n = len(value)
        head = bytes([0x90 | n]) if n < 16 else b"\xdc" + struct.pack(">H", n)
        return head + b"".join(map(pack, value))
    assert isinstance(value, int)
    if value >= 0:
        if value < 128:
            return bytes([value])
        for limit, code, form in ((1 << 8, 0xCC, ">B"), (1 << 16, 0xCD, ">H"), (1 << 32, 0xCE, ">I")):
            if value < limit:
                return bytes([code]) + struct.pack(form, value)
        return b"\xcf" + struct.pack(">Q", value)
    if value >= -32:
        return struct.pack("b", value)
    for limit, code, form in ((1 << 7, 0xD0, ">b"), (1 << 15, 0xD1, ">h"), (1 << 31, 0xD2, ">i")):
        if value >= -limit:
            return bytes([code]) + struct.pack(form, value)
    return b"\xd3" + struct.pack(">q", value)


def hashed(what: str, data: bytes) -> bytes:
    return blake3(data, derive_key_context=f"flowengine manifest v1 {what}").digest()


def cut(items: list[Any], ends: Callable[[list[Any]], bool]) -> list[list[Any]]:
    lists: list[list[Any]] = [[]]
    for item in items:
        lists[-1].append(item)
        if ends(lists[-1]):
            lists.append([])
    return [each for each in lists if each]


def run_ends(run: list[Any], id_at: int) -> bool:
    chosen = struct.unpack_from("<H", run[-1], id_at)[0] % 512 == 0
    return len(run) >= 64 and (chosen or len(run) == 2048)


def page_ends(page: list[tuple[bytes, int]]) -> bool:
    name, weight = page[-1]
    mixed = zlib.crc32(name) * 0x9E3779B1 % 2**32
    return mixed < max(2**24, weight * 2**16) or len(page) == 1024 or sum(w for _, w in page) >= 131072


def content(chunks: list[tuple[int, bytes]]) -> tuple[int, bytes, bytes, int]:
    """size, chunks, runs, depth of a file."""
    items = [struct.pack("<I32s", length, identity) for length, identity in chunks]
    size = sum(length for length, _ in chunks)
    if len(items) <= 1024:
        return size, b"".join(items), b"", 0
    measures, depth = [(length, 1) for length, _ in chunks], 0
    while len(items) > 1024:
        at, runs, id_at = 0, [], 0 if depth else 4
        for run in cut(items, lambda run, id_at=id_at: run_ends(run, id_at)):  # type: ignore[misc]
            total = [sum(each) for each in zip(*measures[at : at + len(run)], strict=True)]
            runs.append((hashed("run list" if depth else "chunk run", b"".join(run)), *total))
            at += len(run)
        items = [struct.pack("<32sQQ", *run) for run in runs]
        measures = [(size, count) for _, size, count in runs]
        depth += 1
    return size, b"", b"".join(items), depth


def oracle_directory(tree: Tree) -> tuple[bytes, list[int]]:
    """Node id and totals (objects, directories, size, chunks)."""
    files, below, totals = [], [], [0, 0, 0, 0]
    for name, value in sorted(tree.items()):
        if isinstance(value, dict):
            size, chunks, runs, depth = content(value.get("chunks", []))
            link = value.get("link", b"")
            kind, mode, mtime = value.get("kind", 0), value.get("mode", 0o644), value.get("mtime", 0)
            fields = [name, kind, mode, mtime, size, chunks, link, value.get("flags", 0), b"", runs, depth]
            files.append((name, 40 + len(name) + len(chunks) + len(link) + len(runs), fields))
            added = [1, 0, size, len(value.get("chunks", []))]
        else:
            mode, mtime, subtree = value
            node_id, inside = oracle_directory(subtree)
            below.append((name, 96 + len(name), [name, mode, mtime, node_id, *inside, b""]))
            added = [inside[0], inside[1] + 1, inside[2], inside[3]]
        totals = [a + b for a, b in zip(totals, added, strict=True)]
    ids = []
    for what, items in (("page of entries", files), ("page of subdirectories", below)):
        pages = cut(items, lambda page: page_ends([(name, weight) for name, weight, _ in page]))
        ids.append(b"".join([hashed(what, pack([fields for _, _, fields in page])) for page in pages]))
    return hashed("directory node", pack(ids)), totals


def oracle_version(tree: Tree, profile: str = "64KiB") -> tuple[bytes, list[int]]:
    """Version id and totals, for a header without options."""
    numbers = {"64KiB": [65536, 16384, 262144], "1MiB": [1 << 20, 1 << 18, 1 << 22]}[profile]
    header = pack([1, profile, *numbers, 0])
    node_id, totals = oracle_directory(tree)
    return hashed("root", pack([header, 0, 0, node_id, *totals, b""])), totals


# ---- the package on the same trees -----------------------------------------------------------------------


def packed(chunks: list[tuple[int, bytes]]) -> bytes:
    return b"".join([struct.pack("<I32s", length, identity) for length, identity in chunks])


def add_tree(builder: ManifestBuilder, tree: Tree, batch: int) -> None:
    entries = []
    for name, value in sorted(tree.items()):
        if not isinstance(value, dict):
            continue
        collect = builder.new_object()
        chunks = packed(value.get("chunks", []))
        for at in range(0, len(chunks), 36 * batch):
            collect.feed(chunks[at : at + 36 * batch])
        found = collect.finish()
        entries.append(
            Entry(
                name, value.get("kind", 0), value.get("mode", 0o644), value.get("mtime", 0), found.size,
                found.chunks, value.get("link", b""), value.get("flags", 0), b"", found.runs, found.depth,
            )
        )  # fmt: skip
    if batch % 2:
        for page in cut_pages(entries):
            builder.add_page(page)
    else:
        for at in range(0, len(entries), batch):
            builder.add_entries(entries[at : at + batch])
    for name, value in sorted(tree.items()):
        if not isinstance(value, dict):
            mode, mtime, subtree = value
            builder.begin_directory(name)
            add_tree(builder, subtree, batch)
            builder.end_directory(mode, mtime)


def build(tree: Tree, batch: int = 1000, profile: str = "64KiB") -> tuple[Summary, bytes]:
    out = bytearray()
    builder = ManifestBuilder(out.extend, Header(PROFILES[profile]))
    builder.begin_directory(b"")
    add_tree(builder, tree, batch)
    builder.end_directory(0o755, 1)
    return builder.finish(), bytes(out)


def reader(data: bytes) -> ManifestReader:
    return ManifestReader(lambda offset, length: data[offset : offset + length], len(data))


def flat(tree: Tree, path: bytes = b"") -> Iterator[tuple[bytes, tuple[Any, ...]]]:
    """What a walk must give, from the tree alone."""
    for name, value in sorted(tree.items()):
        if isinstance(value, dict):
            size, chunks, runs, depth = content(value.get("chunks", []))
            yield path, (name, value.get("kind", 0), value.get("mtime", 0), size, chunks, runs, depth)
    for name, value in sorted(tree.items()):
        if not isinstance(value, dict):
            size = oracle_directory(value[2])[1][2]
            yield path, (name, DIRECTORY, value[1], size, b"", b"", 0)
            yield from flat(value[2], path + b"/" + name if path else name)


def walked(data: bytes) -> list[tuple[bytes, tuple[Any, ...]]]:
    return [
        (path, (e.name, e.kind, e.mtime_ns, e.size, e.chunks, e.runs, e.depth))
        for path, e in reader(data).walk()
    ]


names = (
    st.binary(min_size=1, max_size=12)
    .map(lambda b: b.replace(b"/", b"a").replace(b"\0", b"b"))
    .filter(lambda b: b not in (b".", b".."))
)
chunk_pairs = st.tuples(st.integers(1, 1 << 22), st.binary(min_size=32, max_size=32))
files = st.fixed_dictionaries(
    {"chunks": st.lists(chunk_pairs, max_size=3)},
    optional={
        "mode": st.integers(0, 0o7777),
        "mtime": st.integers(-(2**63), 2**63 - 1),
        "flags": st.just(1),
    },
)
links = st.fixed_dictionaries(
    {"kind": st.just(1), "link": st.binary(min_size=1, max_size=40).map(lambda b: b.replace(b"\0", b"c"))}
)
trees = st.recursive(
    st.dictionaries(names, files | links, max_size=6),
    lambda inner: st.dictionaries(
        names, files | links | st.tuples(st.integers(0, 0o7777), st.integers(0, 2**62), inner), max_size=6
    ),
    max_leaves=12,
)


def wide_tree(number: int, step: int = 1) -> Tree:
    """A directory of so many files with one chunk each, and a subdirectory for each hundred of them."""
    tree: Tree = {
        b"file-%06d" % i: {"chunks": [(i + 1, blake3(b"%d" % i).digest())], "mtime": i * 10**9}
        for i in range(0, number, step)
    }
    for i in range(number // 100):
        tree[b"sub%04d" % i] = (0o755, i, {b"x": {"kind": 1, "link": b"../file-000000"}})
    return tree


def large_object(chunks: int, salt: bytes = b"") -> list[tuple[int, bytes]]:
    return [(65536, blake3(salt + b"%d" % i).digest()) for i in range(chunks)]


# ---- properties ------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(trees, st.integers(1, 1000))
def test_builder_and_walk_agree_with_the_oracle(tree: Tree, batch: int) -> None:
    summary, data = build(tree, batch)
    assert (summary.version_id, [*summary[1:]]) == oracle_version(tree)
    assert walked(data) == [*flat(tree)]
    assert reader(data).verify() == summary


@pytest.mark.slow
@given(trees, st.integers(1, 60), st.integers(1, 60))
def test_the_file_does_not_depend_on_batches(tree: Tree, one: int, other: int) -> None:
    assert build(tree, one) == build(tree, other)


@pytest.mark.slow
@pytest.mark.parametrize("number", [255, 5000])
@pytest.mark.parametrize("batch", [1, 7, 64, 5000])
def test_wide_directories_agree_with_the_oracle(number: int, batch: int) -> None:
    tree = wide_tree(number)
    summary, data = build(tree, batch)
    assert (summary.version_id, [*summary[1:]]) == oracle_version(tree)
    assert reader(data).verify() == summary
    assert walked(data) == [*flat(tree)]


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1023, 1024, 1025, 3000])
def test_large_objects_agree_with_the_oracle(chunks: int) -> None:
    tree: Tree = {b"large": {"chunks": large_object(chunks)}, b"same": {"chunks": large_object(chunks)}}
    summary, data = build(tree, 7)
    assert (summary.version_id, [*summary[1:]]) == oracle_version(tree)
    opened = reader(data)
    for name in (b"large", b"same"):
        assert b"".join(opened.chunks(b"", opened.lookup(name))) == packed(large_object(chunks))
    assert opened.verify() == summary


@given(st.lists(st.integers(0, 3), min_size=1, max_size=300), st.data())
def test_runs_do_not_depend_on_batches(pattern: list[int], data: st.DataObject) -> None:
    chunks = packed([(1, bytes([0, 2 * kind]) + bytes(30)) for kind in pattern])
    whole, parts = ChunkRunCutter(), ChunkRunCutter()
    runs = []
    at = 0
    while at < len(chunks):
        step = 36 * data.draw(st.integers(1, 100))
        runs += parts.feed(chunks[at : at + step])
        at += step
    assert runs + parts.finish() == whole.feed(chunks) + whole.finish()
    assert b"".join(runs) == chunks[: sum(map(len, runs))]


@pytest.fixture(scope="module")
def small() -> tuple[Summary, bytes]:
    tree: Tree = {
        b"a": {"chunks": [(5, b"i" * 32)], "mtime": 7},
        b"d": (0o755, 3, {b"e": (0o700, 4, {}), b"f": {"kind": 2, "link": b"a"}}),
        b"empty": {"chunks": []},
        b"link": {"kind": 1, "link": b"a"},
    }
    return build(tree)


def damaged_or_same(data: bytes, expected: list[tuple[bytes, tuple[Any, ...]]]) -> None:
    """`verify` notices; `walk` notices or gives what was written."""
    with pytest.raises((IntegrityError, ProtocolError)):
        reader(data).verify()
    found = []
    try:
        for path, e in reader(data).walk():
            found.append((path, (e.name, e.kind, e.mtime_ns, e.size, e.chunks, e.runs, e.depth)))
    except (IntegrityError, ProtocolError):
        assert found == expected[: len(found)]
    else:
        assert found == expected


@pytest.mark.slow
def test_every_flipped_bit_is_noticed(small: tuple[Summary, bytes]) -> None:
    _, data = small
    expected = walked(data)
    for bit in range(len(data) * 8):
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << bit % 8
        damaged_or_same(bytes(altered), expected)


def test_every_truncation_is_noticed(small: tuple[Summary, bytes]) -> None:
    _, data = small
    for length in range(len(data)):
        with pytest.raises(IntegrityError):
            reader(data[:length])


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_in_a_large_file_is_noticed(data: st.DataObject) -> None:
    _, whole = LARGE
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    altered = bytearray(whole)
    altered[bit // 8] ^= 1 << bit % 8
    with pytest.raises((IntegrityError, ProtocolError)):
        reader(bytes(altered)).verify()


LARGE = build({**wide_tree(300), b"large": {"chunks": large_object(1100)}})


@given(st.binary(max_size=400))
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\x91" * 300)
def test_garbage_pages_give_the_protocol_error(data: bytes) -> None:
    builder = ManifestBuilder()
    builder.begin_directory(b"")
    with pytest.raises(ProtocolError):
        builder.add_encoded_page(data)


@pytest.mark.slow
@given(trees.filter(bool), st.data())
def test_altered_pages_give_the_protocol_error_or_stay_canonical(tree: Tree, data: st.DataObject) -> None:
    entries = [e for path, e in reader(build(tree)[1]).walk() if not path and e.kind != DIRECTORY]
    if not entries:
        return
    plain = ManifestBuilder()
    plain.begin_directory(b"")
    page = bytearray(plain.add_page(next(cut_pages(entries))).data)
    for _ in range(data.draw(st.integers(1, 3))):
        page[data.draw(st.integers(0, len(page) - 1))] = data.draw(st.integers(0, 255))
    builder, again = ManifestBuilder(), ManifestBuilder()
    builder.begin_directory(b"")
    again.begin_directory(b"")
    try:
        accepted = builder.add_encoded_page(bytes(page))
    except ProtocolError:
        return
    assert accepted.data == page
    assert again.add_encoded_page(accepted.data, accepted.page_id) == accepted


# ---- differences -----------------------------------------------------------------------------------------


def naive_diff(a: bytes, b: bytes) -> set[tuple[str, bytes]]:
    before, after = (
        {path + b"/" + e.name if path else e.name: e for path, e in reader(data).walk()} for data in (a, b)
    )
    changes = set()
    for path in before.keys() | after.keys():
        old, new = before.get(path), after.get(path)
        if old is not None and new is not None and (old.kind == DIRECTORY) != (new.kind == DIRECTORY):
            changes |= {("removed", path), ("added", path)}
        elif old is None or new is None:
            changes.add(("added" if old is None else "removed", path))
        elif (old.kind, old.chunks, old.runs, old.link) != (new.kind, new.chunks, new.runs, new.link):
            changes.add(("changed", path))
        elif (old.mode, old.mtime_ns, old.flags) != (new.mode, new.mtime_ns, new.flags):
            changes.add(("metadata", path))
    return changes


def found_diff(a: bytes, b: bytes) -> list[Change]:
    return [*diff(reader(a), reader(b))]


@pytest.mark.slow
@given(trees, trees)
def test_diff_agrees_with_a_naive_one(one: Tree, other: Tree) -> None:
    a, b = build(one)[1], build(other)[1]
    changes = found_diff(a, b)
    assert {(c.kind, c.path) for c in changes} == naive_diff(a, b)
    assert len({(c.kind, c.path) for c in changes}) == len(changes)
    for change in changes:
        assert (change.before is None) == (change.kind == "added")
        assert (change.after is None) == (change.kind == "removed")


@pytest.mark.slow
@given(st.lists(st.integers(0, 2999), max_size=8, unique=True), st.integers(0, 2))
@settings(max_examples=15)
def test_diff_of_wide_directories_agrees_with_a_naive_one(where: list[int], how: int) -> None:
    tree = wide_tree(3000)
    for i in where:
        name = b"file-%06d" % i
        if how == 0:
            del tree[name]
        elif how == 1:
            tree[name] = {"kind": 1, "link": b"elsewhere"}
        else:
            tree[name + b"-new"] = tree[name]
    a, b = WIDE, build(tree)[1]
    assert {(c.kind, c.path) for c in found_diff(a, b)} == naive_diff(a, b)


WIDE = build(wide_tree(3000))[1]


# ---- pinned vectors --------------------------------------------------------------------------------------


def vector_trees() -> dict[str, tuple[str, Tree]]:
    hello = blake3(b"hello\n").digest()
    return {
        "empty": ("64KiB", {}),
        "the specification's example": (
            "64KiB",
            {
                b"a.txt": {"chunks": [(6, hello)], "mtime": 1_700_000_000_000_000_000},
                b"empty": (0o755, 0, {}),
                b"link": {"kind": 1, "mode": 0o777, "link": b"a.txt"},
            },
        ),
        "kinds and extremes": (
            "1MiB",
            {
                b"\xff\xfe": {"mode": 0o7777, "mtime": -1, "flags": 1, "chunks": [(1 << 22, b"\1" * 32)] * 2},
                b"a" * 255: {"kind": 1, "mode": 0o777, "mtime": -(2**63), "link": b"x" * 4096},
                b"b": {"mtime": 2**63 - 1, "chunks": []},
                b"c": {"kind": 2, "link": b"b"},
                b"d": (0o1777, 2**63 - 1, {b"e": (0, 0, {b"f": {"kind": 2, "link": b"b"}})}),
            },
        ),
        "5000 files and 50 directories": ("64KiB", wide_tree(5000)),
        "100 files of 200 chunks": (
            "64KiB",
            {b"%05d" % i: {"chunks": large_object(200, b"%d" % i)} for i in range(0, 2000, 20)},
        ),
        "an object of 1024 chunks": ("64KiB", {b"o": {"chunks": large_object(1024)}}),
        "an object of 1025 chunks": ("64KiB", {b"o": {"chunks": large_object(1025)}}),
        "an object of 10000 chunks": ("1MiB", {b"o": {"chunks": large_object(10000)}}),
        "an object of 66000 chunks, in runs of 64 and a list of runs": (
            "64KiB",
            {
                b"o": {
                    "chunks": [(65536, bytes(2) + struct.pack("<Q", i * i) + bytes(22)) for i in range(66000)]
                }
            },
        ),
        "an object of 3000 equal chunks": ("1MiB", {b"o": {"chunks": [(1 << 22, b"\7" * 32)] * 3000}}),
    }


PINNED = json.loads(VECTORS.read_text()) if VECTORS.exists() else {"trees": {}}


@pytest.mark.slow
def test_every_vector_is_tested() -> None:
    assert [*PINNED["trees"]] == [*vector_trees()]


@pytest.mark.slow
@pytest.mark.parametrize("name", PINNED["trees"])
def test_vectors_hold_for_oracle_and_package(name: str) -> None:
    profile, tree = vector_trees()[name]
    version_id, totals = oracle_version(tree, profile)
    summary, data = build(tree, 1000, profile)
    expected = PINNED["trees"][name]
    assert {"version_id": version_id.hex(), "totals": totals} == {
        k: expected[k] for k in ("version_id", "totals")
    }
    assert summary == (version_id, *totals)
    assert (len(data), blake3(data).hexdigest()) == (expected["file_bytes"], expected["file_blake3"])


def write_vectors() -> None:
    """Write the vectors: ids and totals as the oracle has them, the file's hash as the package writes it."""
    trees = {}
    for name, (profile, tree) in vector_trees().items():
        version_id, totals = oracle_version(tree, profile)
        _, data = build(tree, 1000, profile)
        trees[name] = {
            "version_id": version_id.hex(),
            "totals": totals,
            "file_bytes": len(data),
            "file_blake3": blake3(data).hexdigest(),
        }
    provenance = (
        "Version ids and totals: the naive implementation in tests/property/test_manifest_properties.py, "
        "written from docs/spec/manifest.md. Files: flowengine 0.1. A difference is a new format."
    )
    VECTORS.write_text(json.dumps({"provenance": provenance, "trees": trees}, indent=1) + "\n")


if __name__ == "__main__":
    write_vectors()
    sys.stdout.write(f"wrote {VECTORS}\n")
