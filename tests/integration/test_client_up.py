"""`flow up` and `flow demo` as anyone would run them, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Flow, wait_until

pytestmark = pytest.mark.slow

FILE = """
[coordinator]
state = "{state}"

[[site]]
name = "a"
root = [{{ path = "a", name = "/data" }}]

[[site]]
name = "b"
root = [{{ path = "b", name = "/data" }}]
"""


def federation(base: Path, state: str = "sqlite") -> Path:
    path = base / "federation.toml"
    path.write_text(FILE.format(state=state))
    (base / "a").mkdir()
    (base / "a/hello").write_text("hello\n")
    return path


def test_once_runs_a_command_and_what_was_there_goes_on(
    flow: Flow, tmp_path: Path, postgres_server: Callable[[], str]
) -> None:
    path = federation(tmp_path, postgres_server())
    flow("up", path, "--once", "flow cp a:/data/hello b:/data/ && flow whoami")
    assert (tmp_path / "b/hello").read_text() == "hello\n"
    # On the same state: sites have their certificates, transfers are remembered.
    again = flow("up", path, "--once", "flow transfer ls; flow whoami; exit 9", code=9)
    assert "completed" in again.stdout
    assert "on postgresql" in again.stdout
    assert (path.parent / "federation.state").stat().st_mode & 0o777 == 0o700


def test_it_serves_until_it_is_stopped_and_only_once(flow: Flow, tmp_path: Path) -> None:
    path = federation(tmp_path)
    with flow.started("up", path) as running:
        line = running.first_line()
        assert line.startswith("export FLOW_CONFIG_DIR=")
        other = Flow(flow.state, env={"FLOW_CONFIG_DIR": line.partition("=")[2]})
        assert "online" in other("site", "ls").stdout
        assert "on sqlite" in other("whoami").stdout
        other("cp", "a:/data/hello", "b:/data/")
        assert "already runs" in flow("up", path, code=1).stderr
        coordinator = json.loads((tmp_path / "federation.state/running.json").read_text())["coordinator"]
        # Everybody may read a process's arguments, and a database's address may hold a password.
        assert b"sqlite" not in Path(f"/proc/{coordinator}/cmdline").read_bytes()
        os.kill(running.pid, signal.SIGINT)
        assert running.finish().code == 0
    assert (tmp_path / "b/hello").read_text() == "hello\n"


@pytest.mark.parametrize("victim", ["b", pytest.param("coordinator", marks=pytest.mark.full)])
def test_when_one_process_dies_all_are_stopped(flow: Flow, tmp_path: Path, victim: str) -> None:
    import json

    path = federation(tmp_path)
    with flow.started("up", path) as running:
        assert running.first_line()
        pids = json.loads((tmp_path / "federation.state/running.json").read_text())
        os.kill(pids[victim], signal.SIGKILL)
        result = running.finish()
    assert result.code == 1
    assert "ended by itself" in result.stderr
    for pid in pids.values():
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "the end of all processes")


def test_nothing_stays_behind_when_it_is_killed(flow: Flow, tmp_path: Path) -> None:
    import json

    path = federation(tmp_path)
    with flow.started("up", path) as running:
        assert running.first_line()
        pids = json.loads((tmp_path / "federation.state/running.json").read_text())
        os.kill(running.pid, signal.SIGKILL)
        for pid in pids.values():
            wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), "the end of all processes")


def test_a_process_that_cannot_start_is_shown_with_its_words(flow: Flow, tmp_path: Path) -> None:
    path = federation(tmp_path, "postgresql://127.0.0.1:9/none")
    said = flow("up", path, code=None)
    assert said.code != 0
    assert "coordinator" in said.stderr
    assert "log" in said.stderr


@pytest.mark.full  # .ci/run runs the demo as the README says, and looks for these words
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_demo(flow: Flow, tmp_path: Path, database: str, request: pytest.FixtureRequest) -> None:
    more = [] if database == "sqlite" else ["--postgresql", request.getfixturevalue("postgres_server")()]
    done = flow("demo", "--dir", tmp_path / "demo", *more)
    assert "That was the demo" in done.stdout
    assert "were at cloud-b already" in done.stdout
    assert "policy does not permit to land this data at edge-c" in done.stdout
    assert list((tmp_path / "demo/cloud-b/weather/readings").glob("*.parquet"))
    assert not (tmp_path / "demo/edge-c/cohort").exists()
    shutil.rmtree(tmp_path / "demo")
