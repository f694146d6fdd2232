"""What takes long to be told does not make what comes next old: it is gathered as before."""

from __future__ import annotations

import pytest
from transfers import block_of, entry

from flowengine.store.scan_events import Batch, DirectoryEntered, DirectoryLeft, Event
from flowengine.transfer import gathering
from flowengine.transfer.gathering import HELD_NS, Gathered, Gatherer


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns


@pytest.mark.parametrize("telling_ns", [0, HELD_NS + 1])
def test_a_peer_that_takes_its_time_gets_as_many_folders_at_once(
    monkeypatch: pytest.MonkeyPatch, telling_ns: int
) -> None:
    clock = Clock()
    monkeypatch.setattr(gathering, "time", clock)
    gatherer = Gatherer()
    files = block_of(entry(b"f", b"of one folder"))
    sizes: list[int] = []
    for number in range(1000):
        events: list[Event] = [
            DirectoryEntered(b"%06d" % number, b"%06d" % number),
            Batch(files, None, [-1], b"/root"),
            DirectoryLeft(0o755, number, b"", True, True),
        ]
        for event in events:
            for one in gatherer.take(event):
                assert isinstance(one, Gathered), "a folder was told by itself"
                sizes.append(len(one.folders))
                clock.now_ns += telling_ns  # the network's or the target's doing
    assert len(sizes) == 7
    assert set(sizes) == {128}
