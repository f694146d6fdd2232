"""Any single change of a chain is found; canonical JSON is one to one."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from chains import chain_with_decisions, verified
from hypothesis import given
from hypothesis import strategies as st

from flowengine.evidence.archive import Evidence
from flowengine.evidence.canonical import MAX_INTEGER, canonical, read_canonical

pytestmark = pytest.mark.slow

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX_INTEGER, MAX_INTEGER)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@functools.cache
def whole() -> Evidence:
    with tempfile.TemporaryDirectory() as folder:
        return chain_with_decisions(Path(folder))


def text_of(evidence: Evidence) -> bytes:
    return b"".join(line + b"\n" for line in evidence.lines)


def with_text(text: bytes) -> Evidence:
    """As the folder's reader takes a file apart."""
    return replace(whole(), lines=text.split(b"\n")[:-1])


@given(json_values)
def test_what_was_written_is_read_and_written_again(value: object) -> None:
    data = canonical(value)
    assert read_canonical(data) == value
    assert canonical(read_canonical(data)) == data


@given(st.binary(max_size=30) | json_values.map(lambda value: canonical(value).replace(b",", b", ")))
def test_what_is_read_is_what_would_be_written(data: bytes) -> None:
    try:
        value = read_canonical(data)
    except ValueError:
        return
    assert canonical(value) == data


@given(st.data())
def test_any_single_changed_byte_is_found(data: st.DataObject) -> None:
    text = text_of(whole())
    at = data.draw(st.integers(0, len(text) - 2))  # without the last line's end, a record is not whole
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != text[at]))
    assert verified(with_text(text[:at] + bytes([byte]) + text[at + 1 :])).findings


@given(st.data())
def test_any_run_of_bytes_that_was_cut_out_is_found(data: st.DataObject) -> None:
    text = text_of(whole())
    first = data.draw(st.integers(0, len(text) - 2))
    last = data.draw(st.integers(first + 1, len(text) - 1))
    assert verified(with_text(text[:first] + text[last:])).findings


@given(st.permutations(range(10)))
def test_any_other_order_is_found(order: list[int]) -> None:
    lines = whole().lines
    found = verified(replace(whole(), lines=[lines[index] for index in order])).findings
    assert bool(found) == (order != sorted(order))


@given(st.integers(0, 8))
def test_a_chain_cut_behind_a_checkpoint_that_a_peer_holds_is_found(kept: int) -> None:
    import base64
    import json

    held = base64.b64decode(json.loads(whole().lines[-1])["document"])
    cut = replace(whole(), lines=whole().lines[:kept])
    assert verified(cut, ("site:alpha", held)).findings
