"""Memory that the harness keeps from a virtual machine's host while contenders run."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import pytest

from perf import run as harness
from perf.run import kept_memory

SIZE = 128 << 20


def resident_bytes() -> int:
    """Counted page by page: what statm says is near it, the less so the more processors there are."""
    return int(Path("/proc/self/smaps_rollup").read_text().partition("Rss:")[2].split()[0]) << 10


def test_a_page_of_each_step_is_kept_and_the_rest_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_MEMORY_LEFT", 0)
    before = resident_bytes()
    with kept_memory(SIZE):
        kept = resident_bytes() - before
        assert SIZE // harness._STEP * mmap.PAGESIZE // 2 < kept < SIZE // 8  # others come and go meanwhile
    assert resident_bytes() - before < SIZE // 16


def test_no_more_is_taken_than_a_group_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    really = mmap.mmap

    def mapping(fd: int, size: int, **how: Any) -> mmap.mmap:
        asked.append(size)
        return really(fd, size, **how)

    monkeypatch.setattr(mmap, "mmap", mapping)
    monkeypatch.setattr(harness, "_MEMORY_LEFT", 0)
    monkeypatch.setattr(harness, "memory_limits", lambda: [SIZE // 2, 1 << 50])
    with kept_memory(SIZE):
        assert asked == [SIZE // 4]


def test_what_cannot_be_had_is_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with kept_memory(0):
        pass

    def refuse(*_: object, **__: object) -> mmap.mmap:
        raise OSError(12, os.strerror(12))

    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(harness, "_MEMORY_LEFT", 0)
    ran = []
    with kept_memory(SIZE):
        ran.append(True)
    assert ran
    assert "memory is not kept" in capsys.readouterr().err
