"""What a contender is to the harness."""

from __future__ import annotations

import os
import shutil
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from perf.session import Session

__all__ = ["Contender", "find_program"]

# Daemons lie where only root's search path looks.
SYSTEM_PATHS = os.pathsep.join(["/usr/local/sbin", "/usr/sbin", "/sbin"])


def find_program(name: str) -> str | None:
    """Where a program lies, daemons included."""
    return shutil.which(name) or shutil.which(name, path=SYSTEM_PATHS)


class Contender(ABC):
    """A way to make a target directory hold what a source directory holds.

    One instance serves one run: `serve` starts what must listen, `transfer` moves one tree and returns when
    the contender says that it is done. After a crash a new instance goes on in the same session.
    """

    name: ClassVar[str]
    programs: ClassVar[tuple[str, ...]] = ()
    package: ClassVar[str] = ""
    """What to install where a program is missing."""
    encrypts: ClassVar[str] = "no"
    verifies: ClassVar[str] = "no"
    syncs: ClassVar[str] = "no"
    local_only: ClassVar[bool] = False
    reference: ClassVar[bool] = False
    """It only shows what the network carries: it writes no target, so none is compared."""
    version_argv: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def missing(cls) -> str:
        """Empty when the contender can run here; else what is missing and how to get it."""
        absent = [program for program in cls.programs if not find_program(program)]
        return f"{', '.join(absent)} is missing; install {cls.package or absent[0]}" if absent else ""

    @classmethod
    def version(cls) -> str:
        """The first line that its program says about its version."""
        argv = cls.version_argv or ((cls.programs[0], "--version") if cls.programs else ())
        if not argv or not (program := find_program(argv[0])):
            return ""
        done = subprocess.run([program, *argv[1:]], capture_output=True, text=True, check=False)
        return ((done.stdout.strip() or done.stderr.strip()).splitlines() or [""])[0][:120]

    def serve(self, session: Session, target: Path) -> None:
        """Start the daemons that the transfer needs; by default none."""
        del session, target

    @abstractmethod
    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        """Move one tree; gives what the contender itself reports, if anything.

        Raises:
            RunFailedError: it did not succeed.
        """

    def program(self, name: str) -> str:
        found = find_program(name)
        assert found is not None, f"{name} was there when missing() was asked"
        return found
