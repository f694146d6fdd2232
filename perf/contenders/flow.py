"""The `flow` command itself: sealed, verified and durable, always."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import ClassVar

from perf.contenders.base import Contender
from perf.session import RunFailedError, Session

__all__ = ["Flow", "FlowLocal"]


def command() -> str:
    """The `flow` of the environment that runs the harness."""
    return str(Path(sys.executable).with_name("flow"))


def report(output: str) -> dict[str, object]:
    """The JSON object at the end of what `flow --json` printed; empty when there is none."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            return found if isinstance(found, dict) else {}
    return {}


class FlowLocal(Contender):
    """`flow cp SRC/ DST` on one machine: source and target are two processes."""

    name = "flow-local"
    encrypts, verifies, syncs = "AES-256-GCM", "blake3, every chunk", "yes"
    local_only = True

    @classmethod
    def missing(cls) -> str:
        return "" if Path(command()).exists() else "the flow command is missing; pip install this project"

    @classmethod
    def version(cls) -> str:
        from flowengine import __version__

        return __version__

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        return report(session.run("a", [command(), "cp", "--json", f"{source}/", str(target)]))


class Flow(FlowLocal):
    """`flow serve` at the target and `flow cp SRC/ TICKET` at the source."""

    name = "flow"
    local_only = False
    listen_option: ClassVar[str] = "--listen"
    _ticket = ""

    def serve(self, session: Session, target: Path) -> None:
        address = f"{session.network.addresses['b']}:{session.port()}"
        daemon = session.start("b", [command(), "serve", str(target), self.listen_option, address])
        output = session.scratch / "daemon.out"

        def ticket_shown() -> bool:
            self._ticket = next(
                (
                    word
                    for line in output.read_text().splitlines(keepends=True)
                    if line.endswith("\n")
                    for word in line.split()
                    if word.startswith("flow://")
                ),
                "",
            )
            return bool(self._ticket)

        session.wait_until(ticket_shown, daemon, "daemon", "print a ticket")

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        if not self._ticket:
            raise RunFailedError("flow serve gave no ticket")
        return report(session.run("a", [command(), "cp", "--json", f"{source}/", self._ticket]))
