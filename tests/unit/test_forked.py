"""A program that is forked from what has loaded its modules is in nothing else than in its start like one that is executed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from support import FLOW, Flow, children, environment, wait_until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["cp", "one"], 2),
        (["cp", "missing", "target", "--json"], 3),
        (["manifest", "/dev/null/nothing"], None),
        (["login", "-"], None),
    ],
)
def test_it_says_and_ends_with_the_same(flow: Flow, words: list[str], code: int | None) -> None:
    found = [
        Flow(flow.state, executed=executed)(*words, code=code, stdin=b"no login\n")
        for executed in (True, False)
    ]
    assert found[0] == found[1]


def test_signals_end_it_as_they_end_others(flow: Flow, tmp_path: Path) -> None:
    codes = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        for executed in (True, False):
            with Flow(flow.state, executed=executed).started("serve", tmp_path) as running:
                assert running.first_line().startswith("flow://")
                assert running.process.poll() is None
                running.process.send_signal(number)
                codes.append(running.finish().code)
    assert codes[::2] == codes[1::2]
    assert codes[1::2] == [0, 0, -signal.SIGKILL]


def test_it_has_its_own_environment_and_open_files(flow: Flow, tmp_path: Path) -> None:
    with flow.started("serve", tmp_path) as running:
        assert running.first_line()
        said = Path(f"/proc/{running.pid}/fd")
        assert {stream for stream in ("1", "2") if "pipe:" in str((said / stream).readlink())} == {"1", "2"}
        with Flow(flow.state, executed=True).started("serve", tmp_path) as other:
            assert other.first_line()
            counts = [len(list(Path(f"/proc/{one.pid}/fd").iterdir())) for one in (running, other)]
            assert counts[0] == counts[1]
        assert not children(running.pid)
    wait_until(lambda: not Path(f"/proc/{running.pid}").exists(), "the end, which the server has seen")


def test_a_time_that_is_over_ends_it(flow: Flow, tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        flow("serve", tmp_path, timeout=0.2)


def test_what_was_asked_for_in_another_way_is_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*FLOW, "--version"]
    assert forked.start(["nice", *words], environment()) is None
    assert forked.start([sys.executable, "-c", "pass"], environment()) is None
    assert forked.start([sys.executable, "-m", "http.server"], environment()) is None
    assert forked.start(words, environment(LD_PRELOAD="libc.so.6")) is None
    monkeypatch.setattr(forked, "_always_execute", True)
    assert forked.start(words, environment()) is None
