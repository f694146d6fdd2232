"""What of the machine this process may use: processors and memory, by affinity and control groups (cgroups(7), both versions).

A job of a batch system has four of a node's hundred processors, a container two of its memory's hundred gigabytes: who counts
the machine's own starts threads that stand in each other's way, and keeps what is taken from others.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Iterator
from functools import cache

__all__ = ["memory_limits", "processor_limits", "usable_processors"]


@cache
def usable_processors() -> int:
    """How many processors this process may keep busy, at least 1; asked once, since threads are counted by it."""
    try:
        count = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # no Linux
        count = os.cpu_count() or 1
    return max(1, math.ceil(min([count, *processor_limits()])))


def processor_limits(root: str = "/") -> list[float]:
    """How many processors' time each control group that this process is in is held to.

    Args:
        root: of the file systems that say so.
    """
    limits: list[float] = []
    for group, unified in _groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):
            if unified:
                quota, period = _read(group, "cpu.max").split()
            else:
                quota, period = _read(group, "cpu.cfs_quota_us"), _read(group, "cpu.cfs_period_us")
            if int(quota) > 0 and int(period) > 0:
                limits.append(int(quota) / int(period))
    return limits


def memory_limits(root: str = "/") -> list[int]:
    """Bytes of memory, cache included, that each control group that this process is in is held to.

    Args:
        root: of the file systems that say so.
    """
    limits: list[int] = []
    for group, unified in _groups(root, "memory"):
        for name in ("memory.max", "memory.high") if unified else ("memory.limit_in_bytes",):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int(_read(group, name)))
    return limits


def _groups(root: str, controller: str) -> Iterator[tuple[str, bool]]:
    """The folders of the control groups that this process is in, the outermost first, and whether they are of version 2."""
    try:
        with open(os.path.join(root, "proc/self/cgroup"), encoding="utf-8", errors="surrogateescape") as said:
            lines = [line.rstrip("\n").split(":", 2) for line in said]
    except OSError:
        return
    for _, controllers, path in [line for line in lines if len(line) == 3]:
        if not controllers:
            places = ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            places = [f"sys/fs/cgroup/{controller}"]
        else:
            continue
        parts = [part for part in path.split("/") if part]
        # In a container the path may be the host's, of which only the root is to be seen.
        groups = ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]
        for place, group in itertools.product(places, groups):
            yield os.path.join(root, place, group), not controllers


def _read(group: str, name: str) -> bytes:
    with open(os.path.join(group, name), "rb") as file:
        return file.read()
