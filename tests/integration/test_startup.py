"""A small command is over quickly: nothing is loaded, made or waited for that it does not need."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Flow

pytestmark = pytest.mark.slow

RUNS, MOST_RUNS = 5, 20
HELP_AT_MOST = 6.5
"""Times the CPU time of a bare interpreter; about 4."""
COPY_AT_MOST = 33.0
"""The same for a copy of one small file: two processes and a session; about 22."""

LOADED = """
import sys
from flowengine.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end
print("loaded:", *sys.modules)
"""


def cpu_s(run: Callable[[], object]) -> float:
    """CPU seconds of what it runs, child processes included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def assert_ratio(flow: Flow, what: str, most: float, run: Callable[[int], object]) -> None:
    """The least CPU seconds of several runs, over those of a bare interpreter between them, are at most so many.

    What else the machine does only adds, and its speed may change from one moment to the next: so both take turns, and where
    the ratio is too large they go on for a while.
    """
    bare, ours = [], []
    for number in range(MOST_RUNS):
        command = [sys.executable, "-c", "pass"]
        bare.append(cpu_s(lambda: subprocess.run(command, check=True, env=flow.environment())))  # noqa: B023
        ours.append(cpu_s(lambda: run(number)))  # noqa: B023
        ratio = min(ours) / min(bare)
        if number + 1 >= RUNS and ratio < most:
            return
    pytest.fail(f"{what} takes {ratio:.1f} times the CPU time of `python -c pass`")


def test_help_is_instant(flow: Flow) -> None:
    flow("--help")
    assert_ratio(flow, "`flow --help`", HELP_AT_MOST, lambda _: flow("--help"))


def test_a_small_copy_is_quick(flow: Flow, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"hello")
    flow("cp", source, tmp_path / "warm")

    def copy(number: int) -> None:
        Flow(tmp_path / f"state-{number}")("cp", source, tmp_path / f"target-{number}")

    assert_ratio(flow, "a copy of 5 bytes", COPY_AT_MOST, copy)


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["--help"], ["trio", "msgspec", "cryptography", "flowengine.cli.copy", "rich"]),
        (
            ["cp", "source", "target"],
            ["numpy", "highspy", "rich", "cryptography.x509", "asyncio", "flowengine.transfer.connect"],
        ),
    ],
    ids=["help", "cp"],
)
def test_nothing_is_loaded_in_vain(flow: Flow, tmp_path: Path, words: list[str], unwanted: list[str]) -> None:
    (tmp_path / "source").write_bytes(b"hello")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words],
        cwd=tmp_path,
        env=flow.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = done.stdout.rpartition("loaded:")[2].split()
    assert "flowengine.errors" in loaded
    assert [name for name in unwanted if name in loaded] == []
