"""The fuzz targets of trust take known inputs, and find what is planted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

_PATH = Path(__file__).parent.parent / "fuzz" / "fuzz_trust.py"
_SPEC = importlib.util.spec_from_file_location("fuzz_trust", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
fuzz_trust = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuzz_trust)

SAMPLES = [
    b"",
    b"\0",
    b"\1",
    b"\x80",
    b"\x30\x80",
    b"-----BEGIN CERTIFICATE-----",
    b"\x93" * 50,
    bytes(20_000),
]


@pytest.mark.parametrize("target", fuzz_trust.TARGETS.values(), ids=fuzz_trust.TARGETS)
def test_a_target_takes_samples(target: Callable[[bytes], None]) -> None:
    for sample in SAMPLES:
        target(sample)


def test_the_right_grant_is_taken_and_what_is_planted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz_trust.TARGETS["grants"](b"\1")
    fuzz_trust.TARGETS["signed_grants"](b"\1")
    for name, planted in (
        ("releases", "check_release"),
        ("labels", "verify_labels"),
        ("agreements", "verify_agreement"),
    ):
        fuzz_trust.TARGETS[name](b"\1")  # what was really signed is taken
        with monkeypatch.context() as patched:
            patched.setattr(
                fuzz_trust, planted, lambda *_, **__: (SimpleNamespace(number=0, key=b"", task=""), None)
            )
            with pytest.raises((AssertionError, AttributeError)):
                fuzz_trust.TARGETS[name](b"\1")
    monkeypatch.setattr(fuzz_trust, "_check", lambda document: None)
    with pytest.raises(AssertionError, match="forged"):
        fuzz_trust.TARGETS["grants"](b"\1\1")
