"""The compiled libraries read bytes that a peer sent: they touch no memory but that, whatever the bytes are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "flowengine"
DRIVER = Path(__file__).with_name("compiled_memory.py")


@pytest.mark.slow
def test_compiled_code_stays_within_its_memory(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    checks = ["-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=all"]
    # Not optimized: with -O1 gcc 12 leaves reads in loops unchecked.
    for folder, name in (("store", "_many"), ("chunking", "_chunks")):
        library, sources = tmp_path / f"{name}.so", sorted((PACKAGE / folder).glob("_*.c"))
        command = ["gcc", "-g", "-O0", "-Wall", "-Werror", *checks, "-fPIC", "-shared"]
        subprocess.run([*command, "-o", library, *sources], check=True)
    runtimes = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    rounds = "2000" if request.config.getoption("--full") else "20"
    done = subprocess.run(
        [sys.executable, DRIVER, tmp_path, "1", rounds],
        env=os.environ | {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    taken, _, refused, _ = done.stdout.split()
    assert int(taken) > 5
    assert int(refused) > 100
