"""Confinement by the kernel: what lies outside the folders cannot be opened, what lies inside can be used as before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flowengine_agent.landlock import LEAST_VERSION, version

_TRY = """
import json, os, socket, sys
from flowengine_agent.landlock import confine
from flowengine_agent.privileges import lock_down

base = sys.argv[1]
listener = socket.create_server(("127.0.0.1", 0))
lock_down("confined")
holds = confine([base + "/read", base + "/none"], [base + "/write"])

def tried(work):
    try:
        work()
        return "done"
    except OSError as error:
        return type(error).__name__

def write(path):
    open(path, "w").close()

print(json.dumps([
    holds,
    tried(lambda: open(base + "/read/x")),
    tried(lambda: write(base + "/read/new")),
    tried(lambda: write(base + "/write/new")),
    tried(lambda: os.rename(base + "/write/new", base + "/write/deep/moved")),
    tried(lambda: os.truncate(base + "/write/deep/moved", 3)),
    tried(lambda: open(base + "/secret")),
    tried(lambda: open(base + "/write/way/secret")),
    tried(lambda: os.listdir(base)),
    tried(lambda: socket.create_connection(listener.getsockname())),
]))
"""


@pytest.mark.slow
def test_nothing_outside_can_be_opened_and_nobody_dialled(tmp_path: Path) -> None:
    for folder in ("read", "write/deep"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "read/x").touch()
    (tmp_path / "secret").touch()
    (tmp_path / "write/way").symlink_to("..")
    done = subprocess.run([sys.executable, "-c", _TRY, tmp_path], capture_output=True, text=True, check=True)
    holds, *rest = json.loads(done.stdout)
    if version() < LEAST_VERSION:  # such a kernel: it says so, and nothing is refused
        assert (holds, rest) == (False, ["done"] * 9)
        return
    no = "PermissionError"
    assert holds
    assert rest[:8] == ["done", no, "done", "done", "done", no, no, no]
    assert rest[8] == (no if version() >= 4 else "done")
