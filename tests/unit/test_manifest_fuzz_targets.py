"""The fuzz targets of the manifest take known inputs, reach what they are for, and find what is planted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

_PATH = Path(__file__).parent.parent / "fuzz" / "fuzz_manifest.py"
_SPEC = importlib.util.spec_from_file_location("fuzz_manifest", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
fuzz_manifest = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz_manifest)

SAMPLES = [
    b"",
    b"\0",
    b"\0\x10\0\x01",
    b"\x91\x9b",
    b"\xdd\xff\xff\xff\xff",
    b"\x89FLOWM\r\n" * 40,
    bytes(5000),
]


@pytest.mark.parametrize("target", fuzz_manifest.TARGETS.values(), ids=fuzz_manifest.TARGETS)
def test_a_target_takes_samples(target: Callable[[bytes], None]) -> None:
    for sample in SAMPLES:
        target(sample)


def test_the_forged_file_is_right_until_it_is_altered() -> None:
    walked = fuzz_manifest._read(fuzz_manifest.forged(b""))
    assert [entry.name for _, entry in walked] == [b"a", b"h", b"l", b"o", b"d"]
    assert fuzz_manifest._read(fuzz_manifest.forged(b"\0\3\0\x05\0\x01")) is None


def test_a_believed_forgery_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    read = fuzz_manifest._read
    monkeypatch.setattr(fuzz_manifest, "_read", lambda data: read(data) or [])
    with pytest.raises(AssertionError, match="forged"):
        fuzz_manifest.TARGETS["files"](b"\0\x40\0\x01")
