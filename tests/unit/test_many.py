"""Many small files at once: compiled and in Python, which must not differ."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from flowengine.chunking import DEFAULT_PROFILE, Cutter, chunk_id, pack_chunks, profile_named
from flowengine.manifest import Block, Entry
from flowengine.store import many
from flowengine.store.encoded import block_of, parse_block, read_block, same_files
from flowengine.store.filesystem import gives_modes
from flowengine.store.index_log import IndexLog, read_log
from flowengine.store.landed import index_folder
from flowengine.store.many import (
    Kind,
    Stat,
    list_folder,
    open_listed,
    place_files,
    read_files,
    write_files,
)
from flowengine.store.proofs import encode_entries
from flowengine.store.runs import dress_files, log_rows, note_folders, place_run, write_run
from flowengine.store.scan_small import batches

LARGE = 1000


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def stat_of(path: Path) -> Stat:
    return Stat.of(path.lstat())


@pytest.mark.usefixtures("way")
def test_list_sorts_by_kind_and_name(tmp_path: Path, folder: int) -> None:
    for name in (b"b", b"a", b"ab", b"\xff\n", b"A"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(name)
    (tmp_path / "large").write_bytes(bytes(LARGE))
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "below").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for _ in range(2):  # where a listing ended the next one begins anew
        listing = list_folder(folder, LARGE)
        assert listing.error is None
        assert not listing.linked
        assert listing.smalls.names == [b"A", b"a", b"ab", b"b", b"link", b"\xff\n"]
        assert [rows.names for rows in listing[1:4]] == [[b"large"], [b"below"], [b"pipe"]]
    for name, st in listing.smalls.pairs() + listing.larges.pairs() + listing.folders.pairs():
        assert st == stat_of(tmp_path / os.fsdecode(name))
    assert listing.proof == many.stats_proof(listing.smalls.pairs())


@pytest.mark.usefixtures("way")
def test_a_pipe_in_a_files_place_holds_nobody_up(tmp_path: Path, folder: int) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"def")
    rows = list_folder(folder, LARGE).smalls.pairs()
    (tmp_path / "b").unlink()
    os.mkfifo(tmp_path / "b")
    buffer = memoryview(bytearray(16))
    assert read_files(folder, rows, buffer, 0) == 1
    assert bytes(buffer[:3]) == b"abc"


@pytest.mark.usefixtures("way")
def test_list_of_nothing_and_of_no_folder(tmp_path: Path, folder: int) -> None:
    listing = list_folder(folder, LARGE)
    assert [len(rows) for rows in listing[:4]] == [0, 0, 0, 0]
    assert listing.proof == b""
    (tmp_path / "file").write_bytes(b"x")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        error = list_folder(fd, LARGE).error
    finally:
        os.close(fd)
    assert isinstance(error, NotADirectoryError)


@pytest.mark.usefixtures("way")
def test_list_sees_other_names(tmp_path: Path, folder: int) -> None:
    (tmp_path / "one").write_bytes(b"x")
    os.link(tmp_path / "one", tmp_path / "two")
    assert list_folder(folder, LARGE).linked


@pytest.mark.usefixtures("way")
def test_read_stops_at_what_is_not_as_expected(tmp_path: Path, folder: int) -> None:
    for name in "abcd":
        (tmp_path / name).write_bytes(name.encode() * 3)
    rows = list_folder(folder, LARGE).smalls.pairs()
    buffer = memoryview(bytearray(32))
    assert read_files(folder, rows, buffer, 2) == 4
    assert bytes(buffer[2:14]) == b"aaabbbcccddd"
    name, st = rows[2]
    assert read_files(folder, [*rows[:2], (name, st._replace(st_mtime_ns=1)), rows[3]], buffer, 0) == 2
    assert read_files(folder, [*rows[:2], (name, st._replace(st_ctime_ns=1)), rows[3]], buffer, 0) == 2
    (tmp_path / "c").write_bytes(b"grown")
    assert read_files(folder, rows, buffer, 0) == 2
    (tmp_path / "b").unlink()
    assert read_files(folder, rows, buffer, 0) == 1
    (tmp_path / "a").unlink()
    (tmp_path / "a").symlink_to("d")
    assert read_files(folder, rows, buffer, 0) == 0


@pytest.mark.parametrize("cold", [0, 1])
def test_files_that_are_cold_are_opened_ahead_and_all_closed(tmp_path: Path, folder: int, cold: int) -> None:
    """More files than are open at a time, with one that is not as expected at each place that counts."""
    data = {f"{number:03d}": os.urandom(1 + number * 7) for number in range(100)}
    for name, content in data.items():
        (tmp_path / name).write_bytes(content)
    rows = list_folder(folder, LARGE).smalls.pairs()
    buffer = memoryview(bytearray(sum(map(len, data.values())) + 1))
    open_before = os.listdir("/proc/self/fd")
    for wrong in (None, 0, 1, 31, 32, 33, 98, 99):
        many.were_cold.value = cold
        asked = list(rows)
        if wrong is not None:
            name, st = rows[wrong]
            asked[wrong] = (name, st._replace(st_mtime_ns=1)) if wrong % 2 else (b"gone", st)
        right = 100 if wrong is None else wrong
        assert read_files(folder, asked, buffer, 0) == right
        expected = b"".join(list(data.values())[:right])
        assert buffer[: len(expected)] == expected
        assert os.listdir("/proc/self/fd") == open_before


@pytest.mark.usefixtures("way")
def test_no_memory_is_touched_but_what_was_given(tmp_path: Path, folder: int) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    rows = list_folder(folder, LARGE).smalls.pairs()
    with pytest.raises(ValueError, match="fit"):
        read_files(folder, rows, memoryview(bytearray(5)), 2)
    for what in ((2, 3, 0o600, 0), (-1, 1, 0o600, 0), (2, -1, 0o600, 0)):
        with pytest.raises(ValueError, match="outside"):
            write_files(folder, ["b"], [what], memoryview(bytearray(4)))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ["writable", "bytes"])
def test_write_makes_files_with_mode_and_time(tmp_path: Path, folder: int, kind: str) -> None:
    data = memoryview(b"..onetwo..") if kind == "bytes" else memoryview(bytearray(b"..onetwo.."))
    before = os.umask(0o022)
    try:
        write_files(folder, ["a", "b"], [(2, 3, 0o640, 1_000_000_001), (5, 3, 0o400, -1)], data)
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"one"
    a, b = stat_of(tmp_path / "a"), stat_of(tmp_path / "b")
    assert (a.st_mode, a.st_mtime_ns) == (0o100640, 1_000_000_001)
    assert (b.st_mode, b.st_mtime_ns) == (0o100400, -1)
    with pytest.raises(FileExistsError):
        write_files(folder, ["c", "a"], [(2, 3, 0o600, 0)] * 2, data)
    assert (tmp_path / "c").exists()


@pytest.mark.usefixtures("way")
def test_place_says_what_stands_where_and_what_failed(tmp_path: Path, folder: int) -> None:
    below = tmp_path / "below"
    (below / "taken").mkdir(parents=True)
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    to = os.open(below, os.O_RDONLY | os.O_DIRECTORY)
    try:
        stats, failed = place_files(
            folder, [("a", to, b"x"), ("b", to, b"taken"), ("none", to, b"y"), ("c", folder, b"z")]
        )
    finally:
        os.close(to)
    assert failed == [1, 2]
    assert stats == [stat_of(below / "x"), None, None, stat_of(tmp_path / "z")]
    assert place_files(folder, []) == ([], [])


def test_a_proof_is_the_same_for_both_kinds_of_stat(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    st = (tmp_path / "a").stat()
    proof = many.stats_proof([(b"a", st), (b"b", st)])
    assert proof == many.stats_proof([(b"a", Stat.of(st)), (b"b", Stat.of(st))])
    assert struct.unpack_from("<I", proof) == (2,)
    assert proof.endswith(b"a/b")


def test_batches_are_bounded_by_number_chunks_and_bytes() -> None:
    assert batches([], 10, 100) == [0]
    assert batches([1] * 1100, 10, 10_000) == [512, 1024, 1100]
    assert batches([60, 60, 60, 20], 10, 100) == [1, 2, 4]
    assert batches([10_000] * 8, 10, 10**9) == [5, 8]


@pytest.mark.usefixtures("way")
def test_files_are_compared_with_a_block(tmp_path: Path, folder: int) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"12")
    listing = list_folder(folder, LARGE)
    chunks = pack_chunks([(2, bytes(32))])
    entries = [
        Entry(name, 0, st.st_mode & 0o7777, st.st_mtime_ns, 2, chunks) for name, st in listing.smalls.pairs()
    ]

    def same(changed: Entry, *, attributes: bool) -> bool:
        block = parse_block(encode_entries([entries[0], changed]))
        assert block is not None
        return same_files(block, listing.smalls, attributes=attributes)

    one = entries[1]
    assert same(one, attributes=True)
    replace = msgspec.structs.replace
    for changed, looks_same in (
        (replace(one, mode=one.mode ^ 1), True),
        (replace(one, mtime_ns=one.mtime_ns + 1), True),
        (replace(one, name=b"bb"), False),
        (replace(one, name=b"c"), False),
        (replace(one, size=3, chunks=pack_chunks([(3, bytes(32))])), False),
    ):
        assert not same(changed, attributes=True)
        assert same(changed, attributes=False) is looks_same
    alone = parse_block(encode_entries([one]))
    assert alone is not None
    assert not same_files(alone, listing.smalls, attributes=True)


def block_in(listing: many.Listing, data: dict[bytes, bytes], cut: int = 1 << 20) -> Block:
    """The block of a folder's small files, each in chunks of `cut` bytes."""
    pieces = [
        [data[name][at : at + cut] for at in range(0, len(data[name]), cut)] for name in listing.smalls.names
    ]
    packed = pack_chunks([(len(piece), chunk_id(piece)) for some in pieces for piece in some])
    counts = struct.pack(f"={len(pieces)}q", *map(len, pieces))
    block = block_of(listing.smalls, 0o1777, counts, packed)
    assert block is not None
    again = parse_block(block.data)
    assert again is not None
    assert again.segments == block.segments
    return block


