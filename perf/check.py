"""The regression check: CPU seconds of `flow` over those of a plain loop in the same run, held under limits.

CPU seconds, because they do not grow while other programs have the cores; a ratio to a loop over the same building
blocks, because it hardly depends on the machine; the least of several runs, because disturbance only adds. Data in
memory, the real command over loopback TCP: source, target, TLS, frames, landing.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from perf.contenders.base import Contender
from perf.contenders.baseline import PythonCopy
from perf.contenders.flow import Flow
from perf.network import Network
from perf.run import OneRun, Plan, kept_memory, memory_folder
from perf.scenarios import SCENARIOS, Built, Scenario

__all__ = ["LIMITS", "Verdict", "check"]

LIMITS: Final = {"s1-one": 4.8, "s3": 4.6, "s4": 4.4}
"""Most CPU seconds of `flow` for one of the loop: about one and a half times what was measured when they were set."""
HERE: Final = Network("here", {"a": "127.0.0.1", "b": "127.0.0.1"}, {"a": [], "b": []}, {}, {})
"""The loopback of the machine itself: no right and no tool is needed for it, and nothing is counted on it."""
ROUNDS: Final = 3
SIZE: Final = "small"
_MEMORY_BYTES: Final = 1 << 30
"""Enough for both ends of a run of this size."""


@dataclass(frozen=True)
class Verdict:
    """How one scenario went.

    Attributes:
        ratio: least CPU seconds of `flow` over the least of the loop.
        error: why there is no ratio; empty otherwise.
    """

    scenario: str
    flow_s: float
    loop_s: float
    ratio: float
    limit: float
    error: str = ""

    @property
    def good(self) -> bool:
        return not self.error and self.ratio <= self.limit

    def __str__(self) -> str:
        if self.error:
            return f"{self.scenario:<8} FAILED   {self.error}"
        verdict = "ok      " if self.good else "TOO SLOW"
        return (
            f"{self.scenario:<8} {verdict} flow {self.flow_s:.2f} CPU s, plain loop {self.loop_s:.2f}: "
            f"ratio {self.ratio:.2f}, at most {self.limit:.2f}"
        )


def check(scenarios: list[str], say: Callable[[str], object] = print) -> bool:
    """Measure and judge scenarios; one that is too slow is measured once more before it is called so."""
    verdicts = []
    with (
        tempfile.TemporaryDirectory(prefix="flow-perf-", dir=memory_folder()) as folder,
        kept_memory(_MEMORY_BYTES),
    ):
        for name in scenarios:
            verdict = _judge(SCENARIOS[name], LIMITS[name], HERE, Path(folder))
            say(str(verdict))
            verdicts.append(verdict)
    return all(verdict.good for verdict in verdicts)


def _judge(scenario: Scenario, limit: float, network: Network, folder: Path) -> Verdict:
    built = scenario.build(folder / "data", SIZE, 1)
    least = {Flow.name: float("inf"), PythonCopy.name: float("inf")}
    try:
        for turn in range(2 * ROUNDS):
            if turn >= ROUNDS and least[Flow.name] <= limit * least[PythonCopy.name]:
                break
            for kind in (PythonCopy, Flow):
                used, error = _run(kind, scenario, built, network, folder)
                if error:
                    return Verdict(scenario.name, 0, 0, 0, limit, f"{kind.name}: {error}")
                least[kind.name] = min(least[kind.name], used)
    finally:
        shutil.rmtree(folder / "data")
    flow_s, loop_s = least[Flow.name], least[PythonCopy.name]
    return Verdict(scenario.name, flow_s, loop_s, flow_s / loop_s, limit)


def _run(
    kind: type[Contender], scenario: Scenario, built: Built, network: Network, folder: Path
) -> tuple[float, str]:
    """CPU seconds of one run, and what went wrong."""
    scratch = folder / "run"
    scratch.mkdir(mode=0o755)
    try:
        record = OneRun(kind, scenario, built, Plan([], [], [], limit_s=60)).measure(network, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return float(str(record.get("cpu_s", 0.0))), str(record["error"])
