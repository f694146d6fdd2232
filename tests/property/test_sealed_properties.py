"""Sealed objects of any kind open equal, and no change to one passes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowengine.errors import IntegrityError
from flowengine.trust.sealed import SEGMENT_BYTES, ObjectSealer, SealingKey, open_object

pytestmark = pytest.mark.slow
KEY = SealingKey(bytes(range(32)))
SIZES = st.one_of(
    st.integers(0, 300),
    st.sampled_from(
        [SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 2 * SEGMENT_BYTES, 3 * SEGMENT_BYTES + 7]
    ),
)


@given(
    st.binary(max_size=600),
    SIZES,
    st.sampled_from(["file", "directory", "symlink"]),
    st.integers(0, 0o7777),
    st.integers(-(2**63), 2**63 - 1),
    st.binary(max_size=300),
    st.binary(max_size=900),
)
@settings(max_examples=100, deadline=None)
def test_what_was_sealed_opens_equal(
    path: bytes, size: int, kind: str, mode: int, mtime_ns: int, link: bytes, extra: bytes
) -> None:
    if kind != "file":
        size = 0
    if kind != "directory":
        path = path or b"x"
    plain = (path * size)[:size]
    data = ObjectSealer(KEY, path).seal(plain, kind, mode, mtime_ns, link, extra)  # type: ignore[arg-type]
    assert len(data) == ObjectSealer.size_of(path, size, link, extra)
    meta, opened = open_object(KEY, data)
    assert opened == plain
    assert (meta.path, meta.kind, meta.size, meta.mode, meta.mtime_ns, meta.link, meta.extra) == (
        path, kind, size, mode, mtime_ns, link, extra,
    )  # fmt: skip


@given(SIZES, st.data())
@settings(max_examples=150, deadline=None)
def test_no_change_passes(size: int, data: st.DataObject) -> None:
    good = ObjectSealer(KEY, b"a/b").seal(bytes(size), "file", 0o644, 1)
    changed = bytearray(good)
    what = data.draw(st.sampled_from(["flip", "cut", "grow", "drop", "move", "double"]))
    at = data.draw(st.integers(0, len(good) - 1))
    length = data.draw(st.integers(1, len(good)))
    to = data.draw(st.integers(0, len(good) - 1))
    run = good[at : at + length]
    if what == "flip":
        changed[at] ^= data.draw(st.integers(1, 255))
    elif what == "cut":
        del changed[at:]
    elif what == "grow":
        changed += run
    elif what == "drop":
        del changed[at : at + length]
    elif what == "move":
        del changed[at : at + length]
        changed[to:to] = run
    else:
        changed[to:to] = run
    if bytes(changed) == good:
        return
    with pytest.raises(IntegrityError):
        open_object(KEY, bytes(changed))
