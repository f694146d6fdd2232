"""The fuzz targets take a few known inputs, so that they are alive when somebody starts them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

_PATH = Path(__file__).parent.parent / "fuzz" / "fuzz_wire.py"
_SPEC = importlib.util.spec_from_file_location("fuzz_wire", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
fuzz_wire = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz_wire)

SAMPLES = [
    b"",
    b"\x01",
    b"\x01" + bytes(16),
    b"a/b\0../c",
    b"*\n/a**\nx/y",
    b"flow://h:1/#AQ",
    bytes(5000),
    b"\xf5\x01\x01\0",
]


@pytest.mark.parametrize("target", fuzz_wire.TARGETS.values(), ids=fuzz_wire.TARGETS)
def test_a_target_takes_samples(target: Callable[[bytes], None]) -> None:
    for sample in SAMPLES:
        target(sample)


def test_a_target_finds_what_is_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_wire, "check_relative_path", lambda path: None)
    with pytest.raises(AssertionError, match="unsafe"):
        fuzz_wire.TARGETS["paths"](b"../x\0y")
