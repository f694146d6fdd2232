"""Coordinator and agents as real processes, with what tests do to them: start, kill, start again, ask."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
from support import environment, free_port, wait_until

from flowengine.client.synchronous import Client, connect
from flowengine.trust.tokens import Login

__all__ = ["Coordinator", "Federation", "SiteAgent", "federation"]

_AGENT = [sys.executable, "-m", "flowengine_agent.main"]
_FLOW = [sys.executable, "-m", "flowengine.cli.main"]


class _Process:
    """A process whose lines are kept."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.popen: forked.Program | subprocess.Popen[str]
        if program := forked.start(command, environment, text=True):
            program.stdin.close()
            self.popen = program
        else:
            self.popen = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        self.out: list[str] = []
        self.err: list[str] = []
        self._threads = [
            threading.Thread(target=self._keep, args=(pipe, lines), daemon=True)
            for pipe, lines in ((self.popen.stdout, self.out), (self.popen.stderr, self.err))
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _keep(pipe: Any, lines: list[str]) -> None:
        for line in pipe:
            lines.append(line)  # noqa: PERF402 - others read while it grows
        pipe.close()

    def wait_ready(self, seconds: float = 90) -> str:
        """What stands behind `ready: `."""

        def found() -> str:
            assert self.popen.poll() is None, "ended early:\n" + "".join(self.err)
            return next((line for line in self.out if line.startswith("ready: ")), "")

        line: str = wait_until(found, "ready line; so far:\n" + "".join(self.err), seconds)
        return line.removeprefix("ready: ").strip()

    def end(self, number: int, seconds: float = 90) -> int:
        """Send a signal and wait for the end; gives the exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        code = self.popen.wait(seconds)
        for thread in self._threads:
            thread.join(seconds)
        return code


@dataclass
class Coordinator:
    """`flow coordinator run`; it keeps its port over a restart. `prefix` stands before the command.

    `state` is a database's URL; empty: SQLite in the folder. Several on one database share the folder.
    """

    folder: Path
    options: list[str] = field(default_factory=list)
    state: str = ""
    listen: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    process: _Process | None = None
    prefix: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Its address."""
        return f"https://{self.listen}"

    def start(self) -> None:
        """Start it, or start it again."""
        self.folder.mkdir(exist_ok=True)
        command = [
            *self.prefix, *_FLOW, "coordinator", "run",
            "--state", self.state or f"sqlite:///{self.folder}/state.sqlite",
            "--secrets", f"{self.folder}/secrets", "--listen", self.listen, *self.options,
        ]  # fmt: skip
        self.process = _Process(command, environment(FLOW_STATE_DIR=str(self.folder)))
        self.listen = self.process.wait_ready().removeprefix("https://")

    def client(self) -> Client:
        """The first admin's client."""
        secrets = self.folder / "secrets"
        login = Login.parse((secrets / "admin-login").read_text())
        return connect(self.url, token=login.token.format_secret(), ca_pem=(secrets / "ca.pem").read_text())

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM; gives the exit code."""
        assert self.process is not None
        return self.process.end(signal.SIGTERM)


@dataclass
class SiteAgent:
    """`flowengine-agent run` of one site that offers one folder as /data; it keeps its port over a restart."""

    site: str
    folder: Path
    listen: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    lines: list[str] = field(default_factory=list)
    access: str = "read-write"
    root_lines: list[str] = field(default_factory=list)
    token: str = ""
    process: _Process | None = None
    prefix: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        """The offered folder."""
        return self.folder / "data"

    @property
    def state(self) -> Path:
        """The agent's state folder."""
        return self.folder / "state"

    @property
    def log(self) -> str:
        """What the running process has logged."""
        return "".join(self.process.err) if self.process is not None else ""

    def write_config(self) -> Path:
        """Write site.toml."""
        self.data.mkdir(parents=True, exist_ok=True)
        path = self.folder / "site.toml"
        path.write_text(
            f'site = "{self.site}"\nstate = "{self.state}"\nlisten = "{self.listen}"\nallow_root = true\n'
            + "".join(f"{line}\n" for line in self.lines)
            + f'[[root]]\npath = "{self.data}"\nname = "/data"\naccess = "{self.access}"\n'
            + "".join(f"{line}\n" for line in self.root_lines)
        )
        return path

    def start(self, *, ready: bool = True) -> None:
        """Start it, or start it again; waits until it is ready."""
        command = [*self.prefix, *_AGENT, "run", "--config", str(self.write_config())]
        more = {"FLOW_JOIN_TOKEN": self.token} if self.token else {}
        self.process = _Process(command, environment(FLOW_STATE_DIR=str(self.folder), **more))
        if ready:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Until it serves and its stream stands."""
        assert self.process is not None
        line = self.process.wait_ready()
        if self.listen:
            self.listen = line.removeprefix("data port ")
        self.token = ""

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.end(signal.SIGKILL)

    def stop(self, seconds: float = 90) -> int:
        """SIGTERM; gives the exit code."""
        assert self.process is not None
        return self.process.end(signal.SIGTERM, seconds)


@dataclass
class Federation:
    """A coordinator with sites that have joined."""

    coordinator: Coordinator
    client: Client
    sites: dict[str, SiteAgent] = field(default_factory=dict)
    folder: Path = Path()

    def __getitem__(self, site: str) -> SiteAgent:
        return self.sites[site]

    def make(self, site: str, **settings: Any) -> SiteAgent:
        """A site that may join; it is not started."""
        agent = SiteAgent(site, self.folder / site, **settings)
        agent.token = self.client.join_token(site).token
        self.sites[site] = agent
        return agent

    def add(self, site: str, **settings: Any) -> SiteAgent:
        """A site, enrolled and running."""
        agent = self.make(site, **settings)
        agent.start()
        return agent


@contextlib.contextmanager
def federation(
    folder: Path, *sites: str, options: list[str] | None = None, host: str = "127.0.0.1"
) -> Iterator[Federation]:
    """A federation that runs while the block lasts, its sites started at once; whatever still runs then is killed.

    Args:
        host: where the coordinator listens.
    """
    coordinator = Coordinator(folder / "coordinator", options or [], listen=f"{host}:{free_port()}")
    made: Federation | None = None
    try:
        coordinator.start()
        with coordinator.client() as client:
            made = Federation(coordinator, client, folder=folder)
            for site in sites:
                made.make(site).start(ready=False)
            for agent in made.sites.values():
                agent.wait_ready()
            yield made
    finally:
        for running in [*(made.sites.values() if made else []), coordinator]:
            if running.process is not None:
                running.process.end(signal.SIGKILL)
