"""What of a machine a process may use, by affinity and control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowengine import machine
from flowengine.machine import memory_limits, processor_limits, usable_processors


def say(root: Path, groups: str | None, files: dict[str, str]) -> None:
    """Have the file systems below a root say that this process is in some groups, and what these are held to."""
    if groups is not None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_bytes(os.fsencode(groups))
    for name, limit in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")


@pytest.mark.parametrize(
    ("groups", "limits", "told"),
    [
        (
            "0::/a.slice/b.scope\n",
            {"a.slice/memory.max": "max", "a.slice/b.scope/memory.max": "4096"},
            [4096],
        ),
        ("0::/a.slice/b.scope\n", {"a.slice/memory.max": "1", "a.slice/b.scope/memory.max": "2"}, [1, 2]),
        ("0::/\n", {"memory.max": "5"}, [5]),  # in a container
        (
            "4:cpu,memory:/of/the:host\n3:cpu:/x\n0::/\n",
            {"memory/memory.limit_in_bytes": "6", "memory/x/memory.limit_in_bytes": "1"},
            [6],
        ),
        (
            "4:memory:/job_1\n0::/\n",
            {"memory/job_1/memory.limit_in_bytes": "7", "unified/memory.max": "8"},
            [7, 8],
        ),
        ("0::/a\n", {"a/memory.max": "9", "a/memory.high": "3"}, [9, 3]),
        ("0::/a\n", {"a/memory.max": ""}, []),
        ("0::/\udcff/b\n", {"\udcff/b/memory.max": "5"}, [5]),
        ("", {}, []),
        (None, {}, []),
    ],
)
def test_what_memory_control_groups_are_held_to(
    tmp_path: Path, groups: str | None, limits: dict[str, str], told: list[int]
) -> None:
    say(tmp_path, groups, limits)
    assert memory_limits(str(tmp_path)) == told


@pytest.mark.parametrize(
    ("groups", "limits", "told"),
    [
        ("0::/a/b\n", {"a/cpu.max": "max 100000", "a/b/cpu.max": "250000 100000"}, [2.5]),
        ("0::/\n", {"cpu.max": "50000 100000"}, [0.5]),
        (
            "5:cpu,cpuacct:/job\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
             "cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000"},
            [4.0],
        ),
        ("5:cpuset:/x\n", {"cpu/x/cpu.cfs_quota_us": "1", "cpu/x/cpu.cfs_period_us": "1"}, []),
        ("0::/a\n", {"a/cpu.max": "0 0"}, []),
        ("0::/a\n", {"a/cpu.max": "much"}, []),
        ("5:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "1"}, []),
        (None, {}, []),
    ],
)  # fmt: skip
def test_what_time_of_processors_control_groups_are_held_to(
    tmp_path: Path, groups: str | None, limits: dict[str, str], told: list[float]
) -> None:
    say(tmp_path, groups, limits)
    assert processor_limits(str(tmp_path)) == told


@pytest.mark.parametrize(
    ("affinity", "limits", "count"), [(8, [], 8), (8, [2.5, 4.0], 3), (8, [0.2], 1), (1, [64.0], 1)]
)
def test_the_least_of_affinity_and_groups_counts(
    monkeypatch: pytest.MonkeyPatch, affinity: int, limits: list[float], count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(machine, "processor_limits", lambda: limits)
    assert usable_processors.__wrapped__() == count


def test_a_process_that_is_held_to_one_processor_uses_one() -> None:
    asked = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from flowengine.machine import usable_processors
from flowengine.transfer.passes import TransferSettings
print(usable_processors(), TransferSettings().reader_threads)
"""
    done = subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"]
