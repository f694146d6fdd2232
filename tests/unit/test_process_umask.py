"""The umask is told without being set: what other threads make in that moment keeps its mode."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from flowengine.store.filesystem import process_umask


def test_asking_for_the_umask_changes_nothing_for_other_threads(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                assert process_umask() == 0o027

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        modes = set()
        for number in range(2000):
            fd = os.open(tmp_path / str(number), os.O_WRONLY | os.O_CREAT, 0o666)
            modes.add(os.fstat(fd).st_mode & 0o777)
            os.close(fd)
        over.set()
        for thread in threads:
            thread.join()
        assert modes == {0o640}
        assert process_umask() == 0o027
    finally:
        os.umask(before)
