"""Feeds the compiled libraries, built to notice wrong access to memory, with what a peer may send; for test_compiled_memory.

Called as `compiled_memory.py FOLDER SEED ROUNDS`, in a process that has the sanitizers' libraries loaded first.
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowengine.manifest.entries import FILE, Entry, encode

number, pointer = ctypes.c_int64, ctypes.c_void_p
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = pointer, [ctypes.c_size_t]
libc.free.argtypes = [pointer]
SEGMENT_NUMBERS, COLUMN_NUMBERS, STAT_NUMBERS, CHUNK_BYTES = 8, 5, 10, 36
PREFIX, REGULAR = b"a/folder/", 0o100000
LISTING, LEAF = struct.Struct("@15q9P"), struct.Struct("=12q")
KEPT = [
    b"",
    b"\x90",
    b"\xdc\x00\x10",
    b"\xdd\xff\xff\xff\xff",
    b"\x91\x9b",
    b"\x91\x9b\xc5\xff\xff",
    b"\xc1" * 40,
]


@contextmanager
def memory(size: int, content: bytes = b"") -> Iterator[int]:
    """So many bytes and not one more: what touches the next one is noticed."""
    place = libc.malloc(max(size, 1))
    ctypes.memmove(place, content, len(content))
    yield place
    libc.free(place)


def made(rng: random.Random) -> bytes:
    """A list of entries as a peer encodes it."""
    entries = []
    for index in range(rng.choice([1, 2, 15, 16, 17, 300])):
        lengths = [rng.randrange(1, 99_999) for _ in range(rng.choice([0, 1, 1, 1, 3, 30]))]
        chunks = b"".join([length.to_bytes(4, "little") + rng.randbytes(32) for length in lengths])
        mtime_ns = rng.choice([0, -1, -33, 127, 128, 70_000, 2**62, -(2**63), 1_700_000_000 * 10**9])
        name = b"f%05d" % index + rng.randbytes(rng.randrange(3)).hex().encode()
        entries.append(Entry(name, FILE, rng.choice([0, 0o644, 0o7777]), mtime_ns, sum(lengths), chunks))
    return bytes(encode(entries))


def damaged(rng: random.Random, data: bytes) -> bytes:
    """The same with a few bytes changed, gone or added, or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            changed[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            del changed[at : at + rng.randrange(1, 20)]
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randrange(1, 6))
        else:
            del changed[at:]
    return bytes(changed)


