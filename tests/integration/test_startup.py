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

RUNS = 5
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


def least(run: Callable[[int], object]) -> float:
    """Least CPU seconds of several runs, child processes included: what else the machine does only adds."""
    seconds = []
    for number in range(RUNS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(number)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def bare(flow: Flow) -> float:
    command = [sys.executable, "-c", "pass"]
    return least(lambda _: subprocess.run(command, check=True, env=flow.environment()))


def test_help_is_instant(flow: Flow) -> None:
    flow("--help")
    ratio = least(lambda _: flow("--help")) / bare(flow)
    assert ratio < HELP_AT_MOST, f"`flow --help` takes {ratio:.1f} times the CPU time of `python -c pass`"


def test_a_small_copy_is_quick(flow: Flow, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"hello")
    flow("cp", source, tmp_path / "warm")
    states = [Flow(tmp_path / f"state-{number}") for number in range(RUNS)]
    taken = least(lambda number: states[number]("cp", source, tmp_path / f"target-{number}"))
    ratio = taken / bare(flow)
    assert ratio < COPY_AT_MOST, f"a copy of 5 bytes takes {ratio:.1f} times the CPU time of `python -c pass`"


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
