"""A new version over an old one: whatever the two are, the target has the new one, and little moves where little changed."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flowengine.store.selection import Root, Selection
from flowengine.transfer.local import copy_local
from flowengine.transfer.passes import Report, TransferSettings

pytestmark = pytest.mark.slow

KIB = 1024
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "delete", "move"]),
        st.floats(0, 1),
        st.integers(1, 40 * KIB),
    ),
    max_size=6,
)


def edited(old: bytes, edits: list[tuple[str, float, int]], seed: int) -> bytes:
    rng = random.Random(seed)
    data = bytearray(old)
    for kind, where, length in edits:
        at = int(where * len(data))
        if kind == "insert":
            data[at:at] = rng.randbytes(length)
        elif kind == "overwrite":
            data[at : at + length] = rng.randbytes(length)
        else:
            piece = data[at : at + length]
            del data[at : at + length]
            if kind == "move":
                to = rng.randrange(len(data) + 1)
                data[to:to] = piece
    return bytes(data)


def transferred(old: dict[str, bytes], new: dict[str, bytes]) -> Report:
    """Copy `new` over `old` with nothing remembered; the report, after comparing what arrived."""
    root = Path(tempfile.mkdtemp(prefix="flow-delta-"))
    try:
        for name, tree in (("source", new), ("target", old)):
            for path, data in tree.items():
                (root / name / path).parent.mkdir(parents=True, exist_ok=True)
                (root / name / path).write_bytes(data)
        (root / "target").mkdir(exist_ok=True)
        report = copy_local(
            Selection([Root(os.fsencode(root / "source"), b"")]),
            os.fsencode(root / "target"),
            TransferSettings(use_cache=False),
        )
        assert report.state == "completed"
        for path, data in new.items():
            assert (root / "target" / path).read_bytes() == data
        return report
    finally:
        shutil.rmtree(root)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(EDITS, st.integers(0, 3_000_000), st.integers(0, 2**32))
@example(
    [("overwrite", 0.0, 1), ("insert", 0.0, 1), ("move", 0.5, 1)], 1_601_751, 0
)  # what follows lies as it did
def test_any_edit_gives_the_new_version_and_sends_about_its_own_bytes(
    edits: list[tuple[str, float, int]], size: int, seed: int
) -> None:
    old = random.Random(seed).randbytes(size)
    new = edited(old, edits, seed + 1)
    report = transferred({"file": old}, {"file": new})
    content = sum(length for kind, _, length in edits if kind != "delete")
    ids = len(new) // 1000  # of chunks, at 36 bytes for each of at least 16 KiB, and a message or two
    assert report.bytes_sent < 2 * content + 12 * KIB * (2 + 4 * len(edits)) + ids + 8 * KIB


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 60_000), EDITS), min_size=1, max_size=12), st.integers(0, 2**32))
def test_any_edits_of_small_files_give_the_new_versions(
    files: list[tuple[int, list[tuple[str, float, int]]]], seed: int
) -> None:
    rng = random.Random(seed)
    old = {f"d{index % 3}/{index}": rng.randbytes(size) for index, (size, _) in enumerate(files)}
    new = {name: edited(old[name], edits, seed) for name, (_, edits) in zip(old, files, strict=True)}
    transferred(old, new)