CONTENTS = {b"a": b"1", b"bb": b"22" * 200, b"\xff": b"333"}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("cut", [1 << 20, 7])
def test_a_run_is_encoded_made_placed_and_logged(tmp_path: Path, cut: int) -> None:
    for name, content in CONTENTS.items():
        path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
        path.write_bytes(content)
        os.utime(path, ns=(5, -7))
        path.chmod(0o6754)
    staging, target = tmp_path / "staging", tmp_path / "target"
    staging.mkdir()
    target.mkdir()
    fds = [os.open(path, os.O_RDONLY) for path in (tmp_path, staging, target)]
    try:
        listing = list_folder(fds[0], LARGE)
        block = block_in(listing, CONTENTS, cut)
        packed = {name: pack_chunks(
            [(len(c[at : at + cut]), chunk_id(c[at : at + cut])) for at in range(0, len(c), cut)]
        ) for name, c in CONTENTS.items()}  # fmt: skip
        assert block.entries == [
            Entry(name, 0, 0o754, -7, len(content), packed[name]) for name, content in CONTENTS.items()
        ]
        room = memoryview(bytearray(1000))
        assert many.read_rows(fds[0], listing.smalls, room, 3) == 3
        assert many.read_rows(fds[0], listing.smalls.part(1, 3), room, 900 - 403) == 2
        data = b"".join(CONTENTS.values())
        assert bytes(room[3 : 3 + len(data)]) == data
        write_run(fds[1], 255, block.columns.packed, room[3:])
        write_run(fds[1], 300, block.columns.packed, memoryview(data))
        assert sorted(path.name for path in staging.iterdir()) == [
            "100",
            "101",
            "12c",
            "12d",
            "12e",
            "ff",
        ]
        rows, stats, failed = place_run(fds[1], 255, block, fds[2])
        assert rows is not None
        assert (stats, failed) == ([], [])
        placed = list_folder(fds[2], LARGE).smalls
        assert rows.pairs() == placed.pairs()
        assert rows.proof == many.stats_proof(placed.pairs()) == placed.proof
        assert many.joined([placed.part(0, 1), placed.part(1, 3)]).pairs() == placed.pairs()
        assert same_files(block, placed, attributes=True)
        assert [(target / os.fsdecode(name)).read_bytes() for name in CONTENTS] == [*CONTENTS.values()]
        log = IndexLog(os.fsencode(tmp_path), "p", str(tmp_path))
        log.add_block(b"x/y", block, rows)
        assert log.chunks == block.chunks
        log.flush()
        (written,) = Path(index_folder(os.fsencode(tmp_path), "p", str(tmp_path))).iterdir()
        assert [*read_log(str(written))] == [
            (b"x/y/" + name, len(content), -7, 0, packed[name]) for name, content in CONTENTS.items()
        ]
        # A folder stands where one of them comes to: all others are placed.
        (target / "bb").unlink()
        (target / "bb").mkdir()
        rows, stats, failed = place_run(fds[1], 300, block, fds[2])
        assert rows is None
        assert failed == [1]
        assert [st is None for st in stats] == [False, True, False]
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.usefixtures("way")
def test_a_run_says_what_could_not_be_made(tmp_path: Path, folder: int) -> None:
    (tmp_path / "a").write_bytes(b"1")
    block = block_in(list_folder(folder, LARGE), {b"a": b"1"})
    (tmp_path / "1").mkdir()
    with pytest.raises(FileExistsError):
        write_run(folder, 1, block.columns.packed, memoryview(b"1"))
    with pytest.raises(ValueError, match="outside"):
        write_run(folder, 2, block.columns.packed, memoryview(b""))


