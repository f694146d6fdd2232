"""Chunk boundaries and ids are pinned: a change of either makes every stored copy new to every other."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from flowengine.chunking import (
    PROFILES,
    Cutter,
    chunk_id,
    is_compiled,
    pack_chunks,
    profile_named,
    zero_chunk_id,
)
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