def look(library: ctypes.CDLL, data: bytes, room: int) -> bool:
    """Look over bytes of entries, and take their columns where they are good."""
    with memory(len(data), data) as place, memory(8 * SEGMENT_NUMBERS * room) as out:
        count = library.flow_segments(place, len(data), 0, 0, out, room)
        assert count <= room
        if count <= 0:
            return False
        rows = (number * (SEGMENT_NUMBERS * count)).from_address(out)
        files, chunks = sum(rows[1::SEGMENT_NUMBERS]), sum(rows[3::SEGMENT_NUMBERS])
        with (
            memory(len(data)) as names,
            memory(8 * COLUMN_NUMBERS * files) as numbers,
            memory(CHUNK_BYTES * chunks) as packed,
        ):
            used = library.flow_columns(place, len(data), names, numbers, packed)
            columns = (number * (COLUMN_NUMBERS * files)).from_address(numbers)
            stats: list[int] = []
            for at in range(0, len(columns), COLUMN_NUMBERS):
                _, size, mode, mtime_ns, _ = columns[at : at + COLUMN_NUMBERS]
                stats += (1, size, mtime_ns, 1, REGULAR | mode, 1, 0, 1, 0, 0)
            rows_of = struct.pack(f"={len(stats)}q", *stats)
            with (
                memory(used, ctypes.string_at(names, used)) as listed,
                memory(len(rows_of), rows_of) as found,
                memory(files * (30 + len(PREFIX)) + used + CHUNK_BYTES * chunks) as log,
                memory(len(PREFIX), PREFIX) as prefix,
            ):
                assert library.flow_same(place, len(data), listed, found, files, 1)
                counts = [packed_bytes // CHUNK_BYTES for packed_bytes in columns[::COLUMN_NUMBERS]]
                assert encoded(library, listed, used, found, counts, packed) == data
                library.flow_log(prefix, len(PREFIX), listed, found, numbers, packed, files, log)
    return True


def encoded(
    library: ctypes.CDLL, names: int, name_bytes: int, rows: int, counts: list[int], packed: int
) -> bytes:
    """Encode files of these columns to memory that is just as large as it is said to need."""
    files, told = len(counts), struct.pack(f"={len(counts)}q", *counts)
    most = 5 + 48 * files + name_bytes + CHUNK_BYTES * sum(counts)
    with (
        memory(len(told), told) as chunks,
        memory(most) as out,
        memory(8 * SEGMENT_NUMBERS * files + 8 * SEGMENT_NUMBERS) as segments,
        memory(8) as made,
    ):
        size = library.flow_block(names, rows, files, 0o7777, chunks, packed, out, segments, files + 1, made)
        assert number.from_address(made).value > 0
        return ctypes.string_at(out, size)


def on_disk(library: ctypes.CDLL, rng: random.Random) -> None:
    """List a folder, read its files, and give them other modes and times, with room for just that."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = [rng.choice([0, 1, 300, 5000]) for _ in range(rng.choice([1, 3, 70]))]
        for index, size in enumerate(sizes):
            (Path(folder) / f"f{index:04d}").write_bytes(rng.randbytes(size))
        (Path(folder) / "large").write_bytes(bytes(6000))
        fd = os.open(folder, os.O_RDONLY)
        with memory(LISTING.size) as listing, memory(6, b"large\0") as marked:
            assert library.flow_list(fd, 6000, marked, listing) == 0
            told = LISTING.unpack(ctypes.string_at(listing, LISTING.size))
            count, name_bytes, names, rows = told[0], told[4], told[15], told[19]
            assert (count, told[1], told[12], told[14]) == (len(sizes), 1, sum(sizes), 2)
            stats = ctypes.string_at(rows, 8 * STAT_NUMBERS * count)
            numbers = struct.pack(
                f"={COLUMN_NUMBERS * count}q",
                *[value for size in sizes for value in (0, size, rng.choice([0o600, 0o640]), -7, 0)],
            )
            with (
                memory(name_bytes, ctypes.string_at(names, name_bytes)) as listed,
                memory(len(stats), stats) as found,
                memory(8 * STAT_NUMBERS * count - 8, stats[8:]) as expected,
                memory(sum(sizes) + 1) as buffer,
                memory(len(numbers), numbers) as wanted,
            ):
                for cold in (number(0), number(1)):
                    done = library.flow_read(
                        fd, listed, count, expected, STAT_NUMBERS, buffer, ctypes.byref(cold)
                    )
                    assert done == count
                assert library.flow_touch(fd, listed, count, wanted, found) == count
                if count > 1:
                    (Path(folder) / "f0001").write_bytes(b"not as it was")
                    ctypes.memmove(wanted + 8 * (COLUMN_NUMBERS + 3), struct.pack("=q", 5), 8)
                    assert library.flow_touch(fd, listed, count, wanted, found) == 1
            library.flow_free(listing)
        os.close(fd)


def beside(library: ctypes.CDLL, rng: random.Random, entries: bytes) -> None:
    """Look at folders side by side, with and without the entries that they may have, with room for just what is told."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {f"d{number}": rng.choice([0, 1, 3, 700]) for number in range(rng.randrange(1, 7))}
        for name, files in sizes.items():
            (Path(folder) / name).mkdir()
            for index in range(files):
                (Path(folder) / name / f"f{index:04d}").touch()
        (Path(folder) / ("n" * 255)).mkdir()
        (Path(folder) / "a folder in it" / "in").mkdir(parents=True)
        sizes["n" * 255] = 0
        names = [*sizes, "a folder in it", "not there"]
        rng.shuffle(names)
        given = "\0".join(names).encode() + b"\0"
        claims = [damaged(rng, entries) for _ in names]
        fd = os.open(folder, os.O_RDONLY)
        with (
            memory(len(given), given) as listed,
            memory(LEAF.size * len(names)) as out,
            memory(2, b"x\0") as marked,
        ):
            for asked in (None, claims):
                pointers = None if asked is None else (ctypes.c_char_p * len(names))(*asked)
                lengths = None if asked is None else (number * len(names))(*map(len, asked))
                proofs = library.flow_leaves(fd, listed, len(names), 5000, marked, pointers, lengths, out)
                assert proofs
                told = [*LEAF.iter_unpack(ctypes.string_at(out, LEAF.size * len(names)))]
                ctypes.string_at(proofs, sum(leaf[-1] for leaf in told))
                for name, leaf in zip(names, told, strict=True):
                    files = sizes.get(name, 0)
                    if asked is None:
                        assert leaf[-2:] == (name in sizes, 3 + 46 * files if files else 0)
                    assert name in sizes or leaf[-2:] == (0, 0)
                library.flow_free_proofs(proofs)
        os.close(fd)


def cut(library: ctypes.CDLL, rng: random.Random) -> None:
    """Cut bytes that nothing stands before or behind, in all ways."""
    size = rng.choice([rng.randrange(1, 400), rng.randrange(1, 60_000)])
    minimum, average, maximum = rng.choice([(256, 512, 4096), (16_384, 65_536, 262_144), (68, 512, 600)])
    most = size // minimum + 1
    with memory(size, rng.choice([rng.randbytes(size), bytes(size)])) as place, memory(4 * most) as lengths:
        for way in range(library.flow_cut_ways()):
            library.flow_cut(place, size, minimum, average, maximum, way, lengths, most)


def hashed(library: ctypes.CDLL, rng: random.Random) -> None:
    """Hash pieces, compare chunks of lists that lie, and cut and name what is read, each in memory that just holds it."""
    lengths = [
        rng.choice([1, 64, 1024, rng.randrange(1, 4000), rng.randrange(1, 90_000)])
        for _ in range(rng.randrange(1, 9))
    ]
    size, count = sum(lengths), len(lengths)
    data = rng.randbytes(size)
    told = struct.pack(f"={count}I", *lengths)
    claimed = [rng.choice([length, length, 0, length + 1, 2**32 - 1]) for length in lengths]
    packed = b"".join(length.to_bytes(4, "little") + rng.randbytes(32) for length in claimed)
    sizes = rng.choice([(256, 512, 4096), (16_384, 65_536, 262_144)])
    room = size // sizes[0] + 1
    with (
        memory(size, data) as place,
        memory(len(told), told) as array,
        memory(32 * count) as names,
        memory(len(packed), packed) as claims,
        memory(36 * room) as chunks,
        memory(16 * room) as fine,
        tempfile.TemporaryFile() as file,
    ):
        file.write(data)
        file.flush()
        under: set[bytes] = set()
        for way in range(library.flow_hash_ways()):
            assert not library.flow_hash_under(way, b"context", 7, place, array, count, names)
            under.add(ctypes.string_at(names, 32 * count))
            rule = (number * 5)(*sizes, library.flow_cut_ways() - 1, way)
            assert not library.flow_hash(way, place, array, count, names)
            assert library.flow_check(way, place, size, claims, count) == 0
            whole = library.flow_pack(rule, place, size, 32, chunks, room)
            assert library.flow_check(way, place, size, chunks, whole) == whole
            assert library.flow_pack(rule, place, size, 12, fine, room) == whole
            objects = [0, *lengths, 0]
            of_all = struct.pack(f"={len(objects)}q", *objects)
            with (
                memory(len(of_all), of_all) as each,
                memory(8 * len(objects)) as counts,
                memory(36 * (room + len(objects))) as many,
            ):
                total = library.flow_pack_many(
                    rule, place, each, 8, len(objects), counts, many, room + len(objects)
                )
                assert library.flow_check(way, place, size, many, total) == total
                assert sum((number * len(objects)).from_address(counts)) == total
                assert (
                    library.flow_pack_many(rule, place, each, 8, len(objects), counts, many, total - 1) == -1
                )
            state = (number * 3)()
            library.flow_read_chunks(file.fileno(), 0, rule, place, state, size, 1, chunks, room)
            assert state[0] == state[1] == size
            part = (number * 3)()
            library.flow_read_chunks(
                file.fileno(), 0, rule, place, part, rng.randrange(size), 0, chunks, room
            )
        assert len(under) == 1


def main() -> None:
    folder, seed, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    many, cutter = ctypes.CDLL(str(folder / "_many.so")), ctypes.CDLL(str(folder / "_chunks.so"))
    calls: list[tuple[Any, list[Any]]] = [
        (many.flow_segments, [pointer, number, number, number, pointer, number]),
        (many.flow_columns, [pointer, number, pointer, pointer, pointer]),
        (many.flow_same, [pointer, number, pointer, pointer, number, number]),
        (many.flow_log, [pointer, number, *[pointer] * 4, number, pointer]),
        (many.flow_block, [*[pointer] * 2, *[number] * 2, *[pointer] * 4, number, pointer]),
        (many.flow_list, [number, number, pointer, pointer]),
        (many.flow_free, [pointer]),
        (many.flow_read, [number, pointer, number, pointer, number, pointer, pointer]),
        (many.flow_leaves, [number, pointer, number, number, *[pointer] * 4]),
        (many.flow_free_proofs, [pointer]),
        (many.flow_touch, [number, pointer, number, pointer, pointer]),
        (cutter.flow_cut_ways, []),
        (cutter.flow_cut, [pointer, number, number, number, number, number, pointer, number]),
        (cutter.flow_hash_ways, []),
        (cutter.flow_hash, [number, pointer, pointer, number, pointer]),
        (
            cutter.flow_hash_under,
            [number, ctypes.c_char_p, ctypes.c_uint32, pointer, pointer, number, pointer],
        ),
        (cutter.flow_check, [number, pointer, number, pointer, number]),
        (cutter.flow_pack, [pointer, pointer, number, number, pointer, number]),
        (cutter.flow_pack_many, [*[pointer] * 3, number, number, pointer, pointer, number]),
        (
            cutter.flow_read_chunks,
            [number, number, pointer, pointer, pointer, number, number, pointer, number],
        ),
    ]
    for function, arguments in calls:
        function.restype, function.argtypes = number, arguments
    rng = random.Random(seed)
    taken = refused = 0
    for turn in range(rounds):
        good = made(rng)
        assert look(many, good, 1000)
        for data in [*KEPT, *(damaged(rng, good) for _ in range(30))]:
            if look(many, data, rng.choice([1, 2, 1000])):
                taken += 1
            else:
                refused += 1
        if turn % 5 == 0:  # which takes longest
            on_disk(many, rng)
            beside(many, rng, good)
        cut(cutter, rng)
        hashed(cutter, rng)
    print(f"{taken} taken, {refused} refused")


if __name__ == "__main__":
    main()