@pytest.mark.usefixtures("way")
def test_list_tells_of_all_at_once(tmp_path: Path, folder: int) -> None:
    empty = list_folder(folder, LARGE, b"mark")
    assert (empty.plain, empty.file_bytes, empty.marked) == (True, 0, None)
    assert empty.newest_ns < 0
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(bytes(LARGE))
    listing = list_folder(folder, LARGE, b"mark")
    assert (listing.plain, listing.file_bytes, listing.marked) == (True, 3, None)
    assert listing.smalls.size_bytes == 3
    assert listing.newest_ns == max((tmp_path / name).stat().st_ctime_ns for name in ("a", "empty", "large"))
    (tmp_path / "link").symlink_to("nowhere, far away")
    (tmp_path / "mark").mkdir()
    listing = list_folder(folder, LARGE, b"mark")
    assert (listing.plain, listing.file_bytes, listing.marked) == (False, 3, Kind.FOLDER)
    assert listing.smalls.size_bytes == 3 + len("nowhere, far away")
    (tmp_path / "mark").rmdir()
    (tmp_path / "mark").write_bytes(bytes(LARGE))
    assert list_folder(folder, LARGE, b"mark").marked is Kind.LARGE


@pytest.mark.usefixtures("way")
def test_empty_files_are_not_opened(tmp_path: Path, folder: int) -> None:
    for name, content in (("a", b"1"), ("b", b""), ("c", b"23"), ("d", b"")):
        (tmp_path / name).write_bytes(content)
    listing = list_folder(folder, LARGE)
    for name in ("b", "d"):
        (tmp_path / name).unlink()
    buffer = memoryview(bytearray(4))
    assert many.read_rows(folder, listing.smalls, buffer, 0) == 4
    assert bytes(buffer) == b"123\0"


