"""A large object is synced on its way: not for little, and not often."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio.testing

from flowengine.manifest import FILE, Entry
from flowengine.store.staging import Staging
from flowengine.transfer.control import Control, ControlDecoder
from flowengine.transfer.landing import Landing
from flowengine.transfer.session import Counters
from flowengine.transfer.sinks import LargeObject, TargetDirectory
from flowengine.transfer.timing import StageClock
from flowengine.units import GIB, MIB


@pytest.mark.trio
async def test_a_large_object_is_synced_after_so_much_and_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    for module in ("landing", "sinks"):
        monkeypatch.setattr(f"flowengine.transfer.{module}.monotonic", lambda: now)
    root = os.open(tmp_path, os.O_RDONLY)
    staging = Staging(root, os.fsencode(tmp_path))
    ours, _ = trio.testing.memory_stream_pair()
    landing = Landing(
        staging,
        Control(ours, ControlDecoder()),
        Counters(),
        StageClock(),
        apply_extra=None,
        pace=lambda size: None,
    )
    folder = TargetDirectory(b"", b"", os.dup(root), None, created=False)
    large = LargeObject(folder, Entry(b"large", FILE, 0o644, 0, size=64 * GIB))

    def asked(after_s: float, size_bytes: int) -> int:
        """How often it is to be synced once so much came so much later."""
        nonlocal now
        now += after_s
        large.unsynced += size_bytes
        landing.add(large, size_bytes)
        found = 0
        while not landing.publishable.empty():
            assert landing.publishable.get()[0] == "checkpoint"
            found += 1
        return found

    try:
        assert asked(14.9, 8 * GIB) == 0  # much, and soon
        assert asked(0.2, MIB) == 1
        assert asked(1.0, 8 * GIB) == 0  # just synced
        assert asked(13.9, MIB) == 0
        assert asked(0.2, MIB) == 1
        assert asked(3600.0, 255 * MIB) == 0  # long ago, and little
        assert asked(1.0, MIB) == 1
        assert asked(-3600.0, 256 * MIB) == 0  # no such clock: nothing breaks
    finally:
        landing.close()
        staging.close(remove=True)
        os.close(folder.fd)
        os.close(root)
