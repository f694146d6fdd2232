"""What all tests share: which tests run where, hypothesis profiles, samples of long suites.

Nothing is skipped silently. A test that is too long for every day (`full`) or changes what only root may
change (`root`) is deselected, and counted as such, unless it is asked for; where the environment says CI, any
skip fails the run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import forked
import hypothesis
import pytest
from support import Flow

from flowengine.store import many

T = TypeVar("T")

hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.register_profile("full", parent=hypothesis.settings.get_profile("ci"), max_examples=2000)


def in_ci() -> bool:
    """Whether the environment says that this is continuous integration."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flowengine")
    group.addoption("--full", action="store_true", help="run the tests marked `full` too, and whole suites")
    group.addoption(
        "--no-root", action="store_true", help="leave out the tests marked `root`, which only -m root runs"
    )
    group.addoption(
        "--sample",
        type=int,
        metavar="N",
        help="with -m full: N of the tests marked `full`, chosen by --sample-seed",
    )
    group.addoption("--sample-seed", type=int, default=1, metavar="SEED", help="which sample (default 1)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--full"):
        forked.always_execute()
    chosen = config.getoption("--hypothesis-profile", default=None)
    if not chosen:
        full = config.getoption("--full")
        hypothesis.settings.load_profile("full" if full else "ci" if in_ci() else "dev")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.get_closest_marker("full")]
    if config.getoption("--full"):
        left_out = []
    elif (count := config.getoption("--sample")) is not None:
        rng = random.Random(config.getoption("--sample-seed"))
        left_out = rng.sample(left_out, max(0, len(left_out) - count))
    # Also for root: a container where everything runs as root need not have the tools for network namespaces.
    asked_for_root = "root" in config.getoption("markexpr") and not config.getoption("--no-root")
    if not asked_for_root or os.geteuid() != 0:
        left_out += [item for item in items if item.get_closest_marker("root")]
    if left_out:
        out = set(left_out)
        config.hook.pytest_deselected(items=[item for item in items if item in out])
        items[:] = [item for item in items if item not in out]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if in_ci() and reporter is not None and reporter.stats.get("skipped") and exitstatus == 0:
        reporter.write_line("")
        reporter.write_line(
            "skipped tests count as failures where CI is set: fix them or mark them", red=True
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def sample(request: pytest.FixtureRequest) -> Callable[[Sequence[T], int], list[T]]:
    """Chooser for suites too long for every day: `sample(cases, n)` gives n of them, all with --full."""
    rng = random.Random(f"{request.config.getoption('--sample-seed')} {request.node.nodeid}")

    def choose(cases: Sequence[T], count: int) -> list[T]:
        if request.config.getoption("--full") or count >= len(cases):
            return list(cases)
        return [cases[index] for index in sorted(rng.sample(range(len(cases)), count))]

    return choose


@pytest.fixture
def flow(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """The `flow` command with caches of its own."""
    return Flow(tmp_path_factory.mktemp("state"))


@pytest.fixture(params=["compiled", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Many small files are handled by the compiled library, or without it."""
    if request.param == "python":
        monkeypatch.setattr(many, "_library", None)
    elif not many.is_compiled():
        pytest.fail("the library was not compiled: is there a C compiler where the package was installed?")
    return str(request.param)
