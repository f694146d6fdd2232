"""Chunk boundaries and ids are pinned: a change of either makes every stored copy new to every other."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
from blake3 import blake3

from flowengine.chunking import (
    PROFILES,
    Cutter,
    chunk_id,
    cutting,
    hashing,
    pack_chunks,
    profile_named,
    zero_chunk_id,
)
from flowengine.chunking.cutting import REACH_BYTES, first_lengths, is_compiled, ways
from flowengine.chunking.fine import fine_profile
from flowengine.cli.doctor import _chunker
from flowengine.errors import UsageError

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "chunking.json").read_text())


def _data(name: str) -> bytes:
    """The inputs that the vectors name, made anew."""
    kind, _, size = name.partition(":")
    if kind == "zeros":
        return bytes(int(size))
    if kind == "random":
        return random.Random(int(size)).randbytes(int(size))
    assert kind == "lines"
    return b"".join(b"%d,%d\n" % (n, n * n) for n in range(int(size)))


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: f"{case['profile']}-{case['input']}")
def test_boundaries_and_ids_are_pinned(case: dict[str, str | list[int]]) -> None:
    data = _data(str(case["input"]))
    lengths = Cutter(profile_named(str(case["profile"]))).lengths(data)
    packed = []
    at = 0
    for length in lengths:
        packed.append((length, chunk_id(data[at : at + length])))
        at += length
    assert lengths == case["lengths"]
    assert chunk_id(pack_chunks(packed)).hex() == case["list_hash"]


def test_the_compiled_chunker_is_in_use() -> None:
    assert is_compiled()


ALL_SIZES = [
    (profile.minimum, profile.average, profile.maximum)
    for coarse in PROFILES.values()
    for profile in (coarse, fine_profile(coarse))
]


def _lines(rng: random.Random, size: int) -> bytes:
    rows = [
        b'{"node":"n%03d","took":%d}\n' % (rng.randrange(300), rng.randrange(10**6))
        for _ in range(size // 24 + 1)
    ]
    return b"".join(rows)[:size]


KINDS: dict[str, Callable[[random.Random, int], bytes]] = {
    "random": lambda rng, size: rng.randbytes(size),
    "zeros": lambda _, size: bytes(size),
    "one period": lambda rng, size: (rng.randbytes(37) * (size // 37 + 1))[:size],
    "few letters": lambda rng, size: bytes(rng.choices(b"ACGT", k=size)),
    "lines": _lines,
    "a hole": lambda rng, size: (
        rng.randbytes(size // 3) + bytes(size // 3) + rng.randbytes(size - 2 * (size // 3))
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_finds_the_same_cuts(kind: str) -> None:
    rng = random.Random(11)
    assert len(ways()) > 1
    for sizes in ALL_SIZES:
        for size in (1, REACH_BYTES, sizes[0] + 1, rng.randrange(3000), rng.randrange(300_000)):
            data = memoryview(b"beside" + KINDS[kind](rng, size))[6:]
            for most in (1, 3, size):
                found = [first_lengths(data, sizes, most, way) for way in ways()]
                assert all(lengths == found[0] for lengths in found)
                assert sum(found[0]) == size or len(found[0]) == most


def _first_by_the_rule(data: bytes, minimum: int, average: int, maximum: int) -> int:
    """docs/spec/chunking.md, word by word."""

    def word(at: int, turned: int) -> int:
        value = int.from_bytes(data[at : at + 4], "little")
        return (value << turned | value >> (32 - turned)) & 0xFFFF_FFFF

    weights = [weight | 1 for weight in struct.unpack("<8Q", blake3(b"flowengine cut").digest(64))]
    for place in range(minimum, min(len(data), maximum)):
        near, middle, far = word(place - 4, 0), word(place - 36, 8), word(place - 68, 16)
        if ((near + middle + far) * 0xC2B2_AE3D % 2**32) >> 24 != 0x7F:
            continue
        window = struct.unpack("<8Q", data[place - 64 : place])
        weight = sum(w * factor for w, factor in zip(window, weights, strict=True)) % 2**64
        if weight >> 32 < (2**39 if place < average else 2**41) // average:
            return place
    return min(len(data), maximum)


def test_the_cuts_are_those_of_the_rule() -> None:
    rng = random.Random(12)
    sizes = (256, 512, 4096)
    for make in KINDS.values():
        data = make(rng, 20_000)
        for length in first_lengths(data, sizes, len(data)):
            assert length == _first_by_the_rule(data, *sizes)
            data = data[length:]


@pytest.mark.parametrize("kind", ["random", "few letters", "lines"])
def test_lengths_are_as_the_profile_says_and_cuts_are_found_again_behind_an_insertion(kind: str) -> None:
    rng = random.Random(13)
    minimum, average, maximum = sizes = (256, 512, 4096)
    data = KINDS[kind](rng, 400_000)
    lengths = first_lengths(data, sizes, len(data))
    assert minimum <= min(lengths[:-1])
    assert max(lengths) <= maximum
    assert 0.85 * (average + minimum) < len(data) / len(lengths) < 1.15 * (average + minimum)
    ends = set(accumulate(lengths))
    changed = data[:200_000] + b"inserted" + data[200_000:]
    moved = {end - 8 for end in accumulate(first_lengths(changed, sizes, len(changed))) if end > 200_008}
    behind = {end for end in ends if end > 200_000}
    assert len(behind - moved) < 20


def test_no_run_of_one_byte_is_a_cut() -> None:
    for byte in range(256):
        assert first_lengths(bytes([byte]) * 5000, (256, 512, 4096), 9) == [4096, 904]


def test_without_the_library_the_cuts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(14).randbytes(300_000)
    expected = Cutter(PROFILES["64KiB"]).lengths(data)
    monkeypatch.setattr(cutting, "LIBRARY", None)
    assert Cutter(PROFILES["64KiB"]).lengths(data) == expected
    assert not is_compiled()


def test_a_library_that_hashes_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(15).randbytes(300_000)
    expected = Cutter(PROFILES["64KiB"]).packed(data)
    assert hashing._sound(hashing.best_hash_way())
    monkeypatch.setattr(hashing, "_TRIED", (1,))
    monkeypatch.setattr(hashing, "ids_of", lambda data, lengths, way: bytes([way + 1] * 32))
    assert not hashing._sound(hashing.best_hash_way())
    monkeypatch.undo()
    monkeypatch.setattr(hashing, "_way", -1)
    assert hashing.hash_ways() == [-1]
    assert Cutter(PROFILES["64KiB"]).packed(data) == expected
    found = _chunker()
    assert (found.check, found.verdict) == ("chunker", "warning")
    assert "hashes otherwise than blake3" in found.text


@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_a_maximum_of_zeros_is_one_chunk(profile: object) -> None:
    # The reader skips holes on the strength of this.
    assert profile in PROFILES.values()
    cutter = Cutter(profile)  # type: ignore[arg-type]
    size = cutter.profile.maximum
    assert cutter.lengths(bytes(2 * size + 5)) == [size, size, 5]
    assert zero_chunk_id(size) == chunk_id(bytes(size))


def test_an_unknown_profile_is_named_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match="no chunking profile") as caught:
        profile_named("3MiB")
    assert "64KiB" in caught.value.hint
