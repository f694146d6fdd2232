"""Where the time goes: busy and blocked seconds of each stage, and the one line that names the bottleneck."""

from __future__ import annotations

from time import perf_counter_ns
from typing import Final

__all__ = ["Stage", "StageClock", "bottleneck_line"]


class Stage:
    """Busy time of one stage in one thread. Written by that thread alone, read by any."""

    __slots__ = ("busy_ns", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.busy_ns = 0

    def since(self, start_ns: int) -> int:
        """Add the time since `start_ns` and give the present, to start the next stage from."""
        now = perf_counter_ns()
        self.busy_ns += now - start_ns
        return now


class StageClock:
    """All stages of one end of a transfer."""

    def __init__(self) -> None:
        self._stages: list[Stage] = []
        self.started_ns = perf_counter_ns()

    def stage(self, name: str) -> Stage:
        """A new stage counter for one thread; several may share a name and are added up."""
        made = Stage(name)
        self._stages.append(made)
        return made

    def elapsed_s(self) -> float:
        """Seconds since this clock was made."""
        return (perf_counter_ns() - self.started_ns) / 1e9

    def busy_ms(self) -> dict[str, int]:
        """Milliseconds per stage, over all threads."""
        totals: dict[str, int] = {}
        for stage in self._stages:
            totals[stage.name] = totals.get(stage.name, 0) + stage.busy_ns // 1_000_000
        return totals

    def threads(self) -> dict[str, int]:
        """How many threads count into each stage."""
        counts: dict[str, int] = {}
        for stage in self._stages:
            counts[stage.name] = counts.get(stage.name, 0) + 1
        return counts


_WHERE: Final = {
    "read": ("source", "reading, cutting and hashing"),
    "finer": ("source", "cutting finer what was edited"),
    "scan": ("source", "listing files"),
    "compress": ("source", "compressing"),
    "seal": ("source", "sealing"),
    "send": ("link", "sending"),
    "pace": ("limit", "waiting for --bwlimit"),
    "place": ("target", "looking for what is already there"),
    "open": ("target", "opening frames"),
    "verify": ("target", "verifying"),
    "write": ("target disk", "writing"),
    "copy": ("target disk", "copying what was already there"),
    "sync": ("target disk", "syncing"),
}


def bottleneck_line(
    source: dict[str, int], target: dict[str, int], elapsed_s: float, threads: dict[str, int]
) -> str:
    """One line that names the stage which was busiest, and how busy the link was if that shows.

    Args:
        source, target: milliseconds per stage at each end (sums over threads).
        elapsed_s: wall time.
        threads: threads per stage, so that a sum over four threads is not taken for one busy thread.

    >>> bottleneck_line({"read": 900, "send": 100}, {"write": 300}, 1.0, {})
    'source: reading, cutting and hashing took 90 % of the time; the link was 10 % used'
    """
    shares = {
        stage: spent / 10 / elapsed_s / max(1, threads.get(stage, 1))
        for stage, spent in [*source.items(), *target.items()]
        if elapsed_s > 0 and stage in _WHERE
    }
    if not shares or max(shares.values()) < 1:
        return "nothing to do took the time: start and end did"
    worst = max(shares, key=lambda name: shares[name])
    place, what = _WHERE[worst]
    line = f"{place}: {what} took {min(shares[worst], 100):.0f} % of the time"
    if worst != "send" and shares.get("send", 0) >= 1:
        line += f"; the link was {min(shares.get('send', 0), 100):.0f} % used"
    return line
