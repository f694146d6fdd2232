"""The yardstick of the regression check: a plain Python loop over the same building blocks."""

from __future__ import annotations

import sys
from pathlib import Path

from perf.contenders.base import Contender
from perf.session import Session

__all__ = ["PythonCopy"]


class PythonCopy(Contender):
    """One process that reads, hashes, seals, opens and writes every byte: what a copy like ours costs at least.

    It needs nothing but Python and our own dependencies, so that it is there on every machine, and it slows down with
    the machine as `flow` does.
    """

    name = "python-copy"
    local_only = True
    encrypts = "AES-256-GCM, to itself"
    verifies = "blake3, every MiB"

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        script = str(Path(__file__).with_name("python_copy.py"))
        session.run("b", [sys.executable, script, str(source), str(target)])
        return {}
