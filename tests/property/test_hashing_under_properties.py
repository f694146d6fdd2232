"""Ids of manifest pieces, many to a call, are those that blake3 gives one by one under their context."""

from __future__ import annotations

import random

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from flowengine.chunking import hashing, ids_under
from flowengine.chunking.hashing import hash_ways
from flowengine.manifest.entries import Kind, digest, digests

LENGTHS = [0, 1, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 2048, 2049, 3072, 70_000]
CONTEXTS = ["flowengine", "", "x" * 64, "y" * 65, "long " * 1000, "naïve ☃ 2026-11-29"]


def one_by_one(context: str, pieces: list[bytes]) -> list[bytes]:
    return [blake3(piece, derive_key_context=context).digest() for piece in pieces]


def of_lengths(lengths: list[int], seed: int = 1) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(length) for length in lengths]


@pytest.mark.parametrize("way", hash_ways())
@pytest.mark.parametrize("context", CONTEXTS)
def test_each_way_and_context_gives_the_ids_that_blake3_gives(way: int, context: str) -> None:
    assert len(hash_ways()) > 1, "the library is in use"
    pieces = of_lengths(LENGTHS)
    assert ids_under(context, pieces, way) == one_by_one(context, pieces)
    for piece in pieces:
        assert ids_under(context, [piece], way) == one_by_one(context, [piece])
    assert ids_under(context, [], way) == []


@pytest.mark.parametrize("way", hash_ways())
@pytest.mark.parametrize("count", [2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 1000])
@pytest.mark.parametrize("length", [0, 40, 64, 700, 1024, 2500])
def test_many_pieces_are_hashed_by_batches(way: int, count: int, length: int) -> None:
    pieces = of_lengths([length] * count)
    assert ids_under("of many", pieces, way) == one_by_one("of many", pieces)


@pytest.mark.parametrize("way", hash_ways())
def test_a_piece_may_be_larger_than_a_batch(way: int) -> None:
    pieces = of_lengths([1500, 2 * 1024 * 1024 + 5, 0, 500])
    assert ids_under("large", pieces, way) == one_by_one("large", pieces)


@settings(deadline=None)
@given(
    lengths=st.lists(st.sampled_from(LENGTHS) | st.integers(0, 5000), max_size=60),
    context=st.text(max_size=200),
    seed=st.integers(0, 1 << 30),
)
def test_pieces_of_all_lengths_beside_each_other(lengths: list[int], context: str, seed: int) -> None:
    pieces = of_lengths(lengths, seed)
    expected = one_by_one(context, pieces)
    for way in hash_ways():
        assert ids_under(context, pieces, way) == expected
    assert ids_under(context, pieces) == expected


def test_a_context_is_no_part_of_the_pieces_and_none_of_the_names_of_chunks() -> None:
    for way in hash_ways():
        found = {
            *ids_under("ab", [b"c"], way),
            *ids_under("a", [b"bc"], way),
            *ids_under("", [b"abc"], way),
            hashing.ids_of(b"abc", [3], way),
        }
        assert len(found) == 4


def test_each_kind_of_piece_has_its_own_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = of_lengths([0, 50, 3000])
    for way in hash_ways():
        monkeypatch.setattr(hashing, "_way", way)
        for kind in (Kind.ENTRIES, Kind.SUBDIRECTORIES, Kind.NODE, Kind.RUN, Kind.ROOT):
            assert digests(kind, pieces) == [digest(kind, piece) for piece in pieces]
            assert digests(kind, []) == []
    assert digests(Kind.NODE, pieces) != digests(Kind.ENTRIES, pieces)


def test_a_library_that_hashes_wrongly_in_this_mode_is_not_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that is made when the module is loaded looks at both modes."""
    for way in hash_ways():
        assert hashing._sound(way)
    monkeypatch.setattr(hashing, "ids_under", lambda context, pieces, way: [b"%d" % way for _ in pieces])
    assert not hashing._sound(hash_ways()[-1])
