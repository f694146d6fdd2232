"""The `flow` command itself: sealed, verified and durable, always."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from perf.contenders.base import Contender
from perf.session import Session

__all__ = ["Flow", "FlowLocal"]


COMMAND = Path(sys.executable).with_name("flow")
"""The `flow` of the environment that runs the harness, unless `--flow` names another."""


def command() -> str:
    """The command that is measured."""
    return str(COMMAND)


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
    """`flow serve` at the target and `flow cp SRC/ flow:///` at the source; the ticket goes by a file."""

    name = "flow"
    local_only = False

    def serve(self, session: Session, target: Path) -> None:
        ticket = session.scratch / "ticket"
        ticket.unlink(missing_ok=True)
        address = f"{session.network.addresses['b']}:{session.port()}"
        listen = ["--listen", address, "--ticket-file", str(ticket)]
        daemon = session.start("b", [command(), "serve", *listen, str(target)])
        output = session.scratch / "daemon.out"
        session.wait_until(lambda: "flow://" in output.read_text(), daemon, "daemon", "print a ticket")

    def transfer(self, session: Session, source: Path, target: Path) -> dict[str, object]:
        ticket = ["--ticket-file", str(session.scratch / "ticket")]
        return report(session.run("a", [command(), "cp", "--json", *ticket, f"{source}/", "flow:///"]))