@pytest.mark.usefixtures("way")
def test_files_are_dressed_as_a_block_has_them(tmp_path: Path, folder: int) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"12")
        os.utime(tmp_path / name, ns=(-5, -5))
        (tmp_path / name).chmod(0o640)
    listing = list_folder(folder, LARGE)
    chunks = pack_chunks([(2, bytes(32))])
    entries = [Entry(b"a", 0, 0o640, -5, 2, chunks), Entry(b"b", 0, 0o444, 7, 2, chunks)]
    block = parse_block(encode_entries([*entries, Entry(b"c", 0, 0o640, -1_000_000_001, 2, chunks)]))
    assert block is not None
    dressed = dress_files(folder, block, listing.smalls)
    assert dressed is not None
    assert dressed.names == [b"a", b"b", b"c"]
    assert dressed.stats == [stat_of(tmp_path / name) for name in ("a", "b", "c")]
    assert [(st.st_mode & 0o7777, st.st_mtime_ns) for st in dressed.stats] == [
        (0o640, -5),
        (0o444, 7),
        (0o640, -1_000_000_001),
    ]
    assert dressed.stats[0] == listing.smalls.stats[0]  # nothing was done to it


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("happened", ["gone", "written", "replaced", "link", "pipe"])
def test_what_is_no_longer_as_listed_is_not_dressed(tmp_path: Path, folder: int, happened: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12")
    (tmp_path / "aside").mkdir()
    listing = list_folder(folder, LARGE)
    if happened == "written":
        path.write_bytes(b"345")
    else:
        path.rename(tmp_path / "aside" / "a")
    if happened == "replaced":
        path.write_bytes(b"67")
    elif happened == "link":
        path.symlink_to("aside/a")
    elif happened == "pipe":
        os.mkfifo(path)
    block = parse_block(encode_entries([Entry(b"a", 0, 0o600, 7, 2, pack_chunks([(2, bytes(32))]))]))
    assert block is not None
    assert dress_files(folder, block, listing.smalls) is None
    assert all(found.lstat().st_mtime_ns != 7 for found in (path, tmp_path / "aside" / "a") if found.exists())


def test_many_objects_are_cut_and_named_in_one_call(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cutter = Cutter(DEFAULT_PROFILE)
    if way == "python":
        monkeypatch.setattr(cutter, "_rule", None)
    sizes = [0, 1, 16 << 10, (16 << 10) + 1, 300_000, 0, 5]
    data = random.Random(4).randbytes(sum(sizes))
    for stride in (8, 24):
        told = b"".join([struct.pack("=q", size) + bytes(stride - 8) for size in sizes])
        counts, packed = cutter.packed_many(data, told, stride)
        at = start = 0
        for size, count in zip(sizes, memoryview(counts).cast("q"), strict=True):
            assert packed[start : start + 36 * count] == cutter.packed(data[at : at + size])
            at, start = at + size, start + 36 * count
        assert start == len(packed)


@pytest.mark.usefixtures("way")
def test_a_folder_is_opened_and_listed_at_once(tmp_path: Path, folder: int) -> None:
    below = tmp_path / "below"
    below.mkdir()
    (below / "a").write_bytes(b"1")
    (tmp_path / "link").symlink_to(below)
    fd, st, listing = open_listed(folder, b"below", LARGE, b"a")
    try:
        assert st == Stat.of(below.stat())
        assert (
            listing.smalls.pairs() == list_folder(fd, LARGE).smalls.pairs() == [(b"a", stat_of(below / "a"))]
        )
        assert listing.marked is Kind.SMALL
        assert os.listdir(fd) == ["a"]
    finally:
        os.close(fd)
    for name, error in ((b"gone", FileNotFoundError), (b"link", NotADirectoryError)):
        with pytest.raises(error):
            open_listed(folder, name, LARGE)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("profile", ["64KiB", "256KiB"])
def test_files_are_read_cut_named_and_encoded_at_once(tmp_path: Path, folder: int, profile: str) -> None:
    contents = {b"a": b"", b"b": bytes(range(256)) * 3000, b"c": b"c"}
    for name, content in contents.items():
        (tmp_path / os.fsdecode(name)).write_bytes(content)
    rows = list_folder(folder, 1 << 20).smalls
    room = memoryview(bytearray(768_005))
    cutter = Cutter(profile_named(profile))
    block = read_block(folder, rows, 0o7777, cutter, room, 3)
    assert block is not None
    assert bytes(room[3:768_004]) == b"".join(contents.values())
    assert [(e.name, e.size, e.chunks) for e in block.entries] == [
        (name, len(content), cutter.packed(content)) for name, content in contents.items()
    ]
    again = parse_block(block.data)
    assert again is not None
    assert again.segments == block.segments
    with pytest.raises(ValueError, match="do not fit"):
        read_block(folder, rows, 0o7777, cutter, room, 4)
    (tmp_path / "b").write_bytes(b"shorter")
    assert read_block(folder, rows, 0o7777, cutter, room, 0) is None


def test_folders_that_landed_are_noted_as_one_by_one(tmp_path: Path, folder: int) -> None:
    names = [b"%d" % number for number in range(7)]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(name * 9 if name != b"3" else b"")
    rows = list_folder(folder, LARGE).smalls
    cutter = Cutter(DEFAULT_PROFILE)
    block = read_block(folder, rows, 0o7777, cutter, memoryview(bytearray(100)), 0)
    assert block is not None
    noted = note_folders([b"x", b"y/z", b"w"], [4, 1, 2], block.columns, rows)
    assert noted is not None
    assert noted[0] == [rows.part(0, 4).proof, rows.part(4, 5).proof, rows.part(5, 7).proof]
    assert noted[1] == b"".join(
        [
            log_rows(path, block.part(first, last).columns, rows.part(first, last)) or b"?"
            for path, first, last in ((b"x/", 0, 4), (b"y/z/", 4, 5), (b"w/", 5, 7))
        ]
    )


@pytest.mark.usefixtures("way")
def test_bits_that_the_system_takes_away_are_given_all_the_same(tmp_path: Path, folder: int) -> None:
    before = os.umask(0o027)
    try:
        write_files(folder, ["a", "b"], [(0, 1, 0o664, 1), (0, 1, 0o406, 1)], memoryview(b"1"), 0o027)
        block = block_in(list_folder(folder, LARGE), {b"a": b"1", b"b": b"1"})
        write_run(folder, 1, block.columns.packed, memoryview(b"11"), 0o027)
        write_files(folder, ["c"], [(0, 1, 0o664, 1)], memoryview(b"1"))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"a": 0o664, "b": 0o406, "1": 0o664, "2": 0o406, "c": 0o640}
    assert gives_modes(folder)
    assert not (tmp_path / "s.probe-mode").exists()
