"""The README's Python examples, run as they are written: plain Python, asyncio, trio."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from federations import Local, local_federation

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def example(name: str) -> str:
    """The text of the block marked `<!-- NAME -->`."""
    spec = importlib.util.spec_from_file_location("check_blocks", ROOT / "docs/check_blocks.py")
    assert spec is not None
    assert spec.loader is not None
    check_blocks = importlib.util.module_from_spec(spec)
    sys.modules["check_blocks"] = check_blocks
    spec.loader.exec_module(check_blocks)
    (block,) = [found for found in check_blocks.parse(ROOT / "README.md") if name in found.markers]
    return "\n".join(block.lines) + "\n"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    sites = dict.fromkeys(["hpc-a", "cloud-b", "edge-c"], "")
    with local_federation(tmp_path_factory.mktemp("federation"), sites) as running:
        for number in range(3):
            path = running.data("hpc-a") / "weather" / f"table-{number}.csv"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{number}\n" * 100)
        yield running


def run(text: str, local: Local) -> str:
    environment = os.environ | local.environment
    done = subprocess.run(
        [sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_plain_python(local: Local) -> None:
    assert "cloud-b table-1.csv" in run(example("example: plain"), local)


@pytest.mark.parametrize("library", ["asyncio", "trio"])
def test_await(local: Local, library: str) -> None:
    shutil.rmtree(
        local.data("cloud-b") / "more", ignore_errors=True
    )  # what is there already does not land again
    text = example("example: await")
    if library == "trio":  # as the comment on the last line says
        first, last = "import asyncio\n", "asyncio.run(main())  # or trio.run(main)\n"
        assert text.startswith(first)
        assert text.endswith(last)
        text = text.replace(first, "import trio\n").replace(last, "trio.run(main)\n")
    shown = run(text, local)
    for number in range(3):
        assert f"table-{number}.csv" in shown
