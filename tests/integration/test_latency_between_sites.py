"""How long a one-file copy between two running agents takes, from the call of the API to its end."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
from federations import local_federation

pytestmark = pytest.mark.slow

COPIES = 12
MOST_QUESTIONS = 150
"""In the time of so many small questions to the coordinator a copy is over, on whatever machine: nothing waits for a clock
that ticks."""


def test_a_small_copy_is_quick(tmp_path: Path) -> None:
    for site in ("a", "b"):
        (tmp_path / site).mkdir()
    with local_federation(tmp_path, {"a": "", "b": ""}) as federation, federation.client() as client:
        took, asked = [], []
        for number in range(COPIES):
            (federation.data("a") / f"{number}").write_text(f"one small file, number {number}")
            begin = time.perf_counter()
            client.copy(f"a:/data/{number}", f"b:/data/{number}").wait()
            took.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            client.me()
            asked.append(time.perf_counter() - begin)
        assert (federation.data("b") / f"{COPIES - 1}").read_text().endswith(f"{COPIES - 1}")
    shown = f"{min(took) * 1e3:.0f} ms at best, {statistics.median(took) * 1e3:.0f} ms in the median"
    shown += (
        f"; a question {min(asked) * 1e3:.1f} ms at best, {statistics.median(asked) * 1e3:.1f} in the median"
    )
    print(shown)
    assert min(took) < MOST_QUESTIONS * min(asked), shown
    assert statistics.median(took) < MOST_QUESTIONS * statistics.median(asked), shown
