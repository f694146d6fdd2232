"""The thread behind a blocking client ends when it is closed, whatever an interrupt left on it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import anyio
import pytest
from anyio.from_thread import BlockingPortal

from flowengine.client.blocking import LoopThread


def test_a_call_that_an_interrupt_orphaned_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LoopThread()
    assert loop.call(anyio.sleep, 0) is None
    start = BlockingPortal.start_task_soon
    orphans: list[Future[Any]] = []

    def interrupted(portal: BlockingPortal, function: Callable[..., Any], *args: Any) -> Future[Any]:
        orphans.append(start(portal, function, *args))
        monkeypatch.undo()
        raise KeyboardInterrupt  # as Ctrl-C does between the start and the return

    monkeypatch.setattr(BlockingPortal, "start_task_soon", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.call(anyio.sleep_forever)
    loop.close()
    assert orphans[0].cancelled()
