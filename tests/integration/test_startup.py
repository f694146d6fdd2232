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
    flow.executed = True
    flow("--help")
    assert_ratio(flow, "`flow --help`", HELP_AT_MOST, lambda _: flow("--help"))


def test_a_small_copy_is_quick(flow: Flow, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"hello")
    flow("cp", source, tmp_path / "warm")

    def copy(number: int) -> None:
        Flow(tmp_path / f"state-{number}", executed=True)("cp", source, tmp_path / f"target-{number}")

    assert_ratio(flow, "a copy of 5 bytes", COPY_AT_MOST, copy)


NEVER = [
    "numpy", "highspy", "rich", "cryptography.x509", "asyncio", "json", "concurrent.futures", "encodings.idna",
    "flowengine.transfer.sites", "flowengine.transfer.hops", "flowengine.transfer.routes",
]  # fmt: skip
"""Not for a copy of one file, wherever to."""


def loaded_by(flow: Flow, place: Path, *words: str) -> set[str]:
    """The modules that a command has loaded at its end."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words],
        cwd=place,
        env=flow.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert "flowengine.errors" in loaded
    return loaded


def test_nothing_is_loaded_in_vain_for_help(flow: Flow, tmp_path: Path) -> None:
    unwanted = {"trio", "msgspec", "cryptography", "flowengine.cli.copy", "rich"}
    assert loaded_by(flow, tmp_path, "--help") & unwanted == set()


def test_nothing_is_loaded_in_vain_for_a_copy(flow: Flow, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"hello")
    loaded = loaded_by(flow, tmp_path, "cp", "source", "target")
    assert loaded & {*NEVER, "flowengine.transfer.connect"} == set()


@pytest.mark.parametrize("push", [True, False])
def test_nothing_is_loaded_in_vain_for_a_copy_by_ticket(flow: Flow, tmp_path: Path, push: bool) -> None:
    (tmp_path / "source").write_bytes(b"hello")
    served = tmp_path / "served"
    served.mkdir()
    (served / "there").write_bytes(b"hello")
    with flow.serving(served) as ticket:
        url = ticket.format_secret_url()
        words = ["source", url] if push else [url, "target"]
        loaded = loaded_by(flow, tmp_path, "cp", *words)
    other_side = {"transfer.target", "transfer.sinks", "transfer.halting"} if push else {"transfer.source"}
    assert loaded & {*NEVER, *(f"flowengine.{name}" for name in other_side)} == set()


def test_what_a_copy_loads_has_few_dataclasses(flow: Flow, tmp_path: Path) -> None:
    """Each takes a millisecond to make; a Struct takes a tenth."""
    (tmp_path / "source").write_bytes(b"hello")
    served = tmp_path / "served"
    served.mkdir()
    counted = LOADED.replace("import sys\n", COUNTED)
    with flow.serving(served) as ticket:
        done = subprocess.run(
            [sys.executable, "-c", counted, "cp", "source", ticket.format_secret_url()],
            cwd=tmp_path, env=flow.environment(), capture_output=True, text=True, check=True,
        )  # fmt: skip
    made = done.stdout.rpartition("loaded:")[0].split()
    assert set(made) <= {"made:Established", "made:Ticket"}, "these hold secrets that they do not show"
    assert made


COUNTED = """import sys, dataclasses
make = dataclasses._process_class
def making(cls, *args, **options):
    if cls.__module__.startswith("flowengine."):
        print("made:" + cls.__name__)
    return make(cls, *args, **options)
dataclasses._process_class = making
"""
